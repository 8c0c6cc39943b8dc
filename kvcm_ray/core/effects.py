"""What the shell has to make true after an event, in order, in one transaction of the instance.

A `CreateSegment` means: make directory and files first, then record the segment. A `DropSegment`
means: drop the record, and remove the files after the commit. The reply goes out after the commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvcm_ray.core.model import Segment
from kvcm_ray.core.records import PinRecord, SessionRecord, TrashRecord, pack_answer
from kvcm_ray.core.requests import BlockLocations, Keys, Removed, Reply, WriteFinished
from kvcm_ray.errors import KvcmError


class Why(StrEnum):
    """Why blocks go."""

    REMOVED = "removed"  #: somebody asked for it
    QUOTA = "quota"  #: the group is above its mark, or a write waits for room
    TIER = "tier"  #: their tier is
    KEYS = "keys"  #: their instance has too many blocks
    EXPIRED = "expired"  #: nobody used them for the group's time to live
    RETIRED = "retired"  #: their instance is being replaced
    DRAINED = "drained"  #: their storage is to become empty, or is registered no more
    UNREADABLE = "unreadable"  #: their bytes could not be read when they were to be moved


class Moved(StrEnum):
    """Why blocks change their storage."""

    DEMOTED = "demoted"
    PROMOTED = "promoted"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class CreateSegment:
    instance_id: str
    segment: Segment


@dataclass(frozen=True, slots=True)
class DropSegment:
    instance_id: str
    segment_id: int


@dataclass(frozen=True, slots=True)
class PutSession:
    """Store the record, replacing one of the same session id."""

    instance_id: str
    record: SessionRecord


@dataclass(frozen=True, slots=True)
class DropSession:
    instance_id: str
    session_id: str
    expired: bool = False  #: nobody ended it in time
    blocks: int = 0  #: distinct ones that it held


@dataclass(frozen=True, slots=True)
class AddBlocks:
    """These blocks are SERVING from now on."""

    instance_id: str
    keys: Keys  #: distinct, none of them in the index, in request order
    locations: BlockLocations
    parent_key: int | None  #: hint: the key before the first of them in the request, if any
    written_s: int  #: unix time


@dataclass(frozen=True, slots=True)
class DropBlocks:
    """These blocks are no longer SERVING."""

    instance_id: str
    keys: Keys  #: distinct, all of them in the index
    why: Why = Why.REMOVED
    nbytes: int = 0  #: payload of all their locations
    needed_bytes: int = 0  #: what was to be freed, of which they are a part


@dataclass(frozen=True, slots=True)
class MoveBlocks:
    """These SERVING blocks are at other locations from now on; all else about them stays."""

    instance_id: str
    keys: Keys  #: distinct, all of them in the index
    locations: BlockLocations
    moved: Moved = Moved.DEMOTED
    nbytes: int = 0  #: payload
    storage: str = ""  #: where they are now


@dataclass(frozen=True, slots=True)
class PutCopies:
    """These SERVING blocks have a second, slower location, in place of an earlier second one."""

    instance_id: str
    keys: Keys
    locations: BlockLocations


@dataclass(frozen=True, slots=True)
class DropCopies:
    """Forget the second locations of these blocks; comes before a DropBlocks of the same keys."""

    instance_id: str
    keys: Keys  #: distinct, all of them have one


@dataclass(frozen=True, slots=True)
class PutPin:
    """Store the record, replacing one of the same name."""

    instance_id: str
    record: PinRecord


@dataclass(frozen=True, slots=True)
class DropPin:
    instance_id: str
    name: str


@dataclass(frozen=True, slots=True)
class PutTrash:
    instance_id: str
    record: TrashRecord


@dataclass(frozen=True, slots=True)
class DropTrash:
    instance_id: str
    trash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RememberAnswer:
    """The same event id again, also after a restart, gets this answer."""

    instance_id: str
    event_id: str
    reply: WriteFinished | Removed

    @property
    def reply_bytes(self) -> bytes:
        return pack_answer(self.reply)


Effect = (
    CreateSegment
    | DropSegment
    | PutSession
    | DropSession
    | AddBlocks
    | DropBlocks
    | MoveBlocks
    | PutCopies
    | DropCopies
    | PutPin
    | DropPin
    | PutTrash
    | DropTrash
    | RememberAnswer
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer (an error is a refusal: nothing changed, no effects) and what to make true."""

    reply: Reply | KvcmError | None
    effects: list[Effect]
