"""What the live estimate of reuse costs, and how near the exact curve it is, on the bundled traces.

Every request is looked up and then written, as a group hears of it. Times are the processor's, of one thread.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvcm_ray.core.reuse import ReuseEstimate
from kvcm_ray.optimizer import hit_curve, load
from kvcm_ray.testing.observed import observed_of, parts

TRACES = ("conversation", "synthetic")
QUOTAS = (1_000, 5_000, 10_000, 30_000)  #: blocks
FACTORS = (0.5, 1.0, 2.0, 4.0)
MAX_BLOCKS = (4_096, 16_384)
_BATCH_REQUESTS = 2_048
_COARSE = 0.5  #: uses a second; so that nearly nothing is in the sample


def run() -> dict[str, Any]:
    """``{"rows": [{trace, max_blocks, tracked_blocks, error_max, us_per_sampled}], "ns_per_unsampled"}``

    The error is that of the hit ratio, the largest over quotas and their multiples.
    """
    rows = [_row(name, max_blocks) for name in TRACES for max_blocks in MAX_BLOCKS]
    return {"rows": rows, "ns_per_unsampled": round(min(_unsampled_ns(name) for name in TRACES), 1)}


def _row(name: str, max_blocks: int) -> dict[str, Any]:
    accesses = load(name)
    capacities = np.multiply.outer(QUOTAS, FACTORS).ravel()
    estimate = ReuseEstimate(max_blocks, sampled_per_s=np.inf)
    seconds = _feed(name, estimate)
    error = np.abs(estimate.hit_ratio(capacities) - hit_curve(accesses).ratio(capacities))
    return {
        "trace": name,
        "max_blocks": max_blocks,
        "tracked_blocks": estimate.tracked,
        "error_max": round(float(error.max()), 4),
        "us_per_sampled": round(seconds / (2 * len(accesses.blocks)) * 1e6, 3),
    }


def _unsampled_ns(name: str) -> float:
    """The second time, when it has become coarse."""
    estimate = ReuseEstimate(sampled_per_s=_COARSE)
    _feed(name, estimate)
    return _feed(name, estimate) / (2 * len(load(name).blocks)) * 1e9


def _feed(name: str, estimate: ReuseEstimate) -> float:
    """With all of a trace; the processor's seconds that it takes."""
    batches = list(parts(observed_of(load(name)), _BATCH_REQUESTS))
    before = time.thread_time()
    for batch in batches:
        estimate.feed(batch)
    return time.thread_time() - before
