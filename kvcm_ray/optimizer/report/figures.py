"""The charts of an analysis by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.report.chart import Chart

if TYPE_CHECKING:
    from kvcm_ray.optimizer.analysis import Analysis

NARROW = 5.0  #: inches; below it charts are drawn for phones


def names(analysis: Analysis) -> tuple[str, ...]:
    """Those that there are for this analysis, in the order of the page."""
    accesses = analysis.accesses
    there = {
        "hit_ratio": True,
        "policies": accesses is not None,
        "money": analysis.knee.worth is not None and analysis.knee.worth.hours > 0,
        "over_time": accesses is not None,
        "prefix_tree": accesses is not None and accesses.chained,
    }
    return tuple(name for name, is_there in there.items() if is_there)


def draw(analysis: Analysis, name: str, width: float) -> Chart:
    """Raises InvalidArgument if there is no such chart."""
    if name not in names(analysis):
        raise InvalidArgument(f"there is no chart {name!r} here; there are {', '.join(names(analysis))}")
    return _DRAWN[name](analysis, width)


def _hit_ratio(analysis: Analysis, width: float) -> Chart:
    from kvcm_ray.optimizer.report.curves import hit_ratio

    return hit_ratio(analysis, width=width, height=_height(width))


def _policies(analysis: Analysis, width: float) -> Chart:
    from kvcm_ray.optimizer.report.policies import policy_gaps

    return policy_gaps(analysis, width=width)


def _money(analysis: Analysis, width: float) -> Chart:
    from kvcm_ray.optimizer.report.money import money

    return money(analysis, width=width, height=_height(width))


def _over_time(analysis: Analysis, width: float) -> Chart:
    from kvcm_ray.optimizer.report.overtime import hit_ratio_over_time, over_time

    accesses, hits = analysis.at_knee
    series = over_time(accesses, hits, 60 if width > NARROW else 40)
    return hit_ratio_over_time(
        series, analysis.knee, analysis.infinite_hit_ratio, analysis.label, width=width,
        height=_height(width) * 0.88,
    )  # fmt: skip


def _prefix_tree(analysis: Analysis, width: float) -> Chart:
    from kvcm_ray.optimizer.report.icicle import prefix_tree
    from kvcm_ray.optimizer.report.tree import hottest

    accesses, hits = analysis.at_knee
    knee = analysis.knee
    where = f"{analysis.label}, {knee.policy} at {knee.capacity_blocks:,} blocks"
    return prefix_tree(
        hottest(accesses, hits, paths_max=24 if width > NARROW else 16),
        where,
        width=width,
        height=_height(width) * 1.3,
    )


def _height(width: float) -> float:
    return 3.5 if width > NARROW else 3.3


_DRAWN: dict[str, Callable[[Analysis, float], Chart]] = {
    "hit_ratio": _hit_ratio,
    "policies": _policies,
    "money": _money,
    "over_time": _over_time,
    "prefix_tree": _prefix_tree,
}
