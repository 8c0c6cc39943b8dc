"""The first halves choose, the second halves judge."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kvcm_ray.core.eviction.adaptive import AdaptiveSettings
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import Accesses, load, of_requests, optimum, replay
from kvcm_ray.optimizer.tuning import grid, tune

CANDIDATES = grid(stay_first=(0.0, 2.0), step=(0.05, 0.2))


@cache
def trace() -> Accesses:
    return load("synthetic").part(0, 800)


def prompts(accesses: Accesses) -> list[list[int]]:
    return [part.tolist() for part in np.split(accesses.keys[accesses.blocks], accesses.offsets[1:-1])]


def test_a_grid_is_all_combinations() -> None:
    assert [(s.stay_first, s.step) for s in CANDIDATES] == [(0, 0.05), (0, 0.2), (2, 0.05), (2, 0.2)]
    assert {s.period for s in CANDIDATES} == {AdaptiveSettings().period}
    assert grid() == [AdaptiveSettings()]


def test_the_second_half_has_no_say() -> None:
    told: list[tuple[int, int]] = []
    tuned = tune({"a": trace()}, CANDIDATES, [300, 900], progress=lambda *counts: told.append(counts))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    first = prompts(trace())[:400]
    other = of_requests(first + first[::-1])
    assert tune({"a": other}, CANDIDATES, [300, 900]).chosen_by.tolist() == tuned.chosen_by.tolist()
    assert tuned.settings == CANDIDATES[int(np.argmax(tuned.chosen_by))]
    assert len(set(tuned.chosen_by.tolist())) > 1, "it had a choice"


def test_what_is_counted_where() -> None:
    tuned = tune({"a": trace()}, CANDIDATES, [300])
    (row,) = tuned.rows
    blocks = trace().lengths
    for name, policy, settings in (
        ("lru", "lru", None), ("production", "adaptive", None), ("tuned", "adaptive", tuned.settings),
    ):  # fmt: skip
        hits = replay(trace(), policy, 300, settings=settings)
        assert getattr(row, name) == hits[400:].sum() / blocks[400:].sum()
    chosen = replay(trace(), "adaptive", 300, settings=tuned.settings)
    assert tuned.chosen_by.max() == chosen[:400].sum() / blocks[:400].sum()
    assert tuned.gain == row.tuned - row.production
    assert tuned.better == (tuned.gain > 0)
    assert max(row.lru, row.production, row.tuned) < row.optimum
    assert row.optimum > optimum(trace(), [300])[0] / blocks.sum() / 2


def test_refused() -> None:
    for arguments in (({}, CANDIDATES, [3]), ({"a": trace()}, [], [3]), ({"a": trace()}, CANDIDATES, [])):
        with pytest.raises(InvalidArgument, match="tuning needs"):
            tune(*arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="at least one block"):
        tune({"a": trace()}, CANDIDATES, [0])
