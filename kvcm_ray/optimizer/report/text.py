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
        f"{row.worth.gpu_hours_saved:,.2f}", f"{row.worth.change_s.mean * 1e3:+,.0f} ms",
        "-" if math.isnan(net) else dollars(net),
    ]  # fmt: skip


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
    found.append(
        f"Knee of {knee.policy}: {knee.capacity_blocks:,} blocks, {knee.hit_ratio:.2%}. "
        "Before it a further block brings more than the average one of the range, behind it less."
    )
    if knee.worth and analysis.model and analysis.costs:
        found += _assumed(analysis, analysis.model, analysis.costs, knee.worth)
    if analysis.best is not None:
        found.append(_best(analysis, analysis.best))
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
        f"Prefill without a cache takes {worth.gpu_hours_needed:,.1f} GPU-hours. At the knee "
        f"{worth.gpu_hours_saved:,.1f} of them are saved, and the time to first token changes by "
        f"{change.mean * 1e3:+,.0f} ms on average (median {change.p50 * 1e3:+,.0f}, "
        f"99th percentile {change.p99 * 1e3:+,.0f}).",
    ]
    if worth.worth_loading < 1 and analysis.knee.hit_blocks:
        found.append(
            f"Of the requests with hits, {1 - worth.worth_loading:.0%} would be served sooner by recomputing "
            "than by reading from that tier."
        )
    return found


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
