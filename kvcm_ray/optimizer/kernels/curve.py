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
Flags = npt.NDArray[np.bool_]

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
def stack_distances(blocks: I32, offsets: I64, partial: Flags, unique: int) -> I32:
    """For each access, the smallest capacity in blocks at which it is a hit; 0 if there is none.

    The stack has the blocks of the latest request first, in prefix order, and below all others those
    that were seen once only, as the last block of a `partial` prompt. After a request, a cache of C
    blocks holds the first C. An access hits if all blocks before it in the prompt do and it is itself
    among those C, so its distance is the largest rank so far in its request.

    Positions are numbers of accesses, counted from the end within a request: later is higher up.
    """
    words = (len(blocks) >> 6) + 1
    bits, tree = np.zeros((2, words), np.uint64), np.zeros((2, words + 1), np.int32)
    live = np.zeros(2, np.int64)
    last, level = np.full(unique, -1, np.int32), np.full(unique, _HIGH, np.uint8)
    distances = np.zeros(len(blocks), np.int32)
    for request in range(len(offsets) - 1):
        start, end = offsets[request], offsets[request + 1]
        rank, deepest, neighbour = 0, 0, -2
        for i in range(start, end):
            position = last[blocks[i]]
            if position < 0:
                break
            if level[blocks[i]] == _LOW:
                rank = live[_HIGH] + live[_LOW] - _before(bits[_LOW], tree[_LOW], position)
                neighbour = -2
            else:  # one that came right after the block before it last time, too, is next in the stack
                if position == neighbour:
                    rank += 1
                else:
                    rank = live[_HIGH] - _before(bits[_HIGH], tree[_HIGH], position)
                neighbour = position - 1
            deepest = max(deepest, rank)
            distances[i] = deepest
        first = start
        if partial[request] and end > start and last[blocks[end - 1]] < 0:
            level[blocks[end - 1]] = _LOW
            _set(bits[_LOW], tree[_LOW], start, start + 1)
            live[_LOW] += 1
            first += 1
        for i in range(start, end):
            block = blocks[i]
            if last[block] >= 0:
                _clear(bits[level[block]], tree[level[block]], last[block])
                live[level[block]] -= 1
                level[block] = _HIGH
            last[block] = start + end - 1 - i
        _set(bits[_HIGH], tree[_HIGH], first, end)
        live[_HIGH] += end - first
    return distances


@jit
def sampled_distances(blocks: I32, offsets: I64, sure: Flags, weight: float, unique: int) -> I64:
    """`stack_distances` of a sample: blocks that are not `sure` count as `weight` of their kind each.

    Blocks of one request are touched last to first, as there, those of both kinds by one clock.
    """
    words = (len(blocks) >> 6) + 1
    bits, tree = np.zeros((2, words), np.uint64), np.zeros((2, words + 1), np.int32)
    live = np.zeros(2, np.int64)
    last = np.full(unique, -1, np.int32)
    distances = np.zeros(len(blocks), np.int64)
    for request in range(len(offsets) - 1):
        start, end = offsets[request], offsets[request + 1]
        deepest = 0
        for i in range(start, end):
            position = last[blocks[i]]
            if position < 0:
                break
            own = 1 if sure[blocks[i]] else 0
            sampled = live[0] - _before(bits[0], tree[0], position) - (1 - own)
            others = live[1] - _before(bits[1], tree[1], position) - own
            deepest = max(deepest, 1 + others + np.int64(np.rint(sampled * weight)))
            distances[i] = deepest
        for i in range(start, end):
            own, position = (1 if sure[blocks[i]] else 0), start + end - 1 - i
            if last[blocks[i]] >= 0:
                _clear(bits[own], tree[own], last[blocks[i]])
                live[own] -= 1
            _set(bits[own], tree[own], position, position + 1)
            live[own] += 1
            last[blocks[i]] = position
    return distances


@jit
def next_uses(blocks: I32, unique: int) -> I32:
    """For each access, the index of the next access of its block; their number if there is none."""
    following = np.full(unique, len(blocks), np.int32)
    nexts = np.empty(len(blocks), np.int32)
    for i in range(len(blocks) - 1, -1, -1):
        nexts[i] = following[blocks[i]]
        following[blocks[i]] = i
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
