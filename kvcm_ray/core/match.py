"""Which part of a request is a hit, given a flag for each of its keys."""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.requests import Flags
from kvcm_ray.errors import InvalidArgument


def prefix_length(hits: Flags) -> int:
    """Number of leading hits."""
    if len(hits) == 0:
        return 0
    first_miss = int(np.argmin(hits))
    return len(hits) if hits[first_miss] else first_miss


def last_window(hits: Flags, size: int) -> int | None:
    """Start of the right-most `size` consecutive hits; None if there are none.

    Raises:
        InvalidArgument: `size` is not within 1..len(hits).
    """
    if not 1 <= size <= len(hits):
        raise InvalidArgument(f"sw_size {size} is not within 1..{len(hits)} (the number of keys)")
    sums = np.concatenate(([0], np.cumsum(hits, dtype=np.int64)))
    starts = np.flatnonzero(sums[size:] - sums[:-size] == size)
    return int(starts[-1]) if len(starts) else None
