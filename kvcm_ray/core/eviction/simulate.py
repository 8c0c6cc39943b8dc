"""A trace against a cache of so many blocks, through the same order and policies as a live group.

One request looks up the leading run of present blocks, blocks leave to make room for what is missing, that
is written, and its blocks become most recent. (A prompt that is larger than the cache, which a live group
would refuse, is written and cut to the capacity.) With a time to live, what nobody touched for
that long is gone before the request looks; a live group is a reclaim step later.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvcm_ray.core.eviction.arrays import Ids
from kvcm_ray.core.eviction.order import EvictionOrder
from kvcm_ray.core.eviction.policy import Policy
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument

_LANE = 0


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
    wanted = [np.array(list(dict.fromkeys(keys.tolist())), np.int64) for keys in requests]
    flags = [False] * len(wanted) if partial is None else list(partial)
    if not wanted:
        return 0
    keys, blocks = np.unique(np.concatenate(wanted), return_inverse=True)
    cache = SimulatedCache(policy, capacity, keys)
    own = np.split(blocks, np.cumsum([len(part) for part in wanted])[:-1])
    rows = enumerate(zip(own, flags, strict=False))
    return sum(cache.serve(part, now, partial=bool(flag)) for now, (part, flag) in rows)


class SimulatedCache:
    """Blocks in an `EvictionOrder` of one lane. Their ids are places in `keys`, which has all there
    will be. Times are integers of any one unit; `ttl` 0 is for ever."""

    def __init__(self, policy: Policy, capacity: int, keys: Keys, ttl: int = 0) -> None:
        self._order = EvictionOrder(policy)
        self._capacity = capacity
        self._ttl = ttl
        self._keys = keys
        self._present = np.zeros(len(keys), np.bool_)
        self._resident = 0

    def serve(
        self, blocks: Ids, now: int, *, read: bool = True, write: bool = True, partial: bool = False
    ) -> int:
        """Serve one request, of distinct blocks in prefix order; how many leading ones were present,
        0 if it does not read."""
        self._expire(now)
        found = self._leading(blocks)
        if read:
            self._order.touch(blocks[:found], self._keys[blocks[:found]], now)
        if write:
            self._write(blocks, now, partial)
        return found if read else 0

    def _write(self, blocks: Ids, now: int, partial: bool) -> None:
        """Step by step what a live group does: that decides what leaves, and what the policy learns."""
        self._renew(blocks, now)
        self._make_room(blocks, now)
        present, found = self._present[blocks], self._leading(blocks)
        new = blocks[~present]
        if len(new):
            parent = int(blocks[found - 1]) if found else -1
            flag = partial and not present[-1]
            self._order.add(_LANE, new, self._keys[new], now, parent=parent, partial=flag)
            self._present[new] = True
            self._resident += len(new)
            self._renew(blocks[present], now)
        self._shrink(self._resident - self._capacity, now)

    def _leading(self, blocks: Ids) -> int:
        present = self._present[blocks]
        return len(blocks) if present.all() else int(present.argmin())

    def _renew(self, blocks: Ids, now: int) -> None:
        """What is there of the prompt becomes most recent: the look-up has counted it."""
        there = blocks[self._present[blocks]]
        self._order.touch(there, self._keys[there], now, used=False)

    def _make_room(self, blocks: Ids, now: int) -> None:
        """For what is missing, as far as other blocks can make it; some of the prompt may leave, too."""
        while True:
            there = int(self._present[blocks].sum())
            excess = self._resident + len(blocks) - there - self._capacity
            if min(excess, self._resident - there) <= 0:
                return
            self._drop(self._order.victims((_LANE,), min(excess, self._resident - there), now))

    def _expire(self, now: int) -> None:
        if self._ttl and self._resident:
            self._drop(self._order.expired((_LANE,), now - self._ttl + 1, self._resident, now))

    def _shrink(self, excess: int, now: int) -> None:
        while excess > 0:
            victims = self._order.victims((_LANE,), excess, now)
            assert len(victims), "nothing is held or leased here"
            self._drop(victims)
            excess -= len(victims)

    def _drop(self, victims: Ids) -> None:
        self._order.remove(victims, self._keys[victims], evicted=True)
        self._present[victims] = False
        self._resident -= len(victims)
