"""Reclaimer actors do the slow part of reclaiming: they erase and they copy bytes.

*Erase*: a call names trash records of one instance, and the reclaimer reads those records from the index
itself: what is not (or no longer) in the trash is not erased. *Move*: a call names a copying session of
one instance; see `copying`. Both can be done again at any time, and dying costs what was in progress.

Each record and each session always goes to the same reclaimer, and a reclaimer does one call at a time;
so while it is at a slot, nobody can have confirmed that slot and given it to another session, even if a
stopped or fenced group actor asked for the same record earlier. When the pool changes its size, all
reclaimers of the old one end before the first of the new one starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kvcm_ray import logs
from kvcm_ray.actors import status_line
from kvcm_ray.actors.copying import Copier, Index
from kvcm_ray.actors.throttle import Throttle
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.events import Copied
from kvcm_ray.core.model import Segment, StorageConfig
from kvcm_ray.core.requests import BlockLocations, Flags
from kvcm_ray.errors import KvcmError, NotFound
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

log = logging.getLogger(__name__)

RECLAIMERS_DEFAULT = 2
ERASE_BYTES = 32 << 20  #: erased before looking at the settings again
NICENESS = 5  #: serving comes first; but writes may wait for what is erased here


class ReclaimerBody:
    """The work, without Ray. One thread at a time."""

    def __init__(
        self, view: RegistryView, opener: Callable[[StorageConfig], StorageAdapter] = open_storage
    ) -> None:
        self._view, self._open = view, opener
        self._readers: dict[str, IndexReader] = {}
        self._adapters: dict[str, tuple[StorageConfig, StorageAdapter]] = {}
        self._throttle = Throttle(view.reclaimer_settings)
        self._copier = Copier(self._adapter, self._throttle)

    def erase(self, index_path: str, trash_ids: Sequence[int]) -> tuple[list[int], str]:
        """Erase the blocks of these trash records.

        Returns the ids that need no more erasing, and what went wrong with the first other one ("" if
        nothing). Ids without a record, and all ids of an index that is gone, need none.
        """
        reader = self._reader(index_path)
        if reader is None:
            return list(trash_ids), ""
        wanted = set(trash_ids)
        records = [record for record in reader.trash() if record.trash_id in wanted]
        locations = BlockLocations.joined([record.locations for record in records])
        failed, problem = self._erase(reader, locations)
        if problem:
            log.warning("trash of %s: %s", index_path, problem)
        begin = 0
        for record in records:
            end = begin + len(record.locations)
            if failed[begin:end].any():
                wanted.discard(record.trash_id)
            begin = end
        return sorted(wanted), problem

    def move(self, index_path: str, session_ids: Sequence[str]) -> dict[str, Copied]:
        """Copy the blocks of these sessions.

        Returns what became of each block, for each session that there is.
        """
        reader = self._reader(index_path)
        if reader is None:
            return {}
        copied = {}
        for session_id in session_ids:
            session = reader.session(session_id)
            if session is not None:
                copied[session_id] = self._copier.copy(reader, session)
        return copied

    def _erase(self, reader: IndexReader, locations: BlockLocations) -> tuple[Flags, str]:
        """Erase all of these, in an order that the storages like; returns which failed, and why."""
        failed = np.zeros(len(locations), np.bool_)
        problem = ""
        for segment_id in np.unique(locations.segment).tolist():
            segment = reader.segment(segment_id)
            adapter = self._adapter(segment.storage) if segment is not None else None
            if segment is None or adapter is None:
                continue  # the storage was removed by force, and its blocks with it
            index = np.flatnonzero(locations.segment == segment_id)
            index = index[np.argsort(locations.slot[index], kind="stable")]
            for piece in _in_pieces(index, segment):
                if not self._throttle.admit(len(piece) * segment.slot_bytes):
                    failed[piece] = True
                    problem = problem or "the reclaimers are paused"
                    continue
                part = locations.take(piece)
                try:
                    adapter.delete(segment, part.slot, part.generation)
                except KvcmError as error:
                    failed[piece] = True
                    problem = problem or str(error)
        return failed, problem

    def _reader(self, index_path: str) -> IndexReader | None:
        """Reads the index; None if it is gone."""
        self._forget_gone()
        reader = self._readers.get(index_path)
        if reader is not None and not reader.refresh():
            self._readers.pop(index_path).close()
            reader = None
        if reader is None:
            try:
                reader = self._readers[index_path] = IndexReader(Path(index_path))
            except NotFound:
                return None
        return reader

    def _forget_gone(self) -> None:
        """An open index keeps its disk space, also when its instance was removed."""
        for path in [p for p in self._readers if not Path(p).exists()]:
            self._readers.pop(path).close()

    def _adapter(self, storage: str) -> StorageAdapter | None:
        config = self._view.storages().get(storage)
        known = self._adapters.get(storage)
        if known is not None and known[0] == config:
            return known[1]
        if known is not None:
            self._adapters.pop(storage)[1].close()
        if config is None:
            return None
        adapter = self._open(config)
        self._adapters[storage] = (config, adapter)
        return adapter


def _in_pieces(index: Index, segment: Segment) -> Iterator[Index]:
    step = max(1, ERASE_BYTES // max(segment.slot_bytes, 1))
    for begin in range(0, len(index), step):
        yield index[begin : begin + step]


class Reclaimer:
    """The actor. Sync and single-threaded on purpose; see above."""

    def __init__(self, data_dir: str, number: int, pool_size: int) -> None:
        logs.configure()
        self._number, self._pool_size = number, pool_size
        self._erased = self._moved = 0
        self._body = ReclaimerBody(RegistryView(data_dir))
        with contextlib.suppress(OSError):
            os.nice(NICENESS)
        status_line.keep(self, self._status)

    def __repr__(self) -> str:
        return f"Reclaimer({self._number} of {self._pool_size})"

    def _status(self) -> str:
        who = f"{self._number} of {self._pool_size}"
        return f"{who}: erased {self._erased} records, copied {self._moved} sessions"

    def erase(self, index_path: str, trash_ids: Sequence[int]) -> tuple[list[int], str]:
        """See `ReclaimerBody.erase`."""
        erased, problem = self._body.erase(index_path, trash_ids)
        self._erased += len(erased)
        return erased, problem

    def move(self, index_path: str, session_ids: Sequence[str]) -> dict[str, Copied]:
        """See `ReclaimerBody.move`."""
        copied = self._body.move(index_path, session_ids)
        self._moved += len(copied)
        return copied

    def pid(self) -> int:
        return os.getpid()
