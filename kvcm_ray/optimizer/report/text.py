"""An analysis as lines for a terminal; the same rows and sentences are on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcm_ray.optimizer.report.chart import short_bytes

if TYPE_CHECKING:
    from kvcm_ray.optimizer.analysis import Analysis
    from kvcm_ray.optimizer.catalogue import Model
    from kvcm_ray.optimizer.economics import Costs, Worth
    from kvcm_ray.optimizer.rows import Row

_CAPACITIES_MAX = 12  #: in the table; files have them all
_SLOWER_MIN = 0.01  #: of the requests with hits; fewer are not worth a sentence


def shown(analysis: Analysis, capacities_max: int = _CAPACITIES_MAX) -> list[Row]:
    """Rows for people: evenly spread capacities, and those of the knee and the best."""
    capacities = analysis.capacities
    few = capacities
    if len(capacities) > capacities_max:
        few = capacities[np.linspace(0, len(capacities) - 1, capacities_max).round().astype(np.int64)]
    marked = [analysis.knee.capacity_blocks, *([analysis.best.capacity_blocks] if analysis.best else [])]
    wanted = {*few.tolist(), *marked}
    return [row for row in analysis.rows if row.capacity_blocks in wanted]


def headings(analysis: Analysis) -> list[str]:
    """Of `cells`."""
    money = ["GPU-hours saved", "TTFT", "net/hour"] if analysis.knee.worth else []
    size = ["bytes"] if analysis.block_bytes else []
    return ["policy", "blocks", *size, "hit blocks", "hit ratio", "of tokens", "to optimum", *money, ""]


def cells(analysis: Analysis, row: Row) -> list[str]:
    """What the table says of a row; "-" where nothing is known."""
    size = [] if row.capacity_bytes is None else [short_bytes(row.capacity_bytes)]
    money = [] if row.worth is None else _money(row)
    return [
        row.policy, f"{row.capacity_blocks:,}", *size, f"{row.hit_blocks:,}", f"{row.hit_ratio:.2%}",
        _percent(row.token_hit_ratio), _points(row.optimum_gap), *money, _mark(analysis, row),
    ]  # fmt: skip


def _money(row: Row) -> list[str]:
    assert row.worth is not None
    net = row.worth.net_usd_per_hour
    return [
        hours(row.worth.gpu_hours_saved), milliseconds(row.worth.change_s.mean),
        "-" if math.isnan(net) else dollars(net),
    ]  # fmt: skip


def hours(value: float) -> str:
    """``1,234``, ``5.67``, ``0.0012``."""
    return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    """A change: ``-1,234 ms``, ``+0.012 ms``."""
    value = seconds * 1e3
    return f"{value:+.2g} ms" if 0 < abs(value) < 10 else f"{value:+,.0f} ms"


def dollars(value: float) -> str:
    """``$1,234``, ``-$5.67``, ``$0.0012``."""
    size, sign = abs(value), "-" if value < 0 else ""
    if 0 < size < 0.1:
        return f"{sign}${size:.2g}"
    return f"{sign}${size:,.0f}" if size >= 100 else f"{sign}${size:.2f}"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2%}"


def _points(gap: float | None) -> str:
    """Percentage points; below the optimum is less."""
    if gap is None:
        return "-"
    points = round(-gap * 100, 1)
    return f"{points:+.1f} pt" if points else "0.0 pt"


def _mark(analysis: Analysis, row: Row) -> str:
    marks = {"best": analysis.best, "knee": analysis.knee}
    return ", ".join(
        name
        for name, marked in marks.items()
        if marked and (marked.policy, marked.capacity_blocks) == (row.policy, row.capacity_blocks)
    )


def sentences(analysis: Analysis) -> list[str]:
    """What to know beside the table."""
    knee, footprint = analysis.knee, analysis.facts.unique_blocks
    size = f" ({short_bytes(footprint * analysis.block_bytes)})" if analysis.block_bytes else ""
    found = [
        f"An endless cache, which needs {footprint:,} blocks{size}, would hit "
        f"{analysis.infinite_hit_blocks:,} blocks, {analysis.infinite_hit_ratio:.2%}.",
    ]
    if not analysis.infinite_hit_blocks:
        return found
    found += [_knee(analysis), *_reservations(analysis)]
    if knee.worth and analysis.model and analysis.costs:
        found += _assumed(analysis, analysis.model, analysis.costs, knee.worth)
    if analysis.best is not None:
        found.append(_best(analysis, analysis.best))
    return found


def _knee(analysis: Analysis) -> str:
    knee = analysis.knee
    found = f"Knee of {knee.policy}: {knee.capacity_blocks:,} blocks, {knee.hit_ratio:.2%}."
    if is_a_knee(analysis):
        found += " Before it a further block brings more than the average one of the range, behind it less."
    else:
        found += " It is at an end of these capacities, so it says little."
    return found


def is_a_knee(analysis: Analysis) -> bool:
    """Whether there are capacities on both sides; those of one or two points are a knee only in name."""
    return bool(analysis.capacities[0] < analysis.knee.capacity_blocks < analysis.capacities[-1])


def optimum(analysis: Analysis) -> str:
    """What policies are compared with."""
    return "the optimum" if analysis.optimum_exact else "an upper bound of the optimum"


def _reservations(analysis: Analysis) -> list[str]:
    """What makes the figures less than they seem."""
    found, knee = [], analysis.knee.totals
    if analysis.optimum_exact is False and analysis.accesses is not None:
        why = (
            "Look-ups and writes are recorded apart here"
            if not analysis.accesses.whole
            else "Blocks do not always come after the same block here"
        )
        found.append(
            f"{why}, so the optimum is only an upper bound: no policy is above it, but perhaps none can "
            "reach it."
        )
    if analysis.model and analysis.accesses is None:
        found.append("What hits are worth depends on which requests have them; a sample does not tell.")
    if knee.held_blocks:
        found.append(
            f"Engines held {knee.held_blocks:,} of the blocks looked up already. Of the hits at the knee "
            f"{knee.held_hit_blocks:,} were such: this cache alone gave "
            f"{knee.hit_blocks - knee.held_hit_blocks:,}."
        )
    return found


def _assumed(analysis: Analysis, model: Model, costs: Costs, worth: Worth) -> list[str]:
    """By what hits became money, and what they are worth at the knee."""
    tier = "".join(
        f", blocks in {tier.name} at {dollars(tier.usd_per_gib_month)} a GiB-month" for tier in costs.tiers
    )
    change = worth.change_s
    found = [
        f"Taken for granted: {model.name} on {costs.gpus_per_replica} x {costs.gpu.name} at "
        f"{costs.utilisation:.0%} of the peak and {dollars(costs.usd_per_gpu_hour)} a GPU-hour{tier}; "
        "an idle engine, with no queue.",
        f"Prefill without a cache takes {hours(worth.gpu_hours_needed)} GPU-hours. At the knee "
        f"{hours(worth.gpu_hours_saved)} of them are saved, and the time to first token changes by "
        f"{milliseconds(change.mean)} on average (median {milliseconds(change.p50)}, "
        f"99th percentile {milliseconds(change.p99)}).",
    ]
    return found + _slower(analysis, costs)


def _slower(analysis: Analysis, costs: Costs) -> list[str]:
    """Whether reading hits takes longer than computing them again."""
    rows = {"at the knee": analysis.knee, "with the best": analysis.best}
    slower = {
        name: 1 - row.worth.worth_loading
        for name, row in rows.items()
        if row and row.worth and row.worth.load_s and 1 - row.worth.worth_loading >= _SLOWER_MIN
    }
    if analysis.best == analysis.knee:
        slower.pop("with the best", None)
    if not slower:
        return []
    tiers = " and ".join(tier.name for tier in costs.tiers)
    often = "mostly" if max(slower.values()) > 0.5 else "sometimes"
    shares = " and ".join(f"{share:.0%} {name}" for name, share in slower.items())
    return [
        f"Loading from {tiers} is {often} slower than recomputing: of the requests with hits, {shares} would "
        "have their first token sooner without the cache."
    ]


def _best(analysis: Analysis, best: Row) -> str:
    size = f" ({short_bytes(best.capacity_bytes)})" if best.capacity_bytes else ""
    text = (
        f"Best: {best.policy} with {best.capacity_blocks:,} blocks{size}, {best.hit_ratio:.2%}, "
        f"{analysis.why_best}."
    )
    worth = best.worth
    if worth is None or math.isnan(worth.net_usd_per_hour):
        return text
    if worth.net_usd_per_hour < 0:
        text += " The cache then costs more than it saves."
    return text + (
        f" It saves {dollars(worth.saved_usd_per_hour)} and costs {dollars(worth.cache_usd_per_hour)} "
        f"an hour: {dollars(worth.net_usd_per_hour)} net."
    )


def parts(analysis: Analysis) -> dict[str, list[list[Any]]]:
    """By "turn", "class", "instance": label, requests, blocks, hit blocks, hit ratio, of tokens."""
    return {
        by: [
            [
                part.label, f"{part.totals.requests:,}", f"{part.totals.accessed_blocks:,}",
                f"{part.totals.hit_blocks:,}", f"{part.totals.hit_ratio:.2%}",
                _percent(part.totals.token_hit_ratio if part.totals.prompt_tokens else None),
            ]
            for part in rows
        ]
        for by, rows in analysis.parts.items()
    }  # fmt: skip


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns for a terminal: the first and marks to the left, what is between to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headings))]
    left = {0} | ({len(headings) - 1} if not headings[-1] else set())
    return [
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


PART_HEADINGS = ("requests", "blocks", "hit blocks", "hit ratio", "of tokens")
