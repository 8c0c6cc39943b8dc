"""The victims of one request: which of the blocks on offer may leave, in an order that keeps prefixes
closed, and which were met in vain."""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.eviction.arrays import I64, Ids
from kvcm_ray.core.eviction.forest import Forest


class Selection:
    """Takes up to `count` of the blocks that are offered, coldest first, none twice."""

    def __init__(self, forest: Forest, leased: I64, now_ms: int, leaves_only: bool, count: int) -> None:
        self.missing = max(count, 0)
        self._forest = forest
        self._leased = leased
        self._now_ms = now_ms
        self._leaves_only = leaves_only
        self._victims: list[Ids] = [np.empty(0, np.int64)]
        self._stuck: list[Ids] = []  #: leased, or with children that are not victims before them
        self._told: list[Ids] = []  #: victims that the forest was told of

    def offer(self, batch: Ids) -> None:
        barred = self._leased[batch] > self._now_ms
        free = self._forest.free(batch, barred) if self._leaves_only else ~barred
        places = np.flatnonzero(free)[: self.missing]
        if len(places) == self.missing:  # blocks behind the last victim were not met
            met = int(places[-1]) + 1 if len(places) else 0
            batch, free = batch[:met], free[:met]
        victims = batch[places]
        self._victims.append(victims)
        self.missing -= len(victims)
        if len(victims) < len(batch):
            self._stuck.append(batch[~free])
        if self.missing and self._leaves_only:
            self._forest.leave(victims)
            self._told.append(victims)

    def finish(self) -> tuple[Ids, Ids]:
        """(victims, blocks to be put back: children before parents)."""
        stuck = self._in_order(self._stuck)
        if self.missing and self._leaves_only and len(stuck):
            # Some were met before their children, which are victims by now.
            self._stuck = []
            self.offer(stuck)
            stuck = self._in_order(self._stuck)
        for victims in self._told:
            self._forest.stay(victims)
        return np.concatenate(self._victims), stuck

    def _in_order(self, parts: list[Ids]) -> Ids:
        return self._forest.leaves_first(np.concatenate(parts)) if parts else self._victims[0]
