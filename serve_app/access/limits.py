"""Token buckets: how often somebody may ask. Each replica counts for itself."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

BUCKETS_MAX = 10_000  #: the least recently used is forgotten, which fills it


class Buckets:
    """A bucket for each key, full at first.

    Args:
        rate: units that come back in a second; 0 for no limit at all.
        burst: units in a full bucket.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = max(burst, 1.0)
        self._clock = clock
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  #: units left, as of when

    def take(self, key: str) -> float:
        """Take one unit: 0 if there was one, else the seconds until there is; nothing is taken then."""
        if not self._rate:
            return 0.0
        now = self._clock()
        left, since = self._held.get(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        if left < 1:
            return (1 - left) / self._rate
        self._held[key] = (left - 1, now)
        self._held.move_to_end(key)
        if len(self._held) > BUCKETS_MAX:
            self._held.popitem(last=False)
        return 0.0
