"""Traces as the traffic that a group observes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcm_ray.core.observed import Observed
from kvcm_ray.core.order import selected
from kvcm_ray.core.ragged import elements_of
from kvcm_ray.optimizer.accesses import Accesses


def observed_of(accesses: Accesses, instance_id: str = "m") -> Observed:
    """Each request looked up in vain, as far as the group says, and then written."""
    twice = np.repeat(np.arange(accesses.requests), 2)
    at = elements_of(accesses.offsets, twice)
    return Observed(
        instance_ids=[instance_id] * len(twice),
        times_s=accesses.times_s[twice].astype(np.float64),
        writes=np.tile([False, True], accesses.requests),
        partial=np.zeros(len(twice), np.bool_),
        found=np.zeros(len(twice), np.int64),
        counts=accesses.lengths[twice],
        keys=accesses.keys[accesses.blocks[at]],
    )


def parts(observed: Observed, requests: int) -> Iterator[Observed]:
    """The same traffic, so many requests at a time."""
    n = len(observed.counts)
    for start in range(0, n, requests):
        yield selected(observed, np.arange(start, min(start + requests, n)))
