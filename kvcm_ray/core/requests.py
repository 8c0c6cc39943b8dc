"""What clients ask of a group actor, and what it answers.

These objects travel by actor handle. Many of them ride in one call (`GroupActor.submit`), which
answers with one reply or one `KvcmError` *value* for each, in order. Every mutation carries an
``event_id`` chosen by the caller: sending the same one again (after a time-out, after the actor died)
has the effect of sending it once, and returns the first answer.

Arrays are one-dimensional numpy arrays: ``int64`` keys, ``uint32`` segment, slot and generation,
``bool`` masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import Segment

Keys = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]


@dataclass(slots=True)
class BlockLocations:
    """Where blocks live: parallel arrays of equal length, one element a block."""

    segment: U32
    slot: U32
    generation: U32

    def __len__(self) -> int:
        return len(self.slot)

    def take(self, index: npt.NDArray[np.intp] | Flags | slice) -> BlockLocations:
        return BlockLocations(self.segment[index], self.slot[index], self.generation[index])

    @staticmethod
    def empty(n: int = 0) -> BlockLocations:
        return BlockLocations(*(np.zeros(n, np.uint32) for _ in range(3)))

    @staticmethod
    def joined(parts: Sequence[BlockLocations]) -> BlockLocations:
        """All of them, one after the other."""
        if not parts:
            return BlockLocations.empty()
        return BlockLocations(
            np.concatenate([part.segment for part in parts]),
            np.concatenate([part.slot for part in parts]),
            np.concatenate([part.generation for part in parts]),
        )


# ------------------------------------------------------------------------------------ requests


@dataclass(frozen=True, slots=True)
class StartWrite:
    """Reserve room for those of `keys` that the instance does not hold yet."""

    event_id: str
    instance_id: str
    keys: Keys
    session_id: str  #: chosen by the caller, 32 characters of [a-z0-9]; unique
    timeout_ms: int  #: time until the session expires; <= 0 means the default (30 s)
    spec_group_names: tuple[str, ...] = ()  #: empty, or one name for each key
    partial_tail: bool = False  #: the last key is a block that its prompt fills only partly


@dataclass(frozen=True, slots=True)
class FinishWrite:
    """End a session: which of its new keys were written (mask over the NEW keys only)."""

    event_id: str
    instance_id: str
    session_id: str
    success: BlockMask


@dataclass(frozen=True, slots=True)
class RemoveBlocks:
    event_id: str
    instance_id: str
    keys: Keys


@dataclass(frozen=True, slots=True)
class TrimInstance:
    """Remove blocks written in ``[begin_s, end_s]`` (unix seconds); all of them by default.

    With `drop_sessions` the sessions in progress end as well (TS_REMOVE_ALL_META).
    """

    event_id: str
    instance_id: str
    begin_s: int = 0
    end_s: int = 2**32 - 1
    drop_sessions: bool = False


@dataclass(frozen=True, slots=True)
class GetMeta:
    """State and location of each key, blocks being written included (a read; no event_id)."""

    instance_id: str
    keys: Keys


@dataclass(frozen=True, slots=True)
class Touch:
    """A reader's report: it looked up `lookups` blocks and found the prefix `keys`. May be lost."""

    instance_id: str
    keys: Keys  #: the keys that were hit, in prefix order
    lookups: int
    chained: bool = True  #: each key is the next block after the one before it
    #: Of the look-up of a whole prompt: what was asked behind `keys`, in vain. None for others.
    missed: Keys | None = None
    held: Keys | None = None  #: and what the engine had itself, before `keys`
    time_s: float = 0.0  #: unix time of the look-up; 0: when the group hears of it


@dataclass(frozen=True, slots=True)
class LeaseBlocks:
    """Keep what is SERVING of `keys` from being reclaimed for a while, for a long transfer.

    Not kept across a restart of the group: then a reader may meet a miss, as without a lease.
    """

    instance_id: str
    keys: Keys
    lease_ms: int  #: from now on; at most LEASE_MAX_MS; a longer lease that exists stays


@dataclass(frozen=True, slots=True)
class PinBlocks:
    """Never reclaim `keys`, those that come later included, until they are unpinned.

    Pinning under a name that exists replaces what it pinned.
    """

    event_id: str
    instance_id: str
    name: str
    keys: Keys
    until_s: int = 0  #: unix time; 0 = until unpinned


@dataclass(frozen=True, slots=True)
class UnpinBlocks:
    event_id: str
    instance_id: str
    name: str


Request = (
    StartWrite
    | FinishWrite
    | RemoveBlocks
    | TrimInstance
    | GetMeta
    | Touch
    | LeaseBlocks
    | PinBlocks
    | UnpinBlocks
)


# ------------------------------------------------------------------------------------- replies


@dataclass(slots=True)
class WriteStarted:
    session_id: str
    exists: Flags  #: one for each key of the request; True = nothing to write
    #: For each key to be written, in request order (a key given twice has the same location twice).
    locations: BlockLocations
    segments: dict[int, Segment]  #: those that `locations` names
    storage: str  #: all locations of one session are on this storage; "" if nothing to write
    lease_ms: int  #: bytes must be written and the session finished within this time


@dataclass(slots=True)
class WriteFinished:
    committed: int  #: blocks that became readable
    dropped: int  #: blocks of the session that did not (failed, or removed meanwhile)


@dataclass(slots=True)
class Removed:
    blocks: int


@dataclass(slots=True)
class BlockMeta:
    """State of each key: `kvcm_ray.core.block.BlockState` numbers, and the location if any."""

    states: npt.NDArray[np.uint8]
    locations: BlockLocations
    segments: dict[int, Segment] = field(default_factory=dict)
    written_s: U32 | None = None


@dataclass(slots=True)
class Touched:
    pass


@dataclass(slots=True)
class Leased:
    blocks: int  #: that are held now
    lease_ms: int  #: granted


@dataclass(slots=True)
class Pinned:
    keys: int  #: that the pin names (0: it is gone)
    blocks: int  #: of them that are SERVING now


Reply = WriteStarted | WriteFinished | Removed | BlockMeta | Touched | Leased | Pinned
