"""The sampled curve is within a point of the exact one, at every capacity, whatever the seed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.core.levels import levels
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import (
    READ,
    WRITE,
    Accesses,
    hit_curve,
    load,
    of_requests,
    sample,
    sample_file,
    sampled_curve,
    save,
)  # fmt: skip
from kvcm_ray.optimizer.sampling import recorded_sample
from kvcm_ray.traces import bundled


@cache
def trace(name: str) -> Accesses:
    return load(name)


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_a_tenth_of_the_blocks_gives_the_curve(name: str) -> None:
    accesses = trace(name)
    capacities = np.arange(0, accesses.unique, 100)
    exact = hit_curve(accesses).ratio(capacities)
    for seed in range(12):
        drawn = sample(accesses, 0.1, seed)
        assert len(drawn.blocks) < 0.15 * len(accesses.blocks)
        assert np.abs(sampled_curve(drawn).ratio(capacities) - exact).max() < 0.01, seed


def test_all_of_the_blocks_give_the_exact_curve() -> None:
    accesses = trace("synthetic").part(0, 1000)
    capacities = np.arange(0, accesses.unique + 2)
    assert np.allclose(
        sampled_curve(sample(accesses, 1.0)).at(capacities), hit_curve(accesses).at(capacities)
    )


def test_a_block_is_in_the_sample_or_not_whatever_the_request() -> None:
    accesses = trace("conversation").part(0, 2000)
    drawn = sample(accesses, 0.1)
    uses = np.bincount(accesses.blocks)
    kept = np.bincount(drawn.blocks)
    first = np.unique(accesses.blocks[accesses.offsets[:-1]])
    assert drawn.sure.sum() == len(first)
    assert kept[drawn.sure].sum() == uses[first].sum() == accesses.requests
    assert kept.sum() == len(drawn.blocks) == len(drawn.places)
    assert set(np.unique(kept)) <= set(np.unique(uses))
    assert len(kept) == pytest.approx(0.1 * accesses.unique, rel=0.1)


def test_a_file_is_sampled_as_the_trace_in_memory() -> None:
    drawn, same = sample_file("synthetic", 0.05, 3), sample(trace("synthetic"), 0.05, 3)
    for name in ("blocks", "offsets", "ops", "places", "sure"):
        assert np.array_equal(getattr(drawn, name), getattr(same, name)), name
    assert drawn.accessed == same.accessed == len(trace("synthetic").blocks)
    assert sample_file(bundled("synthetic"), 0.05, 4).blocks.tolist() != drawn.blocks.tolist()


def test_instances_are_kept_apart_in_files(tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    records = ['{"format":"kvcm-trace","version":1,"block_tokens":16}']
    records += [f'{{"time_us":{t},"keys":[7,8],"instance":"{"ab"[t % 2]}"}}' for t in range(4)]
    file.write_text("\n".join(records))
    assert sampled_curve(sample_file(file, 1.0)).infinite == hit_curve(load(file)).infinite == 4


def test_weights_by_place() -> None:
    accesses = trace("synthetic")
    drawn = sample(accesses, 0.1)
    exact = hit_curve(accesses, weights=1.0 + accesses.places)
    curve = sampled_curve(drawn, weights=1.0 + drawn.places)
    assert curve.accessed == pytest.approx(exact.accessed, rel=0.05)
    assert curve.ratio([5000, 20000]) == pytest.approx(exact.ratio([5000, 20000]), abs=0.02)


def cut_in_two(accesses: Accesses) -> Accesses:
    requests = [accesses.keys[part].tolist() for part in np.split(accesses.blocks, accesses.offsets[1:-1])]
    return of_requests([keys for keys in requests for _ in (READ, WRITE)], ops=[READ, WRITE] * len(requests))


def test_look_ups_and_writes_of_their_own(tmp_path: Path) -> None:
    whole = trace("synthetic").part(0, 2000)
    apart = cut_in_two(whole)
    capacities = [1000, 5000, 20000]
    curve, same = sampled_curve(sample(apart, 0.1, 1)), sampled_curve(sample(whole, 0.1, 1))
    assert curve.accessed == pytest.approx(same.accessed)
    assert curve.at(capacities) == pytest.approx(same.at(capacities))
    save(apart, tmp_path / "apart.jsonl")
    assert sampled_curve(sample_file(tmp_path / "apart.jsonl", 0.1, 1)).at(capacities) == pytest.approx(
        curve.at(capacities)
    )


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_a_recording_that_is_a_sample(name: str) -> None:
    """Made as the live manager does: first blocks, and the others of level 3 or more."""
    accesses = trace(name)
    kept = levels(accesses.keys[accesses.blocks], accesses.offsets) >= 3
    blocks = accesses.blocks[kept]
    offsets = np.append(0, np.cumsum(kept))[accesses.offsets]
    recorded = replace(accesses, blocks=blocks, offsets=offsets, sample_level=3)
    capacities = np.arange(0, accesses.unique, 500)
    estimate = sampled_curve(recorded_sample(recorded)).ratio(capacities)
    assert np.abs(estimate - hit_curve(accesses).ratio(capacities)).max() < 0.015
    with pytest.raises(InvalidArgument, match="one of 8 blocks"):
        sample(recorded, 0.1)


def test_refused() -> None:
    for rate in (0, 1.5, -1):
        with pytest.raises(InvalidArgument, match="rate"):
            sample(trace("synthetic"), rate)


def test_nothing_to_sample() -> None:
    drawn = sample(of_requests([]), 0.1)
    assert sampled_curve(drawn).infinite == 0
