"""How far each policy is from the offline optimum, at some capacities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvcm_ray.optimizer.report import palette, text
from kvcm_ray.optimizer.report.chart import Chart, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvcm_ray.optimizer.analysis import Analysis


def policy_gaps(analysis: Analysis, *, width: float) -> Chart:
    """Bars of points of hit ratio below the optimum; without an optimum, below the endless cache."""
    chosen = _some(analysis, 4)
    order = _best_first(analysis, chosen)
    gaps = {policy: _gaps(analysis, policy)[chosen] * 100 for policy in order}
    most = max((float(np.nanmax(values, initial=0)) for values in gaps.values()), default=0.0)
    title = _finding(analysis, order, gaps, chosen)
    shown = range(len(chosen)) if width > 5.5 else range(len(chosen))[::2]
    to = text.optimum(analysis)
    figure, panels = canvas(
        title, f"{analysis.label}: points of hit ratio below {to}, smaller is better",
        width=width, height=0.2 + 0.3 * len(order), panels=len(shown),
        left=0.16 + 0.088 * max(map(len, order)), right=0.45, gap=0.5, bottom=0.1, above=0.3,
    )  # fmt: skip
    for axes, at in zip(panels, shown, strict=True):
        _panel(axes, {p: float(gaps[p][at]) for p in order}, most, analysis)
        axes.set_yticks(range(len(order)), order if at == 0 else [""] * len(order))
        axes.set_title(
            f"{analysis.capacities[chosen[at]]:,} blocks",
            fontsize=9.5,
            color=palette.light("text"),
            loc="left",
        )
    about = f"Bars: {', '.join(order)} at {len(chosen)} capacities."
    return Chart("policies", title, about, figure)


def _panel(axes: Axes, gaps: dict[str, float], most: float, analysis: Analysis) -> None:
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(True)
    axes.spines["left"].set_color(palette.light("quiet"))
    axes.set_xticks([])
    axes.set_xlim(0, max(most, 1e-9))
    axes.set_ylim(len(gaps) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=9.5, labelcolor=palette.light("text"))
    for row, (policy, gap) in enumerate(gaps.items()):
        if np.isnan(gap):
            continue
        colour = palette.light(palette.role_of_policy(policy, analysis.policies))
        axes.barh(row, gap, height=0.62, color=colour)
        axes.annotate(
            f"{gap:.1f}", (gap, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
            color=palette.light("text"), annotation_clip=False,
        )  # fmt: skip


def _gaps(analysis: Analysis, policy: str) -> np.typing.NDArray[np.float64]:
    best = analysis.optimum_hit_ratios
    ratios = analysis.hit_ratios(policy)
    return np.asarray((analysis.infinite_hit_ratio if best is None else best) - ratios)


def _some(analysis: Analysis, count: int) -> list[int]:
    """Capacities where something is to be gained: up to where the knee's policy has nearly all hits."""
    ratios = analysis.hit_ratios(analysis.knee.policy)
    until = int(np.searchsorted(ratios, 0.97 * analysis.infinite_hit_ratio))
    until = min(max(until, 1), len(ratios) - 1)
    return sorted({int(at) for at in np.linspace(0, until, count).round()})


def _best_first(analysis: Analysis, chosen: list[int]) -> list[str]:
    return sorted(analysis.policies, key=lambda p: float(np.nanmean(_gaps(analysis, p)[chosen])))


def _finding(
    analysis: Analysis, order: list[str], gaps: dict[str, np.typing.NDArray[np.float64]], chosen: list[int]
) -> str:
    if len(order) == 1:
        return f"{order[0]} is {np.nanmax(gaps[order[0]]):.0f} points below {text.optimum(analysis)} at worst"
    first, last = order[0], order[-1]
    apart = gaps[last] - gaps[first]
    if float(np.nanmax(np.abs(apart))) < 0.5:
        return "The policies are within half a point of each other: capacity matters, the policy does not"
    at = int(np.nanargmax(apart))
    return (
        f"{first} comes closest to {text.optimum(analysis)}; it is {apart[at]:.1f} points ahead of {last} at "
        f"{analysis.capacities[chosen[at]]:,} blocks"
    )
