"""How records look on disk. Every record carries a 64-bit xxh3 checksum seeded with its key.

Run record (native little-endian), for up to `RUN_BLOCKS` consecutive blocks of one chain:

    sum u64 | magic u16 | version u8 | flags u8 | blocks u16 | dead u16 | location sum u64
    parent key i64, zero unless flag 1 is set
    keys i64[blocks]
    hole bits, padded to 8 bytes; only if dead > 0
    segment u32[blocks] | slot u32[blocks] | generation u32[blocks] | written_s u32[blocks]

The first sum covers all up to the locations (the location sum too), so that a match without
locations reads and verifies no more than that. A removed block stays as a hole, since its key may
be asked for and must then be a miss; the last block is never a hole. The parent key is that of the
block before the first one in its chain, as the writer of the run said: a hint for the order of
evicting, which need not be in the index.

Pointer record: ``run id << 16 | offset`` in 8 bytes. It has no sum of its own: the key that the run
holds at that offset proves it.

Any other record: ``sum u64 | payload``, seeded with table name and key ("sealed"). The payload is
msgpack, or of a copy ``segment u32 | slot u32 | generation u32``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from kvcm_ray.core import limits
from kvcm_ray.core.model import Segment, from_plain, to_plain
from kvcm_ray.core.records import PinRecord, SessionKind, SessionRecord, TrashRecord
from kvcm_ray.core.requests import U32, BlockLocations, Flags, Keys

FORMAT_VERSION = 2
MAGIC = 0x4B52
#: 510 blocks of 24 bytes with both headers, LMDB's and ours, fill three 4 KiB pages to the byte.
RUN_BLOCKS = min(limits.RUN_BLOCKS_MAX, 510)
RUN_HEADER = struct.Struct("<QHBBHHQq")
HAS_PARENT = 1  #: flag
SUM_BYTES = 8
_LOCATION_SUM = 16  #: where it is in the header
COPY_BYTES = 12
COLUMNS = 4  #: segment, slot, generation, written_s
U64 = struct.Struct("<Q")
U32_KEY = struct.Struct("<I")

Columns = npt.NDArray[np.uint32]  #: of shape (COLUMNS, blocks)

digest = xxhash.xxh3_64_intdigest
_unpack_header = RUN_HEADER.unpack_from


# ---------------------------------------------------------------------------------------- runs


@dataclass(slots=True)
class Run:
    """A decoded run: copies, safe to keep."""

    run_id: int
    keys: Keys
    columns: Columns
    holes: Flags | None  #: True = removed; None if there are none
    parent: int | None  #: key before the first block in its chain, if any

    @property
    def alive(self) -> Flags:
        return np.ones(len(self.keys), np.bool_) if self.holes is None else ~self.holes

    @property
    def locations(self) -> BlockLocations:
        return BlockLocations(self.columns[0], self.columns[1], self.columns[2])


def match_end(blocks: int, dead: int) -> int:
    """Bytes of a run record before its locations."""
    bits = (blocks + 63) // 64 * 8 if dead else 0
    return RUN_HEADER.size + 8 * blocks + bits


def encode_run(run: Run) -> bytes:
    """Record of a run with 1..`RUN_BLOCKS` blocks of which the last one is alive."""
    blocks = len(run.keys)
    dead = int(run.holes.sum()) if run.holes is not None else 0
    assert 0 < blocks <= RUN_BLOCKS
    assert not dead or (run.holes is not None and not run.holes[-1])
    bits = b""
    if dead and run.holes is not None:
        packed = np.packbits(run.holes, bitorder="little").tobytes()
        bits = packed.ljust((blocks + 63) // 64 * 8, b"\0")
    tail = np.ascontiguousarray(run.columns, np.uint32).tobytes()
    return _record(run.run_id, run.parent, blocks, dead, run.keys.tobytes() + bits, tail)


def cut_run(view: Any, run_id: int, header: tuple[int, int, int], blocks: int) -> bytes:
    """The first `blocks` blocks of a verified run record that has no holes."""
    before, start = header[0], RUN_HEADER.size
    keys = bytes(view[start : start + 8 * blocks])
    starts = range(start + 8 * before, len(view), 4 * before)
    tail = b"".join([view[column : column + 4 * blocks] for column in starts])
    return _record(run_id, parent_of(view), blocks, 0, keys, tail)


def _record(run_id: int, parent: int | None, blocks: int, dead: int, keys: bytes, tail: bytes) -> bytes:
    """Header before `keys` (with the hole bits) and `tail` (the columns)."""
    flags, number = (0, 0) if parent is None else (HAS_PARENT, parent)
    head = RUN_HEADER.pack(0, MAGIC, FORMAT_VERSION, flags, blocks, dead, digest(tail, run_id), number)
    body = head[SUM_BYTES:] + keys
    return U64.pack(digest(body, run_id)) + body + tail


def reseal(view: Any, run_id: int, header: tuple[int, int, int]) -> None:
    """Make the checksums of a writable run record right after its locations were changed."""
    end = match_end(header[0], header[1])
    U64.pack_into(view, _LOCATION_SUM, digest(view[end:], run_id))
    U64.pack_into(view, 0, digest(view[SUM_BYTES:end], run_id))


def read_header(view: Any, run_id: int) -> tuple[int, int, int] | None:
    """(blocks, dead, location sum) of a run record whose first part is intact, else None."""
    if view is None or len(view) < RUN_HEADER.size:
        return None
    total, magic, version, _, blocks, dead, location_sum, _ = _unpack_header(view)
    end = match_end(blocks, dead)
    if magic != MAGIC or version != FORMAT_VERSION or len(view) != end + 4 * COLUMNS * blocks:
        return None
    if digest(view[SUM_BYTES:end], run_id) != total:
        return None
    return blocks, dead, location_sum


def parent_of(view: Any) -> int | None:
    """Parent key of a verified run record."""
    _, _, _, flags, _, _, _, parent = _unpack_header(view)
    return parent if flags & HAS_PARENT else None


def keys_of(view: Any, blocks: int) -> Keys:
    """Keys of a run record, holes included, as a view."""
    return np.frombuffer(view, np.int64, blocks, RUN_HEADER.size)


def holes_of(view: Any, blocks: int) -> Flags:
    """Hole flags of a verified run record with dead > 0."""
    bits = np.frombuffer(view, np.uint8, (blocks + 7) // 8, RUN_HEADER.size + 8 * blocks)
    return np.unpackbits(bits, count=blocks, bitorder="little").view(np.bool_)


def columns_of(view: Any, run_id: int, header: tuple[int, int, int]) -> Columns | None:
    """Locations of a run record as a view of shape (COLUMNS, blocks); None if they are damaged."""
    blocks, dead, location_sum = header
    start = match_end(blocks, dead)
    if digest(view[start:], run_id) != location_sum:
        return None
    return np.frombuffer(view, np.uint32, COLUMNS * blocks, start).reshape(COLUMNS, blocks)


def decode_run(view: Any, run_id: int) -> Run | None:
    """Copy of a whole run record, or None if any part of it is damaged."""
    header = read_header(view, run_id)
    columns = columns_of(view, run_id, header) if header else None
    if header is None or columns is None:
        return None
    blocks, dead, _ = header
    holes = holes_of(view, blocks) if dead else None
    return Run(run_id, keys_of(view, blocks).copy(), columns.copy(), holes, parent_of(view))


def raw_keys(keys: Keys) -> list[bytes]:
    """Keys as LMDB takes them."""
    raw = keys.tobytes()
    return [raw[i : i + 8] for i in range(0, len(raw), 8)]


def pointers(run_id: int, first: int, count: int) -> bytes:
    """`count` pointer records, one after the other, for offsets `first` and up."""
    return (np.arange(first, first + count, dtype=np.uint64) | np.uint64(run_id << 16)).tobytes()


# ------------------------------------------------------------------------------- sealed records


def seal(table: bytes, key: bytes, payload: bytes) -> bytes:
    return U64.pack(digest(payload, digest(table + key))) + payload


def unseal(table: bytes, key: bytes, record: Any) -> bytes | None:
    """The payload, or None if the record is damaged or belongs to another key or table."""
    if record is None or len(record) < SUM_BYTES:
        return None
    payload = bytes(record[SUM_BYTES:])
    total = U64.pack(digest(payload, digest(table + bytes(key))))
    return payload if total == bytes(record[:SUM_BYTES]) else None


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(payload: bytes) -> Any:
    return msgpack.unpackb(payload, raw=False, strict_map_key=False)


def pack_u32(column: U32) -> Any:
    """A constant as a number, a stretch of consecutive numbers as ``[first]``, else the bytes."""
    if len(column) == 0:
        return b""
    first, last = int(column[0]), int(column[-1])
    if first == last and (column == first).all():
        return first
    if last - first == len(column) - 1 and (np.diff(column) == 1).all():
        return [first]
    return np.ascontiguousarray(column, np.uint32).tobytes()


def unpack_u32(packed: Any, count: int) -> U32:
    if isinstance(packed, int):
        return np.full(count, packed, np.uint32)
    if isinstance(packed, list):
        return np.arange(packed[0], packed[0] + count, dtype=np.uint32)
    return np.frombuffer(packed, np.uint32).copy()


def pack_keys(keys: Keys) -> bytes:
    return np.ascontiguousarray(keys, np.int64).tobytes()


def unpack_keys(packed: bytes) -> Keys:
    return np.frombuffer(packed, np.int64).copy()


def pack_locations(locations: BlockLocations) -> list[Any]:
    columns = (locations.segment, locations.slot, locations.generation)
    return [len(locations), *map(pack_u32, columns)]


def unpack_locations(packed: list[Any]) -> BlockLocations:
    count, *columns = packed
    return BlockLocations(*(unpack_u32(column, count) for column in columns))


def _pack_flags(flags: Flags) -> list[Any]:
    return [len(flags), np.packbits(flags).tobytes()]


def _unpack_flags(packed: list[Any]) -> Flags:
    return np.unpackbits(np.frombuffer(packed[1], np.uint8), count=packed[0]).astype(np.bool_)


def pack_copies(locations: BlockLocations) -> list[bytes]:
    """The payload of a copy record for each."""
    rows = np.stack((locations.segment, locations.slot, locations.generation), axis=1)
    raw = np.ascontiguousarray(rows, np.uint32).tobytes()
    return [raw[i : i + COPY_BYTES] for i in range(0, len(raw), COPY_BYTES)]


def unpack_copies(payloads: list[bytes]) -> BlockLocations:
    rows = np.frombuffer(b"".join(payloads), np.uint32).reshape(-1, 3)
    return BlockLocations(*(rows[:, i].copy() for i in range(3)))


def pack_session(record: SessionRecord) -> list[Any]:
    return [
        record.session_id,
        record.event_id,
        record.instance_id,
        record.generation,
        record.deadline_ms,
        record.lease_ms,
        record.storage,
        record.parent_key,
        _pack_flags(record.exists),
        pack_keys(record.keys),
        pack_locations(record.locations),
        _pack_flags(record.removed),
        record.kind.value,
        pack_locations(record.source),
    ]


def unpack_session(packed: list[Any]) -> SessionRecord:
    exists, keys, locations, removed, kind, source = packed[8:]
    fields: list[Any] = [
        *packed[:8],
        _unpack_flags(exists),
        unpack_keys(keys),
        unpack_locations(locations),
        _unpack_flags(removed),
        SessionKind(kind),
        unpack_locations(source),
    ]
    return SessionRecord(*fields)


def pack_trash(record: TrashRecord) -> list[Any]:
    return [
        record.trash_id,
        record.instance_id,
        record.due_ms,
        pack_locations(record.locations),
    ]


def unpack_trash(packed: list[Any]) -> TrashRecord:
    trash_id, instance_id, due_ms, locations = packed
    return TrashRecord(trash_id, instance_id, due_ms, unpack_locations(locations))


def pack_pin(record: PinRecord) -> list[Any]:
    return [record.name, record.instance_id, pack_keys(record.keys), record.until_s]


def unpack_pin(packed: list[Any]) -> PinRecord:
    name, instance_id, keys, until_s = packed
    return PinRecord(name, instance_id, unpack_keys(keys), until_s)


def pack_segment(segment: Segment) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(segment)
    return plain


def unpack_segment(packed: dict[str, Any]) -> Segment:
    return from_plain(Segment, packed)


# ------------------------------------------------------------------------------------- counters


@dataclass(slots=True)
class Counters:
    """Numbers of an index that are written with every commit."""

    seq: int = 0  #: number of the last commit
    next_run: int = 1
    blocks: int = 0  #: SERVING
    log_first: int = 1  #: oldest log entry kept
    log_bytes: int = 0
    next_answer: int = 1
    next_generation: int = 1
    next_trash_id: int = 1
    next_segment_id: int = 1

    def encode(self) -> bytes:
        return _COUNTERS.pack(*(getattr(self, name) for name in self.__slots__))

    @staticmethod
    def decode(payload: bytes) -> Counters:
        return Counters(*_COUNTERS.unpack(payload))


_COUNTERS = struct.Struct("<9Q")
