"""In which order the resident blocks of a group leave it.

Every touch appends blocks to the tail of a queue, last to first, so that a block is colder than its
parent. There is a queue for each *lane* (the caller's number: an instance in a tier) and *class*
(the policy's). Victims are taken from the heads, merged by the policy's scores, so that finding them
costs what they and the stale entries before them cost, however many blocks there are.

That children leave before their parents does not rest on recency: the forest of parents is known,
and a block that must stay goes to the tail of its queue. Pure: time comes with the call.

Arrays of blocks are distinct ids; those of one request come in prefix order, root first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.eviction.arrays import I64, U8, Ids, grown, size_for
from kvcm_ray.core.eviction.forest import Forest
from kvcm_ray.core.eviction.policy import Policy
from kvcm_ray.core.eviction.ring import Ring
from kvcm_ray.core.eviction.scan import Scan
from kvcm_ray.core.eviction.selection import Selection
from kvcm_ray.core.requests import Keys

_OUT = -1  #: last position of a block that is in no queue; lane of a block that is not resident
_BATCH_MIN, _BATCH_MAX = 64, 4096
#: How many blocks one call looks at in vain at most, so that it ends soon where all are leased.
_MET_MIN, _MET_PER_VICTIM = 1 << 15, 64


class EvictionOrder:
    """Resident blocks, who came from whom, and who leaves next."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._forest = Forest()
        self._rings: dict[int, dict[int, Ring]] = {}  #: lane -> class -> queue
        self._counts: dict[int, int] = {}
        self._clock = 0  #: position of the next entry
        self._restored: list[Ids] = []  #: not in a queue yet
        self._size = 0
        self._lane = np.full(0, _OUT, np.int32)
        self._class: U8 = np.zeros(0, np.uint8)
        self._last = np.full(0, _OUT, np.int64)
        self._touched = np.zeros(0, np.int64)
        self._leased = np.zeros(0, np.int64)
        self._holds = np.zeros(0, np.int32)
        self._keys: Keys = np.zeros(0, np.int64)

    # ------------------------------------------------------------------------- coming and going

    def add(
        self, lane: int, blocks: Ids, keys: Keys, now_ms: int, *, parent: int = -1, partial: bool = False
    ) -> None:
        """New blocks, each one's parent the one before it, the first one's `parent` (-1: none).

        To keep leaves coldest, touch the blocks before them in the prompt afterwards. With `partial`
        the last block is a prompt's partial last one, which leaves before all others.
        """
        if len(blocks) == 0:
            return
        self._settle()
        self._arrive(lane, blocks, keys)
        self._touched[blocks] = now_ms
        self._forest.add(blocks, parent)
        self._class[blocks] = self.policy.admitted(blocks, keys, partial)
        self._append(blocks[::-1])

    def restore(self, lane: int, blocks: Ids, keys: Keys, parents: Ids, touched_ms: I64) -> None:
        """Blocks known from before a restart, in any order.

        Those with a smaller `touched_ms` are colder, children before parents if it is equal. Parents
        are ids or -1; they may be in another lane, and may be restored by a later call.
        """
        if len(blocks) == 0:
            return
        self._make_room(parents)
        self._arrive(lane, blocks, keys)
        self._touched[blocks] = touched_ms
        self._forest.restore(blocks, parents)
        self._class[blocks] = self.policy.admitted(blocks, keys, False)
        self._restored.append(blocks.copy())

    def remove(self, blocks: Ids, keys: Keys, *, evicted: bool) -> None:
        """No longer resident, held or not; their ids may be used again."""
        if len(blocks) == 0:
            return
        assert self._lane[blocks].min() >= 0, "removed blocks that are not resident"
        self._count(self._lane[blocks], -1)
        self._lane[blocks] = _OUT
        self._last[blocks] = _OUT
        self._holds[blocks] = 0
        self._leased[blocks] = 0
        self._forest.remove(blocks)
        self.policy.gone(blocks, keys, evicted)

    def move(self, blocks: Ids, lane: int) -> None:
        """To the tail of another lane, with its times, class and parents; held blocks stay out."""
        if len(blocks) == 0:
            return
        self._settle()
        self._count(self._lane[blocks], -1)
        self._lane[blocks] = lane
        self._count(self._lane[blocks], 1)
        self._append(self._forest.leaves_first(self._not_held(blocks)[::-1]))

    # ---------------------------------------------------------------------------- use and holds

    def touch(self, blocks: Ids, keys: Keys, now_ms: int, *, chained: bool = True, used: bool = True) -> None:
        """Resident blocks were used. Held ones are noted, but stay out of the order.

        With `chained`, a block without a living parent becomes the child of the one before it. Without
        `used` they only become the most recent: the same request has counted them already.
        """
        if len(blocks) == 0:
            return
        assert self._lane[blocks].min() >= 0, "touched blocks that are not resident"
        self._settle()
        self._touched[blocks] = now_ms
        if used:
            self._class[blocks] = self.policy.touched(blocks, keys)
        if chained:
            self._forest.adopt(blocks)
        latest = self._not_held(blocks)[::-1]
        if used or not self._are_latest(latest):
            self._append(latest)

    def hold(self, blocks: Ids) -> None:
        """Out of the order until released as often: pinned, or being moved."""
        self._holds[blocks] += 1
        self._last[blocks] = _OUT

    def release(self, blocks: Ids) -> None:
        """Undo one `hold`; those that nobody holds any more go to the tail of their lane."""
        assert len(blocks) == 0 or self._holds[blocks].min() > 0, "released blocks that nobody holds"
        self._settle()
        self._holds[blocks] -= 1
        self._append(self._forest.leaves_first(self._not_held(blocks)[::-1]))

    def lease(self, blocks: Ids, until_ms: int) -> None:
        """No victims before `until_ms`, nor before the end of an earlier lease if that is later."""
        self._leased[blocks] = np.maximum(self._leased[blocks], until_ms)

    def leased_until(self, blocks: Ids) -> I64:
        """End of each block's lease in milliseconds; 0 if it never had one."""
        return self._leased[blocks]

    def touched_ms(self, blocks: Ids) -> I64:
        """When each block was last used, in milliseconds."""
        return self._touched[blocks]

    # ---------------------------------------------------------------------------------- victims

    def victims(self, lanes: Sequence[int], count: int, now_ms: int, *, leaves_only: bool = True) -> Ids:
        """Up to `count` blocks of these lanes, coldest first; every prefix of them may leave alone.

        They stay where they are: hold or remove them before asking again. Leased blocks that were met
        go to the tail of their queue; with `leaves_only` so do blocks with resident children that are
        not among the victims before them. After tens of thousands of those in a row the call gives up
        with fewer victims; the next one goes on where it stopped.
        """
        return self._select(lanes, count, now_ms, leaves_only, None)

    def expired(
        self, lanes: Sequence[int], before_ms: int, count: int, now_ms: int, *, leaves_only: bool = True
    ) -> Ids:
        """Like `victims`, but only blocks last touched before `before_ms`.

        Queues are in order of appending: a block that was put back at the tail of its queue later than
        it was touched is found once those before it have expired.
        """
        return self._select(lanes, count, now_ms, leaves_only, before_ms)

    def may_leave(self, blocks: Ids, now_ms: int) -> Ids:
        """Those of these resident blocks that are neither held nor leased and have no resident children
        but among them; children first."""
        selection = Selection(self._forest, self._leased, now_ms, True, len(blocks))
        selection.offer(self._forest.leaves_first(self._not_held(blocks)))
        return selection.finish()[0]

    def coldest_ms(self, lanes: Sequence[int]) -> int | None:
        """The earliest last touch among the heads of the queues; None if nothing is in order."""
        heads = [ring.blocks[ring.head] for _, ring in self._queues(lanes)]
        return int(self._touched[heads].min()) if heads else None

    def count(self, lanes: Sequence[int]) -> int:
        """Resident blocks of these lanes, held ones too."""
        return sum(self._counts.get(lane, 0) for lane in lanes)

    def blocks_of(self, lane: int) -> Ids:
        """Resident blocks of a lane, held ones too, in no order. Looks at all blocks."""
        return np.flatnonzero(self._lane == lane)

    def use(self, policy: Policy) -> None:
        """Change the policy. Recency is kept; what only the old policy knew is not."""
        self._settle()
        self.policy = policy
        resident = np.flatnonzero(self._lane >= 0)
        resident = resident[np.argsort(self._last[resident], kind="stable")]
        if len(resident):
            self._class[resident] = policy.admitted(resident, self._keys[resident], False)
        self._rings.clear()
        self._append(self._not_held(resident))

    # -------------------------------------------------------------------------------- internals

    def _select(
        self, lanes: Sequence[int], count: int, now_ms: int, leaves_only: bool, before_ms: int | None
    ) -> Ids:
        scan = Scan(self.policy, self._queues(lanes), self._last, self._touched, before_ms)
        selection = Selection(self._forest, self._leased, now_ms, leaves_only, count)
        size, left = _BATCH_MIN, max(_MET_MIN, _MET_PER_VICTIM * count)
        while left > 0 and selection.missing and len(batch := scan.take(max(selection.missing, size))):
            selection.offer(batch)
            left -= len(batch)
            size = min(2 * size, _BATCH_MAX)
        victims, stuck = selection.finish()
        self._append(stuck)
        return victims

    def _queues(self, lanes: Sequence[int]) -> list[tuple[int, Ring]]:
        """(class, queue) of every queue of these lanes that is not empty."""
        self._settle()
        queues = []
        for lane in dict.fromkeys(lanes):
            rings = self._rings.get(lane, {})
            for klass, ring in list(rings.items()):
                if ring.settle(self._last):
                    queues.append((klass, ring))
                else:
                    del rings[klass]
        return queues

    def _are_latest(self, blocks: Ids) -> bool:
        """Appended last of all, in this order: again would only let time pass."""
        n = len(blocks)
        return bool((self._last[blocks] == np.arange(self._clock - n, self._clock)).all())

    def _append(self, blocks: Ids) -> None:
        """To the tails of their queues, in the order given (coldest first)."""
        n = len(blocks)
        if n == 0:
            return
        positions = np.arange(self._clock, self._clock + n)
        self._clock += n
        self._last[blocks] = positions
        queues = self._lane[blocks].astype(np.int64) << 8 | self._class[blocks]
        first = int(queues[0])
        if (queues == first).all():
            self._ring(first).append(blocks, positions, self._last)
            return
        for queue in np.unique(queues).tolist():
            mine = queues == queue
            self._ring(queue).append(blocks[mine], positions[mine], self._last)

    def _ring(self, queue: int) -> Ring:
        rings = self._rings.setdefault(queue >> 8, {})
        if (klass := queue & 0xFF) not in rings:
            rings[klass] = Ring()
        return rings[klass]

    def _settle(self) -> None:
        """Put restored blocks in order, together with what is there already."""
        if not self._restored:
            return
        blocks = np.concatenate([np.flatnonzero(self._last >= 0), *self._restored])
        self._restored.clear()
        blocks = blocks[self._lane[blocks] >= 0]  # some were removed since
        self._rings.clear()
        ordered = self._forest.leaves_first_by(blocks, self._touched[blocks])
        self._append(self._not_held(ordered))

    def _not_held(self, blocks: Ids) -> Ids:
        held = self._holds[blocks] > 0
        return blocks[~held] if held.any() else blocks

    def _arrive(self, lane: int, blocks: Ids, keys: Keys) -> None:
        self._make_room(blocks)
        assert lane >= 0, "lanes are numbered from 0"
        assert self._lane[blocks].max() == _OUT, "added blocks that are resident"
        self._lane[blocks] = lane
        self._keys[blocks] = keys
        self._counts[lane] = self._counts.get(lane, 0) + len(blocks)

    def _count(self, lanes: npt.NDArray[np.int32], sign: int) -> None:
        if (lanes == lanes[0]).all():
            self._counts[int(lanes[0])] = self._counts.get(int(lanes[0]), 0) + sign * len(lanes)
            return
        for lane, n in zip(*(part.tolist() for part in np.unique(lanes, return_counts=True)), strict=True):
            self._counts[lane] = self._counts.get(lane, 0) + sign * n

    def _make_room(self, blocks: Ids) -> None:
        size = size_for(self._size, blocks)
        if size == self._size:
            return
        self._size = size
        self._forest.grow(size)
        self._lane = grown(self._lane, size, _OUT)
        self._class = grown(self._class, size, 0)
        self._last = grown(self._last, size, _OUT)
        self._touched = grown(self._touched, size, 0)
        self._leased = grown(self._leased, size, 0)
        self._holds = grown(self._holds, size, 0)
        self._keys = grown(self._keys, size, 0)
