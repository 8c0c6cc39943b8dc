"""Durations counted by size, and what can be read from the counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

#: Upper ends in seconds, each twice the one before it: 0.1 ms to 6.6 s.
DURATIONS_S = tuple(1e-4 * 2**k for k in range(17))


class Histogram:
    """Counts of durations; one more count than bounds, the last for what is beyond them all."""

    __slots__ = ("bounds", "counts", "sum_s")

    def __init__(self, bounds: Sequence[float] = DURATIONS_S) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds

    def to_json(self) -> dict[str, Any]:
        """``le`` in seconds; ``counts`` of each bucket alone, the last without an upper end."""
        return {"le": list(self.bounds), "counts": list(self.counts), "sum": self.sum_s}


def quantile(bounds: Sequence[float], counts: Sequence[float], q: float) -> float | None:
    """The q-quantile, as if a bucket's durations lay evenly in it; None of nothing.

    Of what is beyond the last bound only that bound is known.
    """
    total = sum(counts)
    if total <= 0:
        return None
    rank, below = q * total, 0.0
    for i, count in enumerate(counts[:-1]):
        if count and below + count >= rank:
            low = bounds[i - 1] if i else 0.0
            return low + (bounds[i] - low) * (rank - below) / count
        below += count
    return bounds[-1]
