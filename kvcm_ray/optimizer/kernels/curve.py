"""Stack distances of leaf-first LRU, and the offline optimum: one pass over a trace each.

Ranks are counted in bitmaps of positions, one bit for each access, with a Fenwick tree over their
words: a few bits an access in all, so that they stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.optimizer.kernels import jit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

_READ, _WRITE = 1, 2
_LOW, _HIGH = 0, 1  #: levels of the stack


@jit
def _ones(word: Any) -> Any:
    """How many bits of a 64-bit word are set."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@jit
def _add(tree: I32, word: int, amount: int) -> None:
    at = word + 1
    while at < len(tree):
        tree[at] += amount
        at += at & -at


@jit
def _before(bits: U64, tree: I32, position: int) -> Any:
    """How many bits are set below `position`."""
    at = position >> 6
    mask = (np.uint64(1) << np.uint64(position & 63)) - np.uint64(1)
    count = _ones(bits[at] & mask)
    while at > 0:
        count += tree[at]
        at -= at & -at
    return count


@jit
def _set(bits: U64, tree: I32, start: int, end: int) -> None:
    """Set the bits ``start <= position < end``, none of which are."""
    while start < end:
        word = start >> 6
        count = min(end, (word + 1) << 6) - start
        ones = ~np.uint64(0) >> np.uint64(64 - count)
        bits[word] |= ones << np.uint64(start & 63)
        _add(tree, word, count)
        start += count


@jit
def _clear(bits: U64, tree: I32, position: int) -> None:
    bits[position >> 6] &= ~(np.uint64(1) << np.uint64(position & 63))
    _add(tree, position >> 6, -1)


@jit
def stack_distances(blocks: I32, offsets: I64, ops: U8, partial: Flags, unique: int) -> I32:
    """For each access that looks up, the smallest capacity in blocks at which it is a hit; 0 if none.

    The stack has the blocks of the latest request first, in prefix order, and below all others those
    that were written once only, as the last block of a `partial` prompt. After a request, a cache of C
    blocks holds the first C. An access hits if all blocks before it in the prompt do and it is itself
    among those C, so its distance is the largest rank so far in its request. What only looks up touches
    the leading run of blocks that were ever written.

    Positions are numbers of accesses, counted from the end within a request: later is higher up.
    """
    words = (len(blocks) >> 6) + 1
    bits, tree = np.zeros((2, words), np.uint64), np.zeros((2, words + 1), np.int32)
    live = np.zeros(2, np.int64)
    last, level = np.full(unique, -1, np.int32), np.full(unique, _HIGH, np.uint8)
    distances = np.zeros(len(blocks), np.int32)
    for request in range(len(offsets) - 1):
        start, end, op = offsets[request], offsets[request + 1], ops[request]
        touched = start
        if op & _READ:
            rank, deepest, neighbour = 0, 0, -2
            while touched < end:
                block = blocks[touched]
                position = last[block]
                if position < 0:
                    break
                if level[block] == _LOW:
                    rank = live[_HIGH] + live[_LOW] - _before(bits[_LOW], tree[_LOW], position)
                    neighbour = -2
                else:  # one that came right after the block before it last time, too, is next in the stack
                    if position == neighbour:
                        rank += 1
                    else:
                        rank = live[_HIGH] - _before(bits[_HIGH], tree[_HIGH], position)
                    neighbour = position - 1
                deepest = max(deepest, rank)
                distances[touched] = deepest
                touched += 1
        if op & _WRITE:
            touched = end
        for i in range(start, touched):
            block = blocks[i]
            if last[block] >= 0:
                _clear(bits[level[block]], tree[level[block]], last[block])
                live[level[block]] -= 1
                if op & _READ:
                    level[block] = _HIGH
            elif partial[request] and i == end - 1:
                level[block] = _LOW
        _put_on_top(blocks, start, end, touched, bits, tree, live, last, level)
    return distances


@jit
def _put_on_top(
    blocks: I32, start: int, end: int, touched: int, bits: U64, tree: I32, live: I64, last: I32, level: U8
) -> None:
    """The first blocks of a request, up to `touched`, become the latest of their levels."""
    begin = start + end - touched  # of positions in a row that are all high
    for i in range(touched - 1, start - 1, -1):
        position = start + end - 1 - i
        last[blocks[i]] = position
        if level[blocks[i]] == _LOW:
            _set(bits[_HIGH], tree[_HIGH], begin, position)
            _set(bits[_LOW], tree[_LOW], position, position + 1)
            live[_HIGH] += position - begin
            live[_LOW] += 1
            begin = position + 1
    _set(bits[_HIGH], tree[_HIGH], begin, end)
    live[_HIGH] += end - begin


@jit
def sampled_distances(blocks: I32, offsets: I64, ops: U8, sure: Flags, weight: float, unique: int) -> I64:
    """`stack_distances` of a sample: blocks that are not `sure` count as `weight` of their kind each.

    Blocks of one request are touched last to first, as there, those of both kinds by one clock.
    """
    words = (len(blocks) >> 6) + 1
    bits, tree = np.zeros((2, words), np.uint64), np.zeros((2, words + 1), np.int32)
    live = np.zeros(2, np.int64)
    last = np.full(unique, -1, np.int32)
    distances = np.zeros(len(blocks), np.int64)
    for request in range(len(offsets) - 1):
        start, end, op = offsets[request], offsets[request + 1], ops[request]
        deepest, touched = 0, start
        while op & _READ and touched < end:
            position = last[blocks[touched]]
            if position < 0:
                break
            own = 1 if sure[blocks[touched]] else 0
            sampled = live[0] - _before(bits[0], tree[0], position) - (1 - own)
            others = live[1] - _before(bits[1], tree[1], position) - own
            rank = others + sampled * weight
            if not own:  # half of its own row, of which it is the only one here, is above it
                rank += (weight - 1) / 2
            deepest = max(deepest, int(np.rint(rank)) + 1)
            distances[touched] = deepest
            touched += 1
        if op & _WRITE:
            touched = end
        for i in range(start, touched):
            own, position = (1 if sure[blocks[i]] else 0), start + end - 1 - i
            if last[blocks[i]] >= 0:
                _clear(bits[own], tree[own], last[blocks[i]])
                live[own] -= 1
            _set(bits[own], tree[own], position, position + 1)
            live[own] += 1
            last[blocks[i]] = position
    return distances


@jit
def next_uses(blocks: I32, offsets: I64, ops: U8, unique: int) -> I32:
    """For each access, the index of the next access of its block if that is a look-up: to be there until
    then is worth a hit. The number of accesses if it is not, or the block was not written yet."""
    written = np.zeros(unique, np.bool_)
    nexts = np.full(len(blocks), len(blocks), np.int32)
    latest = np.full(unique, -1, np.int32)
    for request in range(len(offsets) - 1):
        for i in range(offsets[request], offsets[request + 1]):
            block = blocks[i]
            if ops[request] & _READ and written[block]:
                nexts[latest[block]] = i
            if ops[request] & _WRITE:
                written[block] = True
            latest[block] = i
    return nexts


@jit
def _highest(word: Any) -> Any:
    """The number of the highest bit that is set in a 64-bit word; there must be one."""
    bit = 0
    for shift in (32, 16, 8, 4, 2, 1):
        if word >> np.uint64(shift):
            word >>= np.uint64(shift)
            bit += shift
    return bit


@jit
def _drop_latest(bits: U64, summary: U64, word: int) -> int:
    """Clear the highest bit of all; the word that it was in. There is none above `word`."""
    if not bits[word]:
        group = word >> 6
        while not summary[group]:
            group -= 1
        word = (group << 6) + _highest(summary[group])
    bits[word] ^= np.uint64(1) << np.uint64(_highest(bits[word]))
    if not bits[word]:
        summary[word >> 6] ^= np.uint64(1) << np.uint64(word & 63)
    return word


@jit
def optimum_hits(nexts: I32, offsets: I64, capacity: int) -> I32:
    """Hit blocks of each request if, over capacity, the block used again latest goes (the deeper of two).

    A bit is set for each access that will be a hit as things stand: its block is in the cache.
    """
    words = (len(nexts) >> 6) + 1
    bits, summary = np.zeros(words, np.uint64), np.zeros((words >> 6) + 1, np.uint64)
    hits = np.zeros(len(offsets) - 1, np.int32)
    kept, highest = 0, 0  # bits set; no word above has any
    for request in range(len(offsets) - 1):
        for i in range(offsets[request], offsets[request + 1]):
            one = np.uint64(1) << np.uint64(i & 63)
            if bits[i >> 6] & one:
                hits[request] += 1
                kept -= 1
                bits[i >> 6] ^= one
                if not bits[i >> 6]:
                    summary[i >> 12] ^= np.uint64(1) << np.uint64((i >> 6) & 63)
        for i in range(offsets[request], offsets[request + 1]):
            at = nexts[i] >> 6
            if nexts[i] < len(nexts):
                bits[at] |= np.uint64(1) << np.uint64(nexts[i] & 63)
                summary[at >> 6] |= np.uint64(1) << np.uint64(at & 63)
                kept += 1
                highest = max(highest, at)
        while kept > capacity:
            highest = _drop_latest(bits, summary, highest)
            kept -= 1
    return hits
