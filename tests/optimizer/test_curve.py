"""The curve of LRU at every capacity and the offline optimum, against values made by other programs, and
against simulators that are written down here as plainly as can be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import READ, REQUEST, WRITE, Accesses, hit_curve, load, of_requests, optimum, replay
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


Op = tuple[Prompt, int, bool]
mixed = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(1, 3), st.booleans()), max_size=25
)


def apart(trace: list[Op]) -> Accesses:
    """A trace of look-ups, writes and both, whose last blocks may be partial."""
    requests = prefix_keys([prompt for prompt, _, _ in trace])
    tokens = [
        4 * len(keys) - (flag and bool(keys)) for keys, (_, _, flag) in zip(requests, trace, strict=True)
    ]
    ops = [op for _, op, _ in trace]
    return of_requests(requests, block_tokens=4, input_tokens=tokens, ops=ops)


@settings(max_examples=60, deadline=None)
@given(mixed)
def test_look_ups_whose_write_follows_directly_are_exact(trace: list[Op]) -> None:
    """Requests cut in two, among writes that nobody asked for: the curve is what replays hit."""
    cut = [step for prompt, op, flag in trace for step in steps(prompt, op, flag)]
    accesses = apart(cut)
    curve, distances = hit_curve(accesses), stack_distances(accesses)
    bounds = list(zip(accesses.offsets[:-1], accesses.offsets[1:], strict=True))
    for capacity in range(1, 12):
        hit = (distances > 0) & (distances <= capacity)
        hits = replay(accesses, "lru", capacity)
        assert [int(hit[start:end].sum()) for start, end in bounds] == hits.tolist()
        assert curve.at(capacity) == hits.sum()
    assert curve.accessed == sum(len(prompt) for prompt, op, _ in cut if op & READ)


@settings(max_examples=60, deadline=None)
@given(mixed)
def test_partial_last_blocks_first_when_requests_are_cut_in_two(trace: list[Op]) -> None:
    whole = apart([(prompt, WRITE if op == WRITE else REQUEST, flag) for prompt, op, flag in trace])
    cut = apart([step for prompt, op, flag in trace for step in steps(prompt, op, flag)])
    capacities = list(range(1, 12))
    curves = [hit_curve(accesses, partial_first=True).at(capacities).tolist() for accesses in (whole, cut)]
    assert curves[0] == curves[1]


def steps(prompt: Prompt, op: int, flag: bool) -> list[Op]:
    return [(prompt, WRITE, flag)] if op == WRITE else [(prompt, READ, flag), (prompt, WRITE, flag)]


@settings(max_examples=60, deadline=None)
@given(mixed)
def test_look_ups_alone_are_exact_where_everything_fits(trace: list[Op]) -> None:
    accesses = apart(trace)
    assert hit_curve(accesses).infinite == replay(accesses, "lru", 1000).sum()


@settings(max_examples=60, deadline=None)
@given(mixed, st.integers(1, 6))
def test_no_policy_hits_more_than_the_optimum_of_a_mixed_trace(trace: list[Op], capacity: int) -> None:
    accesses = apart(trace)
    (most,) = optimum(accesses, [capacity]).tolist()
    assert most <= hit_curve(accesses).infinite
    for policy in ("lru", "lfu"):
        assert replay(accesses, policy, capacity).sum() <= most


@pytest.mark.parametrize("name", LRU)
def test_real_traces_cut_into_look_ups_and_writes(name: str) -> None:
    whole = trace(name)
    twice = np.repeat(np.arange(whole.requests), 2)
    counts = whole.lengths[twice]
    offsets = np.append(0, np.cumsum(counts))
    at = np.repeat(whole.offsets[twice] - offsets[:-1], counts) + np.arange(offsets[-1])
    cut = replace(
        whole, blocks=whole.blocks[at], offsets=offsets,
        ops=np.tile(np.array([READ, WRITE], np.uint8), whole.requests),
        partial=whole.partial[twice], times_s=whole.times_s[twice], instances=whole.instances[twice],
    )  # fmt: skip
    capacities = CAPACITIES[: len(LRU[name])]
    assert hit_curve(cut).at(capacities).tolist() == LRU[name]
    assert optimum(cut, capacities[: len(OPTIMUM[name])]).tolist() == OPTIMUM[name][: len(capacities)]


def test_what_look_ups_touch() -> None:
    accesses = of_requests([[1, 2], [1, 2, 3], [7], [1, 2, 3], [1]], ops=[WRITE, READ, WRITE, READ, READ])
    assert stack_distances(accesses).tolist() == [0, 0, 1, 2, 0, 0, 2, 3, 0, 1]
    curve = hit_curve(accesses)
    assert (curve.accessed, curve.at([1, 2, 3]).tolist()) == (7, [2, 4, 5])
    tokens = np.array([9.0, 9, 1, 2, 4, 9, 1, 2, 4, 1])
    assert hit_curve(accesses, weights=tokens).ratio([3]).tolist() == [7 / 15]


def test_nothing_is_worth_keeping_until_it_is_written_again() -> None:
    """At one block: 1 goes while 2 is asked for, and comes back by its write."""
    accesses = of_requests([[1], [2], [2], [1], [1]], ops=[WRITE, WRITE, READ, WRITE, READ])
    assert optimum(accesses, [1]).tolist() == [2]
    assert optimum(of_requests([[1], [1], [1]], ops=[READ, WRITE, READ]), [1]).tolist() == [1]


def test_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one block, got 0"):
        optimum(of_requests([[1]]), [0])
