"""What can happen to a group. `GroupState.handle` takes these and nothing else changes its state.

Time comes with the event: ``now_ms`` is CLOCK_MONOTONIC in milliseconds, ``now_s`` is unix time in
seconds. What only the index knows (which keys are SERVING, and where) comes with the event too: the
shell looks it up in the transaction that will carry the effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.requests import (
    BlockLocations,
    FinishWrite,
    Flags,
    Keys,
    LeaseBlocks,
    PinBlocks,
    StartWrite,
    UnpinBlocks,
)

#: What became of each block of a move: not copied, copied, or its bytes cannot be read (verified).
Copied = npt.NDArray[np.uint8] | Flags
NOT_COPIED, COPIED, UNREADABLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class StartWriteEvent:
    request: StartWrite
    exists: Flags  #: one for each key of the request: SERVING according to the index
    found: BlockLocations  #: aligned with the keys; zeros where not SERVING
    now_ms: int
    now_s: int
    #: Bytes that earlier requests are waiting for: room that this one must leave.
    ahead_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FinishWriteEvent:
    request: FinishWrite
    #: Where the block before the session's first one is (`GroupState.parent_key`), if it is SERVING.
    parent: BlockLocations
    now_ms: int
    now_s: int


@dataclass(frozen=True, slots=True)
class RemoveEvent:
    """Remove `keys`; `hits` and `found` are the index's lookup of exactly these keys.

    Blocks being written are removed too: finishing drops them. With `drop_sessions` all sessions of
    the instance end (their blocks need not be among the keys).
    """

    event_id: str  #: "" = do not remember the answer
    instance_id: str
    keys: Keys
    hits: Flags  #: SERVING
    found: BlockLocations  #: aligned with keys; zeros where not SERVING
    now_ms: int
    drop_sessions: bool = False


@dataclass(frozen=True, slots=True)
class GetMetaEvent:
    """A read: states of `keys`, given the index's lookup of them. Has no effects."""

    instance_id: str
    keys: Keys
    hits: Flags
    found: BlockLocations


@dataclass(frozen=True, slots=True)
class DeletesConfirmed:
    """The bytes of these trash records are erased (unknown ids are ignored)."""

    instance_id: str
    trash_ids: tuple[int, ...]
    now_ms: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: sessions whose deadline is reached expire, a bounded number for each event."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class TouchEvent:
    """A reader looked `lookups` blocks up and found `keys`, in prefix order."""

    instance_id: str
    keys: Keys
    lookups: int
    hits: Flags  #: which of the keys are SERVING (still)
    found: BlockLocations
    now_ms: int
    chained: bool = True


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    request: LeaseBlocks
    hits: Flags
    found: BlockLocations
    now_ms: int


@dataclass(frozen=True, slots=True)
class PinEvent:
    request: PinBlocks
    hits: Flags
    found: BlockLocations
    now_ms: int


@dataclass(frozen=True, slots=True)
class UnpinEvent:
    """`hits` and `found` are the index's lookup of `GroupState.pinned_keys(instance, name)`."""

    request: UnpinBlocks
    hits: Flags
    found: BlockLocations
    now_ms: int


@dataclass(frozen=True, slots=True)
class Want:
    """A write that waits for room; see `kvcm_ray.core.reclaim.want_of`."""

    instance_id: str
    nbytes: int
    blocks: int


@dataclass(frozen=True, slots=True)
class ReclaimEvent:
    """Make room: one bounded step of evicting, demoting, promoting, draining and expiring.

    `GroupState.next_reclaim_ms` tells when there is more to do. Waiting writes come in order.
    """

    now_ms: int
    now_s: int
    wants: tuple[Want, ...] = ()


@dataclass(frozen=True, slots=True)
class MovedEvent:
    """A reclaimer has copied blocks of a session of kind MOVE or PROMOTE, or gave up.

    `hits` and `found` are the index's lookup of the session's keys (`GroupState.session_keys`).
    """

    instance_id: str
    session_id: str
    copied: Copied  #: one for each key
    hits: Flags
    found: BlockLocations
    now_ms: int


Event = (
    StartWriteEvent
    | FinishWriteEvent
    | RemoveEvent
    | GetMetaEvent
    | DeletesConfirmed
    | Tick
    | TouchEvent
    | LeaseEvent
    | PinEvent
    | UnpinEvent
    | ReclaimEvent
    | MovedEvent
)
