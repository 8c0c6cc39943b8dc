"""The state of one instance group: every decision about quota, sessions, slots and deletions.

Events go in, effects come out (`handle`); nothing else changes it except the administrator's calls
`configure`, `open_instance` and `close_instance`. It knows no clock, no disk and no randomness, so
replaying the same events gives the same state. A refused event changes nothing and has no effects.

Which blocks are SERVING is the index's knowledge: events bring what was looked up there, and
effects say what to write. If a commit fails, open the instance again with what the index holds.

The actor calls this. It takes the effects of an outcome in order, in one transaction, and answers
after the commit. Erasing and copying bytes is another's work: `due_trash` and `due_moves` hand out
what is due, and `DeletesConfirmed`, `trash_failed` or `MovedEvent` reports back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from kvcm_ray.core.block import BlockState
from kvcm_ray.core.blocks import NO_IDS, Ids
from kvcm_ray.core.drain import follow_types
from kvcm_ray.core.effects import Outcome
from kvcm_ray.core.events import (
    DeletesConfirmed,
    Event,
    FinishWriteEvent,
    GetMetaEvent,
    LeaseEvent,
    MovedEvent,
    PinEvent,
    ReclaimEvent,
    RemoveEvent,
    StartWriteEvent,
    Tick,
    TouchEvent,
    UnpinEvent,
)
from kvcm_ray.core.eviction import make_policy
from kvcm_ray.core.finish import expire_sessions, finish_write
from kvcm_ray.core.holds import lease, pin, unpin
from kvcm_ray.core.inflight import enlist, release, still_there
from kvcm_ray.core.ledger import KINDS, Instance, Ledger
from kvcm_ray.core.limits import PROMOTIONS_WAITING_MAX
from kvcm_ray.core.marks import policy_of
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, Segment, StorageConfig
from kvcm_ray.core.moves import FULL_STORAGE_MS, moved
from kvcm_ray.core.placement import tiers
from kvcm_ray.core.pressure import next_reclaim_ms
from kvcm_ray.core.reclaim import reclaim
from kvcm_ray.core.records import (
    RecoveredInstance,
    SessionKind,
    SessionRecord,
    TrashRecord,
    unpack_answer,
)
from kvcm_ray.core.remove import confirm_deletes, remove_blocks
from kvcm_ray.core.report import capacity, held
from kvcm_ray.core.requests import BlockLocations, BlockMeta, Keys, Touched
from kvcm_ray.core.restore import NOTHING_KNOWN, forget_blocks, recency, restore_blocks, written_ms
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
        """Use another configuration from now on: writes at once, what exists with the next
        `ReclaimEvent`s."""
        ledger = self.ledger
        ledger.group, ledger.storages = group, dict(storages)
        ledger.quota.configure(group)
        if ledger.order.policy.name != policy_of(group):
            ledger.order.use(make_policy(policy_of(group)))
        follow_types(ledger)
        ledger.recount()
        self._look_again()

    def set_instance(self, info: InstanceInfo) -> None:
        """The registration of an open instance changed in what is not its shape: it retires, say.

        Raises:
            InstanceNotFound
        """
        self.ledger.instance(info.instance_id).info = info
        self._look_again()

    @property
    def paused(self) -> bool:
        """Nothing is reclaimed, and nothing handed out to be erased or moved."""
        return self.ledger.plan.paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self.ledger.plan.paused = paused
        self._look_again()

    def _look_again(self) -> None:
        plan = self.ledger.plan
        plan.retry_ms = plan.marks_ms = plan.expiry_ms = plan.shares_ms = None
        plan.falling.clear()
        plan.unreadable.clear()
        plan.draining = True

    def open_instance(
        self, info: InstanceInfo, recovered: RecoveredInstance | None, now_ms: int = 0, now_s: int = 0
    ) -> None:
        """Take charge of an instance; of one that is open already, anew from `recovered`.

        Blocks count as last touched when they were written, unless they were open here before.

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
        known = NOTHING_KNOWN
        if info.instance_id in self.ledger.instances:
            known = recency(self.ledger, self.ledger.instance(info.instance_id))
            self.close_instance(info.instance_id)
        instance.number = _smallest_free({i.number for i in self.ledger.instances.values()})
        self.ledger.instances[info.instance_id] = instance
        restore_blocks(self.ledger, instance, recovered, written_ms(recovered, now_ms, now_s), known)
        for session in sessions:
            if session.record.kind is SessionKind.WRITE:
                self.ledger.sessions.add(session)
            else:
                enlist(self.ledger, session, still_there(self.ledger, instance, session))
        for record in recovered.trash:
            self.ledger.trash.put(record)
        for event_id, answer in answers.items():
            self.ledger.answers.remember(info.instance_id, event_id, answer)
        self.ledger.count([instance], sessions, recovered.trash)
        self._look_again()

    def close_instance(self, instance_id: str) -> None:
        """Forget an instance with all it holds; the caller disposes of its index and segments.

        Raises:
            InstanceNotFound
        """
        ledger = self.ledger
        instance = ledger.instance(instance_id)
        for session in ledger.sessions.of_instance(instance_id):
            ledger.sessions.remove(session)
            if session.record.kind is not SessionKind.WRITE:
                release(ledger, session)
        ledger.sessions.forget_empty(instance_id)
        ledger.trash.forget(instance_id)
        ledger.answers.forget_instance(instance_id)
        forget_blocks(ledger, instance)
        del ledger.instances[instance_id]
        ledger.recount()

    # --------------------------------------------------------------------------------- events

    def handle(self, event: Event) -> Outcome:
        """Decide about one event. A refusal is an error in the outcome's `reply`, never raised."""
        try:
            outcome = _HANDLERS[type(event)](self.ledger, event)
        except KvcmError as refusal:
            return Outcome(refusal, [])
        if isinstance(event, _MAKE_ROOM):
            self.ledger.plan.retry_ms = None
        if self.ledger.growth.due(event_ms := getattr(event, "now_ms", 0)):
            self.ledger.growth.sample(event_ms, held(self.ledger))
        return outcome

    # -------------------------------------------------------------------------------- queries

    def due_trash(self, now_ms: int, limit: int = 64) -> list[TrashRecord]:
        """At most `limit` records whose bytes may be erased now. Each is handed out once, until
        `trash_failed`; after a restart or a reopening all are handed out again."""
        return [] if self.paused else self.ledger.trash.hand_out(now_ms, limit)

    def trash_failed(self, instance_id: str, trash_ids: tuple[int, ...], now_ms: int) -> None:
        """Erasing these failed: hand them out again after TRASH_RETRY_MS. Ignores unknown ids."""
        self.ledger.trash.again(instance_id, trash_ids, now_ms + TRASH_RETRY_MS)

    def due_moves(self, limit: int = 16) -> list[SessionRecord]:
        """At most `limit` sessions whose blocks are to be copied; each is handed out once."""
        moves = self.ledger.moves
        names = list(islice(moves.waiting, 0 if self.paused else limit))
        for name in names:
            del moves.waiting[name]
        return [moves.by_id[name].session.record for name in names]

    def storage_failed(self, storage: str, now_ms: int) -> None:
        """A storage could not make a segment: for a while, new blocks go elsewhere if they can."""
        self.ledger.plan.full_until_ms[storage] = now_ms + FULL_STORAGE_MS

    def next_move_due(self) -> bool:
        """Whether `due_moves` has something to hand out."""
        return bool(self.ledger.moves.waiting) and not self.paused

    def next_reclaim_ms(self, now_ms: int) -> int | None:
        """When a `ReclaimEvent` may find something to do though nobody waits for room."""
        return next_reclaim_ms(self.ledger, now_ms)

    def parent_key(self, instance_id: str, session_id: str) -> int | None:
        """Key of the block before the first one of a write session, if there is one."""
        session = self.ledger.sessions.find(instance_id, session_id)
        return None if session is None else session.record.parent_key

    def session_keys(self, instance_id: str, session_id: str) -> Keys | None:
        """New or copied keys of a session; None if it has ended."""
        session = self.ledger.sessions.find(instance_id, session_id)
        return None if session is None else session.record.keys

    def pinned_keys(self, instance_id: str, name: str) -> Keys:
        """Keys of a pin; none if there is no such pin.

        Raises:
            InstanceNotFound
        """
        record = self.ledger.instance(instance_id).pins.get(name)
        return np.zeros(0, np.int64) if record is None else record.keys

    def capacity(self, now_ms: int, now_s: int) -> dict[str, Any]:
        """The capacity report; see `kvcm_ray.core.report`."""
        return capacity(self.ledger, now_ms, now_s)

    def next_session_ms(self) -> int | None:
        """When a `Tick` will have something to do."""
        return self.ledger.sessions.next_deadline_ms()

    def next_trash_ms(self) -> int | None:
        """When `due_trash` will have something to hand out (may be in the past)."""
        return None if self.paused else self.ledger.trash.next_due_ms()

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
        recovered.blocks.locations,
        recovered.copies,
        *(s.locations for s in sessions),
        *(t.locations for t in recovered.trash),
    ]
    segments.restore(recovered.segments, BlockLocations.joined(held))
    writing: dict[int, Session] = {}
    for session in sessions:
        if session.record.kind is not SessionKind.WRITE:
            continue
        keys = session.record.keys[~session.record.removed]
        writing.update(dict.fromkeys(keys.tolist(), session))
    return Instance(
        info,
        segments,
        writing,
        len(recovered.blocks),
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
    instance = ledger.instance(event.instance_id)
    ledger.hit_blocks += len(event.keys)
    ledger.lookup_blocks += max(event.lookups, len(event.keys))
    ids = ledger.find(instance, event.hits, event.found)
    ledger.touch(ids, event.now_ms, chained=event.chained)
    order = tiers(ledger.group, ledger.storages) if len(ids) else []
    below = ids[ledger.table.kind[ids] != order[0]] if len(order) > 1 else NO_IDS
    if len(below):
        _count_below(ledger, event.instance_id, below)
        _wish_promotion(ledger, below)
    return Outcome(Touched(), [])


def _count_below(ledger: Ledger, instance_id: str, ids: Ids) -> None:
    kinds, counts = np.unique(ledger.table.kind[ids], return_counts=True)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        ledger.hits_below[instance_id, KINDS[kind]] += count


def _wish_promotion(ledger: Ledger, below: Ids) -> None:
    """Blocks that were hit anywhere but in the first tier; too many of them are forgotten."""
    slow = below[~ledger.table.moving[below]].tolist()
    wishes = ledger.plan.promotions
    if slow and len(wishes) + len(slow) <= PROMOTIONS_WAITING_MAX:
        wishes.update(dict.fromkeys(slow))


def _smallest_free(numbers: set[int]) -> int:
    return next(n for n in range(len(numbers) + 1) if n not in numbers)


_HANDLERS: dict[type[Event], Callable[[Ledger, Any], Outcome]] = {
    StartWriteEvent: start_write,
    FinishWriteEvent: finish_write,
    RemoveEvent: remove_blocks,
    DeletesConfirmed: confirm_deletes,
    Tick: expire_sessions,
    GetMetaEvent: _get_meta,
    TouchEvent: _touch,
    LeaseEvent: lease,
    PinEvent: pin,
    UnpinEvent: unpin,
    ReclaimEvent: reclaim,
    MovedEvent: moved,
}
#: After these a step that could do nothing before may find something.
_MAKE_ROOM = (DeletesConfirmed, MovedEvent, RemoveEvent, UnpinEvent, FinishWriteEvent)
