"""The segments of one instance: making them, giving their slots out, dropping empty ones.

Segments of one storage and one set of specs form a class and replace each other. A segment is made
only when the free slots of its class do not suffice, and dropped as soon as it is wholly free,
unless it is the newest of its class, which the next write is likely to need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvcm_ray.core.allocator import SlotAllocator
from kvcm_ray.core.limits import SEGMENT_BYTES_TARGET, SEGMENT_SLOTS_MAX
from kvcm_ray.core.model import InstanceInfo, LocationSpecInfo, Segment, segment_path
from kvcm_ray.core.requests import U32, BlockLocations, Flags
from kvcm_ray.errors import Corrupt

_ClassName = tuple[str, int]  # (storage, number of the shape)


@dataclass(frozen=True, slots=True)
class Shape:
    """A set of specs that blocks of the instance can have."""

    number: int
    specs: tuple[LocationSpecInfo, ...]
    slot_bytes: int


def by_segment(locations: BlockLocations) -> Iterator[tuple[int, U32]]:
    """(segment id, slots there) for each segment that `locations` names, in order of ids."""
    segment, slot = locations.segment, locations.slot
    if not len(segment):
        return
    if (segment == segment[0]).all():
        yield int(segment[0]), slot
        return
    order = np.argsort(segment, kind="stable")
    ids, begins = np.unique(segment[order], return_index=True)
    yield from zip(ids.tolist(), np.split(slot[order], begins[1:]), strict=True)


def segment_slots(slot_bytes: int, needed: int, quota_bytes: int) -> int:
    """Slots of a new segment when a write needs `needed` more: near the target size, but a quarter
    of the quota at most unless the write needs more than that."""
    slot_bytes = max(slot_bytes, 1)
    target = min(max(SEGMENT_BYTES_TARGET // slot_bytes, 1), SEGMENT_SLOTS_MAX)
    quarter = max(quota_bytes // 4 // slot_bytes, 1)
    return min(target, max(quarter, needed))


class SegmentTable:
    """All segments of an instance."""

    def __init__(self, info: InstanceInfo, next_id: int = 1) -> None:
        self.segments: dict[int, Segment] = {}
        self.slot_bytes: dict[int, int] = {}  #: of each of `segments`
        self.next_id = next_id
        self._info = info
        self._classes: dict[_ClassName, SlotAllocator] = {}
        self._newest: dict[_ClassName, int] = {}
        self._class_of: dict[int, _ClassName] = {}
        self._shapes: dict[tuple[LocationSpecInfo, ...], Shape] = {}
        #: shape of each spec group; "" is all specs
        self.shapes: dict[str, Shape] = {
            name: self._shape(info.specs_of(name))
            for name in ("", *(g.name for g in info.location_spec_groups))
        }

    def allocate(
        self, storage: str, shape: Shape, count: int, quota_bytes: int
    ) -> tuple[list[Segment], U32, U32]:
        """Take `count` slots on `storage`: (segments made for it, their segments, their slots)."""
        name = storage, shape.number
        allocator = self._classes.setdefault(name, SlotAllocator())
        made = []
        while (needed := count - allocator.free_total) > 0:
            slots = segment_slots(shape.slot_bytes, needed, quota_bytes)
            path = segment_path(self._info.instance_id, self._info.uid, self.next_id)
            segment = Segment(self.next_id, storage, path, shape.specs, slots)
            self._add(segment, None)
            made.append(segment)
        return made, *allocator.allocate(count)

    def free(self, locations: BlockLocations) -> list[int]:
        """Give slots back; ids of the segments that were dropped because of it."""
        dropped = []
        for segment_id, slots in by_segment(locations):
            name = self._class_of[segment_id]
            allocator = self._classes[name]
            allocator.free(np.full(len(slots), segment_id, np.uint32), slots)
            if not allocator.taken(segment_id) and self._newest.get(name) != segment_id:
                self._remove(segment_id)
                dropped.append(segment_id)
        return dropped

    def drop_unused(self, segment_id: int) -> bool:
        """Drop a segment if it is wholly free, also the newest of its class."""
        if self.taken(segment_id):
            return False
        self._remove(segment_id)
        return True

    def _remove(self, segment_id: int) -> None:
        name = self._class_of.pop(segment_id)
        self._classes[name].remove_segment(segment_id)
        del self.segments[segment_id], self.slot_bytes[segment_id]
        if self._newest.get(name) == segment_id:
            del self._newest[name]

    def restore(self, segments: list[Segment], taken: BlockLocations) -> None:
        """Fill an empty table with `segments`, whose slots at `taken` are not free.

        Raises:
            Corrupt: two blocks share a slot, or one is outside of all segments.
        """
        assert not self.segments
        flags = {s.segment_id: np.zeros(s.slots, np.bool_) for s in segments}
        for segment_id, slots in by_segment(taken):
            _mark(flags.get(segment_id), segment_id, slots)
        for segment in sorted(segments, key=lambda s: s.segment_id):
            self._add(segment, flags[segment.segment_id])

    def taken(self, segment_id: int) -> int:
        """Slots of a segment that are not free."""
        return self._classes[self._class_of[segment_id]].taken(segment_id)

    def named_by(self, locations: BlockLocations) -> dict[int, Segment]:
        return {i: self.segments[i] for i in sorted(set(locations.segment.tolist()))}

    def bytes_by_storage(self, locations: BlockLocations) -> dict[str, int]:
        """Payload bytes of the blocks at `locations`, for each storage that has some of them."""
        total: dict[str, int] = {}
        for segment_id, slots in by_segment(locations):
            storage = self.segments[segment_id].storage
            total[storage] = total.get(storage, 0) + len(slots) * self.slot_bytes[segment_id]
        return total

    def slots(self) -> tuple[int, int]:
        """(all slots, free slots) of the instance."""
        allocators = self._classes.values()
        return sum(a.slots_total for a in allocators), sum(a.free_total for a in allocators)

    def allocators(self) -> list[SlotAllocator]:
        """For checks."""
        return list(self._classes.values())

    def _add(self, segment: Segment, taken: Flags | None) -> None:
        shape = self._shape(segment.specs)
        name = segment.storage, shape.number
        allocator = self._classes.setdefault(name, SlotAllocator())
        allocator.add_segment(segment.segment_id, segment.slots, taken)
        self.segments[segment.segment_id] = segment
        self.slot_bytes[segment.segment_id] = shape.slot_bytes
        self._class_of[segment.segment_id] = name
        self._newest[name] = segment.segment_id
        self.next_id = max(self.next_id, segment.segment_id + 1)

    def shape(self, specs: tuple[LocationSpecInfo, ...]) -> Shape:
        """The shape of blocks with these specs."""
        return self._shape(specs)

    def _shape(self, specs: tuple[LocationSpecInfo, ...]) -> Shape:
        shape = self._shapes.get(specs)
        if shape is None:
            shape = Shape(len(self._shapes), specs, sum(spec.size for spec in specs))
            self._shapes[specs] = shape
        return shape


def _mark(flags: Flags | None, segment_id: int, slots: U32) -> None:
    if flags is None:
        raise Corrupt(f"the index names segment {segment_id}, of which it has no record")
    if int(slots.max()) >= len(flags):
        raise Corrupt(f"slot {int(slots.max())} of segment {segment_id}, which has {len(flags)}")
    flags[slots] = True
    if np.count_nonzero(flags) != len(slots):
        raise Corrupt(f"two blocks share a slot of segment {segment_id}")
