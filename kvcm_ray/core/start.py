"""ABSENT -> WRITING: reserve room for the keys of a request that the instance does not hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kvcm_ray.core import limits
from kvcm_ray.core.blocks import Ids
from kvcm_ray.core.effects import CreateSegment, Effect, Outcome, PutSession
from kvcm_ray.core.events import StartWriteEvent
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.model import StorageConfig
from kvcm_ray.core.placement import candidates, choose_storage
from kvcm_ray.core.records import SessionRecord
from kvcm_ray.core.report import explained
from kvcm_ray.core.requests import BlockLocations, Flags, Keys, StartWrite, WriteStarted
from kvcm_ray.core.retire import allowed_bytes
from kvcm_ray.core.segments import Shape
from kvcm_ray.core.session import EMPTY_SESSION_MS, Indices, Session, repetitions
from kvcm_ray.errors import AlreadyExists, InvalidArgument, KeyLimitReached, LimitReached, QuotaExceeded

_SESSION_ID = re.compile(r"[a-z0-9]{32}")


@dataclass(slots=True)
class _Plan:
    """What a write needs, before anything is decided about storages."""

    exists: Flags  #: of each key of the request
    keys: Keys  #: new ones, repetitions included
    repeated: tuple[Indices, Indices] | None  #: see `repetitions`
    #: for each shape: the places of its blocks among the distinct new keys; None = all of them
    shapes: list[tuple[Shape, Indices | None]]
    blocks: int  #: distinct new keys

    def count(self, places: Indices | None) -> int:
        return self.blocks if places is None else len(places)

    @property
    def nbytes(self) -> int:
        return sum(shape.slot_bytes * self.count(places) for shape, places in self.shapes)


def start_write(ledger: Ledger, event: StartWriteEvent) -> Outcome:
    """Make a session for the new keys of the request.

    Raises:
        InvalidArgument: bad session id, keys or spec group names.
        AlreadyExists: the session id is in use.
        InstanceNotFound, NoStorageAvailable, QuotaExceeded, KeyLimitReached, LimitReached
    """
    request = event.request
    instance = ledger.instance(request.instance_id)
    if answer := _first_answer(ledger, instance, request):
        return Outcome(answer, [])
    _check(ledger, instance, request)
    assert len(event.exists) == len(request.keys), "one flag for each key"
    exists = _held(instance, request.keys, event.exists)
    before = ledger.find(instance, event.exists, event.found)
    # Also if it is refused: it comes again, and what it has must not leave to make room for it.
    ledger.touch(before, event.now_ms, used=False)
    if exists.all():
        return _nothing_to_write(ledger, event, exists)
    plan = _plan(instance, request, exists)
    _check_limits(ledger, instance, plan, before)
    storage = _choose_storage(ledger, instance, event, plan, before)
    return _begin(ledger, instance, event, plan, storage, before)


def started(instance: Instance, record: SessionRecord) -> WriteStarted:
    """The answer to the request that made this session."""
    return WriteStarted(
        record.session_id,
        record.exists,
        record.locations,
        instance.segments.named_by(record.locations),
        record.storage,
        record.lease_ms,
    )


# ------------------------------------------------------------------------------------- decide


def _first_answer(ledger: Ledger, instance: Instance, request: StartWrite) -> WriteStarted | None:
    session = ledger.sessions.started_by(request.instance_id, request.event_id)
    if session is not None:
        return started(instance, session.record)
    return ledger.answers.find(request.instance_id, request.event_id, WriteStarted)


def _check(ledger: Ledger, instance: Instance, request: StartWrite) -> None:
    keys, names = request.keys, request.spec_group_names
    if keys.ndim != 1 or keys.dtype != np.int64:
        raise InvalidArgument(f"keys must be one row of int64, not {keys.dtype} of {keys.shape}")
    if len(keys) > limits.KEYS_PER_CALL_MAX:
        raise InvalidArgument(f"{len(keys)} keys, more than {limits.KEYS_PER_CALL_MAX} a call")
    if names and len(names) != len(keys):
        raise InvalidArgument(f"{len(names)} location_spec_group_names for {len(keys)} keys")
    unknown = set(names) - instance.segments.shapes.keys()
    if unknown:
        raise InvalidArgument(f"instance {request.instance_id!r} has no location spec group {min(unknown)!r}")
    if not _SESSION_ID.fullmatch(request.session_id):
        raise InvalidArgument(f"session id {request.session_id!r} is not 32 characters of [a-z0-9]")
    if request.session_id in ledger.sessions:
        raise AlreadyExists(f"session id {request.session_id!r} is in use")


def _held(instance: Instance, keys: Keys, serving: Flags) -> Flags:
    """Which keys are SERVING or WRITING."""
    writing, values = instance.writing, keys.tolist()
    if not writing or writing.keys().isdisjoint(values):
        return serving.copy()
    return serving | np.fromiter((k in writing for k in values), np.bool_, len(values))


def _plan(instance: Instance, request: StartWrite, exists: Flags) -> _Plan:
    keys = request.keys[~exists]
    repeated = repetitions(keys)
    blocks = len(keys) if repeated is None else len(repeated[0])
    if not request.spec_group_names:
        shapes: list[tuple[Shape, Indices | None]] = [(instance.segments.shapes[""], None)]
    else:
        places = np.flatnonzero(~exists)
        if repeated is not None:
            places = places[repeated[0]]
        shapes = _by_shape(instance, [request.spec_group_names[i] for i in places.tolist()])
    for shape, _ in shapes:
        if not shape.specs:
            raise InvalidArgument(f"a block of instance {request.instance_id!r} would have no specs")
    return _Plan(exists, keys, repeated, shapes, blocks)


def _by_shape(instance: Instance, names: list[str]) -> list[tuple[Shape, Indices | None]]:
    """Places of each shape's blocks, given the spec group of each block."""
    of_name = instance.segments.shapes
    if len(set(names)) == 1:
        return [(of_name[names[0]], None)]
    numbers = np.array([of_name[name].number for name in names])
    shapes = {of_name[name].number: of_name[name] for name in names}
    return [(shape, np.flatnonzero(numbers == number)) for number, shape in shapes.items()]


def _check_limits(ledger: Ledger, instance: Instance, plan: _Plan, before: Ids) -> None:
    if len(ledger.sessions) >= limits.SESSIONS_PER_GROUP_MAX:
        raise LimitReached(
            f"group {ledger.group.name!r} has {len(ledger.sessions)} write sessions in progress"
        )
    limit, held = ledger.group.max_key_count, instance.key_count + len(instance.writing)
    if limit > 0 and held + plan.blocks > limit:
        hopeless = ledger.plan.paused or len(before) + plan.blocks > limit
        free_to_go = 0 if hopeless else _unpinned(ledger, instance)
        raise KeyLimitReached(
            f"instance {instance.info.instance_id!r} holds {held} blocks; {plan.blocks} more would "
            f"exceed max_key_count {limit}",
            limit=limit,
            held=held,
            asked=plan.blocks,
            asked_blocks=plan.blocks,
            asked_bytes=plan.nbytes,
            reclaimable=free_to_go,
            may_wait=not hopeless and (free_to_go > 0 or bool(instance.writing)),
        )


def _unpinned(ledger: Ledger, instance: Instance) -> int:
    """Bytes of an instance that are neither pinned nor waiting for deletion."""
    table, ids = ledger.table, ledger.table.of_instance(instance.number)
    return int(table.nbytes[ids[~table.pinned[ids]]].sum())


def _choose_storage(
    ledger: Ledger, instance: Instance, event: StartWriteEvent, plan: _Plan, before: Ids
) -> StorageConfig:
    ranked = candidates(ledger.group, ledger.storages)
    _check_share(ledger, instance, plan, event.now_s)
    try:
        return choose_storage(_sound(ledger, ranked, event), ledger.quota, plan.nbytes, event.ahead_bytes)
    except QuotaExceeded as refusal:
        raise explained(ledger, refusal, ranked, plan.nbytes, plan.blocks, before, event.now_ms) from None


def _sound(
    ledger: Ledger, ranked: tuple[StorageConfig, ...], event: StartWriteEvent
) -> tuple[StorageConfig, ...]:
    """Without those that could not make room lately, a full disk say, unless that leaves none."""
    full = ledger.plan.full_until_ms
    return tuple(s for s in ranked if full.get(s.global_unique_name, 0) <= event.now_ms) or ranked


def _check_share(ledger: Ledger, instance: Instance, plan: _Plan, now_s: int) -> None:
    allowed = allowed_bytes(instance.info, ledger.quota.capacity, now_s)
    if allowed is not None and instance.serving_bytes + plan.nbytes > allowed:
        raise QuotaExceeded(
            f"instance {instance.info.instance_id!r} retires: its share is {allowed} bytes by now, it "
            f"holds {instance.serving_bytes}, {plan.nbytes} more do not fit",
            quota="retiring",
            capacity=allowed,
            used=instance.serving_bytes,
            asked=plan.nbytes,
        )


def _lease_ms(timeout_ms: int) -> int:
    if timeout_ms <= 0:
        return limits.SESSION_TIMEOUT_DEFAULT_MS
    return min(timeout_ms, limits.SESSION_TIMEOUT_MAX_MS)


# ------------------------------------------------------------------------------------- change


def _nothing_to_write(ledger: Ledger, event: StartWriteEvent, exists: Flags) -> Outcome:
    request = event.request
    ledger.sessions.add_empty(request.instance_id, request.session_id, event.now_ms)
    nowhere = BlockLocations.empty()
    reply = WriteStarted(request.session_id, exists, nowhere, {}, "", EMPTY_SESSION_MS)
    ledger.answers.remember(request.instance_id, request.event_id, reply)
    return Outcome(reply, [])


def _begin(
    ledger: Ledger,
    instance: Instance,
    event: StartWriteEvent,
    plan: _Plan,
    storage: StorageConfig,
    before: Ids,
) -> Outcome:
    request, lease_ms = event.request, _lease_ms(event.request.timeout_ms)
    ledger.quota.reserve(storage.storage_type, plan.nbytes)
    effects, blocks = _allocate(ledger, instance, plan, storage)
    first_new = int(np.argmin(plan.exists))
    record = SessionRecord(
        session_id=request.session_id,
        event_id=request.event_id,
        instance_id=request.instance_id,
        generation=int(blocks.generation[0]),
        deadline_ms=event.now_ms + lease_ms,
        lease_ms=lease_ms,
        storage=storage.global_unique_name,
        parent_key=int(request.keys[first_new - 1]) if first_new else None,
        exists=plan.exists,
        keys=plan.keys,
        locations=blocks if plan.repeated is None else blocks.take(plan.repeated[1]),
        removed=np.zeros(len(plan.keys), np.bool_),
    )
    first, block_of = plan.repeated or (None, None)
    distinct = plan.keys if first is None else plan.keys[first]
    session = Session(record, distinct, blocks, first, block_of)
    session.partial_tail = request.partial_tail and not plan.exists[-1]
    session.before = before, ledger.table.keys[before]
    ledger.sessions.add(session)
    instance.writing.update(dict.fromkeys(distinct.tolist(), session))
    effects.append(PutSession(request.instance_id, record))
    return Outcome(started(instance, record), effects)


def _allocate(
    ledger: Ledger, instance: Instance, plan: _Plan, storage: StorageConfig
) -> tuple[list[Effect], BlockLocations]:
    """Slots for the distinct new keys, in their order, and the segments made for them."""
    effects: list[Effect] = []
    ceiling = ledger.quota.ceiling(storage.storage_type)
    blocks = BlockLocations.empty(plan.blocks)
    blocks.generation[:] = instance.take_generation()
    for shape, places in plan.shapes:
        made, segment, slot = instance.segments.allocate(
            storage.global_unique_name, shape, plan.count(places), ceiling
        )
        for new in made:
            ledger.table.open_segment(instance.number, new.segment_id, new.slots)
            effects.append(CreateSegment(instance.info.instance_id, new))
        index = slice(None) if places is None else places
        blocks.segment[index], blocks.slot[index] = segment, slot
    return effects, blocks
