"""A trace analysed: rows of policies and capacities, the optimum, the knee, the best, and their charts.

`analyse` is what ``kvcm optimize`` runs; a notebook calls it just so. It computes once; what an
`Analysis` gives later (hits of each request, breakdowns, charts) is worked out when it is asked for.

Ratios are of the blocks that were looked up; a cache that is endless still misses what comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvcm_ray.core.eviction import POLICIES as LIVE
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import F64, I32, I64, READ, Accesses
from kvcm_ray.optimizer.breakdown import Row as Part
from kvcm_ray.optimizer.breakdown import breakdown
from kvcm_ray.optimizer.catalogue import Model
from kvcm_ray.optimizer.curve import Curve, hit_curve, optimum, positive
from kvcm_ray.optimizer.dataset import load, read_batches
from kvcm_ray.optimizer.economics import Costs, Worth, best, group_update, knee, worth
from kvcm_ray.optimizer.replay import POLICIES, Totals, replay, totals
from kvcm_ray.optimizer.rows import Facts, Row
from kvcm_ray.optimizer.sampling import Sample, recorded_sample, sample, sample_file, sampled_curve
from kvcm_ray.optimizer.sweep import Point, sweep
from kvcm_ray.traces.files import resolve

if TYPE_CHECKING:
    from kvcm_ray.optimizer.report.chart import Chart

Progress = Callable[[int, int], None]

DEFAULT_POLICIES = ("lru", "lfu", "adaptive")
DEFAULT_POINTS = 40
_DEFAULT_SPAN = 64  #: from the footprint divided by this, to the footprint
CAPACITY_MAX = 1 << 53  #: blocks; beyond it neighbours are one floating-point number


@dataclass(frozen=True)
class Analysis:
    """p policies at c capacities."""

    label: str  #: of the trace
    facts: Facts
    capacities: I64  #: (c,) increasing
    policies: tuple[str, ...]
    rows: tuple[Row, ...]  #: (p * c,) by policy, then by capacity
    optimum: I64 | None  #: (c,) hit blocks; None with a sample
    curve: Curve  #: of lru at every capacity, as if no block expired; see `hit_curve`
    infinite_hit_blocks: int
    knee: Row  #: of the first policy: where more capacity begins to bring less
    best: Row | None  #: None if nothing says what is good: neither money nor a target
    why_best: str
    model: Model | None
    costs: Costs | None
    accesses: Accesses | None  #: None with a sample
    settings: dict[str, Any] = field(default_factory=dict)  #: of `replay`

    @property
    def infinite_hit_ratio(self) -> float:
        return self.infinite_hit_blocks / max(1, self.facts.accessed_blocks)

    @property
    def optimum_hit_ratios(self) -> F64 | None:
        """(c,)"""
        return None if self.optimum is None else self.optimum / max(1, self.facts.accessed_blocks)

    @property
    def optimum_exact(self) -> bool | None:
        """Whether some policy that knew the future could reach the optimum; False: it is only an upper bound
        of that (see `curve.optimum`). None without an optimum."""
        if self.accesses is None or self.optimum is None:
            return None
        return self.accesses.whole and self.accesses.chained

    @property
    def block_bytes(self) -> float | None:
        return block_bytes(self.model, self.costs, self.facts.block_tokens)

    @property
    def about(self) -> str:
        """One line on what was analysed."""
        facts, more = self.facts, ""
        if facts.sample_rate < 1:
            more = f", estimated from {facts.sample_rate:.3g} of the blocks"
        return (
            f"{self.label}: {facts.requests:,} requests, {facts.accessed_blocks:,} blocks looked up, "
            f"{facts.unique_blocks:,} different ones{more}"
        )

    def rows_of(self, policy: str) -> tuple[Row, ...]:
        """(c,) rows by capacity. Raises InvalidArgument if the policy was not asked for."""
        if policy not in self.policies:
            raise InvalidArgument(f"{policy!r} was not analysed; these were: {', '.join(self.policies)}")
        first = self.policies.index(policy) * len(self.capacities)
        return self.rows[first : first + len(self.capacities)]

    def hit_ratios(self, policy: str) -> F64:
        """(c,) Raises InvalidArgument if the policy was not asked for."""
        return np.array([row.hit_ratio for row in self.rows_of(policy)], np.float64)

    def hits(self, row: Row) -> I32:
        """(n,) hit blocks of each request.

        Raises:
            InvalidArgument: the trace was sampled.
        """
        return replay(self._whole(), row.policy, row.capacity_blocks, **self.settings)

    @cached_property
    def at_knee(self) -> tuple[Accesses, I32]:
        """The trace, and the hits of each request (n,) at the knee.

        Raises:
            InvalidArgument: the trace was sampled.
        """
        return self._whole(), self.hits(self.knee)

    def _whole(self) -> Accesses:
        if self.accesses is None:
            raise InvalidArgument("a sample gives the hits of all requests together, not of each")
        return self.accesses

    @cached_property
    def parts(self) -> dict[str, list[Part]]:
        """Results at the knee by "turn", "class" and "instance", as far as the trace tells them apart."""
        if self.accesses is None:
            return {}
        accesses, hits = self.at_knee
        told = {
            "turn": bool(accesses.turns.any()),
            "class": len(accesses.class_names) > 1,
            "instance": len(accesses.instance_names) > 1,
        }
        return {by: breakdown(accesses, hits, by=by) for by, differs in told.items() if differs}

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the charts that there are."""
        from kvcm_ray.optimizer.report import figures

        return figures.names(self)

    def figure(self, name: str, *, width: float = 7.4) -> Chart:
        """A chart by its name; `width` in inches.

        Raises:
            InvalidArgument: no chart of that name, or none for this trace.
            Unsupported: matplotlib is not installed.
        """
        from kvcm_ray.optimizer.report import figures

        return figures.draw(self, name, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``kvcm optimize --json`` prints them."""
        found: dict[str, Any] = {
            "label": self.label,
            "trace": self.facts.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "optimum": [] if self.optimum is None else self._optimum(),
            "optimum_exact": self.optimum_exact,
            "infinite_hit_blocks": self.infinite_hit_blocks,
            "infinite_hit_ratio": self.infinite_hit_ratio,
            "knee": self.knee.to_dict(),
            "best": None if self.best is None else self.best.to_dict() | {"why": self.why_best},
        }
        if self.model and self.costs:
            found["money"] = self._assumed(self.model, self.costs)
        return found | {f"by_{by}": [_part_dict(part) for part in parts] for by, parts in self.parts.items()}

    def _assumed(self, model: Model, costs: Costs) -> dict[str, Any]:
        """By what hits became money, and what there is to save."""
        found = {
            "model": model.name,
            "gpu": costs.gpu.name,
            "usd_per_gpu_hour": costs.usd_per_gpu_hour,
            "utilisation": costs.utilisation,
            "gpus_per_replica": costs.gpus_per_replica,
            "kv_value_bytes": costs.kv_value_bytes,
            "tiers": [asdict(tier) for tier in costs.tiers],
            "block_bytes": self.block_bytes,
        }
        if (worth := self.knee.worth) is None:
            return found
        without = {f"ttft_{name}_s": value for name, value in asdict(worth.prefill_s).items()}
        return found | {"hours": worth.hours, "gpu_hours_needed": worth.gpu_hours_needed} | without

    def _optimum(self) -> list[dict[str, int]]:
        assert self.optimum is not None
        pairs = zip(self.capacities.tolist(), self.optimum.tolist(), strict=True)
        return [{"capacity_blocks": capacity, "hit_blocks": hits} for capacity, hits in pairs]

    @property
    def recommended(self) -> Row:
        """The best, or the knee if nothing says what is good."""
        return self.best or self.knee

    def group_update(self, row: Row | None = None) -> dict[str, Any]:
        """What ``kvcm group update NAME --from FILE`` takes to make a group as this row, by default the
        one that is `recommended`.

        Raises:
            InvalidArgument: it is not known how large a block is, or no live group has that policy.
        """
        row = row or self.recommended
        if self.block_bytes is None:
            raise InvalidArgument(
                "a quota is in bytes, and nothing says how large a block is",
                hint="Give a model and its costs (--model), and --block-tokens if the trace is silent.",
            )
        ttl_s = float(self.settings.get("ttl_s", 0))
        return group_update(row.policy, row.capacity_blocks, self.block_bytes, ttl_s=ttl_s)

    def write(self, folder: str | Path) -> list[Path]:
        """CSV, JSON, charts and ``report.html`` into a folder, which is made; returns what was written.

        Raises:
            InvalidArgument: it cannot be written.
            Unsupported: matplotlib is not installed.
        """
        from kvcm_ray.optimizer.report import files

        return files.write(self, Path(folder))


def _part_dict(part: Part) -> dict[str, Any]:
    found = part.totals
    return {
        "label": part.label,
        "requests": found.requests,
        "accessed_blocks": found.accessed_blocks,
        "hit_blocks": found.hit_blocks,
        "hit_ratio": found.hit_ratio,
        "token_hit_ratio": found.token_hit_ratio if found.prompt_tokens else None,
    }


# ------------------------------------------------------------------------------------ analysing


def analyse(
    trace: str | Path | Accesses,
    *,
    capacities: Sequence[int] | None = None,
    policies: Sequence[str] | None = None,
    partial_first: bool = False,
    ttl_s: float = 0,
    rate: float | None = None,
    block_tokens: int = 0,
    model: Model | None = None,
    costs: Costs | None = None,
    budget_usd_per_hour: float | None = None,
    target_hit_ratio: float | None = None,
    ray_address: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Replay a trace at many capacities, and say what more cache or another policy would be worth.

    Args:
        trace: a file, the name of a bundled trace, or what `load` gives. A recording that was sampled when
            it was made, and anything with a `rate`, gives estimates, of lru only.
        capacities: in blocks; 40 from a 64th of the footprint to all of it by default.
        policies: of `replay.POLICIES`; lru, lfu and adaptive by default. The knee is that of the first.
        rate: estimate from this share of the blocks; a file is then streamed, and may be beyond memory.
        block_tokens: of a block, for a trace that does not say so itself.
        model, costs: what a hit saves, and what the cache costs; both or neither. With estimates they
            only say how large a block is.
        budget_usd_per_hour, target_hit_ratio: what the best must keep to, and reach.
        partial_first, ttl_s, ray_address, workers, progress: as `sweep`.

    Raises:
        InvalidArgument: a bad trace, or one of the arguments is out of range or does not go with another.
        Unsupported: numba is not installed, or Ray where it is asked for.
    """
    _check_money(model, costs, budget_usd_per_hour)
    label = "trace" if isinstance(trace, Accesses) else label_of(trace)
    accesses = trace if isinstance(trace, Accesses) else None
    if accesses is None and rate is None:
        accesses = load(cast("str | Path", trace))
    if accesses is None or rate is not None or accesses.sample_level:
        what = _What(label, _checked_policies(("lru",) if policies is None else policies), model, costs)
        _only_lru(what.policies, partial_first, ttl_s)
        if budget_usd_per_hour is not None:
            raise InvalidArgument("a budget needs the hits of each request, which a sample does not tell")
        source = trace if accesses is None else accesses
        told = tokens_of_block(source, block_tokens)
        found = _from_sample(what, _drawn(source, rate), told, capacities)
    else:
        what = _What(
            label, _checked_policies(DEFAULT_POLICIES if policies is None else policies), model, costs
        )
        accesses = replace(accesses, block_tokens=tokens_of_block(accesses, block_tokens))
        chosen = chosen_capacities(capacities, accesses.unique)
        points = sweep(
            accesses, what.policies, chosen.tolist(), partial_first=partial_first, ttl_s=ttl_s,
            measure=_Measure(model, costs), ray_address=ray_address, workers=workers, progress=progress,
        )  # fmt: skip
        settings = {"partial_first": partial_first, "ttl_s": ttl_s}
        found = _from_points(what, accesses, chosen, points, settings)
    return _with_best(found, budget_usd_per_hour, target_hit_ratio)


def label_of(trace: str | Path) -> str:
    """The name of a trace file without what only says how it is packed."""
    name = Path(trace).name
    for suffix in (".gz", ".jsonl", ".json", ".log"):
        name = name.removesuffix(suffix)
    return name


def chosen_capacities(capacities: Sequence[int] | None, footprint: int) -> I64:
    """(c,) increasing, without repeats.

    Raises:
        InvalidArgument: there is none, or one is not positive, or beyond `CAPACITY_MAX`.
    """
    if capacities is None:
        footprint = max(1, footprint)
        return spread(max(1, footprint // _DEFAULT_SPAN), footprint, DEFAULT_POINTS)
    if not len(capacities):
        raise InvalidArgument("give at least one capacity")
    for capacity in capacities:
        positive(int(capacity))
        if capacity > CAPACITY_MAX:
            raise InvalidArgument(f"a capacity is at most {CAPACITY_MAX:,} blocks, not {capacity:,}")
    return np.unique(np.array([int(capacity) for capacity in capacities], np.int64))


def spread(least: int, most: int, points: int) -> I64:
    """At most so many capacities from `least` to `most`, evenly on a logarithmic axis."""
    return np.unique(np.geomspace(least, most, points).round().astype(np.int64))


def _checked_policies(policies: Sequence[str]) -> tuple[str, ...]:
    if isinstance(policies, str) or not policies:
        raise InvalidArgument("policies are a list of at least one name")
    for policy in policies:
        if policy not in POLICIES:
            raise InvalidArgument(f"no policy {policy!r} to replay; there are {', '.join(POLICIES)}")
    return tuple(dict.fromkeys(policies))


def _check_money(model: Model | None, costs: Costs | None, budget: float | None) -> None:
    if (model is None) != (costs is None):
        raise InvalidArgument("hits become money with a model and its costs, both of them")
    if budget is not None and costs is None:
        raise InvalidArgument("a budget needs a model and costs: without them nothing has a price")


def _only_lru(policies: tuple[str, ...], partial_first: bool, ttl_s: float) -> None:
    if policies != ("lru",) or partial_first or ttl_s:
        raise InvalidArgument(
            "a sample gives estimates of lru only, with neither a ttl nor partial blocks first",
            hint="Ask for policies=['lru'] (--policy lru).",
        )


@dataclass(frozen=True, slots=True)
class _What:
    """What is asked."""

    label: str
    policies: tuple[str, ...]
    model: Model | None
    costs: Costs | None


@dataclass(frozen=True, slots=True)
class _Measure:
    """What is kept of the hits of each request at one point; runs where they were replayed."""

    model: Model | None
    costs: Costs | None

    def __call__(self, accesses: Accesses, hits: I32) -> tuple[Totals, Worth | None]:
        found = totals(accesses, hits)
        if self.model is None or self.costs is None:
            return found, None
        return found, worth(accesses, hits, self.model, self.costs)


def _from_points(
    what: _What, accesses: Accesses, capacities: I64, points: Sequence[Point], settings: dict[str, Any]
) -> Analysis:
    best_hits = optimum(accesses, capacities.tolist())
    curve = hit_curve(accesses, partial_first=settings["partial_first"])
    size = block_bytes(what.model, what.costs, accesses.block_tokens)
    rows = []
    for point, most in zip(points, np.tile(best_hits, len(what.policies)).tolist(), strict=True):
        found, value = point.measured
        if value is not None and what.costs is not None:
            value = value.at(point.capacity, what.costs)
        nbytes = None if size is None else point.capacity * size
        rows.append(Row(point.policy, point.capacity, found, most, nbytes, value))
    facts = Facts(
        accesses.requests, int(curve.accessed), accesses.unique, _seconds(accesses),
        accesses.block_tokens, 1.0,
    )  # fmt: skip
    return Analysis(
        what.label, facts, capacities, what.policies, tuple(rows), best_hits, curve, int(curve.infinite),
        _knee(capacities, rows), None, "", what.model, what.costs, accesses, settings,
    )  # fmt: skip


def _seconds(accesses: Accesses) -> float:
    return float(np.ptp(accesses.times_s)) if accesses.requests else 0.0


def tokens_of_block(trace: str | Path | Accesses, given: int = 0) -> int:
    """Of a full block: what the trace says, else what is given; 0 if neither says so.

    Raises:
        InvalidArgument: they disagree, or it is not a trace.
    """
    if isinstance(trace, Accesses):
        told = trace.block_tokens
    else:
        told = next(read_batches(resolve(trace)))[0].block_tokens
    if given and told and given != told:
        raise InvalidArgument(f"the trace says that its blocks have {told} tokens, not {given}")
    return told or given


def _drawn(trace: str | Path | Accesses, rate: float | None) -> Sample:
    rate = 1.0 if rate is None else rate
    if not isinstance(trace, Accesses):
        return sample_file(trace, rate)
    return recorded_sample(trace) if trace.sample_level else sample(trace, rate)


def _from_sample(what: _What, drawn: Sample, block_tokens: int, capacities: Sequence[int] | None) -> Analysis:
    curve = sampled_curve(drawn)
    sure = int(drawn.sure.sum())
    footprint = sure + round((len(drawn.sure) - sure) / drawn.rate)
    chosen = chosen_capacities(capacities, footprint)
    requests = int(((drawn.ops & READ) > 0).sum())
    size = block_bytes(what.model, what.costs, block_tokens)
    rows = [
        Row(
            "lru", capacity, Totals(requests, drawn.accessed, round(hits), 0, 0, 0, 0), None,
            None if size is None else capacity * size, None,
        )
        for capacity, hits in zip(chosen.tolist(), curve.at(chosen).tolist(), strict=True)
    ]  # fmt: skip
    facts = Facts(requests, drawn.accessed, footprint, None, block_tokens, drawn.rate)
    return Analysis(
        what.label, facts, chosen, what.policies, tuple(rows), None, curve, round(curve.infinite),
        _knee(chosen, rows), None, "", what.model, what.costs, None, {},
    )  # fmt: skip


def _with_best(found: Analysis, budget: float | None, target: float | None) -> Analysis:
    """Of the policies that groups can have, if any of them was replayed."""
    if target is None and found.knee.worth is None and budget is None:
        return found
    live = [row for row in found.rows if row.policy in LIVE]
    row = best(live or found.rows, budget_usd_per_hour=budget, target_hit_ratio=target)
    if target is not None:
        why = f"the {'cheapest' if row.worth else 'smallest'} that reaches {target:.4g}"
    else:
        why = "the highest net"
    if budget is not None:
        why += f" within {budget:g} US dollars an hour"
    return replace(found, best=row, why_best=why)


def _knee(capacities: I64, rows: Sequence[Row]) -> Row:
    """Of the first policy."""
    return rows[knee(capacities, np.array([row.hit_blocks for row in rows[: len(capacities)]]))]


def block_bytes(model: Model | None, costs: Costs | None, block_tokens: int) -> float | None:
    """Keys and values of a block; None if that is not known."""
    if model is None or costs is None or not block_tokens:
        return None
    return model.kv_bytes_per_token(costs.kv_value_bytes) * block_tokens
