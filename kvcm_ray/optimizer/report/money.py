"""What the cache saves, what it costs, and what is left, against capacity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvcm_ray.optimizer.accesses import F64
from kvcm_ray.optimizer.report import palette
from kvcm_ray.optimizer.report.chart import Chart, bytes_axis, canvas, capacity_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvcm_ray.optimizer.analysis import Analysis
    from kvcm_ray.optimizer.rows import Row


def money(analysis: Analysis, *, width: float, height: float) -> Chart:
    """Of the policy that leaves the most."""
    top = richest(analysis)
    rows = analysis.rows_of(top.policy)
    title = _finding(top)
    model, costs = analysis.model, analysis.costs
    assert model is not None
    assert costs is not None
    figure, (axes,) = canvas(
        title, f"{analysis.label}, {top.policy}, {model.name} on {costs.gpu.name}: "
        "GPU time saved, cost of the cache, and what is left, in US dollars an hour",
        width=width, height=height, right=0.6, above=0.25,
    )  # fmt: skip
    least, most = float(analysis.capacities[0]), float(analysis.capacities[-1])
    capacity_axis(axes, *((least, most) if most > least else (least / 2, most * 2)))
    lines = [
        ("saved", "series-1", _column(rows, "saved_usd_per_hour")),
        ("cost", "series-2", _column(rows, "cache_usd_per_hour")),
        ("net", "good", _column(rows, "net_usd_per_hour")),
    ]
    for name, role, values in lines:
        axes.plot(
            analysis.capacities, values, color=palette.light(role), linewidth=2.4 if name == "net" else 1.8
        )
    axes.axhline(0, color=palette.light("quiet"), linewidth=0.8)
    axes.set_ylim(*_limits([values for _, _, values in lines]))
    axes.yaxis.set_major_formatter(_dollars)
    _labels(axes, lines)
    assert top.worth is not None
    axes.plot(
        [top.capacity_blocks], [top.worth.net_usd_per_hour], "o", color=palette.light("good"), markersize=6
    )
    if analysis.block_bytes:
        bytes_axis(axes, analysis.block_bytes)
    return Chart("money", title, "Saved GPU time, cost of the cache and net against capacity.", figure)


def richest(analysis: Analysis) -> Row:
    """The row with the most left; only of an analysis with money."""
    return max(analysis.rows, key=lambda row: row.worth.net_usd_per_hour if row.worth else -np.inf)


def _finding(top: Row) -> str:
    assert top.worth is not None
    net = top.worth.net_usd_per_hour
    if net <= 0:
        return "At these prices the cache costs more than the GPU time that it saves, at every capacity"
    return f"{top.capacity_blocks:,} blocks leave the most: {_dollars(net, 0)} an hour with {top.policy}"


def _column(rows: tuple[Row, ...], name: str) -> F64:
    return np.array([getattr(row.worth, name) for row in rows], np.float64)


def _dollars(value: float, _: object) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}${abs(value):,.0f}" if abs(value) >= 100 or value == 0 else f"{sign}${abs(value):.3g}"


def _limits(columns: list[F64]) -> tuple[float, float]:
    """All of what is saved and the best of what is left; a cost far beyond both may leave the chart."""
    saved, cost, net = columns
    top = max(float(saved.max()), float(net.max()), min(float(cost.max()), 1.5 * float(saved.max())), 1e-9)
    return min(0.0, max(float(net.min()), -0.6 * top)) * 1.08, top * 1.08


def _labels(axes: Axes, lines: list[tuple[str, str, F64]]) -> None:
    """Names at the right ends, moved apart."""
    low, high = axes.get_ylim()
    step = 0.155 / (axes.bbox.height / axes.figure.dpi) * (high - low)
    wanted = sorted(
        ((min(max(float(v[-1]), low), high), role, name) for name, role, v in lines), reverse=True
    )
    at = [value for value, _, _ in wanted]
    for index in range(1, len(at)):
        at[index] = min(at[index], at[index - 1] - step)
    for y, (_, role, name) in zip(at, wanted, strict=True):
        axes.annotate(
            name, (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", fontsize=9, color=palette.light(role), va="center",
            fontweight="bold" if name == "net" else "normal", annotation_clip=False,
        )  # fmt: skip
