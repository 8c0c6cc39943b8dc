"""What a group would find with another quota: the live estimate, put as a report.

The estimate is of leaf-first LRU over the whole group, whatever its policy and tiers are; it is made anew
when the actor starts. Blocks used before that are unknown to it, so right after a start it knows little
about quotas larger than what was asked for since (`footprint_bytes`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvcm_ray.core.observed import Observed
from kvcm_ray.core.reuse import F64, ReuseEstimate
from kvcm_ray.errors import InvalidArgument

FACTORS = (0.5, 1.0, 2.0, 4.0)
FACTORS_MAX = 64


class Advisor:
    """A listener of an `Observer`.

    Args:
        estimate: what to keep up; the default one if there is none.
    """

    def __init__(self, estimate: ReuseEstimate | None = None) -> None:
        self._estimate = estimate or ReuseEstimate()
        self._lock = threading.Lock()
        self._block_bytes: Mapping[str, int] = {}

    def feed(self, observed: Observed) -> None:
        """Count these requests."""
        with self._lock:
            self._estimate.weigh(self._block_bytes)
            self._estimate.feed(observed)

    def weigh(self, block_bytes: Mapping[str, int]) -> None:
        """How large the blocks of each instance are: those of different size are told apart from now on.
        Waits for nothing, so that the group's loop may call it."""
        self._block_bytes = dict(block_bytes)

    def report(
        self, capacity: Mapping[str, Any], block_bytes: Mapping[str, int], factors: Sequence[float] = FACTORS
    ) -> dict[str, Any]:
        """Plain JSON values; ratios are None as long as nothing was looked up.

        Args:
            capacity: the group's report, see `GroupState.capacity`.
            block_bytes: of each instance, as for `weigh`.
            factors: quotas to tell about, as multiples of the one that the group has.

        Raises:
            InvalidArgument: a factor is not positive, or there are too many.
        """
        _check(factors)
        with self._lock:
            self._estimate.weigh(block_bytes)
            return _report(self._estimate, capacity, factors)


def _report(estimate: ReuseEstimate, capacity: Mapping[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    quota = capacity["quota_bytes"]
    bytes_each = estimate.block_bytes
    sums = estimate.sums
    some = sums.accessed > 0
    edges, ratios = estimate.curve()
    return {
        "group": capacity["group"],
        "policy": capacity["policy"],
        "quota_bytes": quota,
        "used_bytes": capacity["used_bytes"],
        "observed": {
            "requests": estimate.requests,
            "accessed_blocks": estimate.accessed,
            "seconds": round(estimate.seconds, 3),
            "half_life_s": estimate.half_life_s,
        },
        "block_bytes": round(bytes_each, 1),
        "footprint_bytes": round(estimate.footprint()) if bytes_each else None,
        "sample_rate": 2.0**-estimate.level,
        "tracked_blocks": estimate.tracked,
        "measured_hit_ratio": round(sums.found / sums.accessed, 6) if some else None,
        "infinite_hit_ratio": round(float(ratios[-1]), 6) if some else None,
        "rows": _rows(estimate, quota, _filled(capacity), factors) if bytes_each else [],
        "knee_bytes": round(knee) if bytes_each and (knee := _knee(edges, ratios)) else None,
    }


def _rows(
    estimate: ReuseEstimate, quota: int, filled: float, factors: Sequence[float]
) -> list[dict[str, Any]]:
    wanted = np.array([1.0, *factors]) * quota
    ratios = estimate.hit_ratio(wanted * filled).tolist()
    some = estimate.sums.accessed > 0
    return [
        {
            "factor": factor,
            "quota_bytes": round(size),
            "blocks": int(size / estimate.block_bytes),
            "hit_ratio": round(ratio, 6) if some else None,
            "change": round(ratio - ratios[0], 6) if some else None,
        }
        for factor, size, ratio in zip(factors, wanted[1:].tolist(), ratios[1:], strict=True)
    ]


def _filled(capacity: Mapping[str, Any]) -> float:
    """How full a full group is on average: it is emptied from its high mark down to its low one."""
    quota, high, low = (float(capacity[f"{name}_bytes"]) for name in ("quota", "high", "low"))
    return 1.0 if not quota or high >= quota else (high + low) / (2 * quota)


def _knee(edges: F64, ratios: F64) -> float | None:
    """The size from which on each doubling is worth less than on average: where the curve over the logarithm
    of the size is highest above the straight line between its ends, or at its end if it is nowhere above.
    None without hits."""
    first = int(np.searchsorted(ratios, 1e-9, side="right"))
    last = int(np.searchsorted(ratios, ratios[-1] * (1 - 1e-6)))
    if last <= first:
        return None
    rise = (ratios[first : last + 1] - ratios[first]) / (ratios[last] - ratios[first])
    line = np.linspace(0.0, 1.0, last - first + 1)  # edges are evenly spaced in the logarithm
    above = rise - line
    return float(edges[first + int(above.argmax())] if above.max() > 0 else edges[last])


def _check(factors: Sequence[float]) -> None:
    if not 1 <= len(factors) <= FACTORS_MAX:
        raise InvalidArgument(f"{len(factors)} factors; ask for 1 to {FACTORS_MAX} multiples of the quota")
    for factor in factors:
        if not (math.isfinite(factor) and 0 < factor <= 1e6):
            raise InvalidArgument(f"factor {factor} is no multiple of a quota; write 0.5 or 2")
