"""What the index keeps for the group actor, as plain objects with numpy arrays.

A block that is being written is a part of a `SessionRecord`, a block whose bytes are still to be
erased is a part of a `TrashRecord`. How they are laid out on disk is the business of
`kvcm_ray.index`; only answers are packed here, because they are two numbers. Times are milliseconds
of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.core.model import Segment
from kvcm_ray.core.requests import U32, BlockLocations, Flags, Keys, Removed, WriteFinished
from kvcm_ray.errors import Corrupt

TRASH_BLOCKS_MAX = 4_096  #: blocks in one trash record; a larger removal makes several records


class SessionKind(enum.StrEnum):
    """Who writes the blocks of a session, and what becomes of where they were."""

    WRITE = "write"  #: a client; the keys are new
    MOVE = "move"  #: a reclaimer copies SERVING blocks to another storage; then the old place goes
    PROMOTE = "promote"  #: the same to a faster tier; the old place stays as a copy if there is room


@dataclass(slots=True)
class SessionRecord:
    """One write in progress. Holds all that is needed to give its first answer again."""

    session_id: str
    event_id: str  #: of the StartWrite that made it; the same one again gets the same answer
    instance_id: str
    generation: int  #: 1..2**32-1, of all its blocks
    deadline_ms: int  #: expires at this time
    lease_ms: int  #: time it was given
    storage: str  #: global_unique_name; all its blocks are there
    parent_key: int | None  #: key before the first new one in the request; None at its start
    exists: Flags  #: one for each key of the request; False = one of `keys`
    keys: Keys  #: the NEW keys in request order, repetitions included
    locations: BlockLocations  #: one for each of `keys`; equal keys have equal locations
    removed: Flags  #: one for each of `keys`: removed meanwhile, so finishing drops it
    kind: SessionKind = SessionKind.WRITE
    #: Where the bytes come from, one for each of `keys`; none for WRITE.
    source: BlockLocations = field(default_factory=BlockLocations.empty)


@dataclass(slots=True)
class TrashRecord:
    """Slots whose bytes are to be erased; they are not free before that is confirmed."""

    trash_id: int  #: unique within the instance, never reused
    instance_id: str
    due_ms: int  #: not to be erased before this time
    locations: BlockLocations  #: at most TRASH_BLOCKS_MAX of them


@dataclass(slots=True)
class PinRecord:
    """Keys that are never reclaimed, whether they are there yet or not."""

    name: str  #: unique within the instance
    instance_id: str
    keys: Keys  #: distinct
    until_s: int  #: unix time; 0 = until unpinned


@dataclass(slots=True)
class ServedBlocks:
    """All SERVING blocks of an instance, as parallel arrays."""

    keys: Keys = field(default_factory=lambda: np.zeros(0, np.int64))
    locations: BlockLocations = field(default_factory=BlockLocations.empty)
    written_s: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    #: int64: place in these arrays of the block before each one in its chain; -1 = unknown or none
    parents: Keys = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class RecoveredInstance:
    """All facts of one instance that the index holds, to rebuild `GroupState` from.

    The three counters must be larger than any number ever given out, also those of records that are
    gone by now. After another boot, sessions and trash must come with their times set to 0.
    """

    segments: list[Segment] = field(default_factory=list)
    sessions: list[SessionRecord] = field(default_factory=list)
    trash: list[TrashRecord] = field(default_factory=list)
    blocks: ServedBlocks = field(default_factory=ServedBlocks)
    #: Second locations of SERVING blocks (the first one is in `blocks`, and is the faster).
    copy_keys: Keys = field(default_factory=lambda: np.zeros(0, np.int64))
    copies: BlockLocations = field(default_factory=BlockLocations.empty)
    pins: list[PinRecord] = field(default_factory=list)
    next_generation: int = 1
    next_trash_id: int = 1
    next_segment_id: int = 1
    #: `pack_answer` of remembered answers by event id, oldest first.
    answers: dict[str, bytes] = field(default_factory=dict)


_ANSWER = struct.Struct("<BQQ")


def pack_answer(reply: WriteFinished | Removed) -> bytes:
    """17 bytes."""
    if isinstance(reply, WriteFinished):
        return _ANSWER.pack(1, reply.committed, reply.dropped)
    return _ANSWER.pack(2, reply.blocks, 0)


def unpack_answer(data: bytes) -> WriteFinished | Removed:
    """Inverse of `pack_answer`.

    Raises:
        Corrupt: not such bytes.
    """
    if len(data) != _ANSWER.size or data[0] not in (1, 2):
        raise Corrupt(f"not a remembered answer: {data[:32]!r}")
    kind, first, second = _ANSWER.unpack(data)
    return WriteFinished(first, second) if kind == 1 else Removed(first)
