"""LRU on several tiers, for groups that share storages: what `simulation` does, compiled.

A queue for each group, tier and band (0 for partial last blocks that were used once, 1 for all others)
runs from the next block to leave to the last. The head of a group's slowest queue is always a leaf,
because in a chained trace a parent is never colder, nor further down, than its child.

All tables are of int64, with the columns below: a function then takes few arguments, which numba
counts references of. 20-60 ns an access.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.optimizer.kernels import jit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]

_READ, _WRITE = 1, 2
_NOWHERE = -1

#: Of a block, or of the end of a queue (those come behind the blocks).
_AFTER, _BEFORE, _QUEUE, _BYTES, _TOUCHED = range(5)
#: Of a tier of a group, by ``group * tiers + tier``; the storage is -1 where a group has fewer tiers.
STORAGE, CAPACITY, HELD = range(3)
ROOM, STORED = range(2)  #: of a storage
QUOTA, TTL, SIZE_MAX = range(3)  #: of a group; a time to live of 0 is for ever
GROUP, SIZE, NOW, TOKENS, PARTIAL = range(5)  #: of a request; SIZE is that of each of its blocks
#: What comes of a request; hits and then bytes written by storage follow.
HITS, EVICTED, EXPIRED, DEMOTED, PROMOTED, DELAY, RESULTS = range(7)


@jit
def _unlink(rows: I64, block: int) -> None:
    rows[rows[block, _BEFORE], _AFTER] = rows[block, _AFTER]
    rows[rows[block, _AFTER], _BEFORE] = rows[block, _BEFORE]


@jit
def _append(rows: I64, lanes: I64, queue: int, block: int) -> None:
    end = len(rows) - 2 * len(lanes) + queue
    tail = rows[end, _BEFORE]
    rows[tail, _AFTER], rows[block, _BEFORE] = block, tail
    rows[block, _AFTER], rows[end, _BEFORE] = end, block
    rows[block, _QUEUE] = queue


@jit
def _count(lanes: I64, devices: I64, lane: int, nbytes: int) -> None:
    lanes[lane, HELD] += nbytes
    devices[lanes[lane, STORAGE], STORED] += nbytes


@jit
def _spare(lanes: I64, devices: I64, lane: int) -> Any:
    """Bytes that a group may still put on a tier; negative if it has too many there."""
    device = lanes[lane, STORAGE]
    own = lanes[lane, CAPACITY] - lanes[lane, HELD]
    return min(own, devices[device, ROOM] - devices[device, STORED])


@jit
def _first_lane(lanes: I64, devices: I64, start: int, stop: int, nbytes: int) -> int:
    """The first tier that could take a block if the group had nothing else there."""
    for lane in range(start, stop):
        if lanes[lane, STORAGE] < 0:
            break
        if _spare(lanes, devices, lane) + lanes[lane, HELD] >= nbytes:
            return lane
    return _NOWHERE


@jit
def _head(rows: I64, lanes: I64, lane: int) -> Any:
    """The block of a tier that leaves next; there must be one."""
    end = len(rows) - 2 * len(lanes) + 2 * lane
    return rows[end, _AFTER] if rows[end, _AFTER] != end else rows[end + 1, _AFTER]


@jit
def _drop(rows: I64, lanes: I64, devices: I64, block: int) -> None:
    _unlink(rows, block)
    _count(lanes, devices, rows[block, _QUEUE] >> 1, -rows[block, _BYTES])
    rows[block, _QUEUE] = _NOWHERE


@jit
def _shift(rows: I64, lanes: I64, devices: I64, result: I64, block: int, to: int) -> None:
    """To the tail of another tier."""
    queue, nbytes = rows[block, _QUEUE], rows[block, _BYTES]
    lane = queue >> 1
    _unlink(rows, block)
    _append(rows, lanes, 2 * to + (queue & 1), block)
    _count(lanes, devices, lane, -nbytes)
    _count(lanes, devices, to, nbytes)
    result[RESULTS + len(devices) + lanes[to, STORAGE]] += nbytes
    result[PROMOTED if to < lane else DEMOTED] += 1


@jit
def _alike(rows: I64, lanes: I64, lane: int, most: int) -> int:
    """How many of the first `most` blocks to leave a tier have the size of the first."""
    end = len(rows) - 2 * len(lanes) + 2 * lane
    block, count, nbytes = rows[end, _AFTER], 0, 0
    while count < most:
        if block == end:
            block = rows[end + 1, _AFTER]
        if block == end + 1 or (count and rows[block, _BYTES] != nbytes):
            break
        nbytes = rows[block, _BYTES]
        count += 1
        block = rows[block, _AFTER]
    return count


@jit
def _relieve(
    rows: I64, lanes: I64, devices: I64, result: I64, lane: int, stop: int, size_max: int, nbytes: int
) -> int:  # fmt: skip
    """Take bytes out of a tier: the coldest blocks go to the next one down, where room is made for all
    of them first, or away; how many that were."""
    taken = 0
    while taken < nbytes:
        block = _head(rows, lanes, lane)
        size = rows[block, _BYTES]
        target = _first_lane(lanes, devices, lane + 1, stop, size)
        if target == _NOWHERE:
            _drop(rows, lanes, devices, block)
            result[EVICTED] += 1
            taken += size
            continue
        most = (_spare(lanes, devices, target) + lanes[target, HELD]) // size
        count = _alike(rows, lanes, lane, min(most, -((taken - nbytes) // size_max)))
        short = count * size - _spare(lanes, devices, target)
        if short > 0:
            _relieve(rows, lanes, devices, result, target, stop, size_max, short)
        for _ in range(count):
            _shift(rows, lanes, devices, result, _head(rows, lanes, lane), target)
        taken += count * size
    return taken


@jit
def _level(
    rows: I64, lanes: I64, devices: I64, result: I64, first: int, stop: int, size_max: int, quota: int
) -> None:  # fmt: skip
    """Down to the capacity of each tier of a group, then to its quota."""
    used = 0
    for lane in range(first, stop):
        if lanes[lane, STORAGE] >= 0:
            over = -_spare(lanes, devices, lane)
            _relieve(rows, lanes, devices, result, lane, stop, size_max, over)
    for lane in range(first, stop):
        used += lanes[lane, HELD]
    lane = stop - 1
    while used > quota:
        while lanes[lane, HELD] == 0:
            lane -= 1
        block = _head(rows, lanes, lane)
        used -= rows[block, _BYTES]
        _drop(rows, lanes, devices, block)
        result[EVICTED] += 1


@jit
def _expire(rows: I64, lanes: I64, devices: I64, groups: I64, result: I64, now: int) -> None:
    """Drop what nobody touched for its group's time to live."""
    tiers = len(lanes) // len(groups)
    for group in range(len(groups)):
        if groups[group, TTL] == 0:
            continue
        ends = len(rows) - 2 * len(lanes)
        for end in range(ends + 2 * group * tiers, ends + 2 * (group + 1) * tiers):
            block = rows[end, _AFTER]
            while block != end and rows[block, _TOUCHED] + groups[group, TTL] <= now:
                _drop(rows, lanes, devices, block)
                result[EXPIRED] += 1
                block = rows[end, _AFTER]


@jit
def _leading(rows: I64, blocks: I32) -> int:
    """How many leading blocks are present."""
    for i in range(len(blocks)):
        if rows[blocks[i], _QUEUE] == _NOWHERE:
            return i
    return len(blocks)


@jit
def _serve(
    rows: I64, lanes: I64, devices: I64, groups: I64, result: I64, request: I64, blocks: I32, op: Any,
    now: Any,
) -> None:  # fmt: skip
    """Look up, write, or both: what is used and what is new goes to the first tier."""
    _expire(rows, lanes, devices, groups, result, now)
    tiers, nbytes = len(lanes) // len(groups), request[SIZE]
    first = request[GROUP] * tiers
    entry = _first_lane(lanes, devices, first, first + tiers, nbytes)
    found = _leading(rows, blocks)
    if op & _READ:
        result[HITS] = found
    for i in range(found):
        lane = rows[blocks[i], _QUEUE] >> 1
        if op & _READ:
            result[RESULTS + lanes[lane, STORAGE]] += 1
        if lane > entry:
            _shift(rows, lanes, devices, result, blocks[i], entry)
    if op & _WRITE and entry != _NOWHERE:
        for i in range(len(blocks) - 1, found - 1, -1):
            band = 0 if request[PARTIAL] and i == len(blocks) - 1 else 1
            _append(rows, lanes, 2 * entry + band, blocks[i])
            rows[blocks[i], _BYTES], rows[blocks[i], _TOUCHED] = nbytes, now
        _count(lanes, devices, entry, nbytes * (len(blocks) - found))
        result[RESULTS + len(devices) + lanes[entry, STORAGE]] += nbytes * (len(blocks) - found)
    for i in range(found - 1, -1, -1):
        _unlink(rows, blocks[i])
        _append(rows, lanes, rows[blocks[i], _QUEUE] | (op & _READ), blocks[i])
        rows[blocks[i], _TOUCHED] = now
    limits = groups[request[GROUP]]
    _level(rows, lanes, devices, result, first, first + tiers, limits[SIZE_MAX], limits[QUOTA])


@jit
def lru(
    blocks: I32, offsets: I64, ops: U8, requests: I64, lanes: I64, devices: I64, groups: I64,
    block_tokens: int, delays: F64, unique: int, results: I64, occupancy: I64,
) -> None:  # fmt: skip
    """Serve all requests of a chained trace of so many different blocks.

    Args:
        requests, lanes, devices, groups: one row each, with the columns above. `lanes` and `devices`
            are changed.
        delays: of the write of a request, and more for each token that it misses; in the unit of NOW.
        results: (n, RESULTS + 2 S) of zeros, to be filled in.
        occupancy: (n, G, S) bytes after each look-up, to be filled in.
    """
    rows = np.zeros((unique + 2 * len(lanes), 5), np.int64)
    rows[:, _AFTER] = rows[:, _BEFORE] = np.arange(len(rows))
    rows[:, _QUEUE] = _NOWHERE
    tiers = len(lanes) // len(groups)
    writes = [(np.int64(0), np.int64(0))]  # (when, of which request)
    writes.pop()
    for r in range(len(offsets) - 1):
        now, op, own = requests[r, NOW], np.int64(ops[r]), blocks[offsets[r] : offsets[r + 1]]
        while len(writes) > 0 and writes[0][0] <= now:
            due, w = heappop(writes)
            late = blocks[offsets[w] : offsets[w + 1]]
            _serve(rows, lanes, devices, groups, results[w], requests[w], late, _WRITE, due)
        if op == _READ | _WRITE and (delays[0] > 0 or delays[1] > 0):
            _expire(rows, lanes, devices, groups, results[r], now)
            missed = max(requests[r, TOKENS] - _leading(rows, own) * block_tokens, 0)
            delay = np.int64(np.rint(delays[0] + delays[1] * missed))
            if delay > 0:
                results[r, DELAY] = delay
                heappush(writes, (now + delay, np.int64(r)))
                op = np.int64(_READ)
        _serve(rows, lanes, devices, groups, results[r], requests[r], own, op, now)
        for lane in range(len(lanes)):
            if lanes[lane, STORAGE] >= 0:
                occupancy[r, lane // tiers, lanes[lane, STORAGE]] = lanes[lane, HELD]
