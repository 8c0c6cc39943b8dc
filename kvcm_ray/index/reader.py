"""The reading side of an index: no lock of the writer's, no RPC, any process of the node.

A record that fails its checksum reads as a miss and is counted in `corrupt_records`. Results are
copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kvcm_ray.core.model import Segment
from kvcm_ray.core.records import PinRecord, SessionRecord, TrashRecord
from kvcm_ray.core.requests import U32, BlockLocations, Flags, Keys
from kvcm_ray.errors import KvcmError, NotFound
from kvcm_ray.index import boot, codec, copies, environment, tables, walk
from kvcm_ray.index.log import LogEntry, follow, read_log
from kvcm_ray.index.survey import Census, census, survey

T = TypeVar("T")


@dataclass(slots=True)
class Match:
    """The longest prefix of the keys that is SERVING."""

    length: int  #: blocks
    locations: BlockLocations  #: of those blocks


class IndexReader:
    """Raises on opening: NotFound (no index there, or not set up yet), Corrupt, Unsupported.

    Looking up never raises for damaged records; it raises Unavailable in a forked process and
    another KvcmError if LMDB refuses to read at all. May be used by several threads.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if boot.read_identity(self.path) is None:
            raise NotFound(f"no index at {self.path}")
        self._shared = environment.acquire(self.path, environment.READ)
        self._damage = walk.Damage()
        self._closed = False

    @property
    def corrupt_records(self) -> int:
        """Damaged records met by this reader."""
        return self._damage.records

    # --------------------------------------------------------------------------------- blocks

    def match(self, keys: Keys) -> Match:
        """Longest prefix of `keys`, with locations."""
        keys = np.ascontiguousarray(keys, np.int64)
        shared = self._shared
        with shared.lock:
            txn = shared.begin()
            try:
                length, columns = walk.match(txn, shared.tables, keys, self._damage)
            finally:
                txn.abort()
        return Match(
            length,
            BlockLocations(columns[0, :length], columns[1, :length], columns[2, :length]),
        )

    def match_length(self, keys: Keys) -> int:
        """Length of the longest prefix of `keys`; verifies what it reads, but no locations."""
        keys = np.ascontiguousarray(keys, np.int64)
        shared = self._shared
        with shared.lock:
            txn = shared.begin()
            try:
                return walk.match_length(txn, shared.tables, keys, self._damage)
            finally:
                txn.abort()

    def lookup(self, keys: Keys) -> tuple[Flags, BlockLocations]:
        """Which of `keys` are SERVING, and where (zeros for misses)."""
        hits, columns = self._lookup(keys)
        return hits, BlockLocations(columns[0], columns[1], columns[2])

    def written(self, keys: Keys) -> U32:
        """Unix time each block was written at; 0 for misses."""
        _, columns = self._lookup(keys)
        written: U32 = columns[3]
        return written

    def _lookup(self, keys: Keys) -> tuple[Flags, codec.Columns]:
        keys = np.ascontiguousarray(keys, np.int64)
        with self._shared.read() as (txn, handles):
            return walk.lookup(txn, handles, keys, self._damage)

    def copies(self, keys: Keys) -> tuple[Flags, BlockLocations]:
        """Which of `keys` have a second location, and where (zeros for the others).

        For blocks that could not be read where `match` and `lookup` say they are.
        """
        keys = np.ascontiguousarray(keys, np.int64)
        with self._shared.read() as (txn, handles):
            return copies.lookup(txn, handles, keys, self._damage)

    def all_copies(self) -> tuple[Keys, BlockLocations]:
        """Every block that has a second location, and where."""
        with self._shared.read() as (txn, handles):
            keys, places, damaged = copies.everything(txn, handles)
        self._damage.records += damaged
        return keys, places

    def select_written(self, begin_s: int, end_s: int) -> Keys:
        """Keys of all blocks written within ``[begin_s, end_s]``; reads every run."""
        with self._shared.read() as (txn, handles):
            return walk.written_between(txn, handles, begin_s, end_s, self._damage)

    def runs(self) -> Iterator[codec.Run]:
        """Every intact run, from one transaction (for fsck: holds them all in memory)."""
        with self._shared.read() as (txn, handles):
            found = list(walk.all_runs(txn, handles))
        self._damage.records += sum(run is None for _, run in found)
        return (run for _, run in found if run is not None)

    def verify(self) -> list[str]:
        """Sentences about all that is damaged or contradicts itself; empty if nothing is."""
        with self._shared.read() as (txn, handles):
            return list(_problems(txn, handles))

    # ----------------------------------------------------------------------------- other records

    def segment(self, segment_id: int) -> Segment | None:
        """None if there is no such segment."""
        packed = self._get("segments", codec.U64.pack(segment_id))
        return None if packed is None else codec.unpack_segment(packed)

    def segments(self) -> dict[int, Segment]:
        found = [codec.unpack_segment(packed) for packed in self._all("segments")]
        return {segment.segment_id: segment for segment in found}

    def session(self, session_id: str) -> SessionRecord | None:
        packed = self._get("sessions", session_id.encode()) if 0 < len(session_id) < 256 else None
        return None if packed is None else codec.unpack_session(packed)

    def sessions(self) -> list[SessionRecord]:
        return [codec.unpack_session(packed) for packed in self._all("sessions")]

    def trash(self) -> list[TrashRecord]:
        return [codec.unpack_trash(packed) for packed in self._all("trash")]

    def pins(self) -> list[PinRecord]:
        return [codec.unpack_pin(packed) for packed in self._all("pins")]

    def commit_seq(self) -> int:
        """Number of the last commit; 0 if it cannot be read."""
        counters = self._counters()
        return counters.seq if counters else 0

    def key_count(self) -> int:
        """SERVING blocks; 0 if it cannot be read."""
        counters = self._counters()
        return counters.blocks if counters else 0

    def epoch(self) -> int:
        """Epoch of the present owner; 0 if it cannot be read."""
        with self._shared.read() as (txn, handles):
            payload = tables.get_meta(txn, handles, tables.EPOCH)
        return int(codec.U64.unpack(payload)[0]) if payload else 0

    def log(self, from_seq: int) -> Iterator[LogEntry]:
        """Entries from commit `from_seq` on, up to the last one. Raises LogGap, Corrupt."""

        def read(seq: int) -> list[LogEntry]:
            with self._shared.read() as (txn, handles):
                return read_log(txn, handles, seq)

        return follow(read, from_seq)

    def _counters(self) -> codec.Counters | None:
        with self._shared.read() as (txn, handles):
            payload = tables.get_meta(txn, handles, tables.COUNTERS)
        return codec.Counters.decode(payload) if payload else None

    def _get(self, name: str, key: bytes) -> Any:
        with self._shared.read() as (txn, handles):
            record = txn.get(key, None, getattr(handles, name))
            if record is None:
                return None
            payload = codec.unseal(name.encode(), key, record)
        self._damage.records += payload is None
        return None if payload is None else codec.unpack(payload)

    def _all(self, name: str) -> list[Any]:
        with self._shared.read() as (txn, handles):
            found = list(tables.sealed_records(txn, name.encode(), getattr(handles, name)))
        self._damage.records += sum(packed is None for _, packed in found)
        return [packed for _, packed in found if packed is not None]

    # ------------------------------------------------------------------------------- life cycle

    def refresh(self) -> bool:
        """Follow a replaced index: open it again if another data file is at the path now.

        One stat call. False if the index is gone (the old one, if mapped, is still read).
        """
        inode = environment.inode_of(self.path)
        if inode is None:
            return False
        if inode == self._shared.inode:
            return True
        try:
            fresh = environment.acquire(self.path, environment.READ)
        except KvcmError:
            return False
        environment.release(self._shared)
        self._shared = fresh
        return True

    def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            environment.release(self._shared)


def _problems(txn: Any, handles: tables.Tables) -> Iterator[str]:
    found = survey(txn, handles)
    counted = census(txn, found)
    yield from _problems_of_runs(counted)
    payload = tables.get_meta(txn, handles, tables.COUNTERS)
    told = codec.Counters.decode(payload).blocks if payload else None
    if told != counted.living:
        yield f"the counters say {told} blocks, there are {counted.living}"
    for name in ("segments", "sessions", "trash", "answers", "log", "pins", "copies"):
        for record, sealed in tables.sealed_payloads(txn, name.encode(), getattr(handles, name)):
            if sealed is None:
                yield f"record {record.hex()} of {name} is damaged"
    keys, _, _ = copies.everything(txn, handles)
    for key in keys[found.places(keys) < 0].tolist():
        yield f"key {key} has a copy, but is not in the index"


def _problems_of_runs(counted: Census) -> Iterator[str]:
    for run_id in counted.damaged_runs:
        yield f"run {run_id} is damaged"
    # Each damaged record is told once: not also what leads to it, or what it should have led to.
    damaged_runs = set(counted.damaged_runs)
    own = {key: word for key, word in counted.dangling if word >> 16 not in damaged_runs}
    for key, word in sorted(own.items()):
        yield f"the pointer of key {key} is damaged: run {word >> 16} has no such block"
    for key, word in sorted(counted.unreachable):
        if key not in own:
            yield f"the pointer of key {key} to run {word >> 16} is missing"
