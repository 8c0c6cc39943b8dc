"""Segments as files below a directory: everything that shared memory and file storages share.

The subclasses say how payload travels (`_load`, `_store`) and whether slots must be locked; the
order of steps, the checks and the errors are here.

* read: headers, copy, checksum over the caller's memory, headers again.
* write: erase headers, payload, headers. All headers of a call go last.
* delete: under an exclusive lock of the slots: erase headers, then punch holes.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import Segment
from kvcm_ray.core.requests import U32, Flags, Keys
from kvcm_ray.errors import (
    InvalidArgument,
    SegmentMissing,
    SessionNotFound,
    StorageError,
    StorageFull,
    StorageIOError,
)
from kvcm_ray.storage_adapters import erase, header, layout, ranges, system, workers
from kvcm_ray.storage_adapters.base import (
    Buffers,
    FoundSegment,
    Headers,
    SegmentOwner,
    StorageAdapter,
)
from kvcm_ray.storage_adapters.buffers import Bytes, Views
from kvcm_ray.storage_adapters.handles import Handle, HandleCache, spec_size
from kvcm_ray.storage_adapters.header_io import load_headers, save_headers
from kvcm_ray.storage_adapters.ranges import Piece, Slots

log = logging.getLogger(__name__)

LOCK_WAIT_S = 1.0
DROP_WAIT_S = 0.1  #: dropping a segment happens in a group's loop
LOG_EVERY_S = 60.0
SEAL_BYTES = 8 << 20  #: payload read at a time to seal it


class PathStorage(StorageAdapter):
    """A storage whose segments are directories of files."""

    def __init__(self, name: str, root: str) -> None:
        self.name = name
        self.root = root
        self._handles = HandleCache(root)
        self._logged: dict[str, float] = {}

    # ------------------------------------------------------------------- what subclasses say

    def _window(self, handle: Handle, views: Views, where: Slots, locked: bool) -> Bytes | None:
        """The data file as memory, if these slots can be touched there safely, else None."""
        return None

    def _load(self, handle: Handle, views: Views, piece: Piece, window: Bytes | None) -> bool:
        """Copy the payload of a piece into `views`; False if the file ends before."""
        begin = piece.slot * handle.size
        parts = views.parts(piece.begin, piece.end)
        return system.read_into(handle.data, parts, begin) == piece.span * handle.size

    def _store(self, handle: Handle, views: Views, piece: Piece, window: Bytes | None) -> None:
        """Copy the payload of a piece from `views`; raises OSError."""
        parts = views.parts(piece.begin, piece.end)
        system.write_from(handle.data, parts, piece.slot * handle.size)

    def _reading_locks(self, handle: Handle) -> bool:
        """Whether readers of these slots hold them against punching."""
        return False

    def _writing_locks(self, handle: Handle) -> bool:
        """Whether writers do. Slots that share pages need it: see `erase`."""
        return handle.size % system.PAGE != 0

    # -------------------------------------------------------------------------- whole segments

    def create_segment(self, segment: Segment, owner: SegmentOwner) -> None:
        need = segment.slots * (segment.slot_bytes + len(segment.specs) * header.HEADER_BYTES)
        with self._errors(segment, need):
            try:
                layout.create(Path(self.root), segment, owner)
            except FileNotFoundError:  # the parent was just removed with its last other segment
                layout.create(Path(self.root), segment, owner)

    def drop_segment(self, segment: Segment) -> int:
        with self._errors(segment, 0):
            freed = layout.stored_bytes(Path(self.root) / segment.path)
            self._give_back(segment)
            layout.drop(Path(self.root), segment)
        self._handles.forget(segment)
        return freed

    def _give_back(self, segment: Segment) -> None:
        """Free the payload now: others may have the files open, and keep them, for a long time."""
        deadline = time.monotonic() + DROP_WAIT_S
        for spec in segment.specs:
            with (
                suppress(SegmentMissing),
                self._handles.use(segment, spec.name) as handle,
                handle.locked(
                    0, segment.slots, exclusive=True, wait_s=deadline - time.monotonic()
                ) as alone,
            ):
                if alone:
                    system.punch(handle.data, 0, segment.slots * handle.size)

    def check_segment(self, segment: Segment) -> str:
        for spec in segment.specs:
            try:
                with self._handles.use(segment, spec.name) as handle:
                    handle.require(segment.slots)
                    if handle.replaced:
                        raise SegmentMissing(f"{handle.data_path} was replaced")
            except SegmentMissing as error:
                self._handles.forget(segment)
                return error.message
            except OSError as error:
                return str(error)
        return ""

    def list_segments(self) -> Iterator[FoundSegment]:
        return layout.find(Path(self.root))

    def stored_bytes(self, segment: Segment) -> int:
        return layout.stored_bytes(Path(self.root) / segment.path)

    def close(self) -> None:
        self._handles.close()

    def prepare(self, segment: Segment, first_slot: int, count: int) -> None:
        if first_slot < 0 or count < 0 or first_slot + count > segment.slots:
            raise InvalidArgument(f"slots {first_slot}+{count} of {segment.slots}")
        if count == 0:
            return
        with self._errors(segment, count * segment.slot_bytes):
            for spec in segment.specs:
                with self._handles.use(segment, spec.name) as handle:
                    handle.require(first_slot + count)
                    _allocate(handle, first_slot, count)

    # ---------------------------------------------------------------------------------- blocks

    def write(
        self,
        segment: Segment,
        spec_name: str,
        slots: U32,
        keys: Keys,
        generations: U32,
        buffers: Buffers,
    ) -> None:
        size = spec_size(segment, spec_name)
        views = Views(buffers, size, writable=False)
        where = _checked(segment, slots, keys, generations, views)
        if len(where) == 0:
            return
        with (
            self._errors(segment, len(where) * size),
            self._handles.use(segment, spec_name) as handle,
            self._hold(handle, where, self._writing_locks(handle), LOCK_WAIT_S) as locked,
        ):
            handle.require(int(where.max()) + 1)
            _erase_older(handle, where, generations)
            sums = np.empty(len(where), np.uint64)
            seeds = header.seeds(segment.tag, spec_name, where, keys, generations)

            window = self._window(handle, views, where, locked)

            def store(piece: Piece) -> None:
                here = slice(piece.begin, piece.end)
                payloads = views.each(piece.begin, piece.end)
                sums[here] = header.checksums(payloads, seeds[here])
                self._store(handle, views, piece, window)

            _in_pieces(store, where, size)
            rows = header.build(segment.tag, spec_name, where, keys, generations, size, sums)
            save_headers(handle, where, rows)
            if handle.unlinked:
                raise SegmentMissing(f"{handle.data_path} was removed during the write")

    def read(
        self,
        segment: Segment,
        spec_name: str,
        slots: U32,
        keys: Keys,
        generations: U32,
        out: Buffers,
    ) -> Flags:
        views = Views(out, spec_size(segment, spec_name), writable=True)
        where = _checked(segment, slots, keys, generations, views)
        flags = np.zeros(len(where), np.bool_)
        if len(where) == 0:
            return flags
        try:
            stale = self._read(segment, spec_name, where, keys, generations, views, flags)
            if stale:  # files of that name were made anew since we opened them
                self._handles.forget(segment)
                self._read(segment, spec_name, where, keys, generations, views, flags)
        except SegmentMissing as error:
            self._log_once(segment, error)
        except OSError as error:
            flags[:] = False
            self._log_once(segment, error)
        return flags

    def _read(
        self,
        segment: Segment,
        spec_name: str,
        where: Slots,
        keys: Keys,
        generations: U32,
        views: Views,
        flags: Flags,
    ) -> bool:
        """Set `flags`; returns True if something missed because other files are there now."""
        with (
            self._handles.use(segment, spec_name) as handle,
            self._hold(handle, where, self._reading_locks(handle), 0.0) as locked,
        ):
            before = load_headers(handle, where)
            flags[:] = header.matching(before, segment.tag, spec_name, where, keys, generations, handle.size)
            flags &= where < handle.slots
            sums = before["checksum"]
            seeds = header.seeds(segment.tag, spec_name, where, keys, generations)

            window = self._window(handle, views, where[flags], locked)

            def load(piece: Piece) -> None:
                here = slice(piece.begin, piece.end)
                if not self._load(handle, views, piece, window):
                    flags[here] = False
                    return
                payloads = views.each(piece.begin, piece.end)
                flags[here] = header.checksums(payloads, seeds[here]) == sums[here]

            _in_pieces(load, where, handle.size, flags.copy())  # `load` clears flags meanwhile
            if flags.any():
                flags &= header.same(before, load_headers(handle, where))
            return not flags.all() and handle.replaced

    def seal(self, segment: Segment, spec_name: str, slots: U32, keys: Keys, generations: U32) -> Flags:
        where = _checked(segment, slots, keys, generations, None)
        sealed = np.zeros(len(where), np.bool_)
        if len(where) == 0:
            return sealed
        try:
            with (
                self._errors(segment, len(where) * header.HEADER_BYTES),
                self._handles.use(segment, spec_name) as handle,
                self._hold(handle, where, self._writing_locks(handle), LOCK_WAIT_S),
            ):
                rows = load_headers(handle, where)
                others = header.pledged(rows) & (rows["generation"] != generations)
                todo = np.flatnonzero(header.blank(rows) & ~others)
                step = max(1, SEAL_BYTES // max(1, handle.size))
                for first in range(0, len(todo), step):
                    part = todo[first : first + step]
                    _seal_some(handle, where[part], keys[part], generations[part], rows[part])
                rows = load_headers(handle, where)
                sealed[:] = header.matching(
                    rows, segment.tag, spec_name, where, keys, generations, handle.size
                )
        except SegmentMissing as error:
            self._log_once(segment, error)
        return sealed

    def sealed(self, segment: Segment, spec_name: str, slots: U32, keys: Keys, generations: U32) -> Flags:
        where = _checked(segment, slots, keys, generations, None)
        try:
            with self._errors(segment, 0), self._handles.use(segment, spec_name) as handle:
                rows = load_headers(handle, where)
                return header.matching(rows, segment.tag, spec_name, where, keys, generations, handle.size)
        except SegmentMissing:
            return np.zeros(len(where), np.bool_)

    def delete(self, segment: Segment, slots: U32, generations: U32) -> int:
        where = _checked(segment, slots, None, generations, None)
        freed = 0
        if len(where) == 0:
            return freed
        for spec in segment.specs:
            try:
                with self._errors(segment, 0), self._handles.use(segment, spec.name) as handle:
                    locks = self._reading_locks(handle) or self._writing_locks(handle)
                    freed += erase.erase_slots(handle, where, generations, locks)
            except SegmentMissing:
                self._handles.forget(segment)
        return freed

    def raw_headers(self, segment: Segment, spec_name: str) -> Headers:
        with self._errors(segment, 0), self._handles.use(segment, spec_name) as handle:
            return load_headers(handle, np.arange(handle.slots, dtype=np.int64))

    def written_slots(self, segment: Segment, spec_name: str) -> Flags:
        flags = np.zeros(segment.slots, np.bool_)
        with self._errors(segment, 0), self._handles.use(segment, spec_name) as handle:
            if handle.size % system.PAGE:
                flags[: handle.slots] = True
                return flags
            for begin, end in system.data_ranges(handle.data, handle.slots * handle.size):
                flags[begin // handle.size : -(-end // handle.size)] = True
        return flags

    # --------------------------------------------------------------------------------- helpers

    def _hold(self, handle: Handle, where: Slots, wanted: bool, wait_s: float) -> Any:
        if not wanted:
            return nullcontext(False)
        first, last = int(where.min()), int(where.max())
        return handle.locked(first, last - first + 1, wait_s=wait_s)

    @contextmanager
    def _errors(self, segment: Segment, asked_bytes: int) -> Iterator[None]:
        """Turn OSError into our errors."""
        path = os.path.join(self.root, segment.path)
        try:
            yield
        except StorageError:
            self._handles.forget(segment)
            raise
        except OSError as error:
            if error.errno in system.FULL_ERRNOS:
                free = system.free_bytes(path)
                raise StorageFull(
                    f"storage {self.name!r} is full: {path} needs {asked_bytes} bytes, "
                    f"{free} are free ({error.strerror})",
                    path=path, asked=asked_bytes, free=free, errno=error.errno,
                ) from error  # fmt: skip
            raise StorageIOError(
                f"storage {self.name!r}: {path}: {error}", path=path, errno=error.errno or 0
            ) from error

    def _log_once(self, segment: Segment, error: Exception) -> None:
        """One line a segment and minute: a broken disk must not fill another one with logs."""
        now = time.monotonic()
        if now - self._logged.get(segment.path, -LOG_EVERY_S) < LOG_EVERY_S:
            return
        if len(self._logged) > 1000:
            self._logged.clear()
        self._logged[segment.path] = now
        log.warning("storage %s, segment %s: %s; counted as misses", self.name, segment.path, error)


def _checked(
    segment: Segment,
    given: U32,
    keys: Keys | None,
    generations: U32,
    views: Views | None,
) -> Slots:
    """Slots as int64, after checking that everything fits together."""
    where = np.asarray(given, np.int64)
    counts = {"slots": len(where), "generations": len(generations)}
    if keys is not None:
        counts["keys"] = len(keys)
    if views is not None:
        counts["buffers"] = len(views)
    if len(set(counts.values())) > 1:
        raise InvalidArgument(f"unequal lengths: {counts}")
    if len(where) and (where.min() < 0 or where.max() >= segment.slots):
        raise InvalidArgument(f"slots {where.min()}..{where.max()} of {segment.slots}")
    return where


def _in_pieces(work: Callable[[Piece], None], where: Slots, size: int, wanted: Flags | None = None) -> None:
    """Call `work` for runs of adjacent slots, by several threads if there are bytes enough."""
    total = size * (len(where) if wanted is None else int(np.count_nonzero(wanted)))
    threads = workers.shares(total, size)
    todo = deque(ranges.pieces(where, size, wanted, total // threads))

    def share() -> None:
        while True:
            try:
                piece = todo.popleft()
            except IndexError:
                return
            work(piece)

    workers.run_all([share] * threads)


def _erase_older(handle: Handle, where: Slots, generations: U32) -> None:
    """Clear the headers of slots about to be written.

    Raises:
        SessionNotFound: one of them belongs to a younger session.
    """
    rows = load_headers(handle, where)
    used = ~header.blank(rows)
    if not used.any():
        return
    whole = header.valid(rows, handle.segment.tag, handle.spec_name, where)
    if (whole & (rows["generation"] > generations)).any():
        raise SessionNotFound(
            f"slots of {handle.segment.path} were given to a younger session; this one has expired"
        )
    save_headers(handle, where[used], np.zeros(int(used.sum()), header.HEADER))


def _allocate(handle: Handle, first: int, count: int) -> None:
    size = handle.size
    system.allocate(handle.header, first * header.HEADER_BYTES, count * header.HEADER_BYTES)
    system.allocate(handle.data, first * size, count * size)


def _seal_some(handle: Handle, where: Slots, keys: Keys, generations: U32, before: Headers) -> None:
    """Write headers for those of `where` (no header yet) that have a payload: the pledged one, if any."""
    size = handle.size
    payload: npt.NDArray[np.uint8] = np.empty(size, np.uint8)
    seeds = header.seeds(handle.segment.tag, handle.spec_name, where, keys, generations)
    no_keys = np.zeros(len(where), np.int64)
    pledges = header.seeds(handle.segment.tag, handle.spec_name, where, no_keys, generations)
    pledged = header.pledged(before)
    good = np.zeros(len(where), np.bool_)
    sums = np.zeros(len(where), np.uint64)
    for index, slot in enumerate(where.tolist()):
        if not system.has_data(handle.data, slot * size, size):
            continue
        if system.read_into(handle.data, [payload], slot * size) == size:
            sums[index : index + 1] = header.checksums([payload], seeds[index : index + 1])
            promised = header.checksums([payload], pledges[index : index + 1])
            good[index] = not pledged[index] or promised[0] == before["checksum"][index]
    rows = header.build(
        handle.segment.tag, handle.spec_name, where[good], keys[good], generations[good], size,
        sums[good],
    )  # fmt: skip
    save_headers(handle, where[good], rows)
