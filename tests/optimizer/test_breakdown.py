"""Totals by turn, class, instance and group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import READ, REQUEST, WRITE, Accesses, load, of_requests, replay, totals
from kvcm_ray.optimizer.breakdown import BY, breakdown
from kvcm_ray.optimizer.scenario import Group, Instance, Scenario, Storage, Tier


@pytest.fixture
def accesses() -> Accesses:
    requests = [[1, 2], [11, 12], [1, 2, 3], [11], [1], [1, 2, 3]]
    plain = of_requests(requests, block_tokens=16, ops=[REQUEST] * 4 + [WRITE, READ])
    return replace(
        plain,
        turns=np.array([1, 1, 2, 10, 3, 2]),
        instances=np.array([0, 1, 0, 1, 2, 0], np.int32),
        instance_names=("x", "y", "writer"),
        classes=np.array([1, 0, 0, 0, 0, 0], np.int32),
        class_names=("chat", "search"),
    )


def rows(accesses: Accesses, by: str, scenario: Scenario | None = None) -> list[tuple[str, int, int, int]]:
    hits = replay(accesses, "lru", 9)
    found = breakdown(accesses, hits, by, scenario=scenario)
    return [(r.label, r.totals.requests, r.totals.accessed_blocks, r.totals.hit_blocks) for r in found]


def test_by_turn_in_the_order_of_numbers(accesses: Accesses) -> None:
    assert rows(accesses, "turn") == [("1", 2, 4, 0), ("2", 2, 6, 5), ("10", 1, 1, 1)]


def test_by_class(accesses: Accesses) -> None:
    assert rows(accesses, "class") == [("chat", 4, 9, 6), ("search", 1, 2, 0)]


def test_by_instance_without_those_that_only_write(accesses: Accesses) -> None:
    assert rows(accesses, "instance") == [("x", 3, 8, 5), ("y", 2, 3, 1)]


def test_by_group(accesses: Accesses) -> None:
    def group(name: str, instance: str) -> Group:
        return Group(
            name=name, tiers=(Tier(storage="s"),), instances=(Instance(name=instance, block_bytes=1),)
        )

    scenario = Scenario(storages=(Storage(name="s"),), groups=(group("one", "y"), group("rest", "*")))
    assert rows(accesses, "group", scenario) == [("one", 2, 3, 1), ("rest", 3, 8, 5)]


def test_a_trace_that_does_not_say_is_one_row() -> None:
    accesses = load("synthetic").part(0, 300)
    hits = replay(accesses, "lru", 1000)
    for by in BY[:3]:
        (row,) = breakdown(accesses, hits, by)
        assert (row.label, row.totals) == ("", totals(accesses, hits))


def test_refused(accesses: Accesses) -> None:
    with pytest.raises(InvalidArgument, match="turn, class, instance, group"):
        rows(accesses, "tenant")
    with pytest.raises(InvalidArgument, match="needs the scenario"):
        rows(accesses, "group")
