"""The curve of LRU at every capacity and the offline optimum, against values made by other programs, and
against simulators that are written down here as plainly as can be."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import READ, WRITE, Accesses, hit_curve, load, of_requests, optimum
from kvcm_ray.optimizer.curve import optimum_hits, stack_distances

CAPACITIES = [1000, 5000, 10000, 30000, 50000, 100000]
LRU = {
    "conversation": [12847, 32260, 61046, 93978, 102290, 104924],
    "synthetic": [10252, 34043, 51669, 76077],
}
OPTIMUM = {
    "conversation": [55019, 98448, 105710, 105710, 105710, 105710],
    "synthetic": [33728, 64139, 75316, 77953],
}
INFINITE = {"conversation": 105710, "synthetic": 77953}

Prompt = list[int]


@cache
def trace(name: str) -> Accesses:
    return load(name)


def prefix_keys(prompts: list[Prompt]) -> list[list[int]]:
    """Each prompt as the keys of its prefixes: equal only if all before is equal."""
    known: dict[tuple[int, ...], int] = {}
    return [
        [known.setdefault(tuple(prompt[: i + 1]), len(known)) for i in range(len(prompt))]
        for prompt in prompts
    ]


prompts = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=25)


def lru_hits(requests: list[list[int]], capacity: int) -> int:
    stack: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for keys in requests:
        for key in keys:
            if key not in stack:
                break
            hits += 1
        for key in reversed(keys):
            stack[key] = None
            stack.move_to_end(key)
        while len(stack) > capacity:
            stack.popitem(last=False)
    return hits


@pytest.mark.parametrize("name", LRU)
def test_the_curve_of_real_traces(name: str) -> None:
    curve = hit_curve(trace(name))
    capacities = CAPACITIES[: len(LRU[name])]
    assert curve.at(capacities).tolist() == LRU[name]
    assert curve.infinite == INFINITE[name]
    assert curve.at(0) == 0


@pytest.mark.parametrize("name", OPTIMUM)
def test_the_optimum_of_real_traces(name: str) -> None:
    assert optimum(trace(name), CAPACITIES[: len(OPTIMUM[name])]).tolist() == OPTIMUM[name]


@settings(max_examples=60, deadline=None)
@given(prompts)
def test_the_curve_is_what_a_cache_of_each_size_hits(prompts: list[Prompt]) -> None:
    requests = prefix_keys(prompts)
    curve = hit_curve(of_requests(requests))
    capacities = list(range(1, 40))
    assert curve.at(capacities).tolist() == [lru_hits(requests, capacity) for capacity in capacities]
    assert curve.accessed == sum(map(len, requests))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=6, unique=True), max_size=25))
def test_keys_that_are_no_prefixes_hit_as_far_as_the_leading_run(requests: list[list[int]]) -> None:
    curve = hit_curve(of_requests(requests))
    capacities = list(range(1, 10))
    assert curve.at(capacities).tolist() == [lru_hits(requests, capacity) for capacity in capacities]


def partial_first_hits(requests: list[list[int]], partial: list[bool], capacity: int) -> int:
    """The cache keeps what is highest by (seen again or no partial last block, time of last use)."""
    rank: dict[int, tuple[bool, int]] = {}
    present: set[int] = set()
    clock = hits = 0
    for keys, flag in zip(requests, partial, strict=True):
        for key in keys:
            if key not in present:
                break
            hits += 1
        for key in reversed(keys):
            clock += 1
            rank[key] = (key in rank or not (flag and key == keys[-1]), clock)
        present = set(sorted(present | set(keys), key=rank.__getitem__, reverse=True)[:capacity])
    return hits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.booleans()), max_size=25))
def test_partial_last_blocks_first(flagged: list[tuple[Prompt, bool]]) -> None:
    requests = prefix_keys([prompt for prompt, _ in flagged])
    partial = [flag and bool(prompt) for prompt, flag in flagged]
    tokens = [4 * len(keys) - flag for keys, flag in zip(requests, partial, strict=True)]
    accesses = of_requests(requests, block_tokens=4, input_tokens=tokens)
    curve = hit_curve(accesses, partial_first=True)
    for capacity in range(1, 12):
        assert curve.at(capacity) == partial_first_hits(requests, partial, capacity)


def best_hits(requests: list[list[int]], capacity: int) -> int:
    """Over every set of blocks that could be kept after each request."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for keys in requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            run = next((i for i, key in enumerate(keys) if key not in held), len(keys))
            for kept in subsets(held | set(keys), capacity):
                after[kept] = max(after.get(kept, 0), hits + run)
        best = after
    return max(best.values())


def subsets(blocks: frozenset[int] | set[int], size: int) -> list[frozenset[int]]:
    found = [frozenset[int]()]
    for block in sorted(blocks):
        found += [kept | {block} for kept in found if len(kept) < size]
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=7), st.integers(1, 3)
)
def test_nothing_is_better_than_the_optimum_and_it_can_be_had(prompts: list[Prompt], capacity: int) -> None:
    requests = prefix_keys(prompts)
    assert optimum(of_requests(requests), [capacity]).tolist() == [best_hits(requests, capacity)]


def test_the_optimum_hits_leading_runs() -> None:
    """What it keeps is closed: of each request, the blocks it hits are the first ones. So their number
    never exceeds what an infinite cache finds there, request by request."""
    part = trace("synthetic").part(0, 800)
    found = np.add.reduceat(stack_distances(part) > 0, part.offsets[:-1])
    for hits in optimum_hits(part, [100, 1000]):
        assert (hits <= found).all()


def test_many_words_apart() -> None:
    """Blocks whose next use is far away, so that whole words of the bitmap are empty in between."""
    far = [[1], *([k] for k in range(10, 9000)), [1], [2], *([k] for k in range(10, 20)), [2]]
    accesses = of_requests(far)
    assert optimum(accesses, [1, 2, 3, 20]).tolist() == [2, 3, 4, 12]
    assert hit_curve(accesses).at([10, 11, 8990, 8991]).tolist() == [0, 1, 1, 2]


def test_weights_and_ratios() -> None:
    accesses = of_requests([[1, 2, 3], [1, 2, 3], [1, 4]])
    tokens = np.array([16.0, 16, 2] * 2 + [16, 16])
    curve = hit_curve(accesses, weights=tokens)
    assert curve.at([1, 2, 3, 99]).tolist() == [32, 48, 50, 50]
    assert curve.accessed == 100
    assert curve.ratio([3]).tolist() == [0.5]
    assert [curve.capacity_for(ratio) for ratio in (0, 0.2, 0.48, 0.5, 0.6)] == [0, 1, 2, 3, None]
    with pytest.raises(InvalidArgument, match="8 accesses"):
        hit_curve(accesses, weights=tokens[1:])


def test_a_trace_without_requests() -> None:
    nothing = of_requests([])
    curve = hit_curve(nothing)
    assert (curve.infinite, curve.at([1]).tolist(), curve.ratio([1]).tolist()) == (0, [0], [0])
    assert optimum(nothing, [5]).tolist() == [0]
    assert hit_curve(of_requests([[], [1], [], [1]])).infinite == 1


def test_refused() -> None:
    apart = of_requests([[1], [1]], ops=[WRITE, READ])
    for call in (lambda: hit_curve(apart), lambda: optimum(apart, [1])):
        with pytest.raises(InvalidArgument, match="depends on the capacity"):
            call()
    with pytest.raises(InvalidArgument, match="at least one block, got 0"):
        optimum(of_requests([[1]]), [0])
