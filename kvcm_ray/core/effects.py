"""What the shell has to make true after an event, in order, in one transaction of the instance.

A `CreateSegment` means: make directory and files first, then record the segment. A `DropSegment`
means: drop the record, and remove the files after the commit. The reply goes out after the commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcm_ray.core.model import Segment
from kvcm_ray.core.records import PinRecord, SessionRecord, TrashRecord, pack_answer
from kvcm_ray.core.requests import BlockLocations, Keys, Removed, Reply, WriteFinished
from kvcm_ray.errors import KvcmError


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


@dataclass(frozen=True, slots=True)
class MoveBlocks:
    """These SERVING blocks are at other locations from now on; all else about them stays."""

    instance_id: str
    keys: Keys  #: distinct, all of them in the index
    locations: BlockLocations


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
