"""The last hour of a group as numbers by time, for charts without a time-series database.

Two rings: 1 s for ten minutes, 10 s for an hour. Nothing samples an idle group: when its loop wakes up, the
interval in which it went to sleep gets what was counted until then, and those slept through get nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.actors.histogram import DURATIONS_S, quantile

STEPS = ((1, 600), (10, 360))  #: (seconds, rows)
#: Differences from one sample to the next.
COUNTED = (
    "lookups", "lookup_blocks", "hit_blocks", "lookup_tokens", "hit_tokens", "writes", "written_blocks",
    "written_bytes", "refused_writes", "evicted_blocks", "evicted_bytes", "demoted_blocks",
    "promoted_blocks",
)  # fmt: skip
#: Values at the end of an interval.
HELD = ("used_bytes", "reserved_bytes", "pending_delete_bytes", "quota_bytes", "blocks", "sessions")

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """What is counted since the start, and what is held now."""

    counted: Sequence[float]  #: in the order of `COUNTED`
    held: Sequence[float]  #: in the order of `HELD`
    durations: Sequence[int]  #: counts of a `Histogram` with `DURATIONS_S`

    def array(self) -> F64:
        return np.array([*self.counted, *self.held, *self.durations], np.float64)


class History:
    """
    Args:
        sample: reads the group's numbers; called by whoever calls `advance`.
    """

    def __init__(self, now_s: float, sample: Callable[[], Sample]) -> None:
        self._sample = sample
        self._rings = [_Ring(step, size, now_s, sample().array()) for step, size in STEPS]
        self._due_s = self._next_s()

    def advance(self, now_s: float) -> None:
        """Close the intervals that are over. Costs a comparison if there are none."""
        if self._due_s - 2 * STEPS[0][0] < now_s < self._due_s:  # before that: the clock was set back
            return
        values = self._sample().array()
        for ring in self._rings:
            ring.advance(now_s, values)
        self._due_s = self._next_s()

    def rows(self, since_s: float, now_s: float) -> dict[str, Any]:
        """Rows that ended after unix time `since_s`: of 1 s if these reach back so far, else of 10 s."""
        fine, coarse = self._rings
        ring = fine if since_s >= now_s - fine.step_s * fine.size or not coarse.count else coarse
        times, values = ring.after(since_s)
        return {"step_s": ring.step_s, "now_s": now_s, "rows": _columns(times, values, ring.step_s)}

    def _next_s(self) -> float:
        return min(ring.end_s for ring in self._rings)


class _Ring:
    """Rows of one length; the values of a row are differences, then what was held at its end."""

    def __init__(self, step_s: int, size: int, now_s: float, values: F64) -> None:
        self.step_s, self.size = step_s, size
        self.count = 0
        self._start(now_s)
        self._last = values
        self._times = np.zeros(size)
        self._values = np.zeros((size, len(values)))

    def _start(self, now_s: float) -> None:
        self.end_s = (now_s // self.step_s + 1) * self.step_s  #: of the interval that is open

    def advance(self, now_s: float, values: F64) -> None:
        if now_s < self.end_s - 2 * self.step_s:  # the clock was set back
            self._start(now_s)
            self._last = values
            return
        passed = int((now_s - self.end_s) // self.step_s) + 1
        if passed <= 0:
            return
        first = values - self._last
        first[len(COUNTED) : len(COUNTED) + len(HELD)] = values[len(COUNTED) : len(COUNTED) + len(HELD)]
        empty = np.zeros_like(first)
        empty[len(COUNTED) : len(COUNTED) + len(HELD)] = first[len(COUNTED) : len(COUNTED) + len(HELD)]
        for i in range(max(passed - self.size, 0), passed):
            at = self.count % self.size
            self._times[at] = self.end_s + i * self.step_s
            self._values[at] = first if i == 0 else empty
            self.count += 1
        self.end_s += passed * self.step_s
        self._last = values

    def after(self, since_s: float) -> tuple[F64, F64]:
        at = np.arange(max(self.count - self.size, 0), self.count) % self.size
        at = at[self._times[at] > since_s]
        return self._times[at], self._values[at]


def _columns(times: F64, values: F64, step_s: int) -> dict[str, list[Any]]:
    names = COUNTED + HELD
    columns: dict[str, list[Any]] = {"time_s": times.tolist()}
    for i, name in enumerate(names):
        columns[name] = values[:, i].astype(np.int64).tolist()
    for unit in ("blocks", "tokens"):
        columns[f"hit_ratio_{unit}"] = _ratios(columns[f"hit_{unit}"], columns[f"lookup_{unit}"])
    for name in ("lookups", "writes", "evicted_blocks", "evicted_bytes"):
        columns[f"{name}_per_s"] = [value / step_s for value in columns[name]]
    durations = values[:, len(names) :].tolist()
    for label, q in (("p50", 0.5), ("p99", 0.99)):
        columns[f"latency_{label}_s"] = [quantile(DURATIONS_S, counts, q) for counts in durations]
    return columns


def _ratios(hits: Sequence[int], lookups: Sequence[int]) -> list[float | None]:
    return [hit / asked if asked else None for hit, asked in zip(hits, lookups, strict=True)]
