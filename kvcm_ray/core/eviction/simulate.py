"""A trace against a cache of so many blocks, through the same order and policies as a live group.

One request looks up the leading run of present blocks, writes what is missing, touches all of its
blocks, and then blocks are evicted down to the capacity.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np

from kvcm_ray.core.eviction.arrays import grown
from kvcm_ray.core.eviction.order import EvictionOrder
from kvcm_ray.core.eviction.policy import Policy
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument

_LANE = (0,)


def simulate(
    requests: Iterable[Keys], policy: Policy, capacity: int, partial: Iterable[bool] | None = None
) -> int:
    """How many blocks are found, in all.

    Args:
        requests: the block keys of each request in prefix order.
        policy: a new policy object.
        capacity: in blocks.
        partial: for each request, whether its last block is partial; None if that is unknown.

    Raises:
        InvalidArgument: `capacity` is not positive.
    """
    if capacity <= 0:
        raise InvalidArgument(f"the capacity must be at least one block, got {capacity}")
    cache = _Cache(policy, capacity)
    flags = repeat(False) if partial is None else partial
    return sum(cache.request(keys, bool(flag)) for keys, flag in zip(requests, flags, strict=False))


class _Cache:
    def __init__(self, policy: Policy, capacity: int) -> None:
        self.order = EvictionOrder(policy)
        self.capacity = capacity
        self.present: dict[int, int] = {}  #: key -> block id
        self.keys = np.zeros(1024, np.int64)  #: key of each block id
        self.unused: list[int] = []  #: ids of blocks that left
        self.now_ms = 0

    def request(self, keys: Keys, partial: bool) -> int:
        """Serve one request; how many leading blocks were present."""
        wanted = list(dict.fromkeys(keys.tolist()))
        found = [self.present.get(key, -1) for key in wanted]
        hits = found.index(-1) if -1 in found else len(found)
        self.now_ms += 1
        if hits < len(found):
            self._write(
                [key for key, block in zip(wanted, found, strict=True) if block < 0],
                found[hits - 1] if hits else -1,
                partial and found[-1] < 0,
            )
        old = np.array([block for block in found if block >= 0], np.int64)
        self.order.touch(old, self.keys[old], self.now_ms)
        self._shrink()
        return hits

    def _write(self, missing: list[int], parent: int, partial: bool) -> None:
        """Admit what is missing; a cache that is closed misses no block before one that it has."""
        blocks = np.array([self._admit(key) for key in missing], np.int64)
        self.order.add(0, blocks, self.keys[blocks], self.now_ms, parent=parent, partial=partial)

    def _admit(self, key: int) -> int:
        block = self.unused.pop() if self.unused else len(self.present)
        if block == len(self.keys):
            self.keys = grown(self.keys, 2 * block, 0)
        self.present[key] = block
        self.keys[block] = key
        return block

    def _shrink(self) -> None:
        while (excess := len(self.present) - self.capacity) > 0:
            victims = self.order.victims(_LANE, excess, self.now_ms)
            assert len(victims), "nothing is held or leased here"
            keys = self.keys[victims]
            self.order.remove(victims, keys, evicted=True)
            for key in keys.tolist():
                del self.present[key]
            self.unused.extend(victims.tolist())
