"""The table of second locations: one sealed record a block that has one.

Only readers that could not read a block at its first location look here, so nothing about it is
tuned; look-ups of blocks never touch it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcm_ray.core.requests import BlockLocations, Flags, Keys
from kvcm_ray.index import codec
from kvcm_ray.index.tables import Tables, sealed_payloads
from kvcm_ray.index.walk import Damage

_TABLE = b"copies"


def put(txn: Any, tables: Tables, keys: Keys, locations: BlockLocations) -> None:
    """Replaces those that are there."""
    for key, payload in zip(codec.raw_keys(keys), codec.pack_copies(locations), strict=True):
        txn.put(key, codec.seal(_TABLE, key, payload), db=tables.copies)


def drop(txn: Any, tables: Tables, keys: Keys) -> int:
    """Returns how many there were."""
    return sum(txn.delete(key, db=tables.copies) for key in codec.raw_keys(keys))


def lookup(txn: Any, tables: Tables, keys: Keys, damage: Damage) -> tuple[Flags, BlockLocations]:
    """Which keys have one, and where (zeros for the others, and for damaged records)."""
    hits = np.zeros(len(keys), np.bool_)
    out = BlockLocations.empty(len(keys))
    found: list[bytes] = []
    for at, key in enumerate(codec.raw_keys(keys)):
        record = txn.get(key, None, tables.copies)
        if record is None:
            continue
        payload = codec.unseal(_TABLE, key, record)
        if payload is None:
            damage.records += 1
        else:
            hits[at] = True
            found.append(payload)
    there = codec.unpack_copies(found)
    out.segment[hits], out.slot[hits], out.generation[hits] = there.segment, there.slot, there.generation
    return hits, out


def everything(txn: Any, tables: Tables) -> tuple[Keys, BlockLocations, int]:
    """All intact ones, and how many are damaged."""
    keys, payloads, damaged = bytearray(), [], 0
    for key, payload in sealed_payloads(txn, _TABLE, tables.copies):
        if payload is None:
            damaged += 1
        else:
            keys += key
            payloads.append(payload)
    return np.frombuffer(keys, np.int64), codec.unpack_copies(payloads), damaged
