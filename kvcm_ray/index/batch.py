"""One write transaction of an index: what the group actor does to it, and the log entry it makes.

Every change is recorded as an operation ``[name, *arguments]`` of plain msgpack values; the
operations of a transaction are its log entry, and `IndexBatch.apply` does the same to another copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvcm_ray.core import limits
from kvcm_ray.core.model import Segment
from kvcm_ray.core.records import PinRecord, SessionRecord, TrashRecord
from kvcm_ray.core.requests import U32, BlockLocations, Flags, Keys
from kvcm_ray.errors import Corrupt, InvalidArgument, StorageFull
from kvcm_ray.index import codec, copies, walk
from kvcm_ray.index.codec import U64, Counters
from kvcm_ray.index.runs import RunTables
from kvcm_ray.index.survey import census, survey
from kvcm_ray.index.tables import BOOT, COUNTERS, EPOCH, Tables, put_meta, sealed_payloads, sealed_records

LOG_BYTES_MAX = 8 << 20


class IndexBatch:
    """Reads see the changes made before them in the same batch. Not for several threads.

    All changing methods raise StorageFull when map or disk is full; the batch then ends without any
    effect. Made by `IndexWriter.begin`.
    """

    def __init__(self, txn: Any, tables: Tables, counters: Counters, full: StorageFull | None) -> None:
        self._txn, self._tables, self.counters = txn, tables, counters
        self.full = full  #: why nothing that makes the index larger is taken, if so
        self.damage = walk.Damage()
        self._runs = RunTables(txn, tables, counters, self.damage)
        self.ops: list[list[Any]] = []

    # ------------------------------------------------------------------------------- reading

    def lookup(self, keys: Keys) -> tuple[Flags, BlockLocations]:
        """Which keys are SERVING, and where (zeros for misses)."""
        hits, columns = walk.lookup(self._txn, self._tables, contiguous(keys), self.damage)
        return hits, BlockLocations(columns[0], columns[1], columns[2])

    def written(self, keys: Keys) -> U32:
        """Unix time each block was written at; 0 for misses."""
        _, columns = walk.lookup(self._txn, self._tables, contiguous(keys), self.damage)
        written: U32 = columns[3]
        return written

    def select_written(self, begin_s: int, end_s: int) -> Keys:
        """Keys of all SERVING blocks written within ``[begin_s, end_s]``; reads every run."""
        return walk.written_between(self._txn, self._tables, begin_s, end_s, self.damage)

    def copies(self, keys: Keys) -> tuple[Flags, BlockLocations]:
        """Which keys have a second location, and where (zeros for the others)."""
        return copies.lookup(self._txn, self._tables, contiguous(keys), self.damage)

    # -------------------------------------------------------------------------------- blocks

    def add_blocks(
        self, keys: Keys, locations: BlockLocations, parent_key: int | None, written_s: int
    ) -> None:
        """Make blocks SERVING; `parent_key` is the key before the first one in its chain, if any.

        Raises:
            InvalidArgument: unequal lengths, a key that is there already or is given twice.
        """
        keys, places = contiguous(keys), _rows(keys, locations)
        columns = np.vstack((places, np.full(len(keys), written_s, np.uint32)))
        self._grow()
        self.ops.append(
            ["add", codec.pack_keys(keys), codec.pack_locations(locations), parent_key, written_s]
        )
        self._runs.add(keys, columns, parent_key)

    def move_blocks(self, keys: Keys, locations: BlockLocations) -> None:
        """SERVING blocks are at other locations from now on; all else about them stays.

        Raises:
            InvalidArgument: unequal lengths, or one of them is not SERVING.
        """
        keys, places = contiguous(keys), _rows(keys, locations)
        self.ops.append(["move", codec.pack_keys(keys), codec.pack_locations(locations)])
        self._runs.move(keys, places)

    def remove_blocks(self, keys: Keys) -> int:
        """End the SERVING state of blocks; returns how many of them had it."""
        keys = contiguous(keys)
        self.ops.append(["remove", codec.pack_keys(keys)])
        return self._runs.remove(keys)

    def put_copies(self, keys: Keys, locations: BlockLocations) -> None:
        """SERVING blocks have a second location, in place of an earlier second one.

        Raises:
            InvalidArgument: unequal lengths, or one of them is not SERVING.
        """
        keys = contiguous(keys)
        _rows(keys, locations)
        self._grow()
        hits, _ = self.lookup(keys)
        if not hits.all():
            absent = len(hits) - int(hits.sum())
            raise InvalidArgument(f"{absent} of {len(keys)} blocks to have copies are not in the index")
        self.ops.append(["copy", codec.pack_keys(keys), codec.pack_locations(locations)])
        copies.put(self._txn, self._tables, keys, locations)

    def drop_copies(self, keys: Keys) -> int:
        """Forget second locations; returns how many there were."""
        keys = contiguous(keys)
        self.ops.append(["uncopy", codec.pack_keys(keys)])
        return copies.drop(self._txn, self._tables, keys)

    def repair(self) -> int:
        """Drop whatever is damaged, blocks in unknown segments, and copies in unknown segments or of
        absent blocks; returns how many keys that lost.

        Reads everything.
        """
        segments = {int.from_bytes(key, "little") for key in self._repair_table("segments")}
        for name in ("sessions", "trash", "answers", "pins", "copies"):
            self._repair_table(name)
        found = census(self._txn, survey(self._txn, self._tables))
        lost = self._runs.repair(found, segments)
        if len(lost):
            self.ops.append(["remove", codec.pack_keys(lost)])
        self._repair_copies(segments)
        return len(lost)

    def _repair_table(self, name: str) -> list[bytes]:
        """Drop damaged records of a table; returns the keys of the others."""
        kept: list[bytes] = []
        damaged: list[bytes] = []
        for key, payload in sealed_payloads(self._txn, name.encode(), getattr(self._tables, name)):
            (damaged if payload is None else kept).append(key)
        for key in damaged:
            self._drop(name, key)
        return kept

    def _repair_copies(self, segments: set[int]) -> None:
        keys, places, _ = copies.everything(self._txn, self._tables)
        good, _ = self.lookup(keys)
        good &= np.isin(places.segment, np.array(sorted(segments), np.uint32))
        if not good.all():
            self.drop_copies(keys[~good])

    # ------------------------------------------------------------------------- other records

    def put_session(self, record: SessionRecord) -> None:
        """Store a write in progress, replacing one of the same session id."""
        counters = self.counters
        counters.next_generation = max(counters.next_generation, record.generation + 1)
        self._put("sessions", record.session_id.encode(), codec.pack_session(record))

    def drop_session(self, session_id: str) -> None:
        self._drop("sessions", session_id.encode())

    def put_trash(self, record: TrashRecord) -> None:
        self.counters.next_trash_id = max(self.counters.next_trash_id, record.trash_id + 1)
        self._put("trash", U64.pack(record.trash_id), codec.pack_trash(record))

    def drop_trash(self, trash_id: int) -> None:
        self._drop("trash", U64.pack(trash_id))

    def put_segment(self, segment: Segment) -> None:
        counters = self.counters
        counters.next_segment_id = max(counters.next_segment_id, segment.segment_id + 1)
        self._put("segments", U64.pack(segment.segment_id), codec.pack_segment(segment))

    def drop_segment(self, segment_id: int) -> None:
        self._drop("segments", U64.pack(segment_id))

    def put_pin(self, record: PinRecord) -> None:
        """Store a pin, replacing one of the same name."""
        self._put("pins", record.name.encode(), codec.pack_pin(record))

    def drop_pin(self, name: str) -> None:
        self._drop("pins", name.encode())

    def remember(self, event_id: str, reply: bytes) -> None:
        """Keep the answer of an event; the oldest is forgotten beyond ANSWERS_REMEMBERED_MAX."""
        number = self.counters.next_answer
        self.counters.next_answer += 1
        self._put("answers", U64.pack(number), [event_id, reply])
        if number > limits.ANSWERS_REMEMBERED_MAX:
            oldest = U64.pack(number - limits.ANSWERS_REMEMBERED_MAX)
            self._txn.delete(oldest, db=self._tables.answers)

    def claim(self, epoch: int, boot: str, *, expire: bool) -> None:
        """Make `epoch` the owner; with `expire` the times of another boot become 0."""
        self.ops.append(["claim", epoch, boot, expire])
        put_meta(self._txn, self._tables, EPOCH, U64.pack(epoch))
        put_meta(self._txn, self._tables, BOOT, boot.encode())
        if expire:
            self._expire("sessions", 4)
            self._expire("trash", 2)

    def raise_counters(self, generation: int, trash_id: int, segment_id: int) -> None:
        """Numbers below these are never given out again."""
        self.ops.append(["counters", generation, trash_id, segment_id])
        counters = self.counters
        counters.next_generation = max(counters.next_generation, generation)
        counters.next_trash_id = max(counters.next_trash_id, trash_id)
        counters.next_segment_id = max(counters.next_segment_id, segment_id)

    def _expire(self, name: str, field: int) -> None:
        """Set a time in all records of a table to 0, by position in the packed record."""
        handle = getattr(self._tables, name)
        for key, packed in list(sealed_records(self._txn, name.encode(), handle)):
            if packed is not None:
                packed[field] = 0
                record = codec.seal(name.encode(), key, codec.pack(packed))
                self._txn.put(key, record, db=handle)

    def _put(self, name: str, key: bytes, value: Any) -> None:
        if name in ("sessions", "segments", "pins"):
            self._grow()
        self.ops.append(["put", name, key, value])
        record = codec.seal(name.encode(), key, codec.pack(value))
        self._txn.put(key, record, db=getattr(self._tables, name))

    def _drop(self, name: str, key: bytes) -> None:
        self.ops.append(["drop", name, key])
        self._txn.delete(key, db=getattr(self._tables, name))

    def _grow(self) -> None:
        """Refuse what makes a full index larger; removing needs the rest of the room."""
        if self.full is not None:
            raise self.full

    # ----------------------------------------------------------------------------------- log

    def apply(self, ops: list[list[Any]]) -> None:
        """Do the operations of a log entry.

        Raises:
            Corrupt: an operation that this version does not know.
        """
        for name, *arguments in ops:
            apply = _APPLY.get(name)
            if apply is None:
                raise Corrupt(f"unknown operation {name!r} in the log of an index")
            apply(self, *arguments)

    def finish(self, epoch: int) -> None:
        """Write log entry and counters; the transaction is ready to be committed."""
        counters, handle = self.counters, self._tables.log
        counters.seq += 1
        key = U64.pack(counters.seq)
        record = codec.seal(b"log", key, codec.pack([epoch, self.ops]))
        self._txn.put(key, record, db=handle, append=True)
        counters.log_bytes += len(record)
        while counters.log_bytes > LOG_BYTES_MAX and counters.log_first < counters.seq:
            oldest = self._txn.pop(U64.pack(counters.log_first), db=handle)
            counters.log_bytes -= len(oldest or b"")
            counters.log_first += 1
        put_meta(self._txn, self._tables, COUNTERS, counters.encode())


def contiguous(keys: Keys) -> Keys:
    return np.ascontiguousarray(keys, np.int64)


def _rows(keys: Keys, locations: BlockLocations) -> codec.Columns:
    """Locations of `keys` as rows of segment, slot, generation. Raises InvalidArgument."""
    columns = (locations.segment, locations.slot, locations.generation)
    if {len(column) for column in columns} != {len(keys)}:
        raise InvalidArgument(f"{len(locations)} locations for {len(keys)} blocks")
    return np.array(columns, np.uint32)


def _apply_add(
    batch: IndexBatch, keys: bytes, locations: list[Any], parent_key: int | None, written_s: int
) -> None:
    unpacked = codec.unpack_locations(locations)
    batch.add_blocks(codec.unpack_keys(keys), unpacked, parent_key, written_s)


def _apply_put(batch: IndexBatch, name: str, key: bytes, value: Any) -> None:
    _PUT[name](batch, value)


def _apply_claim(batch: IndexBatch, epoch: int, boot: str, expire: bool) -> None:
    batch.claim(epoch, boot, expire=expire)


_PUT: dict[str, Callable[[IndexBatch, Any], None]] = {
    "answers": lambda batch, value: batch.remember(*value),
    "sessions": lambda batch, value: batch.put_session(codec.unpack_session(value)),
    "trash": lambda batch, value: batch.put_trash(codec.unpack_trash(value)),
    "segments": lambda batch, value: batch.put_segment(codec.unpack_segment(value)),
    "pins": lambda batch, value: batch.put_pin(codec.unpack_pin(value)),
}

_APPLY: dict[str, Callable[..., Any]] = {
    "add": _apply_add,
    "remove": lambda batch, keys: batch.remove_blocks(codec.unpack_keys(keys)),
    "move": lambda batch, keys, locations: batch.move_blocks(
        codec.unpack_keys(keys), codec.unpack_locations(locations)
    ),
    "copy": lambda batch, keys, locations: batch.put_copies(
        codec.unpack_keys(keys), codec.unpack_locations(locations)
    ),
    "uncopy": lambda batch, keys: batch.drop_copies(codec.unpack_keys(keys)),
    "put": _apply_put,
    "drop": lambda batch, name, key: batch._drop(name, key),
    "claim": _apply_claim,
    "counters": IndexBatch.raise_counters,
}
