"""Groups with tiers: against replays, stack distances, a live group, and itself in compiled form."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.core.model import ReclaimPolicy
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import READ, REQUEST, WRITE, Accesses, hit_curve, load, of_requests, replay
from kvcm_ray.optimizer.curve import stack_distances
from kvcm_ray.optimizer.scenario import Group, Instance, Scenario, Storage, Tier, WriteDelay
from kvcm_ray.optimizer.simulation import Outcome, simulate
from kvcm_ray.testing.small_groups import tier_of, two_tiers

TOKENS = 4  #: of a block


@cache
def trace(name: str) -> Accesses:
    return load(name)


@cache
def piece() -> Accesses:
    return trace("conversation").part(4000, 4900)


def prompts_of(prompts: list[list[int]], instances: list[int] | None = None) -> list[list[int]]:
    """Prefix keys; those of different instances differ."""
    known: dict[tuple[int, ...], int] = {}
    owners = instances or [0] * len(prompts)
    return [
        [known.setdefault((owner, *prompt[: i + 1]), len(known)) for i in range(len(prompt))]
        for owner, prompt in zip(owners, prompts, strict=True)
    ]


@st.composite
def traces(draw: st.DrawFn, *, apart: bool = False, instances: int = 1, most: int = 40) -> Accesses:
    """Prompts over a small alphabet, a quarter of a second to three seconds apart."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), max_size=7), min_size=1, max_size=most))
    n = len(prompts)
    each = st.lists(st.integers(0, 1 << 20), min_size=n, max_size=n)
    owners = [number % instances for number in draw(each)]
    op = [[READ, WRITE, REQUEST][number % 3] if apart else REQUEST for number in draw(each)]
    short = [number % 2 for number in draw(each)]
    gaps = [[0, 0.25, 1, 3][number % 4] for number in draw(each)]
    accesses = of_requests(
        prompts_of(prompts, owners),
        block_tokens=TOKENS,
        input_tokens=[TOKENS * len(p) - (flag and bool(p)) for p, flag in zip(prompts, short, strict=True)],
        times_s=np.cumsum(gaps).tolist(),
        ops=op,
    )
    names = tuple(f"i{number}" for number in range(instances))
    return replace(accesses, instances=np.array(owners, np.int32), instance_names=names)


def one_tier(capacity: int | None, policy: str = "lru", **more: object) -> Scenario:
    """Capacities are in blocks: they have a byte each."""
    group = Group(
        name="g",
        tiers=(Tier(storage="a", capacity_bytes=capacity),),
        instances=(Instance(block_bytes=1),),
        policy=policy,
        ttl_s=float(more.pop("ttl_s", 0)),  # type: ignore[arg-type]
    )
    return Scenario(storages=(Storage(name="a"),), groups=(group,), **more)  # type: ignore[arg-type]


def tiered(
    *capacities: int | None, policy: str = "lru", quota: int | None = None, **more: object
) -> Scenario:
    names = "abc"[: len(capacities)]
    group = Group(
        name="g",
        tiers=tuple(Tier(storage=n, capacity_bytes=c) for n, c in zip(names, capacities, strict=True)),
        instances=(Instance(block_bytes=1),),
        policy=policy,
        quota_bytes=quota,
    )
    return Scenario(storages=tuple(Storage(name=n) for n in names), groups=(group,), **more)  # type: ignore[arg-type]


def assert_same(one: Outcome, other: Outcome) -> None:
    for field in fields(Outcome):
        if field.name != "scenario":
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            assert mine.tolist() == theirs.tolist(), field.name


# -------------------------------------------------------------------------------- one tier: replay


@pytest.mark.parametrize("policy", ["lru", "ttl"])
def test_one_tier_is_a_replay(policy: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(traces(apart=True), st.integers(1, 20), st.sampled_from([0, 1, 4]))
    def agree(accesses: Accesses, capacity: int, ttl_s: int) -> None:
        for delay_s in (0, 0.5, 2.25):
            wanted = replay(accesses, policy, capacity, ttl_s=ttl_s, write_delay_s=delay_s, compiled=False)
            scenario = one_tier(capacity, policy, ttl_s=ttl_s, write_delay=WriteDelay(seconds=delay_s))
            for compiled in (True, False):
                assert simulate(accesses, scenario, compiled=compiled).hits.tolist() == wanted.tolist()

    agree()


@pytest.mark.parametrize("policy", ["lru", "ttl"])
@pytest.mark.parametrize("capacity", [300, 2000])
def test_one_tier_is_a_replay_of_a_real_trace(policy: str, capacity: int) -> None:
    wanted = replay(piece(), policy, capacity)
    for compiled in (True, False):
        found = simulate(piece(), one_tier(capacity, policy), compiled=compiled)
        assert found.hits.tolist() == wanted.tolist()
        assert found.tier_hits[:, 0].tolist() == wanted.tolist()
        assert not found.demoted.any()


@pytest.mark.parametrize("policy", ["lfu", "adaptive"])
def test_room_that_is_made_behind_the_writes_hardly_matters(policy: str) -> None:
    """`replay` makes it before them, as a group without water marks."""
    wanted = replay(piece(), policy, 2000, partial_first=True).sum()
    found = simulate(piece(), one_tier(2000, policy, partial_first=True)).hits.sum()
    assert found == pytest.approx(wanted, rel=0.05)


def test_a_quota_or_a_full_storage_is_a_capacity() -> None:
    plain, wanted = one_tier(None), replay(piece(), "lru", 700).tolist()
    by_quota = replace(plain, groups=(replace(plain.groups[0], quota_bytes=700),))
    by_storage = replace(plain, storages=(Storage(name="a", capacity_bytes=700),))
    for scenario in (by_quota, by_storage):
        for compiled in (True, False):
            assert simulate(piece(), scenario, compiled=compiled).hits.tolist() == wanted


# ------------------------------------------------------------------------------------------- tiers


def hits_by_distance(accesses: Accesses, *capacities: int) -> list[list[int]]:
    """Of each request, hits in each tier: a stack cut at the sums of the capacities."""
    distances, bounds = stack_distances(accesses), np.cumsum([0, *capacities])
    rows = np.repeat(np.arange(accesses.requests), accesses.lengths)
    columns = []
    for low, high in pairwise(bounds):
        here = (distances > low) & (distances <= high)
        columns.append(np.bincount(rows[here], minlength=accesses.requests))
    return np.array(columns).T.tolist()


@settings(max_examples=80, deadline=None)
@given(traces(), st.lists(st.integers(1, 8), min_size=2, max_size=3), st.booleans())
def test_tiers_of_lru_are_pieces_of_one_stack(
    accesses: Accesses, capacities: list[int], compiled: bool
) -> None:
    found = simulate(accesses, tiered(*capacities), compiled=compiled)
    assert found.tier_hits.tolist() == hits_by_distance(accesses, *capacities)


@pytest.mark.parametrize(("fast", "slow"), [(1000, 4000), (50, 10000), (30000, 20000)])
def test_tiers_of_lru_are_pieces_of_one_stack_on_a_whole_trace(fast: int, slow: int) -> None:
    accesses = trace("conversation")
    found = simulate(accesses, tiered(fast, slow))
    assert found.tier_hits.tolist() == hits_by_distance(accesses, fast, slow)
    assert found.hits.sum() == hit_curve(accesses).at(fast + slow)


def test_moves_are_what_the_stack_says() -> None:
    """What comes into a tier and does not make it larger goes out of it."""
    fast, slow = 500, 900
    for compiled in (True, False):
        found = simulate(piece(), tiered(fast, slow), compiled=compiled)
        new = piece().lengths - found.hits
        seen = np.cumsum(new - found.evicted)
        assert found.occupancy[:, 0].tolist() == [[min(n, fast), max(n - fast, 0)] for n in seen.tolist()], (
            "the fast tier fills up first"
        )
        grown = np.diff(found.occupancy[:, 0], axis=0, prepend=0)
        assert found.promoted.tolist() == found.tier_hits[:, 1].tolist()
        assert found.demoted.tolist() == (new + found.promoted - grown[:, 0]).tolist()
        assert found.written[:, 0].tolist() == (new + found.promoted).tolist()
        assert found.written[:, 1].tolist() == found.demoted.tolist()
        assert found.occupancy.sum(axis=(1, 2)).max() == fast + slow


def test_a_quota_below_the_sum_of_the_tiers_cuts_the_last() -> None:
    for compiled in (True, False):
        found = simulate(piece(), tiered(300, 900, quota=800), compiled=compiled)
        assert found.tier_hits.tolist() == hits_by_distance(piece(), 300, 500)


def test_without_limits_nothing_is_lost() -> None:
    accesses = trace("conversation")
    for scenario in (one_tier(None), tiered(1000, None), tiered(10, 20, None)):
        found = simulate(accesses, scenario)
        assert found.hits.sum() == hit_curve(accesses).infinite
        assert not found.evicted.any()
    for policy in ("lfu", "adaptive"):
        found = simulate(piece(), tiered(100, None, policy=policy))
        assert found.hits.tolist() == simulate(piece(), one_tier(None)).hits.tolist()


@pytest.mark.parametrize("policy", ["lfu", "adaptive"])
@settings(max_examples=60, deadline=None)
@given(accesses=traces(apart=True), capacities=st.lists(st.integers(1, 6), min_size=2, max_size=3))
def test_tiers_of_any_policy_stay_within_their_limits(
    policy: str, accesses: Accesses, capacities: list[int]
) -> None:
    found = simulate(accesses, tiered(*capacities, policy=policy, quota=sum(capacities) - 1 or 1))
    assert (found.occupancy[:, 0] <= capacities).all()
    assert found.occupancy.sum(axis=2).max() <= max(sum(capacities) - 1, 1)
    assert found.tier_hits.sum(axis=1).tolist() == found.hits.tolist()
    assert (found.hits <= simulate(accesses, tiered(*capacities[:-1], None)).hits).all()


# ------------------------------------------------------------------------------------ a live group


def live_tier_hits(accesses: Accesses, fast: int, slow: int, policy: ReclaimPolicy) -> list[list[int]]:
    """Of each request, what a real group finds in shared memory and in files.

    Its quotas are twice the capacities and its marks lie in the middle: writes find room in the first
    tier, and then it goes down to the capacities.
    """
    driver = two_tiers(2 * (fast + slow), 2 * fast, 2 * slow, high=0.5, low=0.5, policy=policy)
    rows = []
    for blocks in np.split(accesses.blocks, accesses.offsets[1:-1]):
        keys, where = blocks.tolist(), tier_of(driver)
        found = next((n for n, key in enumerate(keys) if key not in where), len(keys))
        hits = [where[key] for key in keys[:found]]
        rows.append([hits.count("shm"), hits.count("nfs")])
        driver.tick(1000)
        if found:
            driver.touch("i", keys[:found], lookups=len(keys))
        driver.settle()
        driver.write("i", keys)
        driver.settle()
    return rows


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_live_group_finds_the_same_in_the_same_tiers(policy: str, seed: int) -> None:
    """Not so with adaptive, which counts time in moves too: here blocks are promoted at once."""
    rng = random.Random(seed)
    fast, slow = rng.randrange(8, 16), rng.randrange(8, 24)
    filling = [[100 + n, 0, 0, 0] for n in range((fast + slow) // 4 + 1)]
    prompts = [[rng.randrange(3) for _ in range(rng.randrange(1, 7))] for _ in range(60)]
    accesses = of_requests(prompts_of(filling + prompts))
    found = simulate(accesses, tiered(fast, slow, policy=policy))
    assert found.tier_hits[:, 1].sum() > 10
    live = live_tier_hits(accesses, fast, slow, ReclaimPolicy[f"POLICY_{policy.upper()}"])
    assert found.tier_hits.tolist() == live


# --------------------------------------------------------------------------- compiled and reference


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Two groups that share storages, with blocks of two sizes, and whatever there is to set."""
    limit = st.one_of(st.none(), st.integers(3, 30))
    storages = tuple(Storage(name=name, capacity_bytes=draw(limit)) for name in "abc")
    groups = []
    for number in range(2):
        names = draw(st.permutations("abc").map(lambda order: order[: draw(st.integers(1, 3))]))
        instances = [Instance(name=f"i{number}", block_bytes=draw(st.integers(1, 3)))]
        if number:
            instances.append(Instance(block_bytes=draw(st.integers(1, 3))))
        groups.append(
            Group(
                name=str(number),
                tiers=tuple(Tier(storage=name, capacity_bytes=draw(limit)) for name in names),
                instances=tuple(instances),
                quota_bytes=draw(limit),
                policy=draw(st.sampled_from(["lru", "ttl"])),
                ttl_s=draw(st.sampled_from([0, 0, 2, 5])),
            )
        )
    seconds, by_token = draw(st.sampled_from([(0, 0), (1.5, 0), (0, 0.125), (0.25, 0.1)]))
    delay = WriteDelay(seconds=seconds, seconds_per_missed_token=by_token)
    return Scenario(
        storages=storages, groups=tuple(groups), write_delay=delay, partial_first=draw(st.booleans())
    )


@settings(max_examples=250, deadline=None)
@given(traces(apart=True, instances=3), scenarios())
def test_compiled_and_live_policies_agree_on_everything(accesses: Accesses, scenario: Scenario) -> None:
    assert_same(simulate(accesses, scenario), simulate(accesses, scenario, compiled=False))


@settings(max_examples=100, deadline=None)
@given(traces(instances=3), scenarios())
def test_no_limit_is_ever_exceeded(accesses: Accesses, scenario: Scenario) -> None:
    found = simulate(accesses, scenario)
    for s, storage in enumerate(scenario.storages):
        if storage.capacity_bytes:
            assert found.occupancy[:, :, s].sum(axis=1).max() <= storage.capacity_bytes
        for g, group in enumerate(scenario.groups):
            own = [tier.capacity_bytes for tier in group.tiers if tier.storage == storage.name]
            assert found.occupancy[:, g, s].max() <= (own[0] or 1 << 62 if own else 0)
    for g, group in enumerate(scenario.groups):
        assert found.occupancy[:, g].sum(axis=1).max() <= (group.quota_bytes or 1 << 62)


@pytest.mark.parametrize("scenario", [tiered(400, 900), tiered(100, 300, 800, quota=1000)], ids=["2", "3"])
def test_they_agree_on_a_piece_of_a_real_trace(scenario: Scenario) -> None:
    scenario = replace(scenario, partial_first=True, write_delay=WriteDelay(seconds_per_missed_token=1e-4))
    assert_same(simulate(piece(), scenario), simulate(piece(), scenario, compiled=False))


def test_a_partial_block_that_others_go_on_from_counts_as_whole() -> None:
    """As in `replay.tails`; else it would leave before its children."""
    keys = [[1, 2], [1, 2, 3], [9], [1, 2, 3]]
    accesses = of_requests(keys, block_tokens=4, input_tokens=[7, 12, 4, 12], ops=[WRITE, WRITE, WRITE, READ])
    scenario = one_tier(3, partial_first=True)
    assert_same(simulate(accesses, scenario), simulate(accesses, scenario, compiled=False))
    assert simulate(accesses, scenario).hits.tolist() == [0, 0, 0, 2]
    assert simulate(accesses, scenario).hits.tolist() == simulate(accesses, one_tier(3)).hits.tolist()


# ------------------------------------------------------------------------------------ write delay


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 20), st.sampled_from([0.05, 0.3]))
def test_a_delay_by_tokens_is_that_of_the_prefill(accesses: Accesses, capacity: int, slow: float) -> None:
    scenario = one_tier(capacity, write_delay=WriteDelay(seconds=0.1, seconds_per_missed_token=slow))
    found = simulate(accesses, scenario)
    missed = np.maximum(accesses.input_tokens - found.hits * TOKENS, 0)
    assert found.write_delay_s == pytest.approx(0.1 + slow * missed)
    again = replay(accesses, "lru", capacity, write_delay_s=found.write_delay_s)
    assert found.hits.tolist() == again.tolist()


def test_what_is_still_being_written_is_no_hit() -> None:
    accesses = of_requests([[1, 2]] * 4, block_tokens=16, times_s=[0, 1, 2, 3])
    for delay_s, hits in ((0, [0, 2, 2, 2]), (1, [0, 2, 2, 2]), (1.5, [0, 0, 2, 2]), (9, [0, 0, 0, 0])):
        scenario = one_tier(9, write_delay=WriteDelay(seconds=delay_s))
        for compiled in (True, False):
            assert simulate(accesses, scenario, compiled=compiled).hits.tolist() == hits


def test_after_a_delay_beyond_the_trace_nothing_was_ever_found() -> None:
    found = simulate(piece(), one_tier(None, write_delay=WriteDelay(seconds=1e6)))
    assert not found.hits.any()
    assert not found.occupancy.any()


# ----------------------------------------------------------------------------------------- groups


def shared(a: Group, b: Group, *storages: Storage) -> Scenario:
    return Scenario(storages=storages, groups=(a, b))


def group(name: str, *tiers: Tier, policy: str = "lru", quota: int | None = None) -> Group:
    return Group(
        name=name, tiers=tiers, instances=(Instance(name=name, block_bytes=1),), policy=policy,
        quota_bytes=quota,
    )  # fmt: skip


def two_instances(n: int = 500) -> Accesses:
    """The same requests, of one instance and of another in turns; no block is shared."""
    part = trace("conversation").part(4000, 4000 + n)
    prompts = np.split(part.keys[part.blocks], part.offsets[1:-1])
    owners = np.arange(n) % 2
    keys = [(prompt ^ (owner << 60)).tolist() for prompt, owner in zip(prompts, owners, strict=True)]
    accesses = of_requests(keys, block_tokens=512, times_s=part.times_s.tolist())
    return replace(accesses, instances=owners.astype(np.int32), instance_names=("x", "y"))


def alone(accesses: Accesses, instance: int) -> Accesses:
    rows = np.flatnonzero(accesses.instances == instance)
    prompts = np.split(accesses.keys[accesses.blocks], accesses.offsets[1:-1])
    return of_requests([prompts[row].tolist() for row in rows], times_s=accesses.times_s[rows].tolist())


@pytest.mark.parametrize("compiled", [True, False])
def test_groups_that_share_nothing_are_replays_of_their_own(compiled: bool) -> None:
    accesses = two_instances()
    scenario = shared(
        group("x", Tier(storage="a", capacity_bytes=400)),
        group("y", Tier(storage="b", capacity_bytes=900), policy="lru" if compiled else "adaptive"),
        Storage(name="a"), Storage(name="b"),
    )  # fmt: skip
    found = simulate(accesses, scenario, compiled=compiled)
    for number, (policy, capacity) in enumerate([("lru", 400), (scenario.groups[1].policy, 900)]):
        own = found.groups == number
        assert found.hits[own].tolist() == replay(alone(accesses, number), policy, capacity).tolist()
        assert not found.tier_hits[own, 1 - number].any()


@pytest.mark.parametrize("compiled", [True, False])
def test_who_writes_gives_way_on_a_shared_storage(compiled: bool) -> None:
    """y has filled the storage; x writes, and only x's blocks go, as long as it has any."""
    keys = prompts_of([[1, 2, 3], [4, 5], [6], [1, 2, 3], [7, 8, 9], [1, 2, 3]], [1, 0, 0, 1, 0, 1])
    accesses = of_requests(keys, block_tokens=4)
    accesses = replace(accesses, instances=np.array([1, 0, 0, 1, 0, 1], np.int32), instance_names=("x", "y"))
    scenario = shared(
        group("x", Tier(storage="a")), group("y", Tier(storage="a")), Storage(name="a", capacity_bytes=5)
    )
    found = simulate(accesses, scenario, compiled=compiled)
    assert found.occupancy[:, :, 0].tolist() == [[0, 3], [2, 3], [2, 3], [2, 3], [2, 3], [2, 3]]
    assert found.hits.tolist() == [0, 0, 0, 3, 0, 3]
    assert found.evicted.tolist() == [0, 0, 1, 0, 3, 0]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_storage_that_others_fill_is_passed_over(compiled: bool) -> None:
    keys = prompts_of([[1, 2, 3], [4, 5], [4, 5]], [1, 0, 0])
    accesses = replace(of_requests(keys), instances=np.array([1, 0, 0], np.int32), instance_names=("x", "y"))
    x = group("x", Tier(storage="a"), Tier(storage="b"))
    storages = Storage(name="a", capacity_bytes=3), Storage(name="b")
    found = simulate(accesses, shared(x, group("y", Tier(storage="a")), *storages), compiled=compiled)
    assert found.tier_hits.tolist() == [[0, 0], [0, 0], [0, 2]]
    assert not found.promoted.any()
    found = simulate(
        accesses,
        shared(replace(x, tiers=x.tiers[:1]), group("y", Tier(storage="a")), *storages),
        compiled=compiled,
    )
    assert found.hits.tolist() == [0, 0, 0]


def test_blocks_cost_what_their_instance_says() -> None:
    keys = prompts_of([[1, 2], [3, 4, 5], [1, 2], [3, 4, 5]], [0, 1, 0, 1])
    accesses = replace(
        of_requests(keys), instances=np.array([0, 1, 0, 1], np.int32), instance_names=("x", "y")
    )
    both = Group(
        name="g",
        tiers=(Tier(storage="a", capacity_bytes=23),),
        instances=(Instance(name="x", block_bytes=10), Instance(block_bytes=1)),
    )
    scenario = Scenario(storages=(Storage(name="a"),), groups=(both,))
    for compiled in (True, False):
        found = simulate(accesses, scenario, compiled=compiled)
        assert found.occupancy[:, 0, 0].tolist() == [20, 23, 23, 23]
        assert found.hits.tolist() == [0, 0, 2, 3]
    with pytest.raises(InvalidArgument, match="no group has instance 'y'"):
        simulate(accesses, replace(scenario, groups=(replace(both, instances=both.instances[:1]),)))


# ----------------------------------------------------------------------------------------- results


def test_load_time_is_latency_and_bandwidth_of_each_storage() -> None:
    accesses = of_requests([[1, 2, 3], [4], [1, 2, 3], [9]])
    big = Group(
        name="g",
        tiers=(Tier(storage="a", capacity_bytes=200), Tier(storage="b")),
        instances=(Instance(block_bytes=100),),
    )
    storages = (
        Storage(name="a", read_bytes_per_s=1000, latency_s=0.5),
        Storage(name="b", read_bytes_per_s=100, latency_s=2),
    )
    found = simulate(accesses, Scenario(storages=storages, groups=(big,)))
    assert found.tier_hits.tolist() == [[0, 0], [0, 0], [1, 2], [0, 0]]
    assert found.load_s.tolist() == [0, 0, 0.5 + 0.1 + 2 + 2, 0]
    unknown = Scenario(storages=(Storage(name="a"), Storage(name="b")), groups=(big,))
    assert not simulate(accesses, unknown).load_s.any()


def test_blocks_expire_in_all_tiers() -> None:
    accesses = of_requests([[1, 2, 3], [4], [4], [1]], times_s=[0, 1, 5, 6])
    scenario = tiered(2, 5)
    scenario = replace(scenario, groups=(replace(scenario.groups[0], ttl_s=5),))
    for compiled in (True, False):
        found = simulate(accesses, scenario, compiled=compiled)
        assert found.expired.tolist() == [0, 0, 3, 0]
        assert found.hits.tolist() == [0, 0, 1, 0]


def test_of_nothing_comes_nothing() -> None:
    found = simulate(of_requests([]), tiered(1, 2))
    assert found.hits.shape == (0,)
    assert found.occupancy.shape == (0, 1, 2)
    assert simulate(of_requests([[], []]), tiered(1, 2)).hits.tolist() == [0, 0]


def test_a_delay_by_tokens_needs_tokens() -> None:
    with pytest.raises(InvalidArgument, match="how many tokens"):
        simulate(of_requests([[1]]), one_tier(1, write_delay=WriteDelay(seconds_per_missed_token=1)))
