"""Ids of all SERVING blocks of a group, and what is known of each.

A block id is a small integer that stays the same while the block lives, wherever it moves, and is
given to another block afterwards. The index maps keys to locations; this table maps locations to
ids, by one array of ids for each segment. So nothing here hashes keys, and all of it is numpy.

A block may have a second location, its *copy*, on a slower storage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.requests import U32, BlockLocations, Flags, Keys

Ids = npt.NDArray[np.int64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
S = TypeVar("S", bound=np.generic)
NO_IDS: Ids = np.zeros(0, np.int64)

_FIRST_SIZE = 64


@dataclass(slots=True)
class _Places:
    """Locations of blocks, by block id."""

    segment: U32 = field(default_factory=lambda: np.zeros(_FIRST_SIZE, np.uint32))
    slot: U32 = field(default_factory=lambda: np.zeros(_FIRST_SIZE, np.uint32))
    generation: U32 = field(default_factory=lambda: np.zeros(_FIRST_SIZE, np.uint32))

    def get(self, ids: Ids) -> BlockLocations:
        return BlockLocations(self.segment[ids], self.slot[ids], self.generation[ids])

    def set(self, ids: Ids, at: BlockLocations) -> None:
        self.segment[ids], self.slot[ids], self.generation[ids] = at.segment, at.slot, at.generation

    def grow(self, size: int) -> None:
        self.segment = _grown(self.segment, size)
        self.slot = _grown(self.slot, size)
        self.generation = _grown(self.generation, size)


class BlockTable:
    """Arrays by block id; entries of ids that are not in use mean nothing."""

    def __init__(self) -> None:
        self.keys: Keys = np.zeros(_FIRST_SIZE, np.int64)
        self.nbytes: I64 = np.zeros(_FIRST_SIZE, np.int64)  #: payload of one location
        self.instance: I32 = np.full(_FIRST_SIZE, -1, np.int32)  #: number; -1 = id not in use
        self.kind: npt.NDArray[np.uint8] = np.zeros(
            _FIRST_SIZE, np.uint8
        )  #: quota type of the first location
        self.moving: Flags = np.zeros(_FIRST_SIZE, np.bool_)  #: a session copies it elsewhere
        self.pinned: Flags = np.zeros(_FIRST_SIZE, np.bool_)
        self.copied: Flags = np.zeros(_FIRST_SIZE, np.bool_)  #: has a copy
        self.places = _Places()
        self.copies = _Places()
        self._at: dict[tuple[int, int], I32] = {}  #: (instance, segment) -> id of each slot, or -1
        self._free: list[int] = []
        self._used = 0  #: ids below this were in use at some time

    def __len__(self) -> int:
        """Blocks in the table."""
        return self._used - len(self._free)

    # ----------------------------------------------------------------------------------- change

    def open_segment(self, instance: int, segment_id: int, slots: int) -> None:
        self._at.setdefault((instance, segment_id), np.full(slots, -1, np.int32))

    def drop_segment(self, instance: int, segment_id: int) -> None:
        self._at.pop((instance, segment_id), None)

    def add(
        self, instance: int, keys: Keys, locations: BlockLocations, nbytes: I64, kind: npt.NDArray[np.uint8]
    ) -> Ids:
        """Ids of new blocks; the segments are open."""
        ids = self._take(len(keys))
        self.keys[ids], self.nbytes[ids], self.kind[ids] = keys, nbytes, kind
        self.instance[ids] = instance
        self.moving[ids] = self.pinned[ids] = self.copied[ids] = False
        self.places.set(ids, locations)
        self._point(instance, locations, ids)
        return ids

    def remove(self, ids: Ids) -> None:
        """Forget blocks of one instance; their locations are the caller's business."""
        if not len(ids):
            return
        instance = int(self.instance[ids[0]])
        self._point(instance, self.places.get(ids), np.full(len(ids), -1, np.int64))
        self.instance[ids] = -1
        self.moving[ids] = self.pinned[ids] = self.copied[ids] = False
        self._free.extend(ids[::-1].tolist())

    def relocate(self, ids: Ids, locations: BlockLocations, kind: npt.NDArray[np.uint8]) -> None:
        """Blocks of one instance have other first locations from now on."""
        instance = int(self.instance[ids[0]])
        self._point(instance, self.places.get(ids), np.full(len(ids), -1, np.int64))
        self.places.set(ids, locations)
        self.kind[ids] = kind
        self._point(instance, locations, ids)

    def forget_instance(self, instance: int) -> None:
        self.remove(self.of_instance(instance))
        for name in [name for name in self._at if name[0] == instance]:
            del self._at[name]

    # ------------------------------------------------------------------------------------- find

    def find(self, instance: int, locations: BlockLocations) -> Ids:
        """Id of the block whose first location is there, for each; -1 if there is none."""
        ids = np.full(len(locations), -1, np.int64)
        for segment_id, here in _by_segment(locations):
            at = self._at.get((instance, segment_id))
            if at is not None:
                slots = locations.slot[here]
                inside = slots < len(at)
                found = np.full(len(slots), -1, np.int64)
                found[inside] = at[slots[inside]]
                ids[here] = found
        known = ids >= 0
        known[known] = self.places.generation[ids[known]] == locations.generation[known]
        ids[~known] = -1
        return ids

    def in_segment(self, instance: int, segment_id: int) -> Ids:
        """Ids of the blocks whose first location is in the segment, in order of slots."""
        at = self._at.get((instance, segment_id))
        return NO_IDS if at is None else at[at >= 0].astype(np.int64)

    def living(self) -> Ids:
        """All ids in use; reads the whole table."""
        return np.flatnonzero(self.instance[: self._used] >= 0)

    def of_instance(self, instance: int) -> Ids:
        return np.flatnonzero(self.instance[: self._used] == instance)

    # -------------------------------------------------------------------------------- internals

    def _point(self, instance: int, locations: BlockLocations, ids: Ids) -> None:
        for segment_id, here in _by_segment(locations):
            self._at[instance, segment_id][locations.slot[here]] = ids[here]

    def _take(self, count: int) -> Ids:
        again = min(count, len(self._free))
        ids = np.empty(count, np.int64)
        if again:
            ids[:again] = self._free[-again:]
            del self._free[-again:]
        first = self._used
        self._used += count - again
        ids[again:] = np.arange(first, self._used)
        if self._used > len(self.keys):
            self._grow(max(self._used, 2 * len(self.keys)))
        return ids

    def _grow(self, size: int) -> None:
        self.keys, self.nbytes = _grown(self.keys, size), _grown(self.nbytes, size)
        self.instance, self.kind = _grown(self.instance, size, -1), _grown(self.kind, size)
        self.moving, self.pinned = _grown(self.moving, size), _grown(self.pinned, size)
        self.copied = _grown(self.copied, size)
        self.places.grow(size)
        self.copies.grow(size)


def _grown(array: npt.NDArray[S], size: int, filler: int = 0) -> npt.NDArray[S]:
    out = np.full(size, filler, array.dtype)
    out[: len(array)] = array
    return out


def _by_segment(locations: BlockLocations) -> list[tuple[int, Flags | slice]]:
    """(segment id, which of the locations are there)."""
    segment = locations.segment
    if not len(segment):
        return []
    if (segment == segment[0]).all():
        return [(int(segment[0]), slice(None))]
    return [(segment_id, segment == segment_id) for segment_id in np.unique(segment).tolist()]
