"""SERVING or WRITING -> DELETING by request, and DELETING -> ABSENT when the bytes are gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvcm_ray.core.effects import (
    DropBlocks,
    DropCopies,
    DropSegment,
    DropTrash,
    Effect,
    Outcome,
    PutSession,
    RememberAnswer,
)
from kvcm_ray.core.events import DeletesConfirmed, RemoveEvent
from kvcm_ray.core.finish import drop_sessions
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.records import TrashRecord
from kvcm_ray.core.requests import Keys, Removed
from kvcm_ray.core.session import Session


def remove_blocks(ledger: Ledger, event: RemoveEvent) -> Outcome:
    """Remove blocks: the SERVING ones now, the WRITING ones when their session is finished.

    Raises:
        InstanceNotFound
        InvalidArgument: the event id belongs to another kind of request.
    """
    instance = ledger.instance(event.instance_id)
    answer = ledger.answers.find(event.instance_id, event.event_id, Removed)
    if answer is not None:
        return Outcome(answer, [])
    assert len(event.keys) == len(event.hits) == len(event.found)
    serving, effects = _remove_serving(ledger, instance, event)
    if event.drop_sessions:
        writing, more = _drop_sessions(ledger, instance, event.now_ms)
    else:
        writing, more = _remove_writing(instance, event.keys)
    effects += more
    reply = Removed(serving + writing)
    if event.event_id:
        ledger.answers.remember(event.instance_id, event.event_id, reply)
        effects.append(RememberAnswer(event.instance_id, event.event_id, reply))
    return Outcome(reply, effects)


def confirm_deletes(ledger: Ledger, event: DeletesConfirmed) -> Outcome:
    """Free the slots whose bytes were erased, and drop segments that nobody uses any more."""
    instance = ledger.instance(event.instance_id)
    known = [ledger.trash.take(event.instance_id, trash_id) for trash_id in event.trash_ids]
    records = [record for record in known if record is not None]
    if not records:
        return Outcome(None, [])
    effects: list[Effect] = [DropTrash(event.instance_id, tuple(r.trash_id for r in records))]
    for record in records:
        effects += [DropSegment(event.instance_id, i) for i in _release(ledger, instance, record)]
    return Outcome(None, effects)


def _release(ledger: Ledger, instance: Instance, record: TrashRecord) -> list[int]:
    for storage, nbytes in instance.segments.bytes_by_storage(record.locations).items():
        ledger.quota.release(ledger.kind_of(storage), nbytes)
    dropped = instance.segments.free(record.locations)
    for segment_id in dropped:
        ledger.table.drop_segment(instance.number, segment_id)
    return dropped


def _remove_serving(ledger: Ledger, instance: Instance, event: RemoveEvent) -> tuple[int, list[Effect]]:
    ids = ledger.find(instance, event.hits, event.found)
    if not len(ids):
        return 0, []
    keys, copied = ledger.table.keys[ids], ledger.copied_keys(ids)
    due_ms = ledger.due_after_readers(ids, event.now_ms)
    before = instance.serving_bytes
    locations = ledger.forget(instance, ids, evicted=False)
    effects: list[Effect] = [DropCopies(event.instance_id, copied)] if len(copied) else []
    effects.append(DropBlocks(event.instance_id, keys, nbytes=before - instance.serving_bytes))
    return len(keys), effects + ledger.discard(instance, locations, due_ms)


def _remove_writing(instance: Instance, keys: Keys) -> tuple[int, list[Effect]]:
    """Mark blocks in their sessions: finishing drops them. Their keys can be written anew now."""
    doomed: dict[str, tuple[Session, list[int]]] = {}
    for key in keys.tolist() if instance.writing else ():
        session = instance.writing.pop(key, None)
        if session is not None:
            doomed.setdefault(session.record.session_id, (session, []))[1].append(key)
    effects: list[Effect] = []
    for session, gone in doomed.values():
        record = session.record
        removed = record.removed | np.isin(record.keys, np.array(gone, np.int64))
        session.record = replace(record, removed=removed)  # effects may still hold the old one
        effects.append(PutSession(record.instance_id, session.record))
    return sum(len(gone) for _, gone in doomed.values()), effects


def _drop_sessions(ledger: Ledger, instance: Instance, now_ms: int) -> tuple[int, list[Effect]]:
    """End all sessions of the instance. Their writers may still be at it for a moment."""
    writing = len(instance.writing)
    ledger.sessions.forget_empty(instance.info.instance_id)
    sessions = ledger.sessions.of_instance(instance.info.instance_id)
    for session in sessions:
        ledger.sessions.remove(session)
    return writing, drop_sessions(ledger, instance, sessions, now_ms)
