"""SERVING blocks that change their storage: down, up, or off a storage that is drained.

A move is a session whose writer is a reclaimer. Until it has copied the bytes the blocks are served
from where they were; then the index names the new place, and the old one goes to the trash, or stays
as a copy. A reclaimer that dies costs no more than a session that expires.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from kvcm_ray.core import limits
from kvcm_ray.core.blocks import Ids
from kvcm_ray.core.effects import (
    CreateSegment,
    DropCopies,
    Effect,
    MoveBlocks,
    Moved,
    Outcome,
    PutCopies,
    PutSession,
)
from kvcm_ray.core.events import COPIED, NOT_COPIED, UNREADABLE, MovedEvent
from kvcm_ray.core.finish import end_session
from kvcm_ray.core.inflight import enlist, still_there
from kvcm_ray.core.ledger import KINDS, Instance, Ledger
from kvcm_ray.core.marks import marks_of
from kvcm_ray.core.model import LocationSpecInfo, StorageConfig
from kvcm_ray.core.placement import tiers
from kvcm_ray.core.records import SessionKind, SessionRecord
from kvcm_ray.core.requests import BlockLocations, Flags
from kvcm_ray.core.session import LATE_WRITER_MS, Session

FULL_STORAGE_MS = 5_000  #: a storage that took no copy is not asked again for so long


def start_move(
    ledger: Ledger, instance: Instance, ids: Ids, storage: StorageConfig, kind: SessionKind, now_ms: int
) -> list[Effect]:
    """Begin to copy blocks of the instance to `storage`, whose quota has room for them."""
    effects: list[Effect] = []
    for part, specs in _by_shape(ledger, instance, ids):
        shape = instance.segments.shape(specs)
        ledger.quota.reserve(storage.storage_type, shape.slot_bytes * len(part))
        made, segment, slot = instance.segments.allocate(
            storage.global_unique_name, shape, len(part), ledger.quota.ceiling(storage.storage_type)
        )
        for new in made:
            ledger.table.open_segment(instance.number, new.segment_id, new.slots)
            effects.append(CreateSegment(instance.info.instance_id, new))
        generation = instance.take_generation()
        locations = BlockLocations(segment, slot, np.full(len(part), generation, np.uint32))
        record = SessionRecord(
            session_id=_session_id(instance.info.instance_id, generation),
            event_id="",
            instance_id=instance.info.instance_id,
            generation=generation,
            deadline_ms=now_ms + limits.MOVE_LEASE_MS,
            lease_ms=limits.MOVE_LEASE_MS,
            storage=storage.global_unique_name,
            parent_key=None,
            exists=np.zeros(len(part), np.bool_),
            keys=ledger.table.keys[part],
            locations=locations,
            removed=np.zeros(len(part), np.bool_),
            kind=kind,
            source=ledger.table.places.get(part),
        )
        enlist(ledger, Session.of(record), part)
        effects.append(PutSession(instance.info.instance_id, record))
    return effects


def moved(ledger: Ledger, event: MovedEvent) -> Outcome:
    """Name the new places of what was copied; see the module."""
    instance = ledger.instance(event.instance_id)
    session = ledger.sessions.find(event.instance_id, event.session_id)
    if session is None or session.record.kind is SessionKind.WRITE:
        return Outcome(None, [])  # it has expired
    record = session.record
    ids = still_there(ledger, instance, session)
    same = _same(event.found, record.source) & event.hits & (ids >= 0)
    good = same & (event.copied == COPIED)
    due_ms = event.now_ms if good.all() else event.now_ms + LATE_WRITER_MS
    effects = end_session(ledger, instance, session, good, due_ms=due_ms)
    if good.any():
        effects += _arrive(ledger, instance, ids[good], record, good, event.now_ms)
    ledger.plan.unreadable.update(ids[same & (event.copied == UNREADABLE)].tolist())
    if failed := int(np.count_nonzero(same & ~good)):
        ledger.counters["failed_moves"] += failed
    if (same & (event.copied == NOT_COPIED)).any() and not good.any():
        ledger.plan.full_until_ms[record.storage] = event.now_ms + FULL_STORAGE_MS
    return Outcome(None, effects)


def _arrive(
    ledger: Ledger, instance: Instance, ids: Ids, record: SessionRecord, good: Flags, now_ms: int
) -> list[Effect]:
    table, name = ledger.table, instance.info.instance_id
    old, new = table.places.get(ids), record.locations.take(good)
    old_kinds = table.kind[ids].copy()
    due_ms = ledger.due_after_readers(ids, now_ms)
    _, kinds = ledger.facts(instance, new)
    why = _why(ledger, instance, record, old)
    nbytes = int(table.nbytes[ids].sum())
    effects: list[Effect] = [MoveBlocks(name, table.keys[ids], new, why, nbytes, record.storage)]
    table.relocate(ids, new, kinds)
    ledger.order.move(ids[::-1], instance.lane(KINDS[kinds[0]]))  # they came coldest first
    kept = np.zeros(len(ids), np.bool_)
    ledger.counters[f"{why}_blocks"] += len(ids)
    if why is Moved.PROMOTED:
        kept = _room_for_copies(ledger, old_kinds) & ~table.copied[ids]
        if kept.any():
            ledger.note_copies(instance, ids[kept], old.take(kept))
            effects.append(PutCopies(name, table.keys[ids[kept]], old.take(kept)))
    if not kept.all():
        effects += ledger.discard(instance, old.take(~kept), due_ms)
    return effects


def _why(ledger: Ledger, instance: Instance, record: SessionRecord, old: BlockLocations) -> Moved:
    if record.kind is SessionKind.PROMOTE:
        return Moved.PROMOTED
    storage = ledger.storages.get(instance.segments.segments[int(old.segment[0])].storage)
    return Moved.DRAINED if storage is None or storage.is_draining else Moved.DEMOTED


def use_copies(ledger: Ledger, instance: Instance, ids: Ids, now_ms: int) -> list[Effect]:
    """Demote blocks that have a copy: it becomes their only place, and nothing is moved."""
    table, name = ledger.table, instance.info.instance_id
    keys, old, new = table.keys[ids], table.places.get(ids), table.copies.get(ids)
    due_ms = ledger.due_after_readers(ids, now_ms)
    instance.serving_bytes -= int(table.nbytes[ids].sum())
    ledger.forget_copies(ids)
    _, kinds = ledger.facts(instance, new)
    table.relocate(ids, new, kinds)
    for kind in np.unique(kinds).tolist():
        ledger.order.move(ids[kinds == kind][::-1], instance.lane(KINDS[kind]))
    ledger.counters["demoted_blocks"] += len(ids)
    nbytes, storage = int(table.nbytes[ids].sum()), instance.segments.segments[int(new.segment[0])].storage
    effects: list[Effect] = [
        DropCopies(name, keys),
        MoveBlocks(name, keys, new, Moved.DEMOTED, nbytes, storage),
    ]
    return effects + ledger.discard(instance, old, due_ms)


def _room_for_copies(ledger: Ledger, kinds: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Flags:
    """Whether the tier a block came from is so empty that the block can stay there as a copy."""
    order = tiers(ledger.group, ledger.storages)
    roomy = np.zeros(len(KINDS), np.bool_)
    for kind in set(kinds.tolist()):
        own = ledger.quota.account(KINDS[kind])
        capacity = ledger.quota.capacities.get(KINDS[kind], ledger.quota.capacity)
        marks = marks_of(ledger.group, upper_tier=bool(order) and KINDS[kind] is not order[-1])
        total, low = ledger.quota.total(), marks_of(ledger.group).low
        roomy[kind] = own.held <= marks.low * capacity and total.held <= low * ledger.quota.capacity
    kept: Flags = roomy[kinds]
    return kept


def _by_shape(
    ledger: Ledger, instance: Instance, ids: Ids
) -> Iterator[tuple[Ids, tuple[LocationSpecInfo, ...]]]:
    """The blocks in sessions of a bounded size, each of one set of specs; with these specs."""
    segments = instance.segments.segments
    specs = {i: segments[i].specs for i in np.unique(ledger.table.places.segment[ids]).tolist()}
    for shape in dict.fromkeys(specs.values()):
        of_shape = [i for i, own in specs.items() if own == shape]
        part = ids[np.isin(ledger.table.places.segment[ids], of_shape)]
        slot_bytes = max(sum(spec.size for spec in shape), 1)
        size = max(min(limits.MOVE_BLOCKS_MAX, limits.MOVE_BYTES_MAX // slot_bytes), 1)
        for begin in range(0, len(part), size):
            yield part[begin : begin + size], shape


def _same(some: BlockLocations, others: BlockLocations) -> Flags:
    place: Flags = (some.segment == others.segment) & (some.slot == others.slot)
    same: Flags = place & (some.generation == others.generation)
    return same


def _session_id(instance_id: str, generation: int) -> str:
    """Of 32 characters, as all are; generations are never used twice by an instance."""
    digest = hashlib.blake2b(instance_id.encode(), digest_size=9).hexdigest()
    return f"mv{digest}{generation:012d}"
