"""Which slots of a set of equal segments are free.

Free slots are kept as extents, which are as long as possible: neighbours are merged at once, so two
extents never touch. Extents hang in bins by the power of two of their length, so that finding one
that is long enough, taking it and giving it back cost the same however many there are. A request
gets one extent of the shortest kind that is long enough, otherwise few long ones. Segments that are
in use are thereby filled before an untouched one is begun.

A position is ``segment_id << 32 | slot`` in one integer. Everything is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.requests import U32, Flags

_BINS = 33
_LOOKED_AT = 16
_SLOT_MASK = (1 << 32) - 1


@dataclass(slots=True)
class _SegmentUse:
    slots: int
    free: int


class SlotAllocator:
    """Slots of segments that can replace each other: same storage, same specs."""

    def __init__(self) -> None:
        self.free_total = 0  #: free slots over all segments
        self.slots_total = 0
        self._segments: dict[int, _SegmentUse] = {}
        self._length: dict[int, int] = {}  #: free extents: first position -> slots
        self._first: dict[int, int] = {}  #: the same extents: position after the last -> first one
        self._bins: list[dict[int, None]] = [{} for _ in range(_BINS)]  #: in insertion order

    # ---------------------------------------------------------------------------- segments

    def add_segment(self, segment_id: int, slots: int, taken: Flags | None = None) -> None:
        """Add a segment; `taken` has one flag for each slot (default: all free)."""
        assert segment_id not in self._segments
        assert slots > 0
        self._segments[segment_id] = _SegmentUse(slots, 0)
        self.slots_total += slots
        if taken is None:
            self._give(segment_id << 32, slots)
            return
        edges = np.flatnonzero(np.diff(np.concatenate(([True], taken, [True])).astype(np.int8)))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            self._give(segment_id << 32 | begin, end - begin)

    def remove_segment(self, segment_id: int) -> None:
        """Forget a segment that is wholly free."""
        use = self._segments.pop(segment_id)
        assert use.free == use.slots, f"segment {segment_id} is in use"
        self._take(segment_id << 32)
        self.slots_total -= use.slots
        self.free_total -= use.slots

    def taken(self, segment_id: int) -> int:
        """Number of slots of the segment that are not free."""
        use = self._segments[segment_id]
        return use.slots - use.free

    # ------------------------------------------------------------------------------- slots

    def allocate(self, count: int) -> tuple[U32, U32]:
        """Take `count` slots, at most `free_total`: their segments and slots, uint32[count]."""
        assert 0 <= count <= self.free_total, "the caller adds segments first"
        pieces: list[npt.NDArray[np.uint64]] = []
        while count:
            first = self._find(count)
            length = self._take(first)
            used = min(length, count)
            if used < length:
                self._put(first + used, length - used)
            self._segments[first >> 32].free -= used
            self.free_total -= used
            pieces.append(np.arange(first, first + used, dtype=np.uint64))
            count -= used
        positions = pieces[0] if len(pieces) == 1 else np.concatenate([_NO_POSITIONS, *pieces])
        return (positions >> np.uint64(32)).astype(np.uint32), positions.astype(np.uint32)

    def free(self, segment: U32, slot: U32) -> None:
        """Give taken slots back, each once."""
        if not len(slot):
            return
        positions = np.sort(segment.astype(np.uint64) << np.uint64(32) | slot)
        ends = np.flatnonzero(np.diff(positions) != 1) + 1
        begins = positions[np.concatenate(([0], ends))].tolist()
        lengths = np.diff(np.concatenate(([0], ends, [len(positions)]))).tolist()
        for begin, length in zip(begins, lengths, strict=True):
            self._give(begin, length)

    def free_extents(self) -> list[tuple[int, int, int]]:
        """(segment, first slot, slots) of every free extent, in order. For checks."""
        return sorted((p >> 32, p & _SLOT_MASK, n) for p, n in self._length.items())

    # ------------------------------------------------------------------------------ extents

    def _find(self, count: int) -> int:
        """A free extent of at least `count` slots, or the longest kind there is."""
        own = count.bit_length() - 1
        # Lengths within one bin differ; a few are looked at, so that the cost stays bounded.
        for first in islice(self._bins[own], _LOOKED_AT):
            if self._length[first] >= count:
                return first
        for index in range(own + 1, _BINS):
            if self._bins[index]:
                return next(iter(self._bins[index]))
        for index in range(own, -1, -1):
            if self._bins[index]:
                some = islice(self._bins[index], _LOOKED_AT)
                return max(some, key=self._length.__getitem__)
        raise AssertionError("no free extent although free_total says so")

    def _give(self, first: int, length: int) -> None:
        """Make an extent free and merge it with its neighbours."""
        use = self._segments[first >> 32]
        use.free += length
        self.free_total += length
        assert use.free <= use.slots, "slots were freed twice"
        if (before := self._first.get(first)) is not None:
            length += self._take(before)
            first = before
        if (after := self._length.get(first + length)) is not None:
            self._take(first + length)
            length += after
        self._put(first, length)

    def _put(self, first: int, length: int) -> None:
        self._length[first] = length
        self._first[first + length] = first
        self._bins[length.bit_length() - 1][first] = None

    def _take(self, first: int) -> int:
        length = self._length.pop(first)
        del self._first[first + length]
        del self._bins[length.bit_length() - 1][first]
        return length


_NO_POSITIONS = np.zeros(0, np.uint64)
