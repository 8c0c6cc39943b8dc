"""From 64-bit keys to dense ids, and what else loading a trace does access by access."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.optimizer.kernels import jit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@jit
def _slot(key: Any, table: I32) -> Any:
    scattered = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((scattered >> np.uint64(20)) & np.uint64(len(table) - 1))


@jit
def number(keys: I64, table: I32, known: I64, count: int) -> tuple[I32, int]:
    """(id of each key, how many ids there are now).

    `table` (a power of two long, -1 where empty, never full) has the ids by key,
    `known` the keys by id, of which `count` are given.
    """
    ids = np.empty(len(keys), np.int32)
    for i in range(len(keys)):
        at = _slot(keys[i], table)
        while table[at] >= 0 and known[table[at]] != keys[i]:
            at = (at + 1) & (len(table) - 1)
        if table[at] < 0:
            table[at] = count
            known[count] = keys[i]
            count += 1
        ids[i] = table[at]
    return ids, count


@jit
def rebuild(table: I32, known: I64) -> None:
    """Put all known keys into an empty table."""
    for i in range(len(known)):
        at = _slot(known[i], table)
        while table[at] >= 0:
            at = (at + 1) & (len(table) - 1)
        table[at] = i


@jit
def _mix(z: Any) -> Any:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def chain(ids: I64, offsets: I64) -> I64:
    """Prefix keys of ids that name single blocks, as `kvcm_ray.traces.keys.keys_of_block_ids`."""
    keys = np.empty(len(ids), np.int64)
    for request in range(len(offsets) - 1):
        key = np.uint64(0)
        for i in range(offsets[request], offsets[request + 1]):
            key = _mix(key ^ _mix(np.uint64(ids[i])))
            keys[i] = np.int64(key)
    return keys


@jit
def first_in_request(blocks: I32, offsets: I64, unique: int) -> Flags:
    """Which accesses are not repeats of a block within their request."""
    seen = np.full(unique, -1, np.int32)
    first = np.ones(len(blocks), np.bool_)
    for request in range(len(offsets) - 1):
        for i in range(offsets[request], offsets[request + 1]):
            first[i] = seen[blocks[i]] != request
            seen[blocks[i]] = request
    return first


@jit
def is_chained(blocks: I32, offsets: I64, unique: int) -> bool:
    """Whether each block always comes after the same block, or always first."""
    parents = np.full(unique, -2, np.int32)
    for request in range(len(offsets) - 1):
        parent = -1
        for i in range(offsets[request], offsets[request + 1]):
            block = blocks[i]
            if parents[block] == -2:
                parents[block] = parent
            elif parents[block] != parent:
                return False
            parent = block
    return True
