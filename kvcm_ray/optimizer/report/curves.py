"""Hit ratio against capacity: all policies, the offline optimum, an endless cache, and the knee."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvcm_ray.optimizer.accesses import F64
from kvcm_ray.optimizer.report import palette, text
from kvcm_ray.optimizer.report.chart import (
    Chart,
    backed,
    bytes_axis,
    canvas,
    capacity_axis,
    percent_axis,
    short_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvcm_ray.optimizer.analysis import Analysis


def hit_ratio(analysis: Analysis, *, width: float, height: float) -> Chart:
    title = _finding(analysis)
    capacities = analysis.capacities
    figure, (axes,) = canvas(
        title, analysis.about, width=width, height=height, above=0.25 if analysis.block_bytes else 0
    )
    capacity_axis(axes, *_limits(capacities), label=_axis_label(analysis))
    percent_axis(axes.yaxis)
    infinite = analysis.infinite_hit_ratio
    axes.set_ylim(0, max(infinite * 1.12, 1e-6))
    _infinite(axes, infinite)
    _optimum(axes, analysis)
    for policy in analysis.policies:
        role = palette.role_of_policy(policy, analysis.policies)
        axes.plot(
            *_points(capacities, analysis.hit_ratios(policy)), color=palette.light(role), linewidth=2,
            solid_capstyle="round", marker="o" if len(capacities) < 12 else None, markersize=3.5,
        )  # fmt: skip
    _knee(axes, analysis)
    _policy_labels(axes, analysis)
    if analysis.block_bytes:
        bytes_axis(axes, analysis.block_bytes)
    about = f"Hit ratio against capacity for {', '.join(analysis.policies)}."
    return Chart("hit_ratio", title, about, figure)


def _finding(analysis: Analysis) -> str:
    knee, infinite = analysis.knee, analysis.infinite_hit_ratio
    if not infinite:
        return "Nothing is asked for twice: no cache has any hits"
    share = knee.hit_ratio / infinite
    capacity = f"{knee.capacity_blocks:,} blocks{_bytes(analysis, knee.capacity_blocks)}"
    found = f"{capacity} give {_percent(share)} of all hits there can be"
    return f"{found}; beyond that each block brings less" if text.is_a_knee(analysis) else found


def _percent(share: float) -> str:
    """Not all, unless it is all."""
    return f"{share:.1%}" if 0.995 <= share < 1 else f"{share:.0%}"


def _bytes(analysis: Analysis, blocks: int) -> str:
    return f" ({short_bytes(blocks * analysis.block_bytes)})" if analysis.block_bytes else ""


def _axis_label(analysis: Analysis) -> str:
    if not analysis.block_bytes:
        return "capacity, blocks"
    return f"capacity, blocks (above: bytes, {short_bytes(analysis.block_bytes)} a block)"


def _limits(capacities: np.typing.NDArray[np.int64]) -> tuple[float, float]:
    least, most = float(capacities[0]), float(capacities[-1])
    return (least, most) if most > least else (least / 2, most * 2)


def _points(capacities: np.typing.NDArray[np.int64], ratios: F64) -> tuple[np.typing.NDArray[np.int64], F64]:
    known = ~np.isnan(ratios)
    return capacities[known], ratios[known]


def _infinite(axes: Axes, infinite: float) -> None:
    axes.axhline(infinite, color=palette.light("quiet"), linewidth=1.1, linestyle=(0, (1, 2)))
    axes.annotate(
        f"endless cache {infinite:.1%}", (0, infinite), xycoords=("axes fraction", "data"),
        xytext=(2, 4), textcoords="offset points", fontsize=9, color=palette.light("quiet"), va="bottom",
    )  # fmt: skip


def _optimum(axes: Axes, analysis: Analysis) -> None:
    """The line ends where it meets that of the endless cache: there is nothing to see beyond."""
    ratios = analysis.optimum_hit_ratios
    if ratios is None:
        return
    reached = int(np.searchsorted(ratios, analysis.infinite_hit_ratio * (1 - 1e-9)))
    upto = slice(0, max(2, reached + 1))
    colour = palette.light("optimum")
    x, y = analysis.capacities[upto], ratios[upto]
    axes.plot(x, y, color=colour, linewidth=1.6, linestyle=(0, (4, 2)))
    at, offset, side = _room(axes, analysis, x, y)
    name = "offline optimum" if analysis.optimum_exact else "optimum, at most"
    axes.annotate(
        name, (x[at], y[at]), xytext=offset, textcoords="offset points", fontsize=9,
        color=colour, bbox=backed(), ha=side, va="bottom" if offset[1] > 0 else "top",
    )  # fmt: skip


def _room(
    axes: Axes, analysis: Analysis, x: np.typing.NDArray[np.int64], y: F64
) -> tuple[int, tuple[int, int], str]:
    """(where on the optimum, offset, alignment) of its name, so that it lies on no other curve."""
    size = np.array([92.0, 15.0]) / _size_in_points(axes)
    top = analysis.infinite_hit_ratio / axes.get_ylim()[1] - 0.01
    for offset, side in (((-6, 5), "right"), ((8, -8), "left")):
        for at in range(len(x)):
            corner = _fraction(axes, float(x[at]), float(y[at])) + offset / _size_in_points(axes)
            low = corner - size * [side == "right", offset[1] < 0]
            high = low + size
            if low.min() < 0 or high[1] > top:
                continue
            lines = [_heights(axes, analysis, policy, low[0], high[0]) for policy in analysis.policies]
            if not any(((low[1] < line) & (line < high[1])).any() for line in lines):
                return at, offset, side
    return 0, (8, -8), "left"


def _fraction(axes: Axes, x: float, y: float) -> F64:
    """Where a point is, as shares of the axes."""
    return np.asarray(axes.transAxes.inverted().transform(axes.transData.transform((x, y))))


def _size_in_points(axes: Axes) -> F64:
    """Width and height of the axes in points."""
    return np.array([axes.bbox.width, axes.bbox.height]) * 72 / axes.figure.dpi


def _heights(axes: Axes, analysis: Analysis, policy: str, left: float, right: float) -> F64:
    """A curve between two places, all as shares of the axes."""
    low, high = np.log(axes.get_xlim())
    at = low + np.linspace(left, right, 12) * (high - low)
    ratios = np.interp(at, np.log(analysis.capacities), analysis.hit_ratios(policy))
    return np.asarray(ratios / axes.get_ylim()[1])


def _knee(axes: Axes, analysis: Analysis) -> None:
    knee = analysis.knee
    colour = palette.light("text")
    axes.plot(
        [knee.capacity_blocks] * 2, [0, knee.hit_ratio], color=colour, linewidth=0.9,
        linestyle=(0, (2, 2)),
    )  # fmt: skip
    axes.plot([knee.capacity_blocks], [knee.hit_ratio], "o", color=colour, markersize=5.5, zorder=5)
    left = _fraction(axes, knee.capacity_blocks, knee.hit_ratio)[0]
    axes.annotate(
        f"knee of {knee.policy}: {knee.capacity_blocks:,}\nblocks, {knee.hit_ratio:.1%}",
        (knee.capacity_blocks, 0), xytext=(-5 if left > 0.55 else 5, 5), textcoords="offset points",
        fontsize=9, color=colour, ha="right" if left > 0.55 else "left", va="bottom", bbox=backed(),
        linespacing=1.25,
    )  # fmt: skip


def _policy_labels(axes: Axes, analysis: Analysis) -> None:
    """Names in a column right of the curves, in their order where they lie farthest apart."""
    at = _widest(analysis)
    ratios = {policy: float(analysis.hit_ratios(policy)[at]) for policy in analysis.policies}
    names = sorted(ratios, key=lambda policy: -ratios[policy])
    capacity = float(analysis.capacities[at])
    step = 15 / _size_in_points(axes)[1]
    column, first = _column(axes, analysis, _fraction(axes, capacity, 0)[0], step)
    for row, policy in enumerate(names):
        colour = palette.light(palette.role_of_policy(policy, analysis.policies))
        axes.annotate(
            policy, (capacity, ratios[policy]), xytext=(column, first - step * row),
            textcoords="axes fraction", fontsize=9.5, color=colour, fontweight="bold", va="center",
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _column(axes: Axes, analysis: Analysis, left: float, step: float) -> tuple[float, float]:
    """Where the names begin, as shares of the axes. Curves rise to the right, so below them is room;
    the more names, the farther right."""
    floor = 3.2 * step  #: the knee's label is there
    knee = _fraction(axes, analysis.knee.capacity_blocks, 0)[0]
    wide = 6.8 * max(map(len, analysis.policies)) / _size_in_points(axes)[0]
    for column in np.arange(left + 0.1, 0.8, 0.02):
        lowest = min(
            float(_heights(axes, analysis, policy, column, column + 0.1).min())
            for policy in analysis.policies
        )
        if column - 0.01 < knee < column + wide:
            continue
        if lowest - 1.3 * step - step * (len(analysis.policies) - 1) > floor:
            return float(column), lowest - 1.3 * step
    return 0.8, floor + step * (len(analysis.policies) - 1)


def _widest(analysis: Analysis) -> int:
    """Where between the ends the policies differ most."""
    ratios = np.array([analysis.hit_ratios(policy) for policy in analysis.policies])
    spread = np.nanmax(ratios, axis=0) - np.nanmin(ratios, axis=0)
    if len(ratios) < 2 or len(spread) < 3:
        return (len(spread) - 1) // 2
    return 1 + int(np.argmax(spread[1:-1]))
