"""How much of a prompt the shared cache holds: the index of one instance, read in this process.

Only lengths are asked for, nobody is called, and the manager does not hear of it: a router's look-up is not a
use of the blocks. While there is no index (no manager yet, nothing written, the instance removed) the length
is 0; `open` looks for it again and belongs on a thread, since it reads files.
"""

from __future__ import annotations

import logging
import time

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import KvcmError
from kvcm_ray.index import IndexReader

log = logging.getLogger(__name__)

LOOK_S = 1.0  #: at most so often for an index that is not there, or was replaced
PAUSE_S = 1.0  #: without look-ups, after one that took too long or failed


class SharedIndex:
    def __init__(self, data_dir: str, instance_id: str, *, slow_s: float) -> None:
        """`slow_s`: a look-up that takes longer is followed by a pause."""
        self._data_dir = data_dir
        self._instance_id = instance_id
        self._slow_s = slow_s
        self._view: RegistryView | None = None
        self._info: InstanceInfo | None = None
        self._reader: IndexReader | None = None
        self._looked = 0.0
        self._paused_until = 0.0

    @property
    def info(self) -> InstanceInfo | None:
        """The instance whose index is open."""
        return self._info if self._reader is not None else None

    def length(self, keys: Keys) -> int:
        """Leading blocks of `keys` that the cache holds; 0 where it cannot be said."""
        reader = self._reader
        begin = time.monotonic()
        if reader is None or not len(keys) or begin < self._paused_until:
            return 0
        try:
            found = reader.match_length(keys)
        except Exception as error:  # it was closed, replaced or is damaged; routing goes on
            log.debug("the shared index cannot be read: %s", error)
            self._paused_until = begin + PAUSE_S
            return 0
        if time.monotonic() - begin > self._slow_s:
            self._paused_until = begin + PAUSE_S
        return found

    def open(self) -> None:
        """Open the index that the instance has now, if it is another one than before. Raises nothing."""
        now = time.monotonic()
        if now - self._looked < LOOK_S and self._looked:
            return
        self._looked = now
        try:
            self._open()
        except (KvcmError, OSError) as error:
            log.debug("no shared index of %s yet: %s", self._instance_id, error)

    def _open(self) -> None:
        if self._view is None:
            self._view = RegistryView(self._data_dir)
        info = self._view.contents().instances.get(self._instance_id)
        if self._reader is not None:
            if info is not None and self._info is not None and info.uid == self._info.uid:
                self._reader.refresh()
                return
            old, self._reader = self._reader, None
            old.close()
        self._info = info
        if info is not None:
            self._reader = IndexReader(self._view.index_path(info))

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        if self._view is not None:
            self._view.close()
