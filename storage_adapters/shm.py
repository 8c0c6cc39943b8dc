"""Storage on shared memory (a tmpfs): copies straight from and to a memory map.

A copy out of a map runs at twice the speed of ``preadv``, but touching a page that is not there may
need memory that a full tmpfs does not have, and that is a signal. So a map is only touched while
the slots are locked against punching and every page of the range is in memory; anything else (fresh
space, swapped pages, a lock that is taken) goes through system calls, which report error numbers.
"""

from __future__ import annotations

import numpy as np

from kvcm_ray.storage_adapters import ranges
from kvcm_ray.storage_adapters.buffers import Bytes, Views
from kvcm_ray.storage_adapters.handles import Handle
from kvcm_ray.storage_adapters.path_storage import PathStorage
from kvcm_ray.storage_adapters.ranges import Piece, Slots

#: Below this many bytes a copy, the kernel's vectored copy beats a loop in Python.
MAPPED_BYTES_MIN = 32 * 1024


class SharedMemoryStorage(PathStorage):
    """Segments below a directory of a tmpfs, normally /dev/shm."""

    def _reading_locks(self, handle: Handle) -> bool:
        return True

    def _writing_locks(self, handle: Handle) -> bool:
        return True

    def _window(self, handle: Handle, views: Views, where: Slots, locked: bool) -> Bytes | None:
        if not locked or (views.matrix is None and handle.size < MAPPED_BYTES_MIN):
            return None
        spans = [(int(where[begin]), end - begin) for begin, end in ranges.runs(where)]
        return handle.mapped([(slot * handle.size, count * handle.size) for slot, count in spans])

    def _load(self, handle: Handle, views: Views, piece: Piece, window: Bytes | None) -> bool:
        if window is None:
            return super()._load(handle, views, piece, None)
        at = piece.slot * handle.size
        for part in views.parts(piece.begin, piece.end):
            np.copyto(part, window[at : at + len(part)])
            at += len(part)
        return True

    def _store(self, handle: Handle, views: Views, piece: Piece, window: Bytes | None) -> None:
        if window is None:
            super()._store(handle, views, piece, None)
            return
        at = piece.slot * handle.size
        for part in views.parts(piece.begin, piece.end):
            np.copyto(window[at : at + len(part)], part)
            at += len(part)
