"""The in-memory twin of the index.

`MemoryIndex` keeps what effects say, refuses effects that break their contract, and gives back what
a real index would recover. It also knows which block is before which, to check that chains stay whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.core import effects as fx
from kvcm_ray.core.invariants import Held
from kvcm_ray.core.model import Segment
from kvcm_ray.core.records import (
    PinRecord,
    RecoveredInstance,
    ServedBlocks,
    SessionKind,
    SessionRecord,
    TrashRecord,
)
from kvcm_ray.core.requests import BlockLocations, Flags, Keys

Place = tuple[int, int, int]  #: segment, slot, generation
Birth = tuple[int, int]  #: a key, and the number of the addition that brought it


@dataclass
class MemoryInstance:
    segments: dict[int, Segment] = field(default_factory=dict)
    sessions: dict[str, SessionRecord] = field(default_factory=dict)
    trash: dict[int, TrashRecord] = field(default_factory=dict)
    served: dict[int, Place] = field(default_factory=dict)
    copies: dict[int, Place] = field(default_factory=dict)
    pins: dict[str, PinRecord] = field(default_factory=dict)
    written_s: dict[int, int] = field(default_factory=dict)
    born: dict[int, int] = field(default_factory=dict)  #: number of the addition of each served key
    before: dict[Birth, Birth] = field(default_factory=dict)  #: the block before each in its chain
    answers: dict[str, bytes] = field(default_factory=dict)
    additions: int = 0
    generation: int = 0  #: largest ever seen
    trash_id: int = 0
    segment_id: int = 0

    def parent(self, key: int) -> int | None:
        """The block before a served one in its chain, if it is there."""
        before = self.before.get((key, self.born[key]))
        return before[0] if before and self._lives(before) else None

    def ancestor(self, key: int) -> int | None:
        """The nearest block before a served one in its chain that is there."""
        birth = self.before.get((key, self.born[key]))
        while birth is not None and not self._lives(birth):
            birth = self.before.get(birth)
        return birth[0] if birth else None

    def _lives(self, birth: Birth) -> bool:
        return self.born.get(birth[0]) == birth[1]


class MemoryIndex:
    """The indexes of all instances of a group."""

    def __init__(self) -> None:
        self.instances: dict[str, MemoryInstance] = {}

    def lookup(self, instance_id: str, keys: Keys) -> tuple[Flags, BlockLocations]:
        """As the real one: hits, and locations aligned with `keys`, zeros for misses."""
        served = self.instances[instance_id].served
        hits = np.array([key in served for key in keys.tolist()], np.bool_)
        return hits, _locations([served.get(key, (0, 0, 0)) for key in keys.tolist()])

    def served(self) -> Mapping[str, dict[int, Place]]:
        return {name: instance.served for name, instance in self.instances.items()}

    def held(self) -> Mapping[str, Held]:
        """What `invariants.check` wants."""
        return {name: Held(kept.served, kept.copies, kept.pins) for name, kept in self.instances.items()}

    def recover(self, instance_id: str) -> RecoveredInstance:
        kept = self.instances[instance_id]
        return RecoveredInstance(
            segments=list(kept.segments.values()),
            sessions=list(kept.sessions.values()),
            trash=list(kept.trash.values()),
            blocks=_served_blocks(kept),
            copy_keys=np.array(list(kept.copies), np.int64),
            copies=_locations(list(kept.copies.values())),
            pins=list(kept.pins.values()),
            next_generation=kept.generation + 1,
            next_trash_id=kept.trash_id + 1,
            next_segment_id=kept.segment_id + 1,
            answers=dict(kept.answers),
        )

    def apply(self, effects: Sequence[fx.Effect]) -> None:
        """Make effects true. Raises AssertionError for one that breaks its contract."""
        for effect in effects:
            _APPLY[type(effect)](self.instances[effect.instance_id], effect)
        for instance_id in {effect.instance_id for effect in effects}:
            _check_references(self.instances[instance_id])


def _locations(places: Sequence[Place]) -> BlockLocations:
    return BlockLocations(*np.array(places, np.uint32).reshape(len(places), 3).T.copy())


def _places(locations: BlockLocations) -> list[Place]:
    columns = (locations.segment, locations.slot, locations.generation)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _distinct(keys: Keys, locations: BlockLocations | None = None) -> list[int]:
    listed = keys.tolist()
    assert keys.dtype == np.int64, keys.dtype
    assert len(set(listed)) == len(listed) > 0, "keys of an effect are distinct, and some"
    assert locations is None or len(locations) == len(listed), "one location for each key"
    return listed


def _served_blocks(kept: MemoryInstance) -> ServedBlocks:
    """In an order of no meaning, as runs are."""
    keys = sorted(kept.served)
    place = {key: at for at, key in enumerate(keys)}
    parents = [kept.ancestor(key) for key in keys]
    return ServedBlocks(
        np.array(keys, np.int64),
        _locations([kept.served[key] for key in keys]),
        np.array([kept.written_s[key] for key in keys], np.uint32),
        np.array([-1 if p is None else place[p] for p in parents], np.int64),
    )


# ------------------------------------------------------------------------------------ effects


def _create_segment(kept: MemoryInstance, effect: fx.CreateSegment) -> None:
    segment = effect.segment
    assert segment.segment_id > kept.segment_id, "segment ids are never reused"
    kept.segment_id = segment.segment_id
    kept.segments[segment.segment_id] = segment


def _drop_segment(kept: MemoryInstance, effect: fx.DropSegment) -> None:
    del kept.segments[effect.segment_id]


def _put_session(kept: MemoryInstance, effect: fx.PutSession) -> None:
    record = effect.record
    assert len(record.keys) == len(record.locations) == len(record.removed) > 0
    if record.kind is SessionKind.WRITE:
        assert not len(record.source), "a client's blocks come from nowhere"
    elif record.session_id not in kept.sessions:
        _check_move(kept, record)
    kept.sessions[record.session_id] = pickle.loads(pickle.dumps(record))
    kept.generation = max(kept.generation, record.generation)


def _check_move(kept: MemoryInstance, record: SessionRecord) -> None:
    """A new move: of SERVING blocks, from where they are."""
    keys = _distinct(record.keys, record.source)
    assert record.generation > kept.generation, "a move has a generation of its own"
    for key, source in zip(keys, _places(record.source), strict=True):
        assert kept.served.get(key) == source, f"block {key} is not at {source}"
    storages = {kept.segments[i].storage for i in set(record.locations.segment.tolist())}
    assert storages == {record.storage}, "all targets are on the session's storage"


def _drop_session(kept: MemoryInstance, effect: fx.DropSession) -> None:
    del kept.sessions[effect.session_id]


def _put_trash(kept: MemoryInstance, effect: fx.PutTrash) -> None:
    record = effect.record
    assert record.trash_id > kept.trash_id, "trash ids are never reused"
    assert len(record.locations)
    kept.trash_id = record.trash_id
    kept.trash[record.trash_id] = record


def _drop_trash(kept: MemoryInstance, effect: fx.DropTrash) -> None:
    for trash_id in effect.trash_ids:
        del kept.trash[trash_id]


def _add_blocks(kept: MemoryInstance, effect: fx.AddBlocks) -> None:
    keys = _distinct(effect.keys, effect.locations)
    assert not kept.served.keys() & set(keys), "added blocks are new"
    kept.additions += 1
    before: Birth | None = None
    if effect.parent_key in kept.served:
        before = effect.parent_key, kept.born[effect.parent_key]
    for key, place in zip(keys, _places(effect.locations), strict=True):
        kept.served[key], kept.born[key] = place, kept.additions
        kept.written_s[key] = effect.written_s
        if before is not None:
            kept.before[key, kept.additions] = before
        before = key, kept.additions


def _drop_blocks(kept: MemoryInstance, effect: fx.DropBlocks) -> None:
    for key in _distinct(effect.keys):
        assert key not in kept.copies, f"the copy of block {key} is dropped before the block"
        del kept.served[key], kept.born[key], kept.written_s[key]


def _move_blocks(kept: MemoryInstance, effect: fx.MoveBlocks) -> None:
    for key, place in zip(_distinct(effect.keys, effect.locations), _places(effect.locations), strict=True):
        assert kept.served[key] != place, f"block {key} is at {place} already"
        kept.served[key] = place


def _put_copies(kept: MemoryInstance, effect: fx.PutCopies) -> None:
    for key, place in zip(_distinct(effect.keys, effect.locations), _places(effect.locations), strict=True):
        assert kept.served[key] != place, f"the copy of block {key} is the block"
        kept.copies[key] = place


def _drop_copies(kept: MemoryInstance, effect: fx.DropCopies) -> None:
    for key in _distinct(effect.keys):
        del kept.copies[key]


def _put_pin(kept: MemoryInstance, effect: fx.PutPin) -> None:
    _distinct(effect.record.keys)
    kept.pins[effect.record.name] = effect.record


def _drop_pin(kept: MemoryInstance, effect: fx.DropPin) -> None:
    del kept.pins[effect.name]


def _remember(kept: MemoryInstance, effect: fx.RememberAnswer) -> None:
    kept.answers[effect.event_id] = effect.reply_bytes


def _check_references(kept: MemoryInstance) -> None:
    """After a commit every named segment exists, and copies belong to blocks."""
    named = {place[0] for place in [*kept.served.values(), *kept.copies.values()]}
    for record in [*kept.sessions.values(), *kept.trash.values()]:
        named |= set(record.locations.segment.tolist())
    assert named <= kept.segments.keys(), f"no records of segments {named - kept.segments.keys()}"
    assert kept.copies.keys() <= kept.served.keys(), "a copy without a block"


_APPLY: dict[type[fx.Effect], Callable[[MemoryInstance, Any], None]] = {
    fx.CreateSegment: _create_segment,
    fx.DropSegment: _drop_segment,
    fx.PutSession: _put_session,
    fx.DropSession: _drop_session,
    fx.PutTrash: _put_trash,
    fx.DropTrash: _drop_trash,
    fx.AddBlocks: _add_blocks,
    fx.DropBlocks: _drop_blocks,
    fx.MoveBlocks: _move_blocks,
    fx.PutCopies: _put_copies,
    fx.DropCopies: _drop_copies,
    fx.PutPin: _put_pin,
    fx.DropPin: _drop_pin,
    fx.RememberAnswer: _remember,
}
