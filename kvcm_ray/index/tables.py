"""The named databases of an index environment, and reading sealed records from them.

Numbers are native-endian integer keys, so LMDB orders them as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcm_ray.index import codec

INTEGER_KEYED = ("runs", "keys", "copies", "segments", "trash", "answers", "log")
STRING_KEYED = ("sessions", "pins", "meta")

EPOCH = b"epoch"
COUNTERS = b"counters"
FORMAT = b"format"  #: [format version, instance tag]
BOOT = b"boot"  #: boot id that the times of sessions and trash belong to


@dataclass(frozen=True, slots=True)
class Tables:
    """LMDB database handles."""

    runs: Any  #: run id u64 -> run record
    keys: Any  #: block key -> pointer record
    copies: Any  #: block key -> second location
    segments: Any  #: segment id u64
    trash: Any  #: trash id u64
    answers: Any  #: running number u64
    log: Any  #: commit number u64
    sessions: Any  #: session id
    pins: Any  #: name
    meta: Any


def open_tables(env: Any, txn: Any, *, create: bool) -> Tables:
    """Raises lmdb.NotFoundError if one is missing and may not be made."""
    handles = {
        name: env.open_db(name.encode(), txn=txn, create=create, integerkey=True) for name in INTEGER_KEYED
    }
    for name in STRING_KEYED:
        handles[name] = env.open_db(name.encode(), txn=txn, create=create)
    return Tables(**handles)


def get_meta(txn: Any, tables: Tables, name: bytes) -> bytes | None:
    """Payload of a meta record; None if it is missing or damaged."""
    return codec.unseal(b"meta", name, txn.get(name, None, tables.meta))


def put_meta(txn: Any, tables: Tables, name: bytes, payload: bytes) -> None:
    txn.put(name, codec.seal(b"meta", name, payload), db=tables.meta)


def sealed_payloads(txn: Any, table: bytes, handle: Any) -> Iterator[tuple[bytes, bytes | None]]:
    """(key, payload) of every record of a table in key order; the payload of a damaged one is None."""
    for key, record in txn.cursor(handle):
        yield bytes(key), codec.unseal(table, key, record)


def sealed_records(txn: Any, table: bytes, handle: Any) -> Iterator[tuple[bytes, Any]]:
    """The same for tables of msgpack."""
    for key, payload in sealed_payloads(txn, table, handle):
        yield key, None if payload is None else codec.unpack(payload)
