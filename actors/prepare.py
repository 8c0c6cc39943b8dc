"""Allocates shared memory of slots just handed out, in the background, before their writer comes.

The first touch of a tmpfs page costs ten times the copy that follows. While the reply travels, a thread
here touches the pages, so that the writer finds some or all of them there. Slots that nobody was given
are not touched: memory that no block, session or trash record names would be a leak.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcm_ray.core.model import Segment
from kvcm_ray.core.requests import U32, WriteStarted
from kvcm_ray.core.segments import by_segment
from kvcm_ray.errors import KvcmError
from kvcm_ray.storage_adapters import StorageAdapter

if TYPE_CHECKING:
    from kvcm_ray.actors.engine import GroupEngine

log = logging.getLogger(__name__)

LATE_S = 0.05  #: the writer is there by then; and a slot must not be touched once it is free again
SMALL_BYTES = 256 * 1024  #: for less the writer's own touch is as fast
_Order = tuple[float, StorageAdapter, Segment, U32]


class Preparer:
    """Takes what a batch handed out; never makes the batch wait."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prepare", daemon=True)
        self._thread.start()

    def started(self, answers: Sequence[Any], engine: GroupEngine) -> None:
        """Look at the answers of a batch."""
        for answer in answers:
            if not isinstance(answer, WriteStarted) or not engine.is_shared_memory(answer.storage):
                continue
            for segment_id, slots in by_segment(answer.locations):
                segment = answer.segments[segment_id]
                if len(slots) * segment.slot_bytes >= SMALL_BYTES:
                    adapter = engine.adapter(segment.storage)
                    self._orders.put((time.monotonic(), adapter, segment, slots))

    def stop(self) -> None:
        self._orders.put(None)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            asked_at, adapter, segment, slots = order
            for first, count in extents(slots):
                if time.monotonic() > asked_at + LATE_S:
                    break
                try:
                    adapter.prepare(segment, first, count)
                except KvcmError as error:
                    log.info("preparing %s: %s", segment.path, error)
                    break


def extents(slots: U32) -> Iterator[tuple[int, int]]:
    """(first slot, count) of each run of consecutive slots.

    [4, 5, 6, 9] gives (4, 3), (9, 1).
    """
    ordered = np.unique(slots).astype(np.int64)
    if not len(ordered):
        return
    for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
        yield int(run[0]), len(run)
