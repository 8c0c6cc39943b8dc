"""Which resident block continues which: parents, numbers of resident children, leaves first.

Ids are used again, so a link holds the parent's id *and* its serial number at that time; the number
changes when the parent goes, which ends the links of all its children at once. Links must not form
a circle, whose blocks could never leave: a new block has no children, `adopt` refuses a link that
would close one, and `leaves_first_by`, through which restored blocks come, cuts one.

All methods take distinct blocks. A batch costs a fixed number of array operations, plus one for
each doubling of the longest chain in it where chains must be followed.
"""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.eviction.arrays import I64, Flags, Ids, grown

_CLIMB_MAX = 1 << 16
_ONE = np.int32(1)  # of the counters' type: `ufunc.at` is ten times slower if it has to convert


class Forest:
    def __init__(self) -> None:
        self.children = np.zeros(0, np.int32)  #: resident blocks whose living parent this is
        self._parent = np.full(0, -1, np.int64)
        self._parent_serial = np.zeros(0, np.int64)
        self._serial = np.zeros(0, np.int64)
        self._resident = np.zeros(0, np.bool_)
        self._place = np.zeros(0, np.int64)  #: scratch: index in the batch at hand, else anything
        self._leaving = np.zeros(0, np.int32)  #: scratch of a selection: its children that leave first

    def grow(self, size: int) -> None:
        self.children = grown(self.children, size, 0)
        self._parent = grown(self._parent, size, -1)
        self._parent_serial = grown(self._parent_serial, size, 0)
        self._serial = grown(self._serial, size, 0)
        self._resident = grown(self._resident, size, 0)
        self._place = grown(self._place, size, 0)
        self._leaving = grown(self._leaving, size, 0)

    # ------------------------------------------------------------------------------- changes

    def add(self, blocks: Ids, parent: int) -> None:
        """New blocks, each the child of the one before it, the first one that of `parent` (or -1)."""
        self._serial[blocks] += 1  # ends links that a restart left to a block that never came back
        self.children[blocks] = 0
        self._resident[blocks] = True
        parents = np.empty(len(blocks), np.int64)
        parents[1:] = blocks[:-1]
        parents[0] = parent if parent >= 0 and self._resident[parent] else -1
        self._link(blocks, parents)

    def restore(self, blocks: Ids, parents: Ids) -> None:
        """Blocks with known parents (-1 none), which may be restored later."""
        self._resident[blocks] = True
        self._link(blocks, parents)

    def remove(self, blocks: Ids) -> None:
        parents = self._parent[blocks]
        linked = (parents >= 0) & (self._serial[parents] == self._parent_serial[blocks])
        np.subtract.at(self.children, parents[linked], _ONE)
        self._serial[blocks] += 1
        self.children[blocks] = 0
        self._parent[blocks] = -1
        self._resident[blocks] = False

    def adopt(self, blocks: Ids) -> None:
        """Blocks in prefix order: those without a living parent become children of the one before."""
        parents = self.parents(blocks)
        if len(blocks) < 2 or parents[1:].min() >= 0:
            return
        orphans = np.flatnonzero(parents[1:] < 0) + 1
        roots = self._roots_before(blocks, parents, orphans)
        self._place[blocks] = np.arange(len(blocks))
        place = self._place[roots]
        own = (place < len(blocks)) & (blocks[np.minimum(place, len(blocks) - 1)] == roots)
        # The tree to hang an orphan into may itself become part of one of the orphans before it only.
        orphans = orphans[~(own & (place >= orphans))]
        self._link(blocks[orphans], blocks[orphans - 1])

    def _roots_before(self, blocks: Ids, parents: Ids, orphans: I64) -> Ids:
        """For each index in `orphans`: the root of the block before it."""
        follows = np.zeros(len(blocks), np.bool_)
        follows[1:] = parents[1:] == blocks[:-1]
        starts = np.maximum.accumulate(np.where(follows, 0, np.arange(len(blocks))))
        roots = blocks[starts[orphans - 1]]
        for _ in range(_CLIMB_MAX):
            up = self.parents(roots)
            if up.max() < 0:
                return roots
            roots = np.where(up >= 0, up, roots)
        return np.where(up >= 0, blocks[orphans], roots)  # too deep to know: no link

    def _link(self, blocks: Ids, parents: Ids) -> None:
        self._parent[blocks] = parents
        self._parent_serial[blocks] = self._serial[parents]
        np.add.at(self.children, parents[parents >= 0], _ONE)

    # ------------------------------------------------------------------------------- queries

    def parents(self, blocks: Ids) -> Ids:
        """The living parent of each block, or -1."""
        parents = self._parent[blocks]
        living = self._resident[parents] & (self._serial[parents] == self._parent_serial[blocks])
        return np.where(living & (parents >= 0), parents, -1)

    def free(self, blocks: Ids, barred: Flags) -> Flags:
        """Which of `blocks` can leave in this order, after those that `leave` was told of.

        A block can if it is not `barred` and all its resident children leave before it.
        """
        n = len(blocks)
        onward = self._onward(blocks)
        ready = np.bincount(onward[~barred], minlength=n + 1)[:n] + self._leaving[blocks]
        stuck = np.zeros(n + 1, np.bool_)
        stuck[:n] = barred | (ready < self.children[blocks])
        if stuck.any():
            jump = np.append(onward, n)
            while jump.min() < n:  # after k rounds the 2**k nearest ancestors of a stuck block are stuck
                stuck[jump[stuck]] = True
                stuck[n] = False
                jump = jump[jump]
        return ~stuck[:n]

    def leave(self, blocks: Ids) -> None:
        """These are selected: their parents need not wait for them."""
        parents = self.parents(blocks)
        np.add.at(self._leaving, parents[parents >= 0], _ONE)

    def stay(self, blocks: Ids) -> None:
        """End of a selection: undo `leave`."""
        parents = self.parents(blocks)
        self._leaving[parents[parents >= 0]] = 0

    def leaves_first(self, blocks: Ids) -> Ids:
        """The same blocks, children before parents: in the order given if that is so already, else
        those with more ancestors among them first."""
        if (self._onward(blocks) == self._onward(blocks, ahead_only=False)).all():
            return blocks
        return blocks[np.argsort(-self._depth(blocks), kind="stable")]

    def leaves_first_by(self, blocks: Ids, rank: I64) -> Ids:
        """Ordered by `rank`, children before parents where it is equal."""
        return blocks[np.lexsort((-self._depth(blocks), rank))]

    def _depth(self, blocks: Ids) -> I64:
        """How many ancestors each block has within `blocks`."""
        n = len(blocks)
        jump = np.append(self._onward(blocks, ahead_only=False), n)
        depth = (jump < n).astype(np.int64)
        for _ in range(n.bit_length() + 1):
            if jump.min() == n:
                return depth[:n]
            depth += depth[jump]
            jump = jump[jump]
        self._cut(blocks[np.unique(jump[jump < n])])  # as many steps as blocks, and still inside: circles
        return self._depth(blocks)

    def _cut(self, blocks: Ids) -> None:
        np.subtract.at(self.children, self.parents(blocks), _ONE)
        self._parent[blocks] = -1

    def _onward(self, blocks: Ids, ahead_only: bool = True) -> I64:
        """Index of each block's parent in `blocks`; ``len(blocks)`` if it is not there, or not ahead."""
        n = len(blocks)
        here = np.arange(n)
        self._place[blocks] = here
        parents = self.parents(blocks)
        place = self._place[parents]
        found = (parents >= 0) & (place < n)
        found &= blocks[np.where(found, place, 0)] == parents
        if ahead_only:
            found &= place > here
        return np.where(found, place, n)
