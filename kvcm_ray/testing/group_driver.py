"""A group driven against the in-memory twin of its index.

`GroupDriver` looks facts up as the shell does, applies effects, and checks every invariant after every
event, that a refused event changed nothing, and that making room leaves no block behind whose
ancestor it took away.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvcm_ray.core import effects as fx
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
    Want,
)
from kvcm_ray.core.group import GroupState
from kvcm_ray.core.invariants import check
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig
from kvcm_ray.core.records import SessionRecord, TrashRecord
from kvcm_ray.core.requests import (
    BlockLocations,
    FinishWrite,
    LeaseBlocks,
    PinBlocks,
    StartWrite,
    UnpinBlocks,
)
from kvcm_ray.errors import KvcmError
from kvcm_ray.testing.memory_index import MemoryIndex, MemoryInstance

#: Events whose refusal is checked to change nothing; it takes a while.
_REFUSABLE = (StartWriteEvent, FinishWriteEvent, RemoveEvent, LeaseEvent, PinEvent, UnpinEvent)
#: What a restart may forget: it lives in memory only.
_FORGOTTEN = frozenset({"hit_blocks", "lookup_blocks", "reclaim", "leased_bytes"})


class GroupDriver:
    """A `GroupState` and its index, with one method for each thing that can happen."""

    def __init__(
        self,
        group: InstanceGroup,
        storages: Mapping[str, StorageConfig],
        instances: Sequence[InstanceInfo],
    ) -> None:
        self.group, self.storages = group, storages
        self.infos = {info.instance_id: info for info in instances}
        self.index = MemoryIndex()
        self.now_ms = 1_000
        self.effects: list[fx.Effect] = []  #: of the last event
        self.sessions = 0  #: made by `write`
        self.state = GroupState(group, storages)
        for info in instances:
            self.index.instances[info.instance_id] = MemoryInstance()
            self.state.open_instance(info, None, now_ms=self.now_ms, now_s=self.now_s)

    @property
    def now_s(self) -> int:
        return self.now_ms // 1000

    def handle(self, event: Event) -> Any:
        """The reply. Raises the error if it is one, after checking that nothing changed."""
        before = _fingerprint(self.state) if isinstance(event, _REFUSABLE) else b""
        outcome = self.state.handle(event)
        self.effects = outcome.effects
        if isinstance(outcome.reply, KvcmError):
            assert outcome.effects == []
            assert before in (b"", _fingerprint(self.state)), "a refused event changed the state"
            raise outcome.reply
        self.index.apply(outcome.effects)
        self.check()
        return outcome.reply

    def check(self) -> None:
        wrong = check(self.state, self.index.held())
        assert not wrong, "\n".join(wrong)

    # ------------------------------------------------------------------------------ requests

    def start(
        self,
        instance_id: str,
        keys: Sequence[int],
        session_id: str,
        *,
        event_id: str = "",
        timeout_ms: int = 0,
        groups: Sequence[str] = (),
        partial_tail: bool = False,
        ahead_bytes: int = 0,
    ) -> Any:
        wanted = np.array(keys, np.int64)
        request = StartWrite(
            event_id, instance_id, wanted, session_id, timeout_ms, tuple(groups), partial_tail
        )
        facts = self.index.lookup(instance_id, wanted)
        return self.handle(StartWriteEvent(request, *facts, self.now_ms, self.now_s, ahead_bytes))

    def finish(self, instance_id: str, session_id: str, success: BlockMask, *, event_id: str = "") -> Any:
        request = FinishWrite(event_id, instance_id, session_id, success)
        parent = self._parent_of(instance_id, session_id)
        return self.handle(FinishWriteEvent(request, parent, self.now_ms, self.now_s))

    def _parent_of(self, instance_id: str, session_id: str) -> BlockLocations:
        if instance_id not in self.infos:
            return BlockLocations.empty()
        key = self.state.parent_key(instance_id, session_id)
        if key is None:
            return BlockLocations.empty()
        hits, found = self.index.lookup(instance_id, np.array([key], np.int64))
        return found.take(hits)

    def write(self, instance_id: str, keys: Sequence[int], *, partial_tail: bool = False) -> Any:
        """Start and finish; the answer to the start."""
        self.sessions += 1
        session_id = f"w{self.sessions:031d}"
        reply = self.start(instance_id, keys, session_id, partial_tail=partial_tail)
        self.finish(instance_id, session_id, BlockMask(offset=len(reply.locations)))
        return reply

    def served(self, instance_id: str) -> list[int]:
        """Keys that are SERVING."""
        return sorted(self.index.instances[instance_id].served)

    def remove(
        self,
        instance_id: str,
        keys: Sequence[int],
        *,
        event_id: str = "",
        drop_sessions: bool = False,
    ) -> Any:
        wanted = np.array(keys, np.int64)
        hits, found = self.index.lookup(instance_id, wanted)
        return self.handle(
            RemoveEvent(event_id, instance_id, wanted, hits, found, self.now_ms, drop_sessions)
        )

    def meta(self, instance_id: str, keys: Sequence[int]) -> Any:
        wanted = np.array(keys, np.int64)
        return self.handle(GetMetaEvent(instance_id, wanted, *self.index.lookup(instance_id, wanted)))

    def touch(self, instance_id: str, keys: Sequence[int], *, lookups: int = 0, chained: bool = True) -> Any:
        wanted = np.array(keys, np.int64)
        facts = self.index.lookup(instance_id, wanted)
        return self.handle(
            TouchEvent(instance_id, wanted, lookups or len(keys), *facts, self.now_ms, chained)
        )

    def lease(self, instance_id: str, keys: Sequence[int], lease_ms: int) -> Any:
        wanted = np.array(keys, np.int64)
        request = LeaseBlocks(instance_id, wanted, lease_ms)
        return self.handle(LeaseEvent(request, *self.index.lookup(instance_id, wanted), self.now_ms))

    def pin(
        self, instance_id: str, name: str, keys: Sequence[int], *, until_s: int = 0, event_id: str = ""
    ) -> Any:
        wanted = np.array(keys, np.int64)
        request = PinBlocks(event_id, instance_id, name, wanted, until_s)
        return self.handle(PinEvent(request, *self.index.lookup(instance_id, wanted), self.now_ms))

    def unpin(self, instance_id: str, name: str, *, event_id: str = "") -> Any:
        keys = self.state.pinned_keys(instance_id, name)
        request = UnpinBlocks(event_id, instance_id, name)
        return self.handle(UnpinEvent(request, *self.index.lookup(instance_id, keys), self.now_ms))

    # ------------------------------------------------------------------------ the group's own

    def tick(self, ms: int = 0) -> None:
        self.now_ms += ms
        self.handle(Tick(self.now_ms))

    def collect(self, limit: int = 1_000) -> list[TrashRecord]:
        """Erase all that is due and confirm it."""
        due = self.state.due_trash(self.now_ms, limit)
        for record in due:
            self.handle(DeletesConfirmed(record.instance_id, (record.trash_id,), self.now_ms))
        return due

    def reclaim(self, wants: Sequence[Want] = ()) -> list[fx.Effect]:
        """One step; its effects. No block may lose an ancestor by it and stay."""
        pairs = [
            (kept, key, kept.parent(key), kept.born[key])
            for kept in self.index.instances.values()
            for key in kept.served
        ]
        self.handle(ReclaimEvent(self.now_ms, self.now_s, tuple(wants)))
        for kept, key, parent, born in pairs:
            stays = kept.born.get(key) == born
            assert not stays or parent is None or parent in kept.served, f"{parent} went before {key}"
        return self.effects

    def settle(self, wants: Sequence[Want] = (), *, steps_max: int = 10_000) -> int:
        """Steps, copies and deletions until nothing is left to do now; number of steps."""
        for steps in range(steps_max):
            due = self.state.next_reclaim_ms(self.now_ms)
            made = bool(self.reclaim(wants)) if wants or (due is not None and due <= self.now_ms) else False
            if not (self.run_moves() or self.collect() or made):
                return steps
        raise AssertionError(f"more to do after {steps_max} steps")

    def run_moves(self, limit: int = 1_000) -> list[SessionRecord]:
        """Copy all that is to be copied and report it."""
        due = self.state.due_moves(limit)
        for record in due:
            self.moved(record)
        return due

    def moved(self, record: SessionRecord, copied: Sequence[bool] | None = None) -> Any:
        """A reclaimer reports; by default every block was copied."""
        keys = self.state.session_keys(record.instance_id, record.session_id)
        keys = np.zeros(0, np.int64) if keys is None else keys
        flags = np.ones(len(record.keys), np.bool_) if copied is None else np.array(copied, np.bool_)
        facts = self.index.lookup(record.instance_id, keys)
        return self.handle(MovedEvent(record.instance_id, record.session_id, flags, *facts, self.now_ms))

    # ------------------------------------------------------------------------ administration

    def configure(
        self, group: InstanceGroup | None = None, storages: Mapping[str, StorageConfig] | None = None
    ) -> None:
        self.group = self.group if group is None else group
        self.storages = self.storages if storages is None else storages
        self.state.configure(self.group, self.storages)
        self.check()

    def set_instance(self, info: InstanceInfo) -> None:
        self.infos[info.instance_id] = info
        self.state.set_instance(info)
        self.check()

    def restart(self) -> None:
        """Another process takes over: nothing is left but the index."""
        before = self.usage()
        self.state = GroupState(self.group, self.storages)
        for info in self.infos.values():
            recovered = self.index.recover(info.instance_id)
            self.state.open_instance(info, recovered, now_ms=self.now_ms, now_s=self.now_s)
        self.check()
        assert self.usage() == before, "a restart changed what the group holds"

    def usage(self) -> dict[str, Any]:
        """`GroupState.usage` without what a restart may forget."""
        usage: dict[str, Any] = json.loads(json.dumps(self.state.usage()))
        return {name: value for name, value in usage.items() if name not in _FORGOTTEN}


def _fingerprint(state: GroupState) -> bytes:
    """All of the state but recency (a refused write comes again: what it has is in use) and what is
    only kept to spare counting it again."""
    facts = dict(vars(state.ledger))
    order, table = facts.pop("order"), facts.pop("table")
    facts["plan"] = replace(facts["plan"], leased=(-1, 0))
    used = slice(0, table._used)
    columns = (table.keys, table.nbytes, table.instance, table.kind, table.moving, table.pinned, table.copied)
    facts["blocks"] = [column[used] for column in (*columns, order._lane, order._holds, order._leased)]
    facts["places"] = table.places.get(used), table.copies.get(used), table._at, table._free
    return pickle.dumps(facts)
