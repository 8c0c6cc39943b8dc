"""Requests as events: each gets the facts that only the index knows, from the transaction that will
carry its effects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns, time

import numpy as np

from kvcm_ray.actors.perform import Transaction
from kvcm_ray.core.events import (
    NOT_COPIED,
    Copied,
    Event,
    FinishWriteEvent,
    GetMetaEvent,
    LeaseEvent,
    MovedEvent,
    PinEvent,
    RemoveEvent,
    StartWriteEvent,
    TouchEvent,
    UnpinEvent,
)
from kvcm_ray.core.group import GroupState
from kvcm_ray.core.requests import (
    BlockLocations,
    FinishWrite,
    GetMeta,
    LeaseBlocks,
    PinBlocks,
    RemoveBlocks,
    Request,
    StartWrite,
    Touch,
    TrimInstance,
    UnpinBlocks,
)


@dataclass(frozen=True, slots=True)
class Now:
    """The time of an event: milliseconds of CLOCK_MONOTONIC, unix seconds."""

    ms: int
    s: int

    @staticmethod
    def read() -> Now:
        return Now(monotonic_ns() // 1_000_000, int(time()))


@dataclass(frozen=True, slots=True)
class Facts:
    """Where facts come from: the transaction, the state, the time, and what waits for room."""

    txn: Transaction
    state: GroupState
    now: Now
    ahead_bytes: int = 0

    def event(self, request: Request) -> Event:
        """The event that `request` makes, of an instance that is open."""
        return _EVENTS[type(request)](self, request)

    def moved(self, instance_id: str, session_id: str, copied: Copied | None) -> MovedEvent | None:
        """None if that session is gone. `copied` None: nothing was copied."""
        keys = self.state.session_keys(instance_id, session_id)
        if keys is None:
            return None
        if copied is None:
            copied = np.full(len(keys), NOT_COPIED, np.uint8)
        hits, found = self.txn.index(instance_id).lookup(keys)
        return MovedEvent(instance_id, session_id, copied, hits, found, self.now.ms)


def _start(facts: Facts, request: StartWrite) -> Event:
    exists, found = facts.txn.index(request.instance_id).lookup(request.keys)
    now = facts.now
    return StartWriteEvent(request, exists, found, now.ms, now.s, facts.ahead_bytes)


def _finish(facts: Facts, request: FinishWrite) -> Event:
    key = facts.state.parent_key(request.instance_id, request.session_id)
    parent = BlockLocations.empty()
    if key is not None:
        index = facts.txn.index(request.instance_id)
        hits, found = index.lookup(np.array([key], np.int64))
        parent = found.take(hits)
    return FinishWriteEvent(request, parent, facts.now.ms, facts.now.s)


def _remove(facts: Facts, request: RemoveBlocks) -> Event:
    hits, found = facts.txn.index(request.instance_id).lookup(request.keys)
    return RemoveEvent(request.event_id, request.instance_id, request.keys, hits, found, facts.now.ms)


def _trim(facts: Facts, request: TrimInstance) -> Event:
    index = facts.txn.index(request.instance_id)
    keys = index.select_written(request.begin_s, request.end_s)
    hits, found = index.lookup(keys)
    return RemoveEvent(
        request.event_id, request.instance_id, keys, hits, found, facts.now.ms, request.drop_sessions
    )


def _get_meta(facts: Facts, request: GetMeta) -> Event:
    hits, found = facts.txn.index(request.instance_id).lookup(request.keys)
    return GetMetaEvent(request.instance_id, request.keys, hits, found)


def _touch(facts: Facts, request: Touch) -> Event:
    hits, found = facts.txn.index(request.instance_id).lookup(request.keys)
    return TouchEvent(
        request.instance_id, request.keys, request.lookups, hits, found, facts.now.ms, request.chained
    )


def _lease(facts: Facts, request: LeaseBlocks) -> Event:
    hits, found = facts.txn.index(request.instance_id).lookup(request.keys)
    return LeaseEvent(request, hits, found, facts.now.ms)


def _pin(facts: Facts, request: PinBlocks) -> Event:
    hits, found = facts.txn.index(request.instance_id).lookup(request.keys)
    return PinEvent(request, hits, found, facts.now.ms)


def _unpin(facts: Facts, request: UnpinBlocks) -> Event:
    keys = facts.state.pinned_keys(request.instance_id, request.name)
    hits, found = facts.txn.index(request.instance_id).lookup(keys)
    return UnpinEvent(request, hits, found, facts.now.ms)


_EVENTS: dict[type, Callable[..., Event]] = {
    StartWrite: _start,
    FinishWrite: _finish,
    RemoveBlocks: _remove,
    TrimInstance: _trim,
    GetMeta: _get_meta,
    Touch: _touch,
    LeaseBlocks: _lease,
    PinBlocks: _pin,
    UnpinBlocks: _unpin,
}
