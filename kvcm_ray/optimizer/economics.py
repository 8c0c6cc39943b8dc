"""From saved FLOPs to GPU-hours, time to first token and money; the knee, and the best configuration.

Rules, so that nobody takes a number for more than it is:

- A prompt's prefill takes ``FLOPs / (peak x utilisation x GPUs of a replica)`` seconds. Utilisation is what
  *your* engine reaches in prefill; measure it. FLOPs are those of `savings`.
- A hit takes ``latency + bytes / bandwidth`` for each tier that it is read from, one tier after the other, in
  whole blocks, and nothing is overlapped with prefill. Where that is longer than recomputing, the request
  is slower than without the cache, and is counted as that.
- There is no queue: no request waits for another, neither for a GPU nor for a tier. Under load
  waiting dominates, and time saved by one is saved by all behind it; so changes of time to first token are
  those of an idle engine, apart from the decoding of the first token.
- GPU time that was saved counts at the price of GPU-hours. It is money only if fewer GPUs are rented, or if
  they do other work. While blocks are read, GPUs are taken to be free for other requests.
- The cache costs its whole capacity all the time, filled or not. Writing into it costs nothing here.
- The trace counts as it is, cold start included, from its first request to its last.
- All prices are in US dollars and are assumptions, those of the catalogue too. A month has 730 hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.eviction import POLICIES
from kvcm_ray.core.marks import GAP
from kvcm_ray.errors import InvalidArgument, NotFound
from kvcm_ray.optimizer.accesses import F64, I32, READ, Accesses
from kvcm_ray.optimizer.catalogue import Gpu, Model, TierCosts
from kvcm_ray.optimizer.savings import RequestFlops, prefix_flops, request_flops

HOURS_A_MONTH = 730.0
_GIB = float(1 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What GPUs and tiers cost, in time and money.

    Raises:
        InvalidArgument: a number is out of range, or there is no price.
    """

    gpu: Gpu
    utilisation: float  #: share of the peak that prefill reaches, above 0 and at most 1; measure it
    price_per_hour: float | None = None  #: US dollars for one GPU; None: what the catalogue assumes
    gpus_per_replica: int = 1  #: that prefill one prompt together
    #: where blocks lie, fastest first. None at all: reading takes no time and capacity costs nothing
    tiers: tuple[TierCosts, ...] = ()
    kv_value_bytes: float = 2  #: of one number of keys and values: 2 for bf16 and fp16, 1 for fp8

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise InvalidArgument(f"utilisation is above 0 and at most 1, got {self.utilisation}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise InvalidArgument(f"the price of a GPU-hour must not be negative, got {self.price_per_hour}")
        if self.gpus_per_replica < 1:
            raise InvalidArgument(f"a replica has at least one GPU, got {self.gpus_per_replica}")
        if not 0 < self.kv_value_bytes < math.inf:
            raise InvalidArgument(f"a number takes more than 0 bytes, got {self.kv_value_bytes}")
        if self.price_per_hour is None and not self.gpu.usd_per_hour:
            raise InvalidArgument(f"the catalogue assumes no price for {self.gpu.name}: give one")

    @property
    def usd_per_gpu_hour(self) -> float:
        return self.gpu.usd_per_hour if self.price_per_hour is None else self.price_per_hour

    @property
    def flops_per_s(self) -> float:
        """That one prompt is prefilled with: peak x utilisation x GPUs of a replica."""
        return self.gpu.peak_flops * self.utilisation * self.gpus_per_replica


def measured_utilisation(model: Model, gpu: Gpu, tokens: int, seconds: float, gpus: int = 1) -> float:
    """Utilisation from one prefill without hits of so many tokens on an idle replica of so many GPUs.

    Take a prompt of a usual length: short ones use a GPU worse. Fits `Costs` with the same model and GPU,
    whatever the formulas leave out.

    Raises:
        InvalidArgument: a number is not above 0, or the time is less than the peak allows.
    """
    if tokens < 1 or gpus < 1 or not 0 < seconds < math.inf:
        raise InvalidArgument(f"{tokens} tokens in {seconds} seconds on {gpus} GPUs are no measurement")
    share = float(prefix_flops(model, tokens)) / (gpu.peak_flops * gpus * seconds)
    if share > 1:
        raise InvalidArgument(
            f"{tokens} tokens in {seconds:g} s are more than {gpu.name} can do with {model.name}",
            hint="Were there hits, or is it another model or GPU, or a precision below 16 bits?",
        )
    return share


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds, over the requests that look up."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What a cache is worth for a trace. Totals are of the whole trace; `at` gives another capacity."""

    requests: int  #: that look up
    hours: float  #: that the trace lasts
    block_bytes: float  #: keys and values of a full block
    flops_needed: float  #: to prefill all prompts without this cache
    flops_saved: float
    gpu_hours_needed: float  #: GPU-hours (of one GPU each) to prefill all prompts without this cache
    gpu_hours_saved: float
    saved_usd: float  #: the price of those
    prefill_s: Spread  #: time to first token without this cache
    cached_s: Spread  #: with it: loading the hits and prefilling the rest
    load_s: float  #: seconds that reading hits takes, of all requests together
    #: of the requests with hits, the share whose hits are read sooner than they would be recomputed; 0 if
    #: there are none. An engine had better recompute the others.
    worth_loading: float
    capacity_bytes: float
    cache_usd_per_hour: float  #: the price of the capacity

    @property
    def flops_share(self) -> float:
        """Saved of those needed."""
        return self.flops_saved / self.flops_needed if self.flops_needed else 0.0

    @property
    def change_s(self) -> Spread:
        """Of the time to first token; negative is sooner. Mean less mean, median less median, and so on."""
        now, then = self.cached_s, self.prefill_s
        return Spread(now.mean - then.mean, now.p50 - then.p50, now.p99 - then.p99)

    @property
    def cache_usd(self) -> float:
        """The price of the capacity for as long as the trace lasts."""
        return self.cache_usd_per_hour * self.hours

    @property
    def net_usd(self) -> float:
        """Saved less the price of the capacity, in all."""
        return self.saved_usd - self.cache_usd

    @property
    def saved_usd_per_hour(self) -> float:
        """For each hour of the trace; nan if it has no length."""
        return self.saved_usd / self.hours if self.hours else math.nan

    @property
    def net_usd_per_hour(self) -> float:
        """For each hour of the trace; nan if it has no length."""
        return self.saved_usd_per_hour - self.cache_usd_per_hour

    def at(self, capacity_blocks: int | Sequence[int], costs: Costs) -> Worth:
        """The same hits with another capacity to be paid; see `worth`.

        Raises:
            InvalidArgument: as `worth` for the capacity.
        """
        held, usd = _capacity(capacity_blocks, self.block_bytes, costs)
        return replace(self, capacity_bytes=held, cache_usd_per_hour=usd)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with what is worked out; None where that is not a number."""
        derived = (
            "flops_share", "cache_usd", "net_usd", "saved_usd_per_hour", "net_usd_per_hour",
        )  # fmt: skip
        found = asdict(self) | {name: getattr(self, name) for name in derived}
        found["change_s"] = asdict(self.change_s)
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in found.items()
        }


def worth(
    accesses: Accesses,
    hits: I32,
    model: Model,
    costs: Costs,
    capacity_blocks: int | Sequence[int] = 0,
    *,
    tier_hits: npt.NDArray[np.integer] | None = None,
    hours: float | None = None,
) -> Worth:
    """What these hits are worth. Blocks that engines held already are neither saved nor read.

    Args:
        hits: (n,) leading hit blocks of each request, as `replay` and `simulate` give them.
        capacity_blocks: full blocks that are paid for: of each of `costs.tiers`, or one number if there is
            one tier, or none. 0 leaves the cost of the cache out.
        tier_hits: (n, tiers) which of the hits are read from each tier; all from the only one by default.
        hours: that the trace stands for; from its first to its last request by default.

    Raises:
        InvalidArgument: the trace does not say how many tokens a block has; hits are not its, or do not add
            up over the tiers; there are several tiers, and one capacity or no `tier_hits`.
    """
    flops = request_flops(model, accesses, hits)
    block_bytes = model.kv_bytes_per_token(costs.kv_value_bytes) * accesses.block_tokens
    held, usd = _capacity(capacity_blocks, block_bytes, costs)
    load_s = _load_s(np.asarray(hits), flops, tier_hits, block_bytes, costs)
    read = (accesses.ops & READ) > 0
    load_s, needed, saved = load_s[read], flops.needed[read], flops.saved[read]
    speed, one_gpu = costs.flops_per_s, costs.gpu.peak_flops * costs.utilisation * 3600
    found = flops.blocks[read] > 0
    saved_all, needed_all = float(saved.sum()), float(needed.sum())
    return Worth(
        requests=len(needed),
        hours=_hours(accesses) if hours is None else hours,
        block_bytes=block_bytes,
        flops_needed=needed_all,
        flops_saved=saved_all,
        gpu_hours_needed=needed_all / one_gpu,
        gpu_hours_saved=saved_all / one_gpu,
        saved_usd=saved_all / one_gpu * costs.usd_per_gpu_hour,
        prefill_s=_spread(needed / speed),
        cached_s=_spread((needed - saved) / speed + load_s),
        load_s=float(load_s.sum()),
        worth_loading=float((load_s < saved / speed)[found].mean()) if found.any() else 0.0,
        capacity_bytes=held,
        cache_usd_per_hour=usd,
    )


def _capacity(blocks: int | Sequence[int], block_bytes: float, costs: Costs) -> tuple[float, float]:
    """(bytes of so many blocks, US dollars for them an hour)."""
    each = [blocks] if isinstance(blocks, int | np.integer) else list(blocks)
    if len(each) != max(1, len(costs.tiers)):
        raise InvalidArgument(f"{len(costs.tiers)} tiers need as many capacities, not {len(each)}")
    if min(each) < 0:
        raise InvalidArgument(f"a capacity must not be negative, got {min(each)}")
    usd_per_month = sum(
        count * block_bytes / _GIB * tier.usd_per_gib_month
        for count, tier in zip(each, costs.tiers, strict=False)
    )
    return sum(each) * block_bytes, usd_per_month / HOURS_A_MONTH


def _load_s(
    hits: npt.NDArray[np.integer],
    flops: RequestFlops,
    tier_hits: npt.NDArray[np.integer] | None,
    block_bytes: float,
    costs: Costs,
) -> F64:
    """(n,) seconds to read the hits that no engine holds."""
    if tier_hits is None:
        if len(costs.tiers) > 1:
            raise InvalidArgument("with several tiers the hits of each are needed: simulate a scenario")
        tier_hits = np.repeat(hits[:, None], len(costs.tiers), axis=1)
    elif tier_hits.shape != (len(hits), len(costs.tiers)) or (tier_hits.sum(axis=1) != hits).any():
        raise InvalidArgument(f"tier_hits must add up to the hits over {len(costs.tiers)} tiers")
    # Which tier has the blocks that an engine holds is not known: each tier is spared its share.
    read = tier_hits * (flops.blocks / np.maximum(hits, 1))[:, None]
    seconds_a_block = np.array([block_bytes / tier.read_bytes_per_s for tier in costs.tiers])
    latencies = np.array([tier.latency_s for tier in costs.tiers])
    return np.asarray(read @ seconds_a_block + (read > 0) @ latencies, np.float64)


def _hours(accesses: Accesses) -> float:
    return float(np.ptp(accesses.times_s)) / 3600 if accesses.requests else 0.0


def _spread(seconds: F64) -> Spread:
    if not len(seconds):
        return Spread(0.0, 0.0, 0.0)
    p50, p99 = np.percentile(seconds, (50, 99))
    return Spread(float(seconds.mean()), float(p50), float(p99))


# ------------------------------------------------------------------------------- knee and best


def knee(capacities: npt.ArrayLike, hits: npt.ArrayLike) -> int:
    """Index of the point farthest above the chord from the first point to the last (as Satopaa and others,
    "Finding a Kneedle in a Haystack", 2011), on a **linear** axis of capacity: all blocks cost the same.

    Where returns diminish, a further block brings more than the average one before it, and less behind
    it. It depends on where the points begin and end. Where the curve is flat it is the first point; where
    it lies nowhere above the chord (returns grow) the last.

    Args:
        capacities: (c,) increasing; hits: (c,) blocks, ratios, or money, in any unit.

    Raises:
        InvalidArgument: there are no points, not as many of both, or capacities do not increase.
    """
    x, y = np.asarray(capacities, np.float64), np.asarray(hits, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x) or (np.diff(x) <= 0).any():
        raise InvalidArgument("a knee needs increasing capacities, and hits of each")
    if len(x) == 1 or y[-1] <= y[0]:
        return int(y.argmax())
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    return int(above.argmax()) if above.max() > 1e-12 else len(x) - 1


class Candidate(Protocol):
    """A policy at a capacity, with what came of it."""

    @property
    def policy(self) -> str: ...
    @property
    def capacity_blocks(self) -> int: ...
    @property
    def hit_ratio(self) -> float: ...
    @property
    def worth(self) -> Worth | None: ...


C = TypeVar("C", bound=Candidate)


def best(
    candidates: Sequence[C],
    *,
    budget_usd_per_hour: float | None = None,
    target_hit_ratio: float | None = None,
) -> C:
    """The one to take. Of equal ones the smaller, and of these the first.

    With a target: the cheapest one that reaches it (the smallest if nothing has a price). Without: the one
    with the highest net. That may be below 0: then no cache at all is better. A budget first takes away
    those whose cache costs more.

    Args:
        budget_usd_per_hour: for the capacity of the cache, `Worth.cache_usd_per_hour`.
        target_hit_ratio: of blocks, from 0 to 1.

    Raises:
        InvalidArgument: nothing says what is good: no target, and candidates without worth; or a budget for
            candidates without worth; or there are no candidates; or the target is not a ratio.
        NotFound: none is within the budget, or none of these reaches the target; the message says what is
            reachable.
    """
    _check_best(candidates, budget_usd_per_hour, target_hit_ratio)
    within = [c for c in candidates if budget_usd_per_hour is None or _usd(c) <= budget_usd_per_hour]
    if not within:
        least = min(candidates, key=_usd)
        raise NotFound(
            f"nothing is within {budget_usd_per_hour:g} US dollars an hour; the least, "
            f"{least.capacity_blocks:,} blocks, costs {_usd(least):.3g}",
            hint="Raise the budget, look at smaller capacities, or take a cheaper tier.",
        )
    if target_hit_ratio is None:
        return min(within, key=lambda c: (-_net(c), c.capacity_blocks))
    reaching = [c for c in within if c.hit_ratio >= target_hit_ratio]
    if not reaching:
        top = min(within, key=lambda c: (-c.hit_ratio, c.capacity_blocks))
        limit = "" if budget_usd_per_hour is None else f" within {budget_usd_per_hour:g} US dollars an hour"
        raise NotFound(
            f"nothing reaches a hit ratio of {target_hit_ratio:g}{limit}; the highest is "
            f"{top.hit_ratio:.4f}, {top.policy} with {top.capacity_blocks:,} blocks",
            hint="Lower the target, or look at larger capacities and other policies.",
        )
    return min(reaching, key=lambda c: (_usd(c), c.capacity_blocks))


def _check_best(candidates: Sequence[C], budget: float | None, target: float | None) -> None:
    if not candidates:
        raise InvalidArgument("the best of none: there are no candidates")
    priced = all(c.worth is not None for c in candidates)
    if target is None and not priced:
        raise InvalidArgument(
            "nothing says what is best: give a target, or a model and costs so that hits are worth money"
        )
    if budget is not None and not priced:
        raise InvalidArgument("a budget needs a model and costs: without them nothing has a price")
    if target is not None and not 0 <= target <= 1:
        raise InvalidArgument(f"a hit ratio is from 0 to 1, not {target}")
    if budget is not None and not budget >= 0:
        raise InvalidArgument(f"a budget must not be negative, got {budget}")


def _usd(candidate: Candidate) -> float:
    return candidate.worth.cache_usd_per_hour if candidate.worth else 0.0


def _net(candidate: Candidate) -> float:
    assert candidate.worth is not None
    return candidate.worth.net_usd


# ------------------------------------------------------------------- a group that is configured so


def group_update(
    policy: str,
    capacity_blocks: int,
    block_bytes: float,
    *,
    ttl_s: float = 0,
    high_water: float = 0,
    low_water: float = 0,
) -> dict[str, Any]:
    """What ``kvcm group update NAME --from FILE`` takes, as JSON, to make a group hold as many blocks.

    Fields are named as the options: ``quota`` (bytes), ``policy``, ``ttl`` (whole seconds, 0 is never),
    ``high_water`` and ``low_water`` (fractions of the quota). Without marks a group is reclaimed when it is
    full, as in a replay. Marks make it fall to the low one now and then, so the quota is raised until the low
    mark is at the capacity: the group then never holds less than what was replayed.

    Args:
        policy: one of a live group. ``ttl`` without a time evicts as ``lru`` does, and becomes that.
        block_bytes: of all specs of a block, as they are registered.

    Raises:
        InvalidArgument: no live group has that policy, or a number is out of range.
    """
    if policy not in POLICIES:
        raise InvalidArgument(f"no group can have policy {policy!r}; there are {', '.join(POLICIES)}")
    if capacity_blocks < 1 or not 0 < block_bytes < math.inf or not 0 <= ttl_s < math.inf:
        raise InvalidArgument("a group needs at least one block, of some bytes, and no negative time to live")
    if not (0 <= high_water <= 1 and 0 <= low_water <= (high_water or 1)):
        raise InvalidArgument(f"marks are from 0 to 1 and low is not above high: {low_water}, {high_water}")
    low = low_water or (high_water - GAP if high_water else 1.0)
    if low <= 0:
        raise InvalidArgument(f"a low mark of {low:g} keeps nothing")
    return {
        "quota": math.ceil(capacity_blocks * math.ceil(block_bytes) / low),
        "policy": "lru" if policy == "ttl" and not ttl_s else policy,
        "high_water": high_water,
        "low_water": low_water,
        "ttl": math.ceil(ttl_s),
    }


def command_line(group: str, update: dict[str, Any]) -> str:
    """The same as one command: ``kvcm group update chat --quota 68719476736 --policy lru ...``"""
    options = [f"--{name.replace('_', '-')} {value}" for name, value in update.items()]
    return " ".join(["kvcm group update", group, *options])
