"""Replay at one capacity: the compiled and the live policies agree on every request."""

from __future__ import annotations

import random
from collections import OrderedDict
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.core.eviction import make_policy, simulate
from kvcm_ray.core.eviction.adaptive import AdaptiveSettings
from kvcm_ray.core.eviction.forest import Forest
from kvcm_ray.core.model import ReclaimPolicy
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.errors import InvalidArgument, KvcmError
from kvcm_ray.optimizer import (
    POLICIES,
    READ,
    REQUEST,
    WRITE,
    Accesses,
    hit_curve,
    load,
    of_requests,
    replay,
    totals,
)  # fmt: skip
from kvcm_ray.optimizer.kernels import adaptive as kernels
from kvcm_ray.optimizer.replay import delayed, hit_tokens, tails
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import driver

HEAD_FIRST = {
    "conversation": {1000: 12831, 5000: 31817, 10000: 60822, 30000: 93967, 50000: 102290, 100000: 104924},
    "synthetic": {1000: 10006, 5000: 34001, 10000: 51622, 30000: 76077},
}


@cache
def trace(name: str) -> Accesses:
    return load(name)


#: Keys that have few places in the adaptive policy's memory: it soon forgets one for another.
CROWDED = [key for key in range(400_000) if key * 0x9E3779B97F4A7C15 % (1 << 64) >> 58 < 2]


def prefix_keys(prompts: list[list[int]], crowded: bool) -> list[list[int]]:
    known: dict[tuple[int, ...], int] = {}
    numbers = [
        [known.setdefault(tuple(prompt[: i + 1]), len(known)) for i in range(len(prompt))]
        for prompt in prompts
    ]
    return [[CROWDED[number] for number in row] for row in numbers] if crowded else numbers


@st.composite
def traces(draw: st.DrawFn, apart: bool) -> Accesses:
    """Prompts over a small alphabet, some of which fill their last block only partly; two may come at
    the same time, and one behind a later one."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=40))
    n = len(prompts)
    partial = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    op = st.sampled_from([READ, WRITE, REQUEST]) if apart else st.just(REQUEST)
    ops = draw(st.lists(op, min_size=n, max_size=n))
    gaps = draw(st.lists(st.sampled_from([1.0, 0.0, 3.0, -1.0]), min_size=n, max_size=n))
    tokens = [4 * len(p) - (flag and bool(p)) for p, flag in zip(prompts, partial, strict=True)]
    keys = prefix_keys(prompts, draw(st.booleans()))
    return of_requests(keys, block_tokens=4, input_tokens=tokens, ops=ops, times_s=np.cumsum(gaps).tolist())


@st.composite
def options(draw: st.DrawFn, requests: int) -> dict[str, Any]:
    """Of `replay`: a time to live and write delays, or none of them; settings of the adaptive policy."""
    delays = st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=requests, max_size=requests)
    return {
        "partial_first": draw(st.booleans()),
        "ttl_s": draw(st.sampled_from([0.0, 0.0, 1.0, 4.0, 20.0])),
        "write_delay_s": draw(st.one_of(st.sampled_from([0.0, 0.0, 2.0]), delays)),
        "settings": draw(st.sampled_from(SETTINGS)),
    }


#: Production's, a policy that changes its mind at once, and one that remembers next to nothing.
SETTINGS = (
    AdaptiveSettings(),
    AdaptiveSettings(stay_first=3, period=0.01, step=2, kept=0.5, prior=1),
    AdaptiveSettings(stay_first=0, stay_max=1, remembered=0.01, prior=3),
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("apart", [False, True])
def test_compiled_and_live_agree_on_every_request(policy: str, apart: bool) -> None:
    @settings(max_examples=80, deadline=None)
    @given(st.data(), traces(apart), st.integers(1, 25))
    def agree(data: st.DataObject, accesses: Accesses, capacity: int) -> None:
        assert accesses.chained
        how = data.draw(options(accesses.requests))
        fast = replay(accesses, policy, capacity, **how)
        live = replay(accesses, policy, capacity, **how, compiled=False)
        assert fast.tolist() == live.tolist()

    agree()


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
@pytest.mark.parametrize(
    ("name", "start"), [("conversation", 0), ("conversation", 6000), ("synthetic", 1000)]
)
def test_they_agree_on_pieces_of_real_traces(policy: str, name: str, start: int) -> None:
    piece = trace(name).part(start, start + 700)
    for capacity, how in (
        (300, {}),
        (2000, {"partial_first": True}),
        (1000, {"ttl_s": 30, "write_delay_s": 0.0005 * piece.input_tokens}),
    ):
        fast = replay(piece, policy, capacity, **how)
        live = replay(piece, policy, capacity, **how, compiled=False)
        assert fast.sum() > 0
        assert np.array_equal(fast, live)


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_adaptive_agrees_on_whole_traces(name: str) -> None:
    for capacity, how in ((1500, {}), (4000, {"partial_first": True, "ttl_s": 300, "write_delay_s": 2})):
        if name == "synthetic" or how:
            fast = replay(trace(name), "adaptive", capacity, **how)
            assert np.array_equal(fast, replay(trace(name), "adaptive", capacity, **how, compiled=False))


@pytest.mark.parametrize("seed", range(3))
def test_parents_that_are_colder_than_their_children_wait_for_them(seed: int) -> None:
    """A block may be remembered when its parent was forgotten. Then the parent is met first, in vain, and
    goes to the tail of its queue: so in one of ten of these traces, and in none of those in files."""
    chance = random.Random(seed)
    for _ in range(50):
        prompts = [[int(chance.random() < 0.1) for _ in range(chance.randrange(1, 30))] for _ in range(200)]
        apart = [chance.choice([READ, WRITE, REQUEST, REQUEST]) for _ in prompts]
        accesses = of_requests(prefix_keys(prompts, True), ops=chance.choice([apart, None]))
        capacity = chance.randrange(1, 60)
        how = {"settings": chance.choice(SETTINGS), "ttl_s": chance.choice([0, 2, 5, 20])}
        fast = replay(accesses, "adaptive", capacity, **how)
        assert fast.tolist() == replay(accesses, "adaptive", capacity, **how, compiled=False).tolist()


def test_what_waits_is_put_back_in_the_order_of_the_live_code() -> None:
    chance = np.random.default_rng(1)
    for size in range(1, 60):
        parents = np.array([chance.integers(-1, block) if block else -1 for block in range(size)], np.int64)
        forest = Forest()
        forest.grow(size)
        forest.restore(np.arange(size), parents)
        stuck = chance.permutation(size)[: chance.integers(1, size + 1)]
        for blocks in (stuck, np.sort(stuck), np.sort(stuck)[::-1]):
            cells, lists = np.zeros(size, kernels._BLOCK), np.zeros((4, size + 2), np.int32)
            cells["parent"], cells["rank"] = parents, -1
            lists[kernels._STUCK, : len(blocks)] = blocks
            state = np.zeros(1, kernels._STATE)
            state["stuck"] = len(blocks)
            kernels._leaves_first(cells, state[0], lists)
            assert lists[kernels._STUCK, : len(blocks)].tolist() == forest.leaves_first(blocks).tolist()
            assert (cells["rank"] == -1).all()


def timed_hits(accesses: Accesses, capacity: int, ttl_s: float, delay_s: float) -> list[int]:
    """Leaf-first LRU, a time to live and a write delay, by a dictionary and a list of what is to come."""
    cache: OrderedDict[int, float] = OrderedDict()
    prompts = np.split(accesses.blocks, accesses.offsets[1:-1]) if accesses.requests else []
    times = np.maximum.accumulate(accesses.times_s).tolist() if prompts else []
    events = [(time, 1, n) for n, time in enumerate(times)]
    events += [(time + delay_s, 0, n) for n, time in enumerate(times)]
    hits = [0] * len(prompts)
    for time, looks, n in sorted(events):
        for block in [b for b, touched in cache.items() if ttl_s and touched <= time - ttl_s]:
            del cache[block]
        used = prompts[n].tolist()
        if looks:
            hits[n] = next((i for i, b in enumerate(used) if b not in cache), len(used))
            used = used[: hits[n]]
        for block in reversed(used):
            cache[block] = time
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@settings(max_examples=100, deadline=None)
@given(traces(False), st.integers(1, 25), st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([1.0, 2.5, 6.0]))
def test_what_ttl_and_write_delay_mean(
    accesses: Accesses, capacity: int, ttl_s: float, delay_s: float
) -> None:
    hits = replay(accesses, "lru", capacity, ttl_s=ttl_s, write_delay_s=delay_s)
    assert hits.tolist() == timed_hits(accesses, capacity, ttl_s, delay_s)


def test_a_write_is_seen_when_it_is_done() -> None:
    accesses = of_requests([[1, 2], [1, 2], [1, 2], [1, 2, 3]], times_s=[0, 1, 2, 3])
    assert replay(accesses, "lru", 9).tolist() == [0, 2, 2, 2]
    assert replay(accesses, "lru", 9, write_delay_s=2).tolist() == [0, 0, 2, 2]
    assert replay(accesses, "lru", 9, write_delay_s=[3, 0.5, 9, 9]).tolist() == [0, 0, 2, 2]
    assert replay(accesses, "lru", 9, write_delay_s=[9, 0, 9, 9]).tolist() == [0, 0, 2, 2]
    apart, at = delayed(accesses, [1.5, 0, 1, 1])
    assert apart.ops.tolist() == [READ, REQUEST, WRITE, READ, WRITE, READ, WRITE]
    assert apart.times_s.tolist() == [0, 1, 1.5, 2, 3, 3, 4]
    assert at.tolist() == [0, 1, 3, 5]


def test_a_block_lives_for_its_time_since_the_last_touch() -> None:
    for end, hits in ((18.0, 0), (17.999999, 2)):
        accesses = of_requests([[1, 2], [1], [1, 2], [1, 2]], times_s=[0, 5, 9, end])
        for policy in POLICIES:
            for compiled in (True, False):
                found = replay(accesses, policy, 9, ttl_s=9, compiled=compiled)
                assert found.tolist() == [0, 1, 1, hits], policy


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
def test_the_live_replay_is_what_the_core_simulates(policy: str) -> None:
    piece = trace("conversation").part(0, 600)
    requests = np.split(piece.keys[piece.blocks], piece.offsets[1:-1])
    for flags in (None, piece.partial):
        hits = replay(piece, policy, 800, partial_first=flags is not None, compiled=False)
        assert hits.sum() == simulate(requests, make_policy(policy), 800, flags)


@pytest.mark.parametrize("name", HEAD_FIRST)
def test_head_first_gives_the_counts_of_the_other_optimizer(name: str) -> None:
    for capacity, hits in HEAD_FIRST[name].items():
        assert replay(trace(name), "lru_head_first", capacity).sum() == hits


@pytest.mark.parametrize("name", HEAD_FIRST)
def test_lru_lies_on_its_curve(name: str) -> None:
    curve = hit_curve(trace(name))
    for capacity in (1, 77, 3333, 20000):
        assert replay(trace(name), "lru", capacity).sum() == curve.at(capacity)


def test_the_curve_with_partial_blocks_first_is_near_the_policy() -> None:
    curve = hit_curve(trace("synthetic"), partial_first=True)
    for capacity in (500, 5000, 30000):
        hits = replay(trace("synthetic"), "lru", capacity, partial_first=True).sum()
        assert abs(int(hits) - int(curve.at(capacity))) < 0.001 * len(trace("synthetic").blocks)


def head_first_hits(accesses: Accesses, capacity: int) -> list[int]:
    cache: OrderedDict[int, None] = OrderedDict()
    found = []
    for blocks, op in zip(np.split(accesses.blocks, accesses.offsets[1:-1]), accesses.ops, strict=True):
        run = 0
        while op & READ and run < len(blocks) and int(blocks[run]) in cache:
            cache.move_to_end(int(blocks[run]))
            run += 1
        if op & WRITE:
            for block in blocks.tolist():
                cache.setdefault(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
        found.append(run)
    return found


@settings(max_examples=60, deadline=None)
@given(traces(True).filter(lambda trace: trace.requests > 0), st.integers(1, 25))
def test_head_first_with_reads_and_writes_apart(accesses: Accesses, capacity: int) -> None:
    assert replay(accesses, "lru_head_first", capacity).tolist() == head_first_hits(accesses, capacity)


def test_keys_that_are_no_prefixes_go_through_the_live_policy() -> None:
    accesses = of_requests([[1, 2], [3, 2], [1, 2]])
    assert not accesses.chained
    for policy in ("lru", "lfu", "adaptive"):
        assert np.array_equal(replay(accesses, policy, 2), replay(accesses, policy, 2, compiled=False))
    assert replay(accesses, "lru", 3).tolist() == [0, 0, 2]


def test_a_write_alone_hits_nothing_and_a_read_alone_leaves_nothing() -> None:
    accesses = of_requests(
        [[1, 2], [1, 2], [1, 2], [1, 2, 3], [1, 2, 3]], ops=[READ, WRITE, READ, READ, READ]
    )
    for policy in POLICIES:
        for compiled in (True, False):
            assert replay(accesses, policy, 9, compiled=compiled).tolist() == [0, 0, 2, 2, 2]


def test_totals_of_some_requests() -> None:
    accesses = of_requests([[1, 2, 3], [1, 2, 3], [1, 2]], block_tokens=16, input_tokens=[40, 40, 32])
    hits = replay(accesses, "lru", 10)
    assert hit_tokens(accesses, hits).tolist() == [0, 40, 32]
    all_of_them = totals(accesses, hits)
    assert (all_of_them.requests, all_of_them.accessed_blocks, all_of_them.hit_blocks) == (3, 8, 5)
    assert (all_of_them.hit_ratio, all_of_them.token_hit_ratio) == (5 / 8, 72 / 112)
    last = totals(accesses, hits, np.array([False, False, True]))
    assert (last.requests, last.accessed_blocks, last.hit_blocks, last.held_blocks) == (1, 2, 2, 0)


def test_refused() -> None:
    accesses = of_requests([[1]])
    with pytest.raises(InvalidArgument, match="lru_head_first"):
        replay(accesses, "arc", 5)
    for policy in POLICIES:
        with pytest.raises(InvalidArgument, match="at least one block"):
            replay(accesses, policy, 0)
        for ttl_s in (-1, float("nan"), 1e12):
            with pytest.raises(InvalidArgument, match="time to live"):
                replay(accesses, policy, 1, ttl_s=ttl_s)
    for delay in (-1, [1, 2], [float("inf")]):
        with pytest.raises(InvalidArgument, match="write delay"):
            replay(accesses, "lru", 1, write_delay_s=delay)


@pytest.mark.parametrize(
    "wrong", [{"step": -1}, {"prior": 0}, {"period": 0}, {"kept": 2}, {"stay_max": float("nan")}]
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=f"adaptive policy: {next(iter(wrong))}"):
        AdaptiveSettings(**wrong)


# ------------------------------------------------------------------------------------ a live group


def live_hits(accesses: Accesses, policy: str, capacity: int, partial_first: bool) -> list[int]:
    """Of each request, what a group without water marks finds that holds so many blocks."""
    group = driver(capacity, policy=ReclaimPolicy[f"POLICY_{policy.upper()}"])
    group.check = lambda: None  # its invariants have tests of their own, and take most of the time
    served = group.index.instances["i"].served
    hits = []
    partial = tails(accesses) if partial_first else np.zeros(accesses.requests, np.bool_)
    prompts = np.split(accesses.keys[accesses.blocks], accesses.offsets[1:-1])
    for prompt, tail in zip(prompts, partial.tolist(), strict=True):
        keys = prompt.tolist()
        hits.append(next((n for n, key in enumerate(keys) if key not in served), len(keys)))
        group.tick(1)
        group.touch("i", keys[: hits[-1]], lookups=len(keys))
        while not written(group, keys, tail):
            pass
    return hits


def written(group: GroupDriver, keys: list[int], partial_tail: bool) -> bool:
    """Write, or make room for it as for a write that waits."""
    try:
        group.write("i", keys, partial_tail=partial_tail)
    except KvcmError as refusal:
        want = want_of("i", refusal)
        if want is None:  # waiting is no use
            raise
        group.settle([want])
        return False
    return True


@pytest.mark.parametrize("partial_first", [False, True])
@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
def test_a_live_group_finds_the_same(policy: str, partial_first: bool) -> None:
    accesses = trace("synthetic").part(0, 600)
    capacity = accesses.unique // 4
    found = replay(accesses, policy, capacity, partial_first=partial_first)
    assert found.sum() > 500
    assert found.tolist() == live_hits(accesses, policy, capacity, partial_first)
