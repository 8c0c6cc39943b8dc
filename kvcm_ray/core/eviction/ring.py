"""A recency queue with lazy removal: blocks and the positions at which they were appended.

An entry is *live* if its block's last position is still the one beside it; otherwise the block was
appended again (here or elsewhere), or taken out, and the entry is skipped. A full queue is packed:
stale entries are dropped and room for as many again as are left is made, so that an append costs
O(1) amortised and the memory is at most twice (and a little) what was live.
"""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.eviction.arrays import I64, Ids

_SIZE_MIN = 64


class Ring:
    """Entries ``head <= i < tail`` of two parallel arrays; positions increase."""

    __slots__ = ("blocks", "head", "positions", "tail")

    def __init__(self) -> None:
        self.blocks: Ids = np.empty(_SIZE_MIN, np.int64)
        self.positions: I64 = np.empty(_SIZE_MIN, np.int64)
        self.head = 0
        self.tail = 0

    def append(self, blocks: Ids, positions: I64, last: I64) -> None:
        """`last` is the last position of every block; that of `blocks` is up to date already."""
        if self.tail + len(blocks) > len(self.blocks):
            self._pack(len(blocks), last)
        end = self.tail + len(blocks)
        self.blocks[self.tail : end] = blocks
        self.positions[self.tail : end] = positions
        self.tail = end

    def _pack(self, more: int, last: I64) -> None:
        blocks, positions = self.blocks[self.head : self.tail], self.positions[self.head : self.tail]
        live = last[blocks] == positions
        blocks, positions = blocks[live], positions[live]
        kept = len(blocks)
        size = max(_SIZE_MIN, 2 * (kept + more))
        self.blocks, self.positions = np.empty(size, np.int64), np.empty(size, np.int64)
        self.blocks[:kept], self.positions[:kept] = blocks, positions
        self.head, self.tail = 0, kept

    def settle(self, last: I64) -> bool:
        """Move the head to the first live entry; False if there is none (the queue is empty)."""
        if self.head < self.tail and last[self.blocks[self.head]] == self.positions[self.head]:
            return True
        window = 64
        while self.head < self.tail:
            end = min(self.head + window, self.tail)
            live = last[self.blocks[self.head : end]] == self.positions[self.head : end]
            first = int(live.argmax())
            if live[first]:
                self.head += first
                return True
            self.head = end
            window = min(4 * window, 1 << 16)
        return False
