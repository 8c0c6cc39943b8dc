"""What happened in a group lately: events to follow, and which blocks went and why.

Both are bounded and kept in memory only. Events of every write and look-up are frequent, all others are
rare; each kind has a ring of its own, so that traffic does not push out what an operator looks for.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcm_ray.core.effects import Why
from kvcm_ray.core.requests import Keys

FREQUENT_MAX, RARE_MAX = 4_096, 4_096
FREQUENT = frozenset({"lookup", "write_started", "write_finished"})
EVENTS_PER_CALL_MAX = 1_000
DEPARTED_MAX = 65_536  #: blocks; about 40 bytes each
_FIELDS = ("id", "time_s", "kind", "instance_id", "blocks", "bytes", "storage", "reason", "session_id")
_WHYS = tuple(Why)

_Row = tuple[int, float, str, str, int, int, str, str, str]


class Journal:
    """Events by ascending number; the oldest are forgotten."""

    def __init__(self) -> None:
        self._next = 1
        self._frequent: deque[_Row] = deque(maxlen=FREQUENT_MAX)
        self._rare: deque[_Row] = deque(maxlen=RARE_MAX)

    def add(
        self, time_s: float, kind: str, instance_id: str = "", blocks: int = 0, nbytes: int = 0,
        storage: str = "", reason: str = "", session_id: str = "",
    ) -> None:  # fmt: skip
        row = (self._next, time_s, kind, instance_id, blocks, nbytes, storage, reason, session_id)
        self._next += 1
        (self._frequent if kind in FREQUENT else self._rare).append(row)

    def after(self, after_id: int, limit: int) -> dict[str, Any]:
        """Events behind number `after_id`, the oldest first; see `GroupService.events`."""
        if not 0 <= after_id < self._next:
            after_id = 0  # the reader comes from another incarnation
        there = [row for ring in (self._frequent, self._rare) for row in ring if row[0] > after_id]
        there.sort()
        rows = there[: max(min(limit, EVENTS_PER_CALL_MAX), 0)]
        upto = rows[-1][0] if rows else after_id if there else self._next - 1
        return {
            "events": [dict(zip(_FIELDS, row, strict=True)) for row in rows],
            "next": upto,
            "dropped": upto - after_id - len(rows),
        }


@dataclass(frozen=True, slots=True)
class Departure:
    """How a block went."""

    time_s: float  #: unix time
    why: Why
    needed_bytes: int  #: that were to be freed then
    since_bytes: int  #: evicted from the group since, the block itself included


class Departed:
    """The blocks that went last."""

    def __init__(self, size: int = DEPARTED_MAX) -> None:
        self._size = size
        self._count = 0  #: that ever went
        self._evicted = 0  #: bytes, by whatever but removal
        self._names: dict[str, int] = {}
        self._numbers = itertools.count()
        self._keys = np.zeros(size, np.int64)
        self._instance = np.zeros(size, np.int32)
        self._time_s = np.zeros(size, np.float64)
        self._why = np.zeros(size, np.uint8)
        self._needed = np.zeros(size, np.int64)
        self._before = np.zeros(size, np.int64)  #: `_evicted` before it went

    def add(
        self, instance_id: str, keys: Keys, nbytes: int, why: Why, needed_bytes: int, time_s: float
    ) -> None:
        if instance_id not in self._names:
            self._names[instance_id] = next(self._numbers)
            self._forget_names()
        kept = keys[-self._size :]
        at = np.arange(self._count, self._count + len(kept)) % self._size
        self._count += len(kept)
        self._keys[at], self._instance[at] = kept, self._names[instance_id]
        self._time_s[at], self._why[at], self._needed[at] = time_s, _WHYS.index(why), needed_bytes
        self._before[at] = self._evicted
        if why is not Why.REMOVED:
            self._evicted += nbytes

    def find(self, instance_id: str, keys: Keys) -> list[Departure | None]:
        """How each of the keys went the last time; None if that is not known (any more)."""
        here = np.flatnonzero(self._instance[: self._count] == self._names.get(instance_id, -1))
        if not len(here):
            return [None] * len(keys)
        # The newest of equal keys comes last: the ring is put straight, and the sort is stable.
        here = here[np.argsort((here - self._count) % self._size, kind="stable")]
        here = here[np.argsort(self._keys[here], kind="stable")]
        at = np.searchsorted(self._keys[here], keys, side="right") - 1
        found = (at >= 0) & (self._keys[here[at]] == keys)
        return [self._departure(here[i]) if there else None for i, there in zip(at, found, strict=True)]

    def _departure(self, at: np.intp) -> Departure:
        why = _WHYS[self._why[at]]
        since = 0 if why is Why.REMOVED else self._evicted - int(self._before[at])
        return Departure(float(self._time_s[at]), why, int(self._needed[at]), since)

    def _forget_names(self) -> None:
        """Of instances of which nothing is kept any more, when there are many."""
        if len(self._names) > 1_024:
            used = set(np.unique(self._instance[: self._count]).tolist())
            newest = max(self._names.values())
            self._names = {n: i for n, i in self._names.items() if i in used or i == newest}
