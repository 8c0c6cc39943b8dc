"""WRITING -> SERVING or DELETING: the end of a session, by its writer or by its deadline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from kvcm_ray.core.effects import AddBlocks, DropSession, Effect, Outcome, RememberAnswer
from kvcm_ray.core.events import FinishWriteEvent, Tick
from kvcm_ray.core.inflight import release
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.records import SessionKind
from kvcm_ray.core.requests import BlockLocations, Flags, WriteFinished
from kvcm_ray.core.session import LATE_WRITER_MS, Session
from kvcm_ray.core.start import started
from kvcm_ray.errors import SessionNotFound

#: Bounds of one `Tick`: its commit must be quick, and small enough for the reserve of a full disk.
EXPIRED_SESSIONS_MAX = 512
EXPIRED_BLOCKS_MAX = 1_024


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
    if session is None or session.record.kind is not SessionKind.WRITE:
        raise SessionNotFound(
            f"no write session {request.session_id!r} of instance {request.instance_id!r}: it is "
            "unknown, has expired, or was finished before"
        )
    record = session.record
    written = session.blocks_all(request.success.exactly(len(record.keys)) & ~record.removed)
    effects = end_session(ledger, instance, session, written, due_ms=event.now_ms)
    if written.any():
        effects.append(_add_blocks(ledger, instance, session, written, event))
    committed = int(np.count_nonzero(written))
    reply = WriteFinished(committed, len(written) - committed)
    if request.event_id:
        ledger.answers.remember(request.instance_id, request.event_id, reply)
        effects.append(RememberAnswer(request.instance_id, request.event_id, reply))
    return Outcome(reply, effects)


def expire_sessions(ledger: Ledger, event: Tick) -> Outcome:
    """End sessions whose deadline is reached, earliest first, as many as one commit should carry;
    `next_deadline_ms` tells whether there are more. Their writers may still be at it for a moment.
    """
    ledger.sessions.expire_empty(event.now_ms)
    ended: dict[str, list[Session]] = {}
    blocks = 0
    for session in islice(ledger.sessions.expired(event.now_ms), EXPIRED_SESSIONS_MAX):
        ended.setdefault(session.record.instance_id, []).append(session)
        ledger.sessions.remove(session)
        blocks += len(session.keys)
        if blocks >= EXPIRED_BLOCKS_MAX:
            break
    effects: list[Effect] = []
    for instance_id, sessions in ended.items():
        effects += drop_sessions(ledger, ledger.instances[instance_id], sessions, event.now_ms, expired=True)
    return Outcome(None, effects)


def drop_sessions(
    ledger: Ledger, instance: Instance, sessions: Sequence[Session], now_ms: int, *, expired: bool = False
) -> list[Effect]:
    """Forget sessions (out of the table already) whose writers may still be at it for a moment.

    All their blocks go to the trash together: thousands of sessions can end at one time.
    """
    effects: list[Effect] = [_forget(ledger, instance, session, expired) for session in sessions]
    locations = BlockLocations.joined([session.locations for session in sessions])
    for storage, nbytes in instance.segments.bytes_by_storage(locations).items():
        ledger.quota.commit(ledger.kind_of(storage), nbytes)
    return effects + ledger.discard(instance, locations, now_ms + LATE_WRITER_MS)


def end_session(
    ledger: Ledger, instance: Instance, session: Session, written: Flags, *, due_ms: int
) -> list[Effect]:
    """Forget a session. The bytes of its blocks count as used from now on; those not `written`
    (one flag for each distinct block) are to be erased at `due_ms`. The caller makes the others
    readable.
    """
    ledger.sessions.remove(session)
    effects: list[Effect] = [_forget(ledger, instance, session)]
    for storage, nbytes in instance.segments.bytes_by_storage(session.locations).items():
        ledger.quota.commit(ledger.kind_of(storage), nbytes)
    if not written.all():
        failed = session.locations.take(~written)
        effects += ledger.discard(instance, failed, due_ms)
    return effects


def _forget(ledger: Ledger, instance: Instance, session: Session, expired: bool = False) -> DropSession:
    """Keep its answer, free its keys; its bytes and slots are the caller's business."""
    record = session.record
    ledger.answers.remember(record.instance_id, record.event_id, started(instance, record))
    writing = instance.writing
    for key in session.keys.tolist():
        if writing.get(key) is session:  # not so if the key was removed meanwhile
            del writing[key]
    if record.kind is not SessionKind.WRITE:
        release(ledger, session)
    return DropSession(record.instance_id, record.session_id, expired, len(session.keys))


def _add_blocks(
    ledger: Ledger, instance: Instance, session: Session, written: Flags, event: FinishWriteEvent
) -> AddBlocks:
    parent = session.key_before(int(np.argmax(written)))
    keys, locations = session.keys, session.locations
    if not written.all():
        keys, locations = keys[written], locations.take(written)
    instance.key_count += len(keys)
    above = ledger.table.find(instance.number, event.parent)
    ledger.serve(
        instance,
        keys,
        locations,
        event.now_ms,
        parent=int(above[0]) if len(above) else -1,
        partial=session.partial_tail and bool(written[-1]),
    )
    _touch_before(ledger, instance, session, event.now_ms)
    return AddBlocks(session.record.instance_id, keys, locations, parent, event.now_s)


def _touch_before(ledger: Ledger, instance: Instance, session: Session, now_ms: int) -> None:
    """The blocks in front of the new ones are more recent than these, so that leaves go first."""
    if session.before is None:
        return
    ids, keys = session.before
    same = (ledger.table.instance[ids] == instance.number) & (ledger.table.keys[ids] == keys)
    ledger.touch(ids[same], now_ms, used=False)


def _finish_empty(ledger: Ledger, event: FinishWriteEvent) -> Outcome:
    request = event.request
    request.success.exactly(0)
    ledger.sessions.remove_empty(request.session_id)
    reply = WriteFinished(0, 0)
    ledger.answers.remember(request.instance_id, request.event_id, reply)
    return Outcome(reply, [])
