"""WRITING -> SERVING or DELETING: the end of a session, by its writer or by its deadline."""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.effects import AddBlocks, DropSession, Effect, Outcome, RememberAnswer
from kvcm_ray.core.events import FinishWriteEvent, Tick
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.requests import Flags, WriteFinished
from kvcm_ray.core.session import LATE_WRITER_MS, Session
from kvcm_ray.core.start import started
from kvcm_ray.errors import SessionNotFound


def finish_write(ledger: Ledger, event: FinishWriteEvent) -> Outcome:
    """Make the written blocks of a session readable and throw the others away.

    A key given twice counts as written if all its places in the mask say so. A session past its
    deadline that no `Tick` has ended yet still owns its slots and can be finished.

    Raises:
        InvalidArgument: the mask does not fit; the session goes on.
        InstanceNotFound
        SessionNotFound: unknown, expired, ended, or of another instance.
    """
    request = event.request
    instance = ledger.instance(request.instance_id)
    answer = ledger.answers.find(request.instance_id, request.event_id, WriteFinished)
    if answer is not None:
        return Outcome(answer, [])
    if ledger.sessions.is_empty(request.instance_id, request.session_id):
        return _finish_empty(ledger, event)
    session = ledger.sessions.find(request.instance_id, request.session_id)
    if session is None:
        raise SessionNotFound(
            f"no write session {request.session_id!r} of instance {request.instance_id!r}: it is "
            "unknown, has expired, or was finished before"
        )
    record = session.record
    written = session.blocks_all(request.success.exactly(len(record.keys)) & ~record.removed)
    effects = end_session(ledger, instance, session, written, due_ms=event.now_ms)
    if written.any():
        effects.append(_add_blocks(session, written, event.now_s))
    committed = int(np.count_nonzero(written))
    reply = WriteFinished(committed, len(written) - committed)
    instance.key_count += committed
    if request.event_id:
        ledger.answers.remember(request.instance_id, request.event_id, reply)
        effects.append(RememberAnswer(request.instance_id, request.event_id, reply))
    return Outcome(reply, effects)


def expire_sessions(ledger: Ledger, event: Tick) -> Outcome:
    """End the sessions whose deadline is reached. Their writers may still be at it for a moment."""
    effects: list[Effect] = []
    ledger.sessions.expire_empty(event.now_ms)
    for session in ledger.sessions.expired(event.now_ms):
        instance = ledger.instances[session.record.instance_id]
        nothing = np.zeros(len(session.keys), np.bool_)
        effects += end_session(
            ledger, instance, session, nothing, due_ms=event.now_ms + LATE_WRITER_MS
        )
    return Outcome(None, effects)


def end_session(
    ledger: Ledger, instance: Instance, session: Session, written: Flags, *, due_ms: int
) -> list[Effect]:
    """Forget a session. The bytes of its blocks count as used from now on; those not `written`
    (one flag for each distinct block) are to be erased at `due_ms`. The caller makes the others
    readable.
    """
    record = session.record
    ledger.answers.remember(record.instance_id, record.event_id, started(instance, record))
    ledger.sessions.remove(session)
    for key in session.keys.tolist():
        if instance.writing.get(key) is session:  # not so if the key was removed meanwhile
            del instance.writing[key]
    for storage, nbytes in instance.segments.bytes_by_storage(session.locations).items():
        ledger.quota.commit(ledger.kind_of(storage), nbytes)
    effects: list[Effect] = [DropSession(record.instance_id, record.session_id)]
    if not written.all():
        failed = session.locations.take(~written)
        effects += ledger.discard(instance, failed, due_ms)
    return effects


def _add_blocks(session: Session, written: Flags, now_s: int) -> AddBlocks:
    parent = session.key_before(int(np.argmax(written)))
    keys, locations = session.keys, session.locations
    if not written.all():
        keys, locations = keys[written], locations.take(written)
    return AddBlocks(session.record.instance_id, keys, locations, parent, now_s)


def _finish_empty(ledger: Ledger, event: FinishWriteEvent) -> Outcome:
    request = event.request
    request.success.exactly(0)
    ledger.sessions.remove_empty(request.session_id)
    reply = WriteFinished(0, 0)
    ledger.answers.remember(request.instance_id, request.event_id, reply)
    return Outcome(reply, [])
