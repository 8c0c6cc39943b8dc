"""Puts requests in the order in which they were made.

Readers look up without asking the group and tell it a little later, some tenths of a second at most. By then
the write of what they missed may have begun. Taken in the order in which the group heard of them, such
look-ups would seem to find what they had missed. So requests are held back for `LATE_S` and sorted by time.
"""

from __future__ import annotations

import math

import numpy as np

from kvcm_ray.core.observed import I64, Observed
from kvcm_ray.core.ragged import elements_of, offsets_of

LATE_S = 0.5  #: by which the report of a look-up is late at most


class InOrder:
    """Requests as they come, in the order of their times; those of one time stay in order."""

    def __init__(self) -> None:
        self._held: Observed | None = None
        self._now_s = -math.inf

    @property
    def holds(self) -> bool:
        """Some are held back."""
        return self._held is not None

    def feed(self, observed: Observed | None, now_s: float = math.inf) -> Observed | None:
        """These requests and those held back so far, but for those after ``now_s - LATE_S``, which are
        held back; None if there are none. If the clock was set back, none are held back."""
        ready_s = now_s - LATE_S if now_s >= self._now_s else math.inf
        if now_s < math.inf:
            self._now_s = now_s
        parts = [part for part in (self._held, observed) if part is not None and len(part.counts)]
        if not parts:
            return None
        both = parts[0] if len(parts) == 1 else joined(*parts)
        order = np.argsort(both.times_s, kind="stable")
        done = int(np.searchsorted(both.times_s[order], ready_s, side="right"))
        self._held = selected(both, order[done:]) if done < len(order) else None
        return selected(both, order[:done]) if done else None


def joined(first: Observed, second: Observed) -> Observed:
    """The requests of the first, then those of the second."""
    held = [part.held if len(part.held) else np.zeros(len(part.counts), np.int64) for part in (first, second)]
    return Observed(
        instance_ids=[*first.instance_ids, *second.instance_ids],
        times_s=np.concatenate([first.times_s, second.times_s]),
        writes=np.concatenate([first.writes, second.writes]),
        partial=np.concatenate([first.partial, second.partial]),
        found=np.concatenate([first.found, second.found]),
        counts=np.concatenate([first.counts, second.counts]),
        keys=np.concatenate([first.keys, second.keys]),
        held=np.concatenate(held) if len(first.held) or len(second.held) else first.held,
    )


def selected(observed: Observed, requests: I64) -> Observed:
    """Some of the requests, in this order."""
    if np.array_equal(requests, np.arange(len(observed.counts))):
        return observed
    ids = observed.instance_ids
    return Observed(
        instance_ids=[ids[request] for request in requests.tolist()],
        times_s=observed.times_s[requests],
        writes=observed.writes[requests],
        partial=observed.partial[requests],
        found=observed.found[requests],
        counts=observed.counts[requests],
        keys=observed.keys[elements_of(offsets_of(observed.counts), requests)],
        held=observed.held[requests] if len(observed.held) else observed.held,
    )
