"""The live estimate of reuse: levels of sampling, counts without a loop, and a curve that is near the exact
one with little memory, at any sampling, and that follows the traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.core.levels import ALWAYS, LEVEL_MAX, levels, sampled, sampled_alone
from kvcm_ray.core.observed import Observed
from kvcm_ray.core.ranks import larger_before, weight_of_larger_before
from kvcm_ray.core.reuse import BINS_PER_OCTAVE, ReuseEstimate
from kvcm_ray.optimizer import Accesses, hit_curve, load, of_requests
from kvcm_ray.testing.observed import observed_of, parts

GRID = 2 ** (1 / BINS_PER_OCTAVE)  #: a number of blocks counts in full where the next step of the grid is
CAPACITIES = np.array([c * f for c in (1000, 5000, 10000, 30000) for f in (0.5, 1, 2, 4)])


@cache
def trace(name: str) -> Accesses:
    return load(name)


@cache
def observed(name: str) -> Observed:
    return observed_of(trace(name))


def fed(estimate: ReuseEstimate, traffic: Observed, step: int = 2000) -> ReuseEstimate:
    for part in parts(traffic, step):
        estimate.feed(part)
    return estimate


def requests(keys: Sequence[Sequence[int]], *, found: int = 0, start_s: float = 0.0) -> Observed:
    """Each prompt looked up, of which so many were there, and written."""
    made = observed_of(of_requests(keys))
    there = np.where(made.writes, 0, np.minimum(made.counts, found))
    return replace(made, found=there, times_s=made.times_s + start_s)


# ------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_levels_are_properties_of_blocks_and_halve_the_sample(name: str) -> None:
    accesses = trace(name)
    keys = accesses.keys[accesses.blocks]
    found = levels(keys, accesses.offsets)
    of_block = np.zeros(accesses.unique, np.uint8)
    of_block[accesses.blocks] = found
    assert (of_block[accesses.blocks] == found).all()
    assert ((found == ALWAYS) == (accesses.places == 0)).all()
    behind = found[found != ALWAYS]
    for level in range(8):
        assert (behind >= level).mean() == pytest.approx(2.0**-level, rel=0.15)


def test_one_of_each_row() -> None:
    """In whole rows there is exactly one of each 2, 4, 8, 16 and 32 blocks."""
    keys = np.random.default_rng(1).integers(-(1 << 63), 1 << 63, 1 + 320)
    found = levels(keys, np.array([0, len(keys)]))[1:]
    for level in range(1, 6):
        assert ((found >= level).reshape(-1, 1 << level).sum(axis=1) == 1).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=8), st.integers(0, 9), st.integers(0, 3))
def test_what_is_sampled_is_what_has_the_level(counts: list[int], level: int, seed: int) -> None:
    offsets = np.append(0, np.cumsum(counts, dtype=np.int64))
    keys = np.random.default_rng(seed).integers(0, 1 << 62, offsets[-1])
    found = levels(keys, offsets, seed)
    at, of_each = sampled(keys, offsets, level, seed)
    assert at.tolist() == np.flatnonzero((found >= level) & (found != ALWAYS)).tolist()
    assert (found[at] == of_each).all()
    alone, of_alone = sampled_alone(keys, np.arange(len(keys)), level, seed)
    assert (of_alone >= level).all()
    assert (of_alone <= LEVEL_MAX).all()
    every, of_every = sampled_alone(keys, np.arange(len(keys)), 0, seed)
    assert alone.tolist() == every[of_every >= level].tolist()


# ------------------------------------------------------------------------------------------- ranks


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(0, 1 << 30))
def test_larger_ones_before(n: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    values, weights = chance.permutation(2 * n)[:n].astype(np.int64), chance.random(n)
    before = [values[:i] > values[i] for i in range(n)]
    assert larger_before(values).tolist() == [int(larger.sum()) for larger in before]
    expected = [weights[:i][larger].sum() for i, larger in enumerate(before)]
    assert np.allclose(weight_of_larger_before(values, weights), expected)


# --------------------------------------------------------------------------------------- the curve


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=25), st.integers(1, 9))
def test_with_room_for_all_blocks_it_is_exact(prompts: list[list[int]], step: int) -> None:
    known: dict[tuple[int, ...], int] = {}
    keys = [[known.setdefault(tuple(p[: i + 1]), len(known)) for i in range(len(p))] for p in prompts]
    estimate = fed(ReuseEstimate(half_life_s=np.inf), requests(keys), step)
    exact = hit_curve(of_requests(keys))
    capacities = np.arange(1, 16)
    assert estimate.hit_ratio(capacities * GRID) == pytest.approx(exact.ratio(capacities))
    assert estimate.curve()[1][-1] == pytest.approx(exact.infinite / max(exact.accessed, 1))


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
@pytest.mark.parametrize("max_blocks", [4096, 16384])
def test_little_memory_is_enough(name: str, max_blocks: int) -> None:
    estimate = fed(ReuseEstimate(max_blocks, half_life_s=np.inf), observed(name))
    exact = hit_curve(trace(name))
    ageing = fed(ReuseEstimate(max_blocks), observed(name)).hit_ratio(CAPACITIES)
    assert np.abs(ageing - exact.ratio(CAPACITIES)).max() < 0.02
    assert np.abs(estimate.hit_ratio(CAPACITIES) - exact.ratio(CAPACITIES)).max() < 0.005
    assert estimate.tracked <= max_blocks
    assert estimate.footprint() == pytest.approx(trace(name).unique, rel=0.05)
    assert (estimate.requests, estimate.accessed) == (trace(name).requests, len(trace(name).blocks))


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_much_traffic_is_sampled(name: str) -> None:
    estimate = fed(ReuseEstimate(4096, half_life_s=np.inf, sampled_per_s=20), observed(name))
    assert 3 <= estimate.level <= 5
    exact = hit_curve(trace(name))
    assert np.abs(estimate.hit_ratio(CAPACITIES) - exact.ratio(CAPACITIES)).max() < 0.02


def test_batches_of_any_size_give_the_same() -> None:
    traffic = next(parts(observed("synthetic"), 600))
    curves = [
        fed(ReuseEstimate(1 << 20, half_life_s=np.inf), traffic, step).curve()[1] for step in (1, 77, 600)
    ]
    assert np.allclose(curves[0], curves[1])
    assert np.allclose(curves[0], curves[2])


def test_look_ups_put_nothing_in() -> None:
    traffic = requests([[1, 2, 3]] * 3)
    reads = replace(traffic, writes=np.zeros(6, np.bool_))
    estimate = fed(ReuseEstimate(), reads)
    assert (estimate.tracked, estimate.hit_ratio(100)) == (0, 0)
    both = fed(ReuseEstimate(half_life_s=np.inf), traffic)
    assert both.hit_ratio([2, 3 * GRID]) == pytest.approx([4 / 9, 6 / 9])


def test_what_was_there_before_the_estimate_is_neither_hit_nor_miss() -> None:
    estimate = fed(ReuseEstimate(half_life_s=np.inf), requests([[1, 2], [3, 4], [1, 2], [5, 6]], found=2))
    assert estimate.sums.unknown == pytest.approx(6)
    assert estimate.hit_ratio(100) == pytest.approx(1.0)  # of [1, 2] the second time


def test_odd_requests_do_no_harm() -> None:
    """Empty ones, repeated keys, children without parents, times that go back."""
    odd = requests([[], [5], [7, 7, 7], [9, 5], [5, 9], []])
    estimate = fed(ReuseEstimate(), replace(odd, times_s=-odd.times_s), 5)
    assert 0 <= estimate.hit_ratio(10) <= 1
    nothing = ReuseEstimate()
    assert (nothing.hit_ratio([1, 10]).tolist(), nothing.seconds, nothing.footprint()) == ([0, 0], 0, 0)
    nothing.feed(replace(odd, instance_ids=[], times_s=odd.times_s[:0], writes=odd.writes[:0],
                         counts=odd.counts[:0], found=odd.found[:0], keys=odd.keys[:0]))  # fmt: skip
    assert nothing.tracked == 0


# ----------------------------------------------------------------------------------------- bytes


def test_instances_with_blocks_of_different_sizes() -> None:
    """Two instances take turns: between two uses of a block lie one of its own and one of the other."""
    traffic = requests([[1], [2]] * 50)
    both = replace(traffic, instance_ids=["small", "small", "large", "large"] * 50)
    estimate = ReuseEstimate(half_life_s=np.inf)
    estimate.weigh({"small": 1000, "large": 3000})
    fed(estimate, both)
    assert estimate.hit_ratio([3000, 3900, 4100]) == pytest.approx([0, 0, 0.98], abs=1e-6)
    assert estimate.block_bytes == pytest.approx(2000)
    assert estimate.footprint() == pytest.approx(4000)


def test_equal_keys_of_instances_are_different_blocks() -> None:
    traffic = requests([[1], [1]])
    assert fed(ReuseEstimate(), traffic).hit_ratio(1) > 0
    assert fed(ReuseEstimate(), replace(traffic, instance_ids=["a", "a", "b", "b"])).hit_ratio(9) == 0


def test_sizes_that_are_known_later_scale_what_was_counted() -> None:
    estimate = fed(ReuseEstimate(half_life_s=np.inf), requests([[1, 2], [1, 2]]))
    estimate.weigh({"m": 4096})
    assert estimate.hit_ratio([4095, 4096, 8192]) == pytest.approx([0, 0.25, 0.5], abs=0.01)


# ------------------------------------------------------------------------------------------- ageing


def test_it_follows_a_change_of_the_traffic() -> None:
    """A cycle over 2000 blocks, then one over 200: a cache of 300 finds nothing, then everything."""
    wide = [[1_000_000 + i % 2000] for i in range(8000)]
    narrow = [[2_000_000 + i % 200] for i in range(8000)]
    estimate = fed(ReuseEstimate(4096, half_life_s=1000), requests(wide))
    before = estimate.hit_ratio([300, 2500])
    assert before[0] < 0.01
    assert before[1] > 0.9
    fed(estimate, requests(narrow, start_s=8000))
    assert estimate.hit_ratio(300) > 0.95


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    """What comes afterwards counts as it would have, and is not taken for a crowd in no time."""
    estimate = ReuseEstimate(4096, half_life_s=1000, sampled_per_s=50)
    for start_s in (1e6, 0.0):  # eleven days back
        fed(estimate, requests([[i % 2000] for i in range(8000)], start_s=start_s))
    fed(estimate, requests([[9000 + i % 200] for i in range(8000)], start_s=8000))
    assert estimate.hit_ratio(300) > 0.95
    assert estimate.level == 0
    assert estimate.seconds == pytest.approx(24_000, rel=0.1)


def test_a_quiet_time_ends_the_sampling() -> None:
    """The finer lists are used from the time on at which they begin."""
    busy = ReuseEstimate(4096, half_life_s=200, sampled_per_s=500)
    crowd = requests([[i % 3000] for i in range(60_000)])
    fed(busy, replace(crowd, times_s=crowd.times_s / 5000))
    assert busy.level > 0
    fed(busy, requests([[i % 100] for i in range(4000)], start_s=100), 100)
    assert busy.level == 0
    assert busy.hit_ratio([90, 110]) == pytest.approx([0, 1], abs=0.02)


@pytest.mark.parametrize("turns", [1, 3])
def test_memory_is_bounded(turns: int) -> None:
    estimate = ReuseEstimate(512, half_life_s=np.inf)
    traffic = next(parts(observed("conversation"), 8000))
    for turn in range(turns):
        fresh = replace(traffic, keys=traffic.keys ^ (turn << 40))
        for part in parts(fresh, 500):
            estimate.feed(part)
            assert estimate.tracked <= 512
