"""Reclaimer actors erase the bytes of blocks whose trash records are committed.

A call names trash records of one instance, and the reclaimer reads those records from the index itself:
what is not (or no longer) in the trash is not erased. Each record always goes to the same reclaimer, and
a reclaimer does one call at a time; so while it erases a slot, nobody can have confirmed that slot and
given it to another session, even if a stopped or fenced group actor asked for the same record earlier.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import StorageConfig
from kvcm_ray.core.records import TrashRecord
from kvcm_ray.core.segments import by_segment
from kvcm_ray.errors import KvcmError, NotFound
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

log = logging.getLogger(__name__)

RECLAIMERS_DEFAULT = 2


class ReclaimerBody:
    """The work, without Ray. One thread at a time."""

    def __init__(self, view: RegistryView) -> None:
        self._view = view
        self._readers: dict[str, IndexReader] = {}
        self._adapters: dict[str, tuple[StorageConfig, StorageAdapter]] = {}

    def erase(self, index_path: str, trash_ids: Sequence[int]) -> tuple[list[int], str]:
        """Erase the blocks of these trash records.

        Returns the ids that need no more erasing, and what went wrong with the first other one ("" if
        nothing). Ids without a record, and all ids of an index that is gone, need none.
        """
        self._forget_gone()
        reader = self._reader(index_path)
        if reader is None:
            return list(trash_ids), ""
        wanted = set(trash_ids)
        done = wanted.copy()
        problem = ""
        for record in reader.trash():
            if record.trash_id not in wanted:
                continue
            try:
                self._erase_record(reader, record)
            except KvcmError as error:
                log.warning("trash %d of %s: %s", record.trash_id, index_path, error)
                done.discard(record.trash_id)
                problem = problem or str(error)
        return sorted(done), problem

    def _erase_record(self, reader: IndexReader, record: TrashRecord) -> None:
        locations = record.locations
        for segment_id, _ in by_segment(locations):
            segment = reader.segment(segment_id)
            if segment is None:
                continue
            adapter = self._adapter(segment.storage)
            if adapter is None:
                continue  # the storage was removed by force, and its blocks with it
            part = locations.take(locations.segment == segment_id)
            adapter.delete(segment, part.slot, part.generation)

    def _reader(self, index_path: str) -> IndexReader | None:
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
        adapter = open_storage(config)
        self._adapters[storage] = (config, adapter)
        return adapter


class Reclaimer:
    """The actor. Sync and single-threaded on purpose; see above."""

    def __init__(self, data_dir: str, number: int) -> None:
        self._number = number
        self._body = ReclaimerBody(RegistryView(data_dir))

    def __repr__(self) -> str:
        return f"Reclaimer({self._number})"

    def erase(self, index_path: str, trash_ids: Sequence[int]) -> tuple[list[int], str]:
        """See `ReclaimerBody.erase`."""
        return self._body.erase(index_path, trash_ids)
