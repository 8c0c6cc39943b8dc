"""A sweep is the same as one replay after another, wherever they run."""

from __future__ import annotations

from dataclasses import replace as changed
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import POLICIES, READ, REQUEST, WRITE, Accesses, load, of_requests, replay, totals
from kvcm_ray.optimizer.accesses import I32
from kvcm_ray.optimizer.sweep import Point, lru_hits, sweep
from kvcm_ray.testing.cluster import run_python
from kvcm_ray.testing.measures import hits_and_thread

CAPACITIES = [900, 40, 300, 900]


@cache
def piece() -> Accesses:
    return load("conversation").part(200, 900)


def replays(accesses: Accesses, policies: list[str], capacities: list[int], **how: object) -> list[Point]:
    return [
        Point(policy, capacity, totals(accesses, replay(accesses, policy, capacity, **how)))  # type: ignore[arg-type]
        for policy in policies
        for capacity in capacities
    ]


@pytest.mark.parametrize("how", [{}, {"partial_first": True}, {"ttl_s": 30.0}])
def test_it_is_one_replay_after_another(how: dict[str, object]) -> None:
    found = sweep(piece(), POLICIES, CAPACITIES, **how)  # type: ignore[arg-type]
    assert found == replays(piece(), list(POLICIES), CAPACITIES, **how)


def test_traces_with_look_ups_and_writes_apart() -> None:
    ops = np.array([READ, WRITE, REQUEST] * 300, np.uint8)[: piece().requests]
    apart = changed(piece(), ops=ops)
    assert sweep(apart, ["lru", "adaptive"], [300]) == replays(apart, ["lru", "adaptive"], [300])


def test_keys_that_are_no_prefixes_are_replayed_in_processes() -> None:
    accesses = of_requests([[1, 2], [3, 2], [1, 2], [3, 2, 1]])
    assert not accesses.chained
    found = sweep(accesses, ["lru", "adaptive", "lru_head_first"], [2, 3], measure=hits_and_thread, workers=2)
    for point in found:
        hits, thread = point.measured
        assert hits == replay(accesses, point.policy, point.capacity).tolist()
        assert thread == "MainThread", "of another process: this one has its points in threads of a pool"


def test_progress_counts_each_point_once() -> None:
    told: list[tuple[int, int]] = []
    sweep(piece(), ["lfu", "lru", "lfu"], CAPACITIES, workers=1, progress=lambda *counts: told.append(counts))
    assert told == [(done, 6) for done in range(1, 7)]


def test_what_goes_wrong_in_a_worker_is_told() -> None:
    def broken(accesses: Accesses, hits: I32) -> None:
        raise ValueError(f"{len(hits)} hits")

    for policy in ("lru", "adaptive"):
        with pytest.raises(ValueError, match="700 hits"):
            sweep(piece(), [policy], [5], measure=broken)


@pytest.mark.ray
def test_on_ray_it_is_the_same() -> None:
    """In a child: this process may be in the Ray cluster of other tests."""
    said = run_python(
        """
        import ray
        from kvcm_ray.optimizer import load, sweep
        trace, told = load("synthetic").part(0, 500), []
        policies, capacities = ["lru", "lfu", "adaptive"], [100, 1000, 3000]
        on_ray = sweep(trace, policies, capacities, partial_first=True, ray_address="local",
                       progress=lambda *counts: told.append(counts))
        here = sweep(trace, policies, capacities, partial_first=True)
        print(on_ray == here, sum(point.measured.hit_blocks for point in here) > 0, told[-1],
              ray.is_initialized())
        """
    )
    assert said.splitlines()[-1] == "True True (9, 9) False"


@pytest.mark.ray
def test_no_ray_there() -> None:
    said = run_python(
        """
        from kvcm_ray.errors import Unavailable
        from kvcm_ray.optimizer import load, sweep
        try:
            sweep(load("synthetic").part(0, 50), ["lfu"], [5], ray_address="127.0.0.1:1")
        except Unavailable as error:
            print(error.message)
        """
    )
    assert "127.0.0.1:1" in said


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=30),
    st.lists(st.integers(1, 25), max_size=4),
    st.sampled_from([0.0, 1.0, 3.0, 8.0]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_one_pass_gives_the_hits_of_each_request(
    prompts: list[list[int]], capacities: list[int], ttl_s: float, gap_s: float
) -> None:
    known: dict[tuple[int, ...], int] = {}
    keys = [[known.setdefault(tuple(p[: i + 1]), len(known)) for i in range(len(p))] for p in prompts]
    accesses = of_requests(keys, times_s=(gap_s * np.arange(len(keys))).tolist())
    found = lru_hits(accesses, capacities, ttl_s=ttl_s)
    assert found.shape == (len(capacities), len(prompts))
    for hits, capacity in zip(found, capacities, strict=True):
        live = replay(accesses, "lru", capacity, ttl_s=ttl_s, compiled=False)
        assert hits.tolist() == live.tolist()


def test_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one block"):
        sweep(piece(), ["lru"], [5, 0])
    with pytest.raises(InvalidArgument, match="arc"):
        sweep(piece(), ["arc"], [5])
    with pytest.raises(InvalidArgument, match="worker"):
        sweep(piece(), ["lru"], [5], workers=0)
    with pytest.raises(InvalidArgument, match="time to live"):
        sweep(piece(), ["lru"], [5], ttl_s=-1)
    assert sweep(piece(), [], [5]) == []
