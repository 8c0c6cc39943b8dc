"""Write sessions in progress, and when they expire.

A session with nothing to write holds nothing, is never recorded, and may be forgotten early;
clients need not finish it. All others live until they are finished, expire, or are dropped with
their blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.records import SessionRecord
from kvcm_ray.core.requests import BlockLocations, Flags, Keys

EMPTY_SESSION_MS = 10_000  #: lifetime of a session with nothing to write
EMPTY_SESSIONS_MAX = 16_384
LATE_WRITER_MS = 1_000  #: an expired session's bytes are not erased before its writer noticed

Indices = npt.NDArray[np.intp]


def repetitions(keys: Keys) -> tuple[Indices, Indices] | None:
    """None if all keys differ, else (first place of each distinct key, number of each place's key).

    [7, 8, 7] gives ([0, 1], [0, 1, 0]).
    """
    if len(set(keys.tolist())) == len(keys):
        return None
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[number]


@dataclass(slots=True)
class Session:
    """A record and its distinct blocks (a key given twice is one block, in one slot)."""

    record: SessionRecord
    keys: Keys  #: distinct, in order of first appearance
    locations: BlockLocations  #: of the distinct blocks
    first: Indices | None  #: place of each distinct block in `record.keys`; None = the same place
    block_of: Indices | None  #: distinct block of each of `record.keys`; None = the same place
    partial_tail: bool = False  #: the last block is a prompt's partial one (not kept over a restart)
    #: Block ids of the request's keys that existed, and those keys; not kept over a restart.
    before: tuple[Indices, Keys] | None = None

    @staticmethod
    def of(record: SessionRecord) -> Session:
        repeated = repetitions(record.keys)
        if repeated is None:
            return Session(record, record.keys, record.locations, None, None)
        first, block_of = repeated
        return Session(record, record.keys[first], record.locations.take(first), first, block_of)

    def blocks_all(self, flags: Flags) -> Flags:
        """One flag for each distinct block: all its places in `record.keys` are set in `flags`."""
        if self.block_of is None:
            return flags
        blocks = np.ones(len(self.keys), np.bool_)
        blocks[self.block_of[~flags]] = False
        return blocks

    def key_before(self, block: int) -> int | None:
        """The key in front of a distinct block in the request, if there is one."""
        place = block if self.first is None else int(self.first[block])
        return int(self.record.keys[place - 1]) if place else self.record.parent_key


class SessionTable:
    """All sessions of a group."""

    def __init__(self) -> None:
        self.by_id: dict[str, Session] = {}
        self._by_event: dict[tuple[str, str], Session] = {}  #: (instance, event id); "" is left out
        #: (deadline, session id); may hold sessions that ended, which are skipped
        self._deadlines: list[tuple[int, str]] = []
        #: session id -> (instance, deadline); equal lifetimes, hence in order of deadlines
        self._empty: dict[str, tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self.by_id)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.by_id or session_id in self._empty

    def find(self, instance_id: str, session_id: str) -> Session | None:
        session = self.by_id.get(session_id)
        return session if session and session.record.instance_id == instance_id else None

    def started_by(self, instance_id: str, event_id: str) -> Session | None:
        return self._by_event.get((instance_id, event_id))

    def of_instance(self, instance_id: str) -> list[Session]:
        return [s for s in self.by_id.values() if s.record.instance_id == instance_id]

    def add(self, session: Session) -> None:
        record = session.record
        assert record.session_id not in self.by_id
        self.by_id[record.session_id] = session
        if record.event_id:
            self._by_event[record.instance_id, record.event_id] = session
        heapq.heappush(self._deadlines, (record.deadline_ms, record.session_id))

    def remove(self, session: Session) -> None:
        record = session.record
        del self.by_id[record.session_id]
        self._by_event.pop((record.instance_id, record.event_id), None)
        if len(self._deadlines) > 2 * len(self.by_id) + 64:
            self._deadlines = [(s.record.deadline_ms, i) for i, s in self.by_id.items()]
            heapq.heapify(self._deadlines)

    def expired(self, now_ms: int) -> Iterator[Session]:
        """Sessions whose deadline is reached, earliest first; the caller removes each."""
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            deadline, session_id = heapq.heappop(self._deadlines)
            session = self.by_id.get(session_id)
            if session is not None and session.record.deadline_ms == deadline:
                yield session

    def next_deadline_ms(self) -> int | None:
        """Earliest deadline of a session that holds blocks."""
        while self._deadlines:
            deadline, session_id = self._deadlines[0]
            session = self.by_id.get(session_id)
            if session is not None and session.record.deadline_ms == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    # ----------------------------------------------------------------------- nothing to write

    def add_empty(self, instance_id: str, session_id: str, now_ms: int) -> None:
        self.expire_empty(now_ms)
        if len(self._empty) >= EMPTY_SESSIONS_MAX:
            del self._empty[next(iter(self._empty))]
        self._empty[session_id] = instance_id, now_ms + EMPTY_SESSION_MS

    def is_empty(self, instance_id: str, session_id: str) -> bool:
        return self._empty.get(session_id, ("", 0))[0] == instance_id

    def remove_empty(self, session_id: str) -> None:
        del self._empty[session_id]

    def expire_empty(self, now_ms: int) -> None:
        while self._empty:
            session_id, (_, deadline) = next(iter(self._empty.items()))
            if deadline > now_ms:
                return
            del self._empty[session_id]

    def forget_empty(self, instance_id: str) -> None:
        for session_id in [i for i, (owner, _) in self._empty.items() if owner == instance_id]:
            del self._empty[session_id]
