"""Replay at one capacity: the compiled and the live policies agree on every request."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.core.eviction import make_policy, simulate
from kvcm_ray.errors import InvalidArgument
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
from kvcm_ray.optimizer.replay import COMPILED, hit_tokens

HEAD_FIRST = {
    "conversation": {1000: 12831, 5000: 31817, 10000: 60822, 30000: 93967, 50000: 102290, 100000: 104924},
    "synthetic": {1000: 10006, 5000: 34001, 10000: 51622, 30000: 76077},
}


@cache
def trace(name: str) -> Accesses:
    return load(name)


def prefix_keys(prompts: list[list[int]]) -> list[list[int]]:
    known: dict[tuple[int, ...], int] = {}
    return [
        [known.setdefault(tuple(prompt[: i + 1]), len(known)) for i in range(len(prompt))]
        for prompt in prompts
    ]


@st.composite
def traces(draw: st.DrawFn, apart: bool) -> Accesses:
    """Prompts over a small alphabet, some of which fill their last block only partly."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=40))
    n = len(prompts)
    partial = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    op = st.sampled_from([READ, WRITE, REQUEST]) if apart else st.just(REQUEST)
    ops = draw(st.lists(op, min_size=n, max_size=n))
    tokens = [4 * len(p) - (flag and bool(p)) for p, flag in zip(prompts, partial, strict=True)]
    return of_requests(prefix_keys(prompts), block_tokens=4, input_tokens=tokens, ops=ops)


@pytest.mark.parametrize("policy", ["lru", "lfu", "ttl"])
@pytest.mark.parametrize("apart", [False, True])
def test_compiled_and_live_agree_on_every_request(policy: str, apart: bool) -> None:
    @settings(max_examples=60, deadline=None)
    @given(traces(apart), st.integers(1, 25), st.booleans())
    def agree(accesses: Accesses, capacity: int, partial_first: bool) -> None:
        assert accesses.chained
        fast = replay(accesses, policy, capacity, partial_first=partial_first)
        live = replay(accesses, policy, capacity, partial_first=partial_first, compiled=False)
        assert fast.tolist() == live.tolist()

    agree()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(
    ("name", "start"), [("conversation", 0), ("conversation", 6000), ("synthetic", 1000)]
)
def test_they_agree_on_pieces_of_real_traces(policy: str, name: str, start: int) -> None:
    piece = trace(name).part(start, start + 700)
    for capacity, partial_first in ((300, False), (2000, True)):
        fast = replay(piece, policy, capacity, partial_first=partial_first)
        live = replay(piece, policy, capacity, partial_first=partial_first, compiled=False)
        assert np.array_equal(fast, live)


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
    for policy in COMPILED:
        with pytest.raises(InvalidArgument, match="at least one block"):
            replay(accesses, policy, 0)
