"""The state of one instance group: every decision about quota, sessions, slots and deletions.

Events go in, effects come out (`handle`); nothing else changes it except the administrator's calls
`configure`, `open_instance` and `close_instance`. It knows no clock, no disk and no randomness, so
replaying the same events gives the same state. A refused event changes nothing and has no effects.

Which blocks are SERVING is the index's knowledge: events bring what was looked up there, and
effects say what to write. If a commit fails, open the instance again with what the index holds.

The actor calls this. It takes the effects of an outcome in order, in one transaction, and answers
after the commit. Erasing bytes is another's work too: `due_trash` hands out what is due, and
`DeletesConfirmed` or `trash_failed` reports back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvcm_ray.core.block import BlockState
from kvcm_ray.core.effects import Outcome
from kvcm_ray.core.events import (
    DeletesConfirmed,
    Event,
    FinishWriteEvent,
    GetMetaEvent,
    RemoveEvent,
    StartWriteEvent,
    Tick,
    TouchEvent,
)
from kvcm_ray.core.finish import expire_sessions, finish_write
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, Segment, StorageConfig
from kvcm_ray.core.records import RecoveredInstance, TrashRecord, unpack_answer
from kvcm_ray.core.remove import confirm_deletes, remove_blocks
from kvcm_ray.core.requests import BlockLocations, BlockMeta, Touched
from kvcm_ray.core.segments import SegmentTable
from kvcm_ray.core.session import Session
from kvcm_ray.core.start import start_write
from kvcm_ray.core.usage import usage
from kvcm_ray.errors import AlreadyExists, KvcmError

TRASH_RETRY_MS = 1_000  #: pause after a failed deletion


class GroupState:
    """Everything that a group actor has to remember, rebuilt from the index after a restart."""

    def __init__(self, group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> None:
        self.ledger = Ledger(group, storages)

    # ------------------------------------------------------------------------- administration

    def configure(self, group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> None:
        """Use another configuration from now on. Nothing that exists is moved or dropped, even if
        a quota is exceeded by it or its storage is disabled; only new writes feel it."""
        ledger = self.ledger
        ledger.group, ledger.storages = group, dict(storages)
        ledger.quota.configure(group)
        ledger.recount()

    def open_instance(self, info: InstanceInfo, recovered: RecoveredInstance | None) -> None:
        """Take charge of an instance; of one that is open already, anew from `recovered`.

        Raises:
            Corrupt: the records contradict each other; nothing was changed.
            AlreadyExists: a session id is in use by another instance; nothing was changed.
        """
        recovered = recovered or RecoveredInstance()
        sessions = [Session.of(record) for record in recovered.sessions]
        instance = _rebuilt(info, recovered, sessions)
        answers = {event: unpack_answer(data) for event, data in recovered.answers.items()}
        for session in sessions:
            other = self.ledger.sessions.by_id.get(session.record.session_id)
            if other is not None and other.record.instance_id != info.instance_id:
                raise AlreadyExists(f"session id {session.record.session_id!r} is in use")
        if info.instance_id in self.ledger.instances:
            self.close_instance(info.instance_id)
        self.ledger.instances[info.instance_id] = instance
        for session in sessions:
            self.ledger.sessions.add(session)
        for record in recovered.trash:
            self.ledger.trash.put(record)
        for event_id, answer in answers.items():
            self.ledger.answers.remember(info.instance_id, event_id, answer)
        self.ledger.count([instance], sessions, recovered.trash)

    def close_instance(self, instance_id: str) -> None:
        """Forget an instance with all it holds; the caller disposes of its index and segments.

        Raises:
            InstanceNotFound
        """
        ledger = self.ledger
        ledger.instance(instance_id)
        for session in ledger.sessions.of_instance(instance_id):
            ledger.sessions.remove(session)
        ledger.sessions.forget_empty(instance_id)
        ledger.trash.forget(instance_id)
        ledger.answers.forget_instance(instance_id)
        del ledger.instances[instance_id]
        ledger.recount()

    # --------------------------------------------------------------------------------- events

    def handle(self, event: Event) -> Outcome:
        """Decide about one event. A refusal is an error in the outcome's `reply`, never raised."""
        try:
            return _HANDLERS[type(event)](self.ledger, event)
        except KvcmError as refusal:
            return Outcome(refusal, [])

    # -------------------------------------------------------------------------------- queries

    def due_trash(self, now_ms: int, limit: int = 64) -> list[TrashRecord]:
        """At most `limit` records whose bytes may be erased now. Each is handed out once, until
        `trash_failed`; after a restart or a reopening all are handed out again."""
        return self.ledger.trash.hand_out(now_ms, limit)

    def trash_failed(self, instance_id: str, trash_ids: tuple[int, ...], now_ms: int) -> None:
        """Erasing these failed: hand them out again after TRASH_RETRY_MS. Ignores unknown ids."""
        self.ledger.trash.again(instance_id, trash_ids, now_ms + TRASH_RETRY_MS)

    def next_session_ms(self) -> int | None:
        """When a `Tick` will have something to do."""
        return self.ledger.sessions.next_deadline_ms()

    def next_trash_ms(self) -> int | None:
        """When `due_trash` will have something to hand out (may be in the past)."""
        return self.ledger.trash.next_due_ms()

    def next_deadline_ms(self) -> int | None:
        """The earlier of both; None = only requests can change anything."""
        times = [t for t in (self.next_session_ms(), self.next_trash_ms()) if t is not None]
        return min(times, default=None)

    def segment(self, instance_id: str, segment_id: int) -> Segment | None:
        """A segment of an open instance; None if there is none of that id.

        Raises:
            InstanceNotFound
        """
        return self.ledger.instance(instance_id).segments.segments.get(segment_id)

    def usage(self) -> dict[str, Any]:
        """What the group holds, in plain JSON values; see `kvcm_ray.core.usage`."""
        return usage(self.ledger)


def _rebuilt(info: InstanceInfo, recovered: RecoveredInstance, sessions: list[Session]) -> Instance:
    segments = SegmentTable(info, recovered.next_segment_id)
    held = [
        recovered.used,
        *(s.locations for s in sessions),
        *(t.locations for t in recovered.trash),
    ]
    segments.restore(recovered.segments, BlockLocations.joined(held))
    writing: dict[int, Session] = {}
    for session in sessions:
        keys = session.record.keys[~session.record.removed]
        writing.update(dict.fromkeys(keys.tolist(), session))
    return Instance(
        info,
        segments,
        writing,
        recovered.key_count,
        recovered.next_generation,
        recovered.next_trash_id,
    )


def _get_meta(ledger: Ledger, event: GetMetaEvent) -> Outcome:
    instance = ledger.instance(event.instance_id)
    states = np.where(event.hits, BlockState.SERVING, BlockState.ABSENT).astype(np.uint8)
    locations = event.found.take(np.arange(len(event.keys)))  # a copy
    places: dict[str, dict[int, int]] = {}  # of the keys, for each session that is met
    for i, key in enumerate(event.keys.tolist() if instance.writing else ()):
        session = instance.writing.get(key)
        if session is not None:
            name = session.record.session_id
            if name not in places:
                places[name] = {k: at for at, k in enumerate(session.keys.tolist())}
            at = places[name][key]
            states[i] = BlockState.WRITING
            locations.segment[i] = session.locations.segment[at]
            locations.slot[i] = session.locations.slot[at]
            locations.generation[i] = session.locations.generation[at]
    held = locations.take(states != BlockState.ABSENT)
    return Outcome(BlockMeta(states, locations, instance.segments.named_by(held)), [])


def _touch(ledger: Ledger, event: TouchEvent) -> Outcome:
    ledger.instance(event.instance_id)
    ledger.hit_blocks += len(event.keys)
    ledger.lookup_blocks += max(event.lookups, len(event.keys))
    return Outcome(Touched(), [])


_HANDLERS: dict[type[Event], Callable[[Ledger, Any], Outcome]] = {
    StartWriteEvent: start_write,
    FinishWriteEvent: finish_write,
    RemoveEvent: remove_blocks,
    DeletesConfirmed: confirm_deletes,
    Tick: expire_sessions,
    GetMetaEvent: _get_meta,
    TouchEvent: _touch,
}
