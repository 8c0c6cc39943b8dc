"""Replay of the adaptive policy, request by request, with the same result as the live code for each one.

It does what `EvictionOrder` with `Adaptive` does, one block at a time where those work on arrays: the same
queues, positions and choices, the same memory of what left, and the same arithmetic of floats in the same
order, so that no sum differs in its last bit. For chained traces only: then what is present is a leading run
of each prompt, and the parent of a block is always the same.

A queue is a doubly linked list that runs from the next to leave to the last; its ends are an entry behind
those of the blocks. All memory is made before, as compiling a loop that makes arrays takes longer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.optimizer.kernels import jit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Records = npt.NDArray[Any]

_READ, _WRITE = 1, 2
_ABSENT = 255
_CLASSES, _PARTIAL, _ONCE, _USES_MAX = 4, 0, 1, 4
_FIRST_OUT = -(1 << 62)
_ALL = 1 << 62

#: What is known of a block; `leaving` is how many of its resident `children` are victims already.
_BLOCK = np.dtype(
    [
        ("position", "i8"), ("touched", "i8"), ("after", "i4"), ("before", "i4"), ("parent", "i4"),
        ("children", "i4"), ("leaving", "i4"), ("rank", "i4"), ("klass", "u1"), ("uses", "u1"),
    ],
    align=True,
)  # fmt: skip
#: A place in the memory of evicted blocks.
_TRACE = np.dtype([("key", "i8"), ("uses", "u1"), ("klass", "u1")], align=True)
#: Single numbers: of the cache, of what the policy learned, and of the selection at hand.
_STATE = np.dtype(
    [
        ("clock", "i8"), ("resident", "i8"), ("until_next", "i8"), ("bits", "i8"), ("lead", "i8", 4),
        ("stay", "f8", 4), ("evicted", "f8", 4), ("regretted", "f8", 4), ("counts", "i8", 4),
        ("heads", "i4", 4), ("victims", "i8"), ("stuck", "i8"),
    ],
    align=True,
)  # fmt: skip
#: Rows of `lists`: blocks chosen to leave, blocks met in vain, and room to sort those.
_VICTIMS, _STUCK, _SCRATCH, _STARTS = range(4)
#: As `AdaptiveSettings`, in its order.
_STAY_FIRST, _STAY_MAX, _PERIOD, _STEP, _KEPT, _PRIOR, _REMEMBERED = range(7)


@jit
def _unlink(cells: Records, block: int) -> None:
    before, after = cells[block].before, cells[block].after
    cells[before].after = after
    cells[after].before = before


@jit
def _append(cells: Records, state: Any, block: int) -> None:
    """To the tail of the queue of its class."""
    end = len(cells) - _CLASSES + cells[block].klass
    tail = cells[end].before
    cells[tail].after = block
    cells[block].before = tail
    cells[block].after = end
    cells[end].before = block
    cells[block].position = state.clock
    state.clock += 1


@jit
def _classed(cells: Records, state: Any, settings: F64, count: int) -> None:
    """So many blocks got a class; perhaps it is time to adjust the stays."""
    state.until_next -= count
    if count == 0 or state.until_next > 0:
        return
    prior = settings[_PRIOR]
    state.until_next = max(64, np.int64(settings[_PERIOD] * state.resident))
    once = (state.regretted[_ONCE] + 1) / (state.evicted[_ONCE] + prior)
    stay = 0.0
    for klass in range(_ONCE + 1, _CLASSES):
        rate = (state.regretted[klass] + once * prior) / (state.evicted[klass] + prior)
        step = settings[_STEP] * min(max(math.log2(rate / once), -1.0), 1.0)
        stay = max(stay, min(max(state.stay[klass] + step, 0.0), settings[_STAY_MAX]))
        state.stay[klass] = stay
        state.lead[klass] = np.int64(stay * state.resident)
    for klass in range(_CLASSES):
        state.evicted[klass] *= settings[_KEPT]
        state.regretted[klass] *= settings[_KEPT]


@jit
def _class_of(uses: int) -> Any:
    return _ONCE if uses < 2 else 2 if uses < _USES_MAX else 3


@jit
def _place(key: int, bits: int) -> Any:
    scattered = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(scattered >> np.uint64(64 - bits))


@jit
def _resize(memory: Records, state: Any, bits: int) -> None:
    """What is remembered, in the order of its places, into another number of places."""
    kept = memory[: 1 << state.bits].copy()
    cleared: Any = memory[: 1 << max(bits, state.bits)]
    cleared.uses[:] = 0
    state.bits = bits
    for i in range(len(kept)):
        if kept[i].uses:
            memory[_place(kept[i].key, bits)] = kept[i]


@jit
def _drop(cells: Records, state: Any, memory: Records, settings: F64, keys: I64, lists: I32) -> None:
    """The victims leave, and are remembered."""
    room, bits = np.int64(settings[_REMEMBERED] * state.resident), 0
    while room >> bits:
        bits += 1
    bits = max(6, bits)
    if state.victims and (bits > state.bits or bits < state.bits - 2):
        _resize(memory, state, bits)
    for klass in range(_CLASSES):
        state.counts[klass] = 0
    for i in range(state.victims):
        block = lists[_VICTIMS, i]
        cell = cells[block]
        _unlink(cells, block)
        state.counts[cell.klass] += 1
        trace = memory[_place(keys[block], state.bits)]
        trace.key, trace.uses, trace.klass = keys[block], cell.uses, cell.klass
        cell.klass = _ABSENT
        if cell.parent >= 0:
            cells[cell.parent].children -= 1
    for klass in range(_CLASSES):  # all at once, as in the live code: sums of floats depend on the order
        state.evicted[klass] += state.counts[klass]
    state.resident -= state.victims


@jit
def _leaves_first(cells: Records, state: Any, lists: I32) -> None:
    """Those that are stuck, children before parents: in the order given if that is so already, else
    those with more ancestors among them first."""
    if not _ranked(cells, state, lists):
        deepest = _depths(cells, state, lists)
        for depth in range(deepest + 1):
            lists[_STARTS, depth] = 0
        for i in range(state.stuck):
            lists[_SCRATCH, i] = lists[_STUCK, i]
            lists[_STARTS, deepest - cells[lists[_STUCK, i]].rank + 1] += 1
        for depth in range(deepest):
            lists[_STARTS, depth + 1] += lists[_STARTS, depth]
        for i in range(state.stuck):
            place = deepest - cells[lists[_SCRATCH, i]].rank
            lists[_STUCK, lists[_STARTS, place]] = lists[_SCRATCH, i]
            lists[_STARTS, place] += 1
    for i in range(state.stuck):
        cells[lists[_STUCK, i]].rank = -1


@jit
def _ranked(cells: Records, state: Any, lists: I32) -> Any:
    """Whether children come before parents; all that are stuck have a rank of 0 then."""
    for i in range(state.stuck):
        cells[lists[_STUCK, i]].rank = 0
    ordered = True
    for i in range(state.stuck):
        parent = cells[lists[_STUCK, i]].parent
        ordered = ordered and (parent < 0 or cells[parent].rank < 1)
        cells[lists[_STUCK, i]].rank = 1
    for i in range(state.stuck):
        cells[lists[_STUCK, i]].rank = 0
    return ordered


@jit
def _depths(cells: Records, state: Any, lists: I32) -> Any:
    """The largest of the ranks, which are one more than that of the parent, if that is stuck too."""
    deepest: Any = np.int32(0)
    for i in range(state.stuck):
        depth: Any = np.int32(0)
        at = lists[_STUCK, i]
        while at >= 0 and cells[at].rank == 0:
            depth, at = depth + 1, cells[at].parent
        if at >= 0 and cells[at].rank > 0:
            depth += cells[at].rank
        deepest, at = max(deepest, depth), lists[_STUCK, i]
        while at >= 0 and cells[at].rank == 0:
            cells[at].rank = depth
            depth, at = depth - 1, cells[at].parent
    return deepest


@jit
def _coldest(cells: Records, state: Any, old: int) -> Any:
    """The class of the coldest of the heads that was not touched after `old`, or -1."""
    best, lowest = -1, np.int64(0)
    for klass in range(_CLASSES):
        block = state.heads[klass]
        if block < len(cells) - _CLASSES and cells[block].touched <= old:
            score = cells[block].position + state.lead[klass]
            if best < 0 or score < lowest:
                best, lowest = klass, score
    return best


@jit
def _offer(cells: Records, state: Any, lists: I32, block: Any) -> None:
    """A block that was met: it leaves if all its children do, else it is stuck."""
    cell = cells[block]
    if cell.leaving < cell.children:
        lists[_STUCK, state.stuck] = block
        state.stuck += 1
        return
    lists[_VICTIMS, state.victims] = block
    state.victims += 1
    if cell.parent >= 0:
        cells[cell.parent].leaving += 1


@jit
def _meet(cells: Records, state: Any, lists: I32, count: int, old: int) -> None:
    """Offer blocks coldest first, until there are `count` victims, or a limit is reached: batch by batch,
    as the live code does."""
    for klass in range(_CLASSES):
        state.heads[klass] = cells[len(cells) - _CLASSES + klass].after
    size, left, klass = 64, max(1 << 15, 64 * count), 0
    while left > 0 and klass >= 0:
        batch = max(count - state.victims, size)
        for _ in range(batch):
            klass = _coldest(cells, state, old)
            if klass < 0:
                return
            _offer(cells, state, lists, state.heads[klass])
            state.heads[klass] = cells[state.heads[klass]].after
            if state.victims == count:
                return
        left -= batch
        size = min(2 * size, 4096)


@jit
def _select(cells: Records, state: Any, lists: I32, count: int, old: Any) -> None:
    """Up to `count` blocks that may leave, of those not touched after `old`, coldest first; those that
    are met in vain go to the tails of their queues."""
    state.victims = state.stuck = 0
    _meet(cells, state, lists, count, old)
    for again in range(2 if state.stuck else 0):
        _leaves_first(cells, state, lists)
        if again or state.victims == count:
            break
        met, state.stuck = state.stuck, 0
        for i in range(met):  # some were met before their children, which are victims by now
            _offer(cells, state, lists, lists[_STUCK, i])
            if state.victims == count:
                break
    for i in range(state.stuck):
        _unlink(cells, lists[_STUCK, i])
        _append(cells, state, lists[_STUCK, i])
    for i in range(state.victims):
        parent = cells[lists[_VICTIMS, i]].parent
        if parent >= 0:
            cells[parent].leaving = 0


@jit
def _admit(
    cells: Records, state: Any, memory: Records, settings: F64, keys: I64, new: I32, partial: bool, now: int
) -> None:
    """New blocks in prefix order, behind those that are present."""
    state.resident += len(new)
    for klass in range(_CLASSES):
        state.counts[klass] = 0
    uses, known = 0, False
    for i in range(len(new) - 1, -1, -1):
        trace = memory[_place(keys[new[i]], state.bits)]
        if trace.uses and trace.key == keys[new[i]]:
            state.counts[trace.klass] += 1
            known = known or i == len(new) - 1
            uses, trace.uses = max(uses, trace.uses), 0
        cell = cells[new[i]]
        cell.uses = min(uses + 1, _USES_MAX)
        cell.klass = _class_of(cell.uses)
        if cell.parent >= 0:
            cells[cell.parent].children += 1
    for klass in range(_CLASSES):
        state.regretted[klass] += state.counts[klass]
    _classed(cells, state, settings, len(new))
    if partial and not known:
        cells[new[len(new) - 1]].klass = _PARTIAL
    for i in range(len(new) - 1, -1, -1):
        cells[new[i]].touched = now
        _append(cells, state, new[i])


@jit
def _touch(cells: Records, state: Any, settings: F64, found: I32, read: bool, now: int) -> None:
    again = read  # those that a write finds at the tails already, in this order, stay as they are
    for i in range(len(found)):
        cells[found[i]].touched = now
        again = again or cells[found[i]].position != state.clock - 1 - i
    for i in range(len(found) - 1 if again else -1, -1, -1):
        cell = cells[found[i]]
        _unlink(cells, found[i])
        if read:
            cell.uses = min(cell.uses + 1, _USES_MAX)
            cell.klass = _class_of(cell.uses)
        _append(cells, state, found[i])
    if read:
        _classed(cells, state, settings, len(found))


@jit
def _replay(
    blocks: I32, offsets: I64, ops: U8, partial: Flags, times: I64, keys: I64, settings: F64,
    cells: Records, states: Records, memory: Records, lists: I32, capacity: int, ttl: int, hits: I32,
) -> None:  # fmt: skip
    state = states[0]
    for request in range(len(offsets) - 1):
        asked, now = blocks[offsets[request] : offsets[request + 1]], times[request]
        read, write = ops[request] & _READ != 0, ops[request] & _WRITE != 0
        if ttl and state.resident:
            _select(cells, state, lists, state.resident, now - ttl)
            _drop(cells, state, memory, settings, keys, lists)
        found = 0
        while found < len(asked) and cells[asked[found]].klass != _ABSENT:
            found += 1
        if read:
            hits[request] = found
        if found and (read or write):
            _touch(cells, state, settings, asked[:found], read, now)
        if not write or found == len(asked):
            continue
        while True:  # make room
            excess = min(state.resident + len(asked) - found - capacity, state.resident - found)
            if excess <= 0:
                break
            _select(cells, state, lists, excess, np.int64(_ALL))
            _drop(cells, state, memory, settings, keys, lists)
            while found and cells[asked[found - 1]].klass == _ABSENT:  # some of the prompt itself left
                found -= 1
        _admit(cells, state, memory, settings, keys, asked[found:], partial[request], now)
        _touch(cells, state, settings, asked[:found], False, now)
        while state.resident > capacity:
            _select(cells, state, lists, state.resident - capacity, np.int64(_ALL))
            _drop(cells, state, memory, settings, keys, lists)


def adaptive(
    blocks: I32, offsets: I64, ops: U8, partial: Flags, times: I64, keys: I64, unique: int, capacity: int,
    ttl: int, settings: F64,
) -> I32:  # fmt: skip
    """Hit blocks of each request. `settings` are those of `AdaptiveSettings`, in its order."""
    cells = np.zeros(unique + _CLASSES, _BLOCK)
    cells["klass"][:unique] = _ABSENT
    cells["klass"][unique:] = range(_CLASSES)
    cells["after"] = cells["before"] = np.arange(unique + _CLASSES)
    cells["rank"] = cells["parent"] = -1
    heads = offsets[:-1][np.diff(offsets) > 0]
    before = np.concatenate([blocks[:1], blocks[:-1]])
    before[heads] = -1
    cells["parent"][blocks] = before
    state = np.zeros(1, _STATE)
    state["bits"] = 6
    state["lead"][0, _PARTIAL] = _FIRST_OUT
    state["stay"][0, _ONCE + 1 :] = settings[_STAY_FIRST] * np.arange(1, _CLASSES - _ONCE)
    most = min(unique, capacity + int(np.diff(offsets).max(initial=0)))
    memory = np.zeros(1 << max(6, int(settings[_REMEMBERED] * most).bit_length()), _TRACE)
    lists, hits = np.empty((4, unique + 2), np.int32), np.zeros(len(offsets) - 1, np.int32)
    _replay(
        blocks, offsets, ops, partial, times, keys, settings, cells, state, memory, lists, capacity, ttl, hits
    )
    return hits
