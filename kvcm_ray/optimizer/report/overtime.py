"""Hit ratio over the time of the trace at one capacity: in windows, and of all so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvcm_ray.optimizer.accesses import F64, I32, I64, READ, Accesses
from kvcm_ray.optimizer.report import palette
from kvcm_ray.optimizer.report.chart import Chart, canvas, percent_axis, short_count

if TYPE_CHECKING:
    from kvcm_ray.optimizer.rows import Row

_WINDOWS = 60


@dataclass(frozen=True, slots=True)
class OverTime:
    """w windows of equal length; hits in blocks."""

    ends: F64  #: (w,) seconds since the first request, or requests if the trace has no times
    in_seconds: bool
    accessed: I64  #: (w,)
    hits: I64  #: (w,)

    @property
    def ratios(self) -> F64:
        """(w,) of each window; NaN where nothing was asked for."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.hits / np.where(self.accessed, self.accessed, np.nan), np.float64)

    @property
    def cumulative(self) -> F64:
        """(w,) of all up to the end of each window."""
        return np.asarray(np.cumsum(self.hits) / np.maximum(1, np.cumsum(self.accessed)), np.float64)


def over_time(accesses: Accesses, hits: I32, windows: int = _WINDOWS) -> OverTime:
    """The hits of each request (n,) by the time of the request, or by its number if times say nothing."""
    reads = (accesses.ops & READ) > 0
    times = accesses.times_s[reads]
    in_seconds = len(times) > 1 and float(times[-1]) > float(times[0])
    at = times - times[0] if in_seconds else np.arange(len(times), dtype=np.float64)
    span = max(float(at.max(initial=0)), 1e-9)
    window = np.minimum(windows - 1, (at / span * windows).astype(np.int64))
    accessed = np.bincount(window, accesses.lengths[reads], windows).astype(np.int64)
    found = np.bincount(window, hits[reads], windows).astype(np.int64)
    return OverTime(span * np.arange(1, windows + 1) / windows, in_seconds, accessed, found)


def hit_ratio_over_time(
    series: OverTime, row: Row, infinite: float, where: str, *, width: float, height: float
) -> Chart:
    from matplotlib.ticker import FuncFormatter

    ratios, cumulative = series.ratios, series.cumulative
    title = _finding(series, row)
    figure, (axes,) = canvas(
        title, f"{where}; {row.policy} at {row.capacity_blocks:,} blocks", width=width, height=height,
        right=0.95,
    )  # fmt: skip
    ends, label = _axis(series)
    edges = np.concatenate([[0.0], ends])
    colour = palette.light(palette.role_of_policy(row.policy, [row.policy]))
    axes.stairs(np.nan_to_num(ratios), edges, fill=True, color=colour, alpha=0.28, linewidth=0)
    axes.plot(ends, cumulative, color=colour, linewidth=2.2)
    axes.set_xlim(0, ends[-1])
    axes.set_ylim(0, max(float(np.nanmax(ratios, initial=0)), infinite, 1e-6) * 1.08)
    percent_axis(axes.yaxis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel(label, fontsize=9, color=palette.light("quiet"))
    _labels(axes, series, colour)
    about = f"Hit ratio in {len(ends)} windows of the trace, and of all requests so far."
    return Chart("over_time", title, about, figure)


def _finding(series: OverTime, row: Row) -> str:
    """Whether windows have come to a level that they keep, and when."""
    ratios = series.ratios
    third, last = np.array_split(ratios[len(ratios) // 2 :], 2)
    if np.isnan(third).all() or np.isnan(last).all():
        return f"{row.policy} ends at {series.cumulative[-1]:.1%}"
    before, after = float(np.nanmedian(third)), float(np.nanmedian(last))
    if abs(after - before) > max(0.15 * before, 0.02):
        way = "rise" if after > before else "fall"
        return f"Hits still {way} when the trace ends, to {after:.0%} in its last quarter"
    steady = float(np.nanmedian(ratios[len(ratios) // 2 :]))
    reached = np.flatnonzero(ratios >= 0.9 * steady)
    if not steady or not len(reached):
        return f"{row.policy} ends at {series.cumulative[-1]:.1%}"
    return f"Warm after {_when(series, int(reached[0]))}: windows then reach about {steady:.0%}"


def _when(series: OverTime, window: int) -> str:
    end = float(series.ends[window])
    if not series.in_seconds:
        return f"{short_count(end)} requests"
    return f"{end / 60:.0f} min" if end >= 120 else f"{end:.0f} s"


def _axis(series: OverTime) -> tuple[F64, str]:
    """(ends in the unit to show, its label)."""
    if not series.in_seconds:
        return series.ends, "requests"
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if series.ends[-1] >= 3 * size:
            return series.ends / size, f"{unit} since the first request"
    return series.ends, "seconds since the first request"


def _labels(axes: object, series: OverTime, colour: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    last = float(series.cumulative[-1])
    tail = series.ratios[-8:]
    window = float(np.nanmean(tail)) if not np.isnan(tail).all() else last
    above = window > last
    for value, text, weight in (
        (last, f"all so far\n{last:.1%}", "bold"),
        (window, f"windows\n{window:.0%}", "normal"),
    ):
        up = (value == window) == above
        axes.annotate(
            text, (1, value), xycoords=("axes fraction", "data"), xytext=(6, 3 if up else -3),
            textcoords="offset points", fontsize=9, color=colour, fontweight=weight,
            va="bottom" if up else "top", linespacing=1.2,
        )  # fmt: skip
