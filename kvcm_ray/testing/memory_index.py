"""The in-memory twin of the index, and a group driven against it.

`MemoryIndex` keeps what effects say, refuses effects that break their contract, and gives back what
a real index would recover. `GroupDriver` joins it with a `GroupState` and checks every invariant
after every event, and that a refused event changed nothing.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.core import effects as fx
from kvcm_ray.core.events import (
    DeletesConfirmed,
    Event,
    FinishWriteEvent,
    GetMetaEvent,
    RemoveEvent,
    StartWriteEvent,
    Tick,
)
from kvcm_ray.core.group import GroupState
from kvcm_ray.core.invariants import check
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, Segment, StorageConfig
from kvcm_ray.core.records import RecoveredInstance, SessionRecord, TrashRecord
from kvcm_ray.core.requests import BlockLocations, FinishWrite, Flags, Keys, StartWrite
from kvcm_ray.errors import KvcmError

Place = tuple[int, int, int]  #: segment, slot, generation


@dataclass
class MemoryInstance:
    segments: dict[int, Segment] = field(default_factory=dict)
    sessions: dict[str, SessionRecord] = field(default_factory=dict)
    trash: dict[int, TrashRecord] = field(default_factory=dict)
    served: dict[int, Place] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)
    generation: int = 0  #: largest ever seen
    trash_id: int = 0
    segment_id: int = 0


class MemoryIndex:
    """The indexes of all instances of a group."""

    def __init__(self) -> None:
        self.instances: dict[str, MemoryInstance] = {}

    def lookup(self, instance_id: str, keys: Keys) -> tuple[Flags, BlockLocations]:
        """As the real one: hits, and locations aligned with `keys`, zeros for misses."""
        served = self.instances[instance_id].served
        rows = [served.get(key, (0, 0, 0)) for key in keys.tolist()]
        columns = np.array(rows, np.uint32).reshape(len(rows), 3).T.copy()
        hits = np.array([key in served for key in keys.tolist()], np.bool_)
        return hits, BlockLocations(*columns)

    def served(self) -> Mapping[str, dict[int, Place]]:
        return {name: instance.served for name, instance in self.instances.items()}

    def recover(self, instance_id: str) -> RecoveredInstance:
        kept = self.instances[instance_id]
        places = np.array(list(kept.served.values()), np.uint32).reshape(len(kept.served), 3)
        return RecoveredInstance(
            segments=list(kept.segments.values()),
            sessions=list(kept.sessions.values()),
            trash=list(kept.trash.values()),
            used=BlockLocations(*places.T.copy()),
            key_count=len(kept.served),
            next_generation=kept.generation + 1,
            next_trash_id=kept.trash_id + 1,
            next_segment_id=kept.segment_id + 1,
            answers=dict(kept.answers),
        )

    def apply(self, effects: Sequence[fx.Effect]) -> None:
        for effect in effects:
            kept = self.instances[effect.instance_id]
            match effect:
                case fx.CreateSegment(_, segment):
                    assert segment.segment_id > kept.segment_id, "segment ids are never reused"
                    kept.segment_id = segment.segment_id
                    kept.segments[segment.segment_id] = segment
                case fx.DropSegment(_, segment_id):
                    del kept.segments[segment_id]
                case fx.PutSession(_, record):
                    assert set(record.locations.segment.tolist()) <= kept.segments.keys()
                    kept.sessions[record.session_id] = pickle.loads(pickle.dumps(record))
                    kept.generation = max(kept.generation, record.generation)
                case fx.DropSession(_, session_id):
                    del kept.sessions[session_id]
                case fx.PutTrash(_, record):
                    assert record.trash_id > kept.trash_id, "trash ids are never reused"
                    kept.trash_id = record.trash_id
                    kept.trash[record.trash_id] = record
                case fx.DropTrash(_, trash_ids):
                    for trash_id in trash_ids:
                        del kept.trash[trash_id]
                case fx.AddBlocks():
                    self._add(kept, effect)
                case fx.DropBlocks(_, keys):
                    for key in keys.tolist():
                        del kept.served[key]
                case fx.RememberAnswer(_, event_id, _):
                    kept.answers[event_id] = effect.reply_bytes

    def _add(self, kept: MemoryInstance, effect: fx.AddBlocks) -> None:
        keys, at = effect.keys.tolist(), effect.locations
        assert len(keys) == len(at) > 0
        assert not kept.served.keys() & set(keys), "added blocks are new"
        assert len(set(keys)) == len(keys), "added blocks are distinct"
        places = zip(at.segment.tolist(), at.slot.tolist(), at.generation.tolist(), strict=True)
        kept.served.update(zip(keys, places, strict=True))


class GroupDriver:
    """A `GroupState` and its index, with one method for each thing that can happen."""

    def __init__(
        self,
        group: InstanceGroup,
        storages: Mapping[str, StorageConfig],
        instances: Sequence[InstanceInfo],
    ) -> None:
        self.group, self.storages, self.infos = group, storages, list(instances)
        self.index = MemoryIndex()
        self.now_ms = 1_000
        self.effects: list[fx.Effect] = []  #: of the last event
        self.state = GroupState(group, storages)
        for info in instances:
            self.index.instances[info.instance_id] = MemoryInstance()
            self.state.open_instance(info, None)

    def handle(self, event: Event) -> Any:
        """The reply. Raises the error if it is one, after checking that nothing changed."""
        before = pickle.dumps(self.state.ledger)
        outcome = self.state.handle(event)
        self.effects = outcome.effects
        if isinstance(outcome.reply, KvcmError):
            assert outcome.effects == []
            assert pickle.dumps(self.state.ledger) == before, "a refused event changed the state"
            raise outcome.reply
        self.index.apply(outcome.effects)
        self.check()
        return outcome.reply

    def check(self) -> None:
        wrong = check(self.state, self.index.served())
        assert not wrong, "\n".join(wrong)

    def start(
        self,
        instance_id: str,
        keys: Sequence[int],
        session_id: str,
        *,
        event_id: str = "",
        timeout_ms: int = 0,
        groups: Sequence[str] = (),
    ) -> Any:
        wanted = np.array(keys, np.int64)
        request = StartWrite(event_id, instance_id, wanted, session_id, timeout_ms, tuple(groups))
        exists, _ = self.index.lookup(instance_id, wanted)
        return self.handle(StartWriteEvent(request, exists, self.now_ms, self.now_ms // 1000))

    def finish(
        self, instance_id: str, session_id: str, success: BlockMask, *, event_id: str = ""
    ) -> Any:
        request = FinishWrite(event_id, instance_id, session_id, success)
        return self.handle(FinishWriteEvent(request, self.now_ms, self.now_ms // 1000))

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
        return self.handle(
            GetMetaEvent(instance_id, wanted, *self.index.lookup(instance_id, wanted))
        )

    def tick(self, ms: int = 0) -> None:
        self.now_ms += ms
        self.handle(Tick(self.now_ms))

    def collect(self, limit: int = 1_000) -> list[TrashRecord]:
        """Erase all that is due and confirm it."""
        due = self.state.due_trash(self.now_ms, limit)
        for record in due:
            self.handle(DeletesConfirmed(record.instance_id, (record.trash_id,), self.now_ms))
        return due

    def configure(self, group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> None:
        self.group, self.storages = group, storages
        self.state.configure(group, storages)
        self.check()

    def restart(self) -> None:
        """Another process takes over: nothing is left but the index."""
        before = self.usage()
        self.state = GroupState(self.group, self.storages)
        for info in self.infos:
            self.state.open_instance(info, self.index.recover(info.instance_id))
        self.check()
        assert self.usage() == before, "a restart changed what the group holds"

    def usage(self) -> dict[str, Any]:
        """`GroupState.usage` without what a restart may forget."""
        usage: dict[str, Any] = json.loads(json.dumps(self.state.usage()))
        return {k: v for k, v in usage.items() if k not in ("hit_blocks", "lookup_blocks")}
