"""One walk over several queues at once, coldest first by the policy's scores.

A step looks at the next entries of the few queues that begin lowest, and merges those that nothing
else can precede. Each step looks at twice as many queues as the one before, so that both long runs
of one queue and queues that interleave finely take few steps, each a fixed number of array
operations and two slices a queue. Every entry is met once. The queues must not change meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter

import numpy as np

from kvcm_ray.core.eviction.arrays import I64, Ids
from kvcm_ray.core.eviction.policy import Policy
from kvcm_ray.core.eviction.ring import Ring

_QUEUES_MIN = 4
_WINDOW_MIN = 16
_WINDOW_MAX = 1 << 14


class _Cursor:
    """How far the walk is in one queue: ``at <= end <= limit``, `end` being that of the step."""

    __slots__ = ("at", "end", "floor", "klass", "limit", "ring", "window")

    def __init__(self, klass: int, ring: Ring, floor: int) -> None:
        self.klass = klass
        self.ring = ring
        self.floor = floor  #: nothing from `at` on scores less
        self.at = self.end = ring.head
        self.limit = ring.tail
        self.window = _WINDOW_MIN


_by_floor = attrgetter("floor")
_by_class = attrgetter("klass")


class Scan:
    """`queues` are (class, queue) with a live head. With `before_ms`, each queue ends at its first
    block that was last touched at that time or later."""

    def __init__(
        self,
        policy: Policy,
        queues: Sequence[tuple[int, Ring]],
        last: I64,
        touched: I64,
        before_ms: int | None = None,
    ) -> None:
        self._policy = policy
        self._last = last
        self._touched = touched
        self._before_ms = before_ms
        self._cursors = [_Cursor(klass, ring, 0) for klass, ring in queues]  #: lowest floor first
        self._merged: Ids = np.empty(0, np.int64)  #: found already, next to be handed out
        self._width = _QUEUES_MIN  #: how many queues to look at
        if len(queues) > 1:
            self._sort_by_head()

    def take(self, count: int) -> Ids:
        """The next blocks, at most `count`; none when the walk is over."""
        parts = [self._merged]
        missing = count - len(self._merged)
        while missing > 0 and self._cursors:
            parts.append(self._step(missing))
            missing -= len(parts[-1])
        found = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._merged = found[count:]
        return found[:count]

    def _sort_by_head(self) -> None:
        self._cursors.sort(key=_by_class)
        heads = np.array([cursor.ring.positions[cursor.at] for cursor in self._cursors])
        ends = range(1, len(heads) + 1)
        for cursor, score in zip(
            self._cursors, self._scores(self._cursors, heads, ends).tolist(), strict=True
        ):
            cursor.floor = score
        self._cursors.sort(key=_by_floor)

    def _step(self, missing: int) -> Ids:
        """Blocks that come next: about `missing`, fewer or none where many entries are stale."""
        active, others = self._open_windows(missing)
        if not active:
            return self._merged[:0]
        blocks = _joined([c.ring.blocks[c.at : c.end] for c in active])
        positions = _joined([c.ring.positions[c.at : c.end] for c in active])
        live = self._last[blocks] == positions
        ends = list(accumulate(c.end - c.at for c in active))
        scores = self._scores(active, positions, ends)
        # What lies behind a window scores at least as much as its last entry.
        limits = [int(scores[end - 1]) for c, end in zip(active, ends, strict=True) if c.end < c.limit]
        limit = min(limits, default=None)
        if others and (limit is None or others[0].floor < limit):
            limit = others[0].floor
            self._width *= 2
        if limit is not None:
            reached = scores <= limit
            live &= reached
            counts = np.add.reduceat(reached, [0, *ends[:-1]], dtype=np.intp)
            self._cursors = sorted(self._advance(active, scores, counts) + others, key=_by_floor)
        else:
            self._cursors = []
        found = np.flatnonzero(live)
        if len(active) > 1:
            found = found[np.argsort(scores[found], kind="stable")]
        return blocks[found]

    def _open_windows(self, missing: int) -> tuple[list[_Cursor], list[_Cursor]]:
        """(queues to look at, their `end` some entries ahead, by class; other queues, lowest first)."""
        active, others = self._cursors[: self._width], self._cursors[self._width :]
        share = 2 * missing // len(active)
        for cursor in active:
            cursor.end = min(cursor.at + max(cursor.window, share), cursor.limit)
        if self._before_ms is not None:
            for cursor in active:
                self._stop_at_young(cursor, self._before_ms)
            active = [cursor for cursor in active if cursor.at < cursor.end]
            self._cursors = active + others
        active.sort(key=_by_class)
        return active, others

    def _stop_at_young(self, cursor: _Cursor, before_ms: int) -> None:
        blocks = cursor.ring.blocks[cursor.at : cursor.end]
        live = self._last[blocks] == cursor.ring.positions[cursor.at : cursor.end]
        young = np.flatnonzero(live & (self._touched[blocks] >= before_ms))
        if len(young):
            cursor.end = cursor.limit = cursor.at + int(young[0])

    def _advance(self, active: list[_Cursor], scores: I64, counts: I64) -> list[_Cursor]:
        """Move each cursor by its count; those with something left."""
        start = 0
        for cursor, count in zip(active, counts.tolist(), strict=True):
            width = cursor.end - cursor.at
            cursor.floor = int(scores[start + min(count, width - 1)])
            cursor.at += count
            start += width
            if count == width:  # this queue gives many in a row, or its entries are stale
                cursor.window = min(4 * width, _WINDOW_MAX)
        return [cursor for cursor in active if cursor.at < cursor.limit]

    def _scores(self, cursors: Sequence[_Cursor], positions: I64, ends: Sequence[int]) -> I64:
        """Scores of entries; those of each cursor, which come by class, end at its place in `ends`."""
        parts = []
        start = 0
        for i, cursor in enumerate(cursors):
            if i + 1 == len(cursors) or cursors[i + 1].klass != cursor.klass:
                parts.append(self._policy.scores(cursor.klass, positions[start : ends[i]]))
                start = ends[i]
        return _joined(parts)


def _joined(parts: list[I64]) -> I64:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
