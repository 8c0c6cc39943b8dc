"""How fast one reclaimer may go, and whether it may go at all.

Settings are read before every piece of work, so a change acts on work in progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvcm_ray.core.model import ReclaimerSettings

SLICE_S = 0.1  #: the longest time in which a change of the settings is not seen


class Throttle:
    """The share of one reclaimer in the pool's rate.

    Args:
        settings: reads the present settings.
    """

    def __init__(self, settings: Callable[[], ReclaimerSettings]) -> None:
        self._settings = settings
        self._free_at = 0.0  #: time.monotonic() from which on the next piece may begin

    def admit(self, nbytes: int, until: float | None = None) -> bool:
        """Wait until `nbytes` may be copied or erased.

        Returns False, without waiting any longer, if the pool is paused or the turn would come after
        `until` (of time.monotonic()).
        """
        while True:
            settings = self._settings()
            now = time.monotonic()
            if settings.paused or (until is not None and now >= until):
                return False
            rate = settings.max_bytes_per_second / max(settings.reclaimers, 1)
            if rate <= 0:
                self._free_at = now
                return True
            if self._free_at <= now:
                self._free_at = now + nbytes / rate
                return True
            if until is not None and self._free_at >= until:
                return False
            time.sleep(min(self._free_at - now, SLICE_S))
