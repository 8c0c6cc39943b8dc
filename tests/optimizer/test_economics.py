"""Hours, seconds and money from hits, by hand and as properties; the knee and the best."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.errors import InvalidArgument, NotFound
from kvcm_ray.optimizer import (
    Accesses,
    Gpu,
    Model,
    TierCosts,
    load,
    of_requests,
    read_catalogue,
    replay,
)
from kvcm_ray.optimizer.economics import (
    Costs,
    Spread,
    Worth,
    best,
    command_line,
    group_update,
    knee,
    measured_utilisation,
    worth,
)
from kvcm_ray.optimizer.replay import hit_tokens
from kvcm_ray.optimizer.savings import prefix_flops
from kvcm_ray.optimizer.sweep import lru_hits

#: 2 P = 2 and 2 L D = 2, so that T tokens cost 2 T + 2 T ** 2; 4 bytes a token in bf16.
TINY = Model(name="tiny", parameters=1, layers=1, heads=1, kv_heads=1, head_size=1)
#: 100 FLOP/s at half its peak.
SLOW = Gpu(name="slow", peak_flops=200, memory_bytes=1, memory_bytes_per_s=1, usd_per_hour=3)
#: A block of 4 tokens has 16 bytes: a quarter of a second, after half a second.
TIER = TierCosts(name="tier", read_bytes_per_s=64, latency_s=0.5, usd_per_gib_month=730)
COSTS = Costs(gpu=SLOW, utilisation=0.5, tiers=(TIER,))


def small() -> Accesses:
    """Three prompts of 12, 12 and 8 tokens in three hours."""
    trace = of_requests([[1, 2, 3], [1, 2, 3], [1, 2]], block_tokens=4)
    return replace(trace, times_s=np.array([0.0, 3600.0, 10800.0]))


HITS = np.array([0, 3, 1], np.int32)


def spread(found: Spread) -> tuple[float, float, float]:
    return found.mean, found.p50, found.p99


# --------------------------------------------------------------------------------------- worth


def test_every_number_by_hand() -> None:
    found = worth(small(), HITS, TINY, COSTS, 1 << 27)
    assert (found.requests, found.hours, found.block_bytes) == (3, 3, 16)
    assert (found.flops_needed, found.flops_saved) == (312 + 312 + 144, 312 + 40)
    assert found.flops_share == pytest.approx(352 / 768)
    assert found.gpu_hours_needed == pytest.approx(7.68 / 3600)
    assert found.gpu_hours_saved == pytest.approx(3.52 / 3600)
    assert found.saved_usd == pytest.approx(3 * 3.52 / 3600)
    assert found.load_s == pytest.approx(0.5 + 3 / 4 + 0.5 + 1 / 4)
    assert spread(found.prefill_s) == pytest.approx(((3.12 + 3.12 + 1.44) / 3, 3.12, 3.12))
    assert spread(found.cached_s) == pytest.approx((6.16 / 3, 1.79, 1.79 + 0.98 * 1.33)), "3.12, 1.25, 1.79"
    assert found.worth_loading == 0.5, "3 blocks in 1.25 s against 3.12; one in 0.75 s against 0.4"
    assert found.capacity_bytes == 2 << 30
    assert found.cache_usd_per_hour == pytest.approx(2.0), "2 GiB at one dollar an hour"
    assert found.cache_usd == pytest.approx(6)
    assert found.net_usd == pytest.approx(found.saved_usd - 6)
    assert found.saved_usd_per_hour == pytest.approx(found.saved_usd / 3)
    assert found.net_usd_per_hour == pytest.approx(found.net_usd / 3)
    assert spread(found.change_s) == pytest.approx(((2.0 - 3.52) / 3, 1.79 - 3.12, 0.98 * 1.33 + 1.79 - 3.12))


def test_more_gpus_in_a_replica_are_faster_and_not_cheaper() -> None:
    one, four = (worth(small(), HITS, TINY, replace(COSTS, gpus_per_replica=n)) for n in (1, 4))
    assert four.prefill_s.mean == pytest.approx(one.prefill_s.mean / 4)
    assert (four.gpu_hours_saved, four.saved_usd) == (one.gpu_hours_saved, one.saved_usd)
    assert four.worth_loading == 0, "recomputing is faster, reading is not"


def test_prices_and_sizes_that_are_given() -> None:
    found = worth(small(), HITS, TINY, replace(COSTS, price_per_hour=6, kv_value_bytes=1), 1 << 27)
    assert found.saved_usd == pytest.approx(6 * 3.52 / 3600), "not the catalogue's 3 dollars"
    assert (found.block_bytes, found.cache_usd_per_hour) == (8, 1)
    assert found.load_s == pytest.approx(1 + 4 / 8)
    free = worth(small(), HITS, TINY, replace(COSTS, tiers=()), 1 << 27)
    assert (free.load_s, free.cache_usd_per_hour, free.worth_loading) == (0, 0, 1)
    assert free.capacity_bytes == 2 << 30


def test_two_tiers() -> None:
    slower = TierCosts(name="slower", read_bytes_per_s=16, latency_s=2, usd_per_gib_month=73)
    costs = replace(COSTS, tiers=(TIER, slower))
    parts = np.array([[0, 0], [2, 1], [0, 1]])
    found = worth(small(), HITS, TINY, costs, (1 << 26, 1 << 27), tier_hits=parts)
    assert found.load_s == pytest.approx((0.5 + 2 / 4) + (2 + 1) + (2 + 1))
    assert found.cache_usd_per_hour == pytest.approx(1.0 + 0.2)
    assert found.capacity_bytes == 3 << 30
    with pytest.raises(InvalidArgument, match="simulate a scenario"):
        worth(small(), HITS, TINY, costs, (1, 1))
    with pytest.raises(InvalidArgument, match="2 tiers need as many capacities, not 1"):
        worth(small(), HITS, TINY, costs, 5, tier_hits=parts)
    with pytest.raises(InvalidArgument, match="add up to the hits"):
        worth(small(), HITS, TINY, costs, (1, 1), tier_hits=parts[:, ::-1] * 2)


def test_what_the_engine_held_is_not_read() -> None:
    held = np.zeros(8, bool)
    held[3:5] = True  # the first two blocks of the second request
    found = worth(replace(small(), held=held), HITS, TINY, COSTS)
    assert found.load_s == pytest.approx(2 * (0.5 + 1 / 4))
    assert found.flops_saved == 312 - 144 + 40
    assert found.flops_needed == 312 + (312 - 144) + 144


def test_writes_of_their_own_are_no_requests() -> None:
    trace = load("conversation").part(0, 300)
    hits = replay(trace, "lru", 1000)
    found = worth(trace, hits, TINY, COSTS)
    ops = trace.ops.copy()
    ops[hits == 0] = 2  # only writes
    part = worth(replace(trace, ops=ops), hits, TINY, COSTS)
    assert (part.requests, part.flops_saved) == ((hits > 0).sum(), found.flops_saved)
    assert part.load_s == pytest.approx(found.load_s)
    assert part.flops_needed < found.flops_needed


def test_a_trace_without_length_or_requests() -> None:
    still = replace(small(), times_s=np.zeros(3))
    found = worth(still, HITS, TINY, COSTS, 1 << 27)
    assert (found.hours, found.net_usd) == (0, found.saved_usd)
    assert math.isnan(found.net_usd_per_hour)
    assert found.cache_usd_per_hour == 2
    shown = found.to_dict()
    assert (shown["net_usd_per_hour"], shown["saved_usd_per_hour"]) == (None, None)
    assert worth(still, HITS, TINY, COSTS, 1 << 27, hours=2).net_usd == pytest.approx(found.saved_usd - 4)
    nothing = worth(small().part(0, 0), HITS[:0], TINY, COSTS)
    assert (nothing.requests, nothing.flops_share, nothing.cached_s) == (0, 0, Spread(0, 0, 0))


def test_another_capacity_and_plain_values() -> None:
    found = worth(small(), HITS, TINY, COSTS)
    assert found.cache_usd == 0
    assert found.at(1 << 27, COSTS) == worth(small(), HITS, TINY, COSTS, 1 << 27)
    shown = json.loads(json.dumps(found.at(1 << 27, COSTS).to_dict()))
    assert shown["net_usd"] == pytest.approx(found.saved_usd - 6)
    assert shown["change_s"].keys() == {"mean", "p50", "p99"}
    assert shown["prefill_s"]["p50"] == pytest.approx(3.12)


# ---------------------------------------------------------------------------------- as properties


@st.composite
def cases(draw: st.DrawFn) -> tuple[Accesses, Any, Model, Costs]:
    """A trace with random leading hits."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    block_tokens = draw(st.integers(1, 64))
    short = [draw(st.integers(0, block_tokens - 1)) for _ in lengths]
    prompts = [max(0, n * block_tokens - less) for n, less in zip(lengths, short, strict=True)]
    trace = of_requests([list(range(n)) for n in lengths], block_tokens=block_tokens, input_tokens=prompts)
    trace = replace(trace, times_s=np.arange(len(lengths)) * 60.0)
    hits = np.array([draw(st.integers(0, n)) for n in lengths], np.int32)
    model = replace(TINY, parameters=draw(st.floats(1, 1e12)), layers=draw(st.integers(1, 100)))
    costs = replace(COSTS, utilisation=draw(st.floats(0.01, 1)), price_per_hour=draw(st.floats(0, 100)))
    return trace, hits, model, costs


@settings(deadline=None)
@given(cases())
def test_no_hits_no_value_and_more_hits_more_value(case: tuple[Accesses, Any, Model, Costs]) -> None:
    trace, hits, model, costs = case
    none, some, all_ = (worth(trace, h, model, costs, 7) for h in (hits * 0, hits, trace.lengths))
    assert (none.flops_saved, none.saved_usd, none.load_s, none.worth_loading) == (0, 0, 0, 0)
    assert none.cached_s == none.prefill_s
    assert none.net_usd == -none.cache_usd
    assert none.flops_saved <= some.flops_saved <= all_.flops_saved
    assert none.saved_usd <= some.saved_usd <= all_.saved_usd
    assert all_.flops_saved == pytest.approx(all_.flops_needed)
    assert none.prefill_s == some.prefill_s == all_.prefill_s
    assert 0 <= some.worth_loading <= 1
    fewer = worth(trace, np.maximum(hits - 1, 0), model, costs, 7)
    assert fewer.flops_saved <= some.flops_saved


@settings(deadline=None)
@given(cases(), st.integers(0, 1000), st.integers(1, 1000))
def test_capacity_only_costs(case: tuple[Accesses, Any, Model, Costs], capacity: int, more: int) -> None:
    trace, hits, model, costs = case
    less, much = (worth(trace, hits, model, costs, n) for n in (capacity, capacity + more))
    assert less.net_usd >= much.net_usd
    assert replace(much, capacity_bytes=0, cache_usd_per_hour=0) == replace(
        less, capacity_bytes=0, cache_usd_per_hour=0
    )


@settings(deadline=None)
@given(cases())
def test_requests_add_up(case: tuple[Accesses, Any, Model, Costs]) -> None:
    """The whole is the sum of its requests, of which each is the sum of its tokens."""
    trace, hits, model, costs = case
    whole = worth(trace, hits, model, costs)
    parts = [worth(trace.part(r, r + 1), hits[r : r + 1], model, costs) for r in range(trace.requests)]
    for name in ("flops_saved", "flops_needed", "gpu_hours_saved", "saved_usd", "load_s"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts), rel=1e-9)
    tokens = [np.arange(0, t) + 0.5 for t in np.minimum(hits * trace.block_tokens, trace.input_tokens)]
    by_token = sum(
        (2 * model.parameters + 4 * model.layers * model.attention_width * t).sum()
        for t, known in zip(tokens, trace.input_tokens, strict=True)
        if known
    )
    assert whole.flops_saved == pytest.approx(by_token, rel=1e-9)


# --------------------------------------------------------------------------------- on real traces


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_real_traces_at_many_capacities(name: str) -> None:
    catalogue, trace = read_catalogue(), load(name)
    model = catalogue.model("llama-3-70b")
    costs = Costs(
        gpu=catalogue.gpu("h100"), utilisation=0.5, gpus_per_replica=4, tiers=(catalogue.tier("dram"),)
    )
    capacities = np.unique(np.geomspace(1000, trace.unique, 30).astype(int))
    found = [
        worth(trace, hits, model, costs, int(capacity))
        for capacity, hits in zip(capacities, lru_hits(trace, capacities.tolist()), strict=True)
    ]
    saved = [w.gpu_hours_saved for w in found]
    assert saved == sorted(saved), "lru is a stack algorithm"
    endless = replay(trace, "lru", trace.unique)
    assert found[-1].flops_saved == pytest.approx(worth(trace, endless, model, costs).flops_saved)
    by_hand = float(prefix_flops(model, trace.input_tokens).sum()) / (989.5e12 * 0.5) / 3600
    assert found[0].gpu_hours_needed == pytest.approx(by_hand)
    needed = prefix_flops(model, trace.input_tokens)
    evenly = (needed * hit_tokens(trace, endless) / trace.input_tokens).sum()
    assert found[-1].flops_saved < evenly, "hits are at the beginnings of prompts, where tokens are cheaper"
    assert found[-1].flops_saved > 0.7 * evenly
    nets = [w.net_usd for w in found]
    assert nets[0] < max(nets), "there is a capacity worth more than the smallest"
    assert found[-1].worth_loading > 0.98, "whole blocks are read, also for a few tokens of a short prompt"
    assert found[-1].change_s.mean < 0


# --------------------------------------------------------------------------------- costs refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"utilisation": 0.0}, "utilisation is above 0"),
        ({"utilisation": 1.1}, "utilisation is above 0"),
        ({"price_per_hour": -1.0}, "price of a GPU-hour"),
        ({"price_per_hour": math.nan}, "price of a GPU-hour"),
        ({"gpus_per_replica": 0}, "at least one GPU"),
        ({"kv_value_bytes": 0}, "more than 0 bytes"),
        ({"gpu": replace(SLOW, usd_per_hour=0)}, "assumes no price for slow"),
    ],
)
def test_costs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        replace(COSTS, **change)


def test_worth_of_what_is_not_known() -> None:
    with pytest.raises(InvalidArgument, match="tokens a block"):
        worth(of_requests([[1]]), np.array([0], np.int32), TINY, COSTS)
    with pytest.raises(InvalidArgument, match="must not be negative"):
        worth(small(), HITS, TINY, COSTS, -1)


def test_utilisation_from_a_prefill() -> None:
    assert measured_utilisation(TINY, SLOW, 12, 3.12, gpus=1) == pytest.approx(0.5)
    assert measured_utilisation(TINY, SLOW, 12, 3.12, gpus=2) == pytest.approx(0.25)
    with pytest.raises(InvalidArgument, match="more than slow can do with tiny") as error:
        measured_utilisation(TINY, SLOW, 12, 1.0)
    assert "Were there hits" in error.value.remedy
    with pytest.raises(InvalidArgument, match="no measurement"):
        measured_utilisation(TINY, SLOW, 0, 1.0)


# ------------------------------------------------------------------------------------ the knee


@pytest.mark.parametrize(
    ("capacities", "hits", "index"),
    [
        ([1, 2, 3, 4, 5], [0, 80, 90, 95, 100], 1),
        ([1, 2, 3, 4, 5], [0, 30, 90, 95, 100], 2),
        ([1, 10, 100, 1000], [0, 50, 90, 100], 2),  # a linear axis: 90 % of the hits for 10 % of the blocks
        ([1, 2, 3], [7, 7, 7], 0),
        ([1, 2, 3], [0, 1, 10], 2),  # returns grow
        ([1, 2, 3], [0, 5, 10], 2),  # or stay
        ([5], [1], 0),
        ([1, 2, 3], [5, 9, 4], 1),
    ],
)
def test_knees(capacities: list[int], hits: list[int], index: int) -> None:
    assert knee(capacities, hits) == index


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=30),
    st.floats(0.1, 1e6),
    st.floats(0.1, 1e6),
)
def test_a_knee_parts_better_from_worse_whatever_the_units(
    gains: list[int], per_block: float, per_hit: float
) -> None:
    """Of diminishing returns: steps before it gain more than the mean step, steps behind it less."""
    gains = sorted(gains, reverse=True)
    hits = np.cumsum([0, *gains])
    capacities = np.arange(1, len(hits) + 1)
    at = knee(capacities, hits)
    mean = hits[-1] / len(gains)
    if len(set(gains)) > 1:
        assert all(gain >= mean * (1 - 1e-9) for gain in gains[:at])
        assert all(gain <= mean * (1 + 1e-9) for gain in gains[at:])
    again = knee(capacities * per_block, hits * per_hit + 3)
    if again != at:  # only by rounding, where a step gains just as much as the mean
        assert gains[min(at, again)] == pytest.approx(mean)


def test_a_knee_of_nothing() -> None:
    for capacities, hits in (([], []), ([1, 1], [1, 2]), ([2, 1], [1, 2]), ([1, 2], [1])):
        with pytest.raises(InvalidArgument, match="increasing capacities"):
            knee(capacities, hits)


# ------------------------------------------------------------------------------------ the best


@dataclass(frozen=True)
class Point:
    policy: str
    capacity_blocks: int
    hit_ratio: float
    worth: Worth | None = None


def priced(policy: str, capacity: int, ratio: float, saved: float, usd: float) -> Point:
    """Saves so many dollars in all three hours, and costs so many each hour."""
    found = worth(small(), HITS, TINY, COSTS)
    return Point(policy, capacity, ratio, replace(found, saved_usd=saved, cache_usd_per_hour=usd))


POINTS = [
    priced("lru", 10, 0.1, 5, 1),  # net 2
    priced("lru", 20, 0.3, 12, 2),  # net 6
    priced("lru", 40, 0.4, 14, 4),  # net 2
    priced("lfu", 10, 0.2, 6, 1),  # net 3
    priced("lfu", 20, 0.3, 12, 2),  # net 6
]


def test_the_best() -> None:
    assert best(POINTS) is POINTS[1], "the highest net; of equals the first"
    assert best(POINTS, budget_usd_per_hour=1) is POINTS[3]
    assert best(POINTS, target_hit_ratio=0.15) is POINTS[3], "the cheapest"
    assert best(POINTS, target_hit_ratio=0.4) is POINTS[2]
    assert best(POINTS, target_hit_ratio=0.3, budget_usd_per_hour=2) is POINTS[1]
    loss = priced("lru", 10, 0.1, 0, 1)
    assert best([loss, priced("lru", 20, 0.1, 0, 2)]) is loss, "even if nothing were better"


def test_the_best_without_money() -> None:
    plain = [Point(p.policy, p.capacity_blocks, p.hit_ratio) for p in POINTS]
    assert best(plain, target_hit_ratio=0.3) is plain[1]
    assert best(plain, target_hit_ratio=0) is plain[0]
    with pytest.raises(InvalidArgument, match="give a target"):
        best(plain)
    with pytest.raises(InvalidArgument, match="a budget needs a model"):
        best(plain, target_hit_ratio=0.1, budget_usd_per_hour=1)


def test_what_is_reachable_instead() -> None:
    with pytest.raises(NotFound, match=r"ratio of 0\.5; the highest is 0\.4000, lru with 40 blocks"):
        best(POINTS, target_hit_ratio=0.5)
    with pytest.raises(
        NotFound, match=r"0\.4 within 2 US dollars an hour; the highest is 0\.3000, lru with 20"
    ):
        best(POINTS, target_hit_ratio=0.4, budget_usd_per_hour=2)
    with pytest.raises(NotFound, match=r"within 0\.5 US dollars an hour; the least, 10 blocks, costs 1"):
        best(POINTS, budget_usd_per_hour=0.5)
    for bad in ({"target_hit_ratio": 1.5}, {"target_hit_ratio": -0.1}, {"budget_usd_per_hour": -1}):
        with pytest.raises(InvalidArgument):
            best(POINTS, **bad)
    with pytest.raises(InvalidArgument, match="no candidates"):
        best([])


# -------------------------------------------------------------------------- a group configured so


def test_a_group_that_holds_as_many_blocks() -> None:
    update = group_update("adaptive", 1000, 4096.0)
    assert update == {"quota": 4_096_000, "policy": "adaptive", "high_water": 0, "low_water": 0, "ttl": 0}
    assert command_line("chat", update) == (
        "kvcm group update chat --quota 4096000 --policy adaptive --high-water 0 --low-water 0 --ttl 0"
    )
    assert group_update("ttl", 10, 10, ttl_s=0.5)["ttl"] == 1, "whole seconds"
    assert group_update("ttl", 10, 10)["policy"] == "lru", "which is what it is without a time"
    assert group_update("lru", 10, 10.5)["quota"] == 110, "blocks have whole bytes"


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(0.06, 1), st.floats(0.01, 1))
def test_marks_leave_the_capacity(blocks: int, high: float, part: float) -> None:
    low = high * part
    quota = group_update("lru", blocks, 4096, high_water=high, low_water=low)["quota"]
    assert round(low * quota) >= blocks * 4096 - 1
    quota = group_update("lru", blocks, 4096, high_water=high)["quota"]
    assert round((high - 0.05) * quota) >= blocks * 4096 - 1, "5 % below, if the low one is not given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "lru_head_first"}, "no group can have policy"),
        ({"capacity_blocks": 0}, "at least one block"),
        ({"block_bytes": 0.0}, "at least one block"),
        ({"ttl_s": -1}, "no negative time"),
        ({"high_water": 0.5, "low_water": 0.6}, "low is not above high"),
        ({"high_water": 1.5}, "marks are from 0 to 1"),
        ({"high_water": 0.05}, "keeps nothing"),
    ],
)
def test_groups_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        group_update(**{"policy": "lru", "capacity_blocks": 1, "block_bytes": 1.0, **arguments})
