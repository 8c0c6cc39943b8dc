"""Replay at one capacity, request by request, over doubly linked lists of blocks.

`banded` and `head_first` take 10-20 ns an access. Lists run from the next to leave to the last, which
is the order of the last touches. Blocks that nobody touched for `ttl` are gone; 0 is for ever.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.optimizer.kernels import jit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

_READ, _WRITE = 1, 2
_ABSENT = 255
_BANDS = 12
_USES_MAX = (1 << 11) - 1
_NEVER_OLD = 1 << 62


@jit
def _unlink(after: I32, before: I32, block: int) -> None:
    after[before[block]] = after[block]
    before[after[block]] = before[block]


@jit
def _append(after: I32, before: I32, end: int, block: int) -> None:
    """To the tail of the list whose ends `end` is."""
    tail = before[end]
    after[tail], before[block] = block, tail
    after[block], before[end] = end, block


@jit
def _band(uses: int) -> int:
    """Bands of powers of two: 1, 2-3, 4-7 and so on are 1, 2, 3."""
    band = 0
    while uses:
        uses >>= 1
        band += 1
    return band


@jit
def _drop_next(after: I32, before: I32, bands: U8, lowest: int) -> Any:
    """Drop the head of the lowest band that is not empty, none of which is below `lowest`; which it was."""
    while after[lowest] == lowest:
        lowest += 1
    block = after[lowest]
    _unlink(after, before, block)
    bands[block] = _ABSENT
    return lowest


@jit
def banded(
    blocks: I32, offsets: I64, ops: U8, partial: Flags, times: I64, unique: int, capacity: int, ttl: int,
    by_uses: bool,
) -> I32:  # fmt: skip
    """Hit blocks of each request with LRU, or with LFU in bands (`by_uses`), blocks last to first.

    For chained traces only: what is present is a leading run, and a child is never in a higher band
    than its parent nor used later, so that the head of the lowest band has no child.
    """
    after, before = np.empty(unique + _BANDS, np.int32), np.empty(unique + _BANDS, np.int32)
    for band in range(_BANDS):
        after[unique + band] = before[unique + band] = unique + band
    bands, uses = np.full(unique, _ABSENT, np.uint8), np.zeros(unique, np.int32)
    touched = np.zeros(unique + _BANDS, np.int64)
    touched[unique:] = _NEVER_OLD
    hits = np.zeros(len(offsets) - 1, np.int32)
    resident = 0
    for request in range(len(offsets) - 1):
        start, end, op, now = offsets[request], offsets[request + 1], ops[request], times[request]
        for band in range(unique, unique + _BANDS if ttl else unique):
            while touched[after[band]] <= now - ttl:
                block = after[band]
                _unlink(after, before, block)
                bands[block] = _ABSENT
                resident -= 1
        found = start
        while found < end and bands[blocks[found]] != _ABSENT:
            found += 1
        if op & _READ:
            hits[request] = found - start
            for i in range(start, found):
                uses[blocks[i]] = min(uses[blocks[i]] + 1, _USES_MAX)
        for i in range(found - 1, start - 1, -1):
            block = blocks[i]
            _unlink(after, before, block)
            if op & _READ:
                bands[block] = _band(uses[block]) if by_uses else 1
            touched[block] = now
            _append(after, before, unique + bands[block], block)
        if not op & _WRITE or found == end:
            continue
        lowest = unique
        while resident + end - found > capacity and resident > found - start:
            lowest = _drop_next(after, before, bands, lowest)
            resident -= 1
            while found > start and bands[blocks[found - 1]] == _ABSENT:  # some of the prompt itself left
                found -= 1
        for i in range(end - 1, found - 1, -1):
            block = blocks[i]
            uses[block] = 1
            bands[block] = 0 if partial[request] and i == end - 1 else 1
            touched[block] = now
            _append(after, before, unique + bands[block], block)
        for i in range(found - 1, start - 1, -1):
            _unlink(after, before, blocks[i])
            _append(after, before, unique + bands[blocks[i]], blocks[i])
        resident += end - found
        lowest = unique
        while resident > capacity:
            lowest = _drop_next(after, before, bands, lowest)
            resident -= 1
    return hits


@jit
def head_first(blocks: I32, offsets: I64, ops: U8, times: I64, unique: int, capacity: int, ttl: int) -> I32:
    """Hit blocks of each request with LRU that touches what it finds first to last, then puts in what
    is missing; blocks that are present behind a gap are not touched."""
    after, before = np.empty(unique + 1, np.int32), np.empty(unique + 1, np.int32)
    after[unique] = before[unique] = unique
    present, touched = np.zeros(unique, np.bool_), np.zeros(unique + 1, np.int64)
    touched[unique] = _NEVER_OLD
    hits = np.zeros(len(offsets) - 1, np.int32)
    resident = 0
    for request in range(len(offsets) - 1):
        start, end, op, now = offsets[request], offsets[request + 1], ops[request], times[request]
        while resident > capacity or (ttl and touched[after[unique]] <= now - ttl):
            block = after[unique]
            _unlink(after, before, block)
            present[block] = False
            resident -= 1
        found = start
        while op & _READ and found < end and present[blocks[found]]:
            _unlink(after, before, blocks[found])
            _append(after, before, unique, blocks[found])
            touched[blocks[found]] = now
            found += 1
        hits[request] = found - start
        for i in range(found, end if op & _WRITE else found):
            if not present[blocks[i]]:
                present[blocks[i]] = True
                touched[blocks[i]] = now
                _append(after, before, unique, blocks[i])
                resident += 1
    return hits


@jit
def hits_at(distances: I32, offsets: I64, capacities: I64) -> I32:
    """(capacities, requests) hit blocks, of stack distances and increasing capacities."""
    hits = np.zeros((len(capacities), len(offsets) - 1), np.int32)
    for request in range(len(offsets) - 1):
        i = offsets[request]
        for k in range(len(capacities)):
            while i < offsets[request + 1] and 0 < distances[i] <= capacities[k]:
                i += 1
            hits[k, request] = i - offsets[request]
    return hits


@jit
def first_expired(blocks: I32, offsets: I64, times: I64, unique: int, ttl: int) -> I64:
    """(requests,) index of the first access of each request whose block nobody touched for `ttl`
    before, or the end of the request: all hits of whole requests come before it."""
    last = np.full(unique, -_NEVER_OLD, np.int64)
    ends = offsets[1:].copy()
    for request in range(len(ends)):
        for i in range(ends[request] - 1, offsets[request] - 1, -1):
            if last[blocks[i]] <= times[request] - ttl:
                ends[request] = i
            last[blocks[i]] = times[request]
    return ends
