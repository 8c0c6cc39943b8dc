"""Filling an index from the block headers of file storages, after the old one was set aside.

A block comes back if all specs of its slot have valid headers of one key and generation. Of
several slots with one key (a copy in a slower tier, a move under way, a block written again) the
newest generation wins; the other slots that have headers go to the trash, so that they are erased.
Sessions, pins and old trash are gone, and so is shared memory, which a boot empties.

Blocks come back in slot order, which is mostly chain order, since a prompt's blocks are allocated
in contiguous extents. Doing it again after being killed in between gives the same result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.core import limits
from kvcm_ray.core.model import InstanceInfo, Segment
from kvcm_ray.core.records import TRASH_BLOCKS_MAX, TrashRecord
from kvcm_ray.core.requests import BlockLocations, Flags, Keys
from kvcm_ray.index.batch import IndexBatch
from kvcm_ray.index.writer import IndexWriter
from kvcm_ray.storage_adapters.base import StorageAdapter

BLOCKS_PER_COMMIT = 16_384
#: Sessions that were under way left no header yet; their numbers must not be given out again.
GENERATIONS_SKIPPED = 1 + limits.SESSIONS_PER_GROUP_MAX


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild found."""

    segments: int = 0
    blocks: int = 0  #: SERVING again
    discarded: int = 0  #: slots with headers that are erased instead


@dataclass(slots=True)
class _Found:
    """Slots with headers, parallel arrays; `whole` = all specs agree."""

    keys: Keys
    locations: BlockLocations
    whole: Flags


def rebuild(
    writer: IndexWriter,
    adapters: Mapping[str, StorageAdapter],
    info: InstanceInfo,
    now_s: int | None = None,
) -> Rebuilt:
    """Fill `writer`'s index with what `adapters` (by storage name) hold of an instance.

    Args:
        now_s: unix time that counts as the blocks' time of writing, which headers do not say; the
            present time by default.

    Raises:
        Fenced, StorageFull, StorageIOError: of the index; do it again later.
    """
    written_s = int(time.time()) if now_s is None else now_s
    segments = list(_segments(adapters, info))
    result = Rebuilt(segments=len(segments))
    with writer.begin() as batch:
        for _, segment in segments:
            batch.put_segment(segment)
    found = _joined([_read(adapter, segment) for adapter, segment in segments])
    winners = _winners(found)
    for chosen in _chunks(np.flatnonzero(winners), BLOCKS_PER_COMMIT):
        with writer.begin() as batch:
            result.blocks += _restore(batch, found, chosen, written_s)
    losers = np.flatnonzero(~winners)
    _discard(writer, info.instance_id, found.locations, losers)
    result.discarded = len(losers)
    with writer.begin() as batch:
        newest = int(found.locations.generation.max(initial=0))
        batch.raise_counters(newest + GENERATIONS_SKIPPED, 1, 1)
    writer.rebuilt()
    return result


def _segments(
    adapters: Mapping[str, StorageAdapter], info: InstanceInfo
) -> Iterator[tuple[StorageAdapter, Segment]]:
    """Segments of the instance on all storages, by segment id."""
    mine = []
    for adapter in adapters.values():
        for found in adapter.list_segments():
            if found.segment is None or found.owner is None:
                continue
            if (found.owner.instance_id, found.owner.uid) == (info.instance_id, info.uid):
                mine.append((found.segment.segment_id, adapter, found.segment))
    for _, adapter, segment in sorted(mine, key=lambda item: item[0]):
        yield adapter, segment


def _read(adapter: StorageAdapter, segment: Segment) -> _Found:
    """Slots of a segment that have a header of any spec."""
    key = np.zeros(segment.slots, np.int64)
    generation = np.zeros(segment.slots, np.uint32)
    seen = np.zeros(segment.slots, np.int64)
    agree = np.ones(segment.slots, np.bool_)
    for spec in segment.specs:
        headers = adapter.headers(segment, spec.name)
        numbers = headers["generation"]
        headers = headers[(numbers > 0) & (numbers < 2**32) & (headers["slot"] < segment.slots)]
        slots = headers["slot"]
        first = seen[slots] == 0
        same = (key[slots] == headers["key"]) & (generation[slots] == headers["generation"])
        agree[slots] &= first | same
        # Of disagreeing headers the newest names the slot in the trash.
        newer = headers["generation"] > generation[slots]
        key[slots[newer]] = headers["key"][newer]
        generation[slots[newer]] = headers["generation"][newer]
        seen[slots] += 1
    slots = np.flatnonzero(seen).astype(np.uint32)
    where = np.full(len(slots), segment.segment_id, np.uint32)
    whole = agree[slots] & (seen[slots] == len(segment.specs))
    return _Found(key[slots], BlockLocations(where, slots, generation[slots]), whole)


def _joined(parts: list[_Found]) -> _Found:
    parts = [_Found(np.zeros(0, np.int64), BlockLocations.empty(), np.zeros(0, np.bool_)), *parts]
    return _Found(
        np.concatenate([part.keys for part in parts]),
        BlockLocations.joined([part.locations for part in parts]),
        np.concatenate([part.whole for part in parts]),
    )


def _winners(found: _Found) -> Flags:
    """For each key that is whole somewhere, its slot of the newest generation."""
    winners = np.zeros(len(found.keys), np.bool_)
    whole = np.flatnonzero(found.whole)
    order = whole[np.lexsort((found.locations.generation[whole], found.keys[whole]))]
    if len(order):
        keys = found.keys[order]
        winners[order[np.append(keys[1:] != keys[:-1], True)]] = True
    return winners


def _restore(batch: IndexBatch, found: _Found, chosen: npt.NDArray[np.intp], written_s: int) -> int:
    """Add blocks that are not there from an earlier attempt; returns how many are there now."""
    hits, _ = batch.lookup(found.keys[chosen])
    missing = chosen[~hits]
    if len(missing):
        batch.add_blocks(found.keys[missing], found.locations.take(missing), None, written_s)
    return len(chosen)


def _discard(
    writer: IndexWriter, instance_id: str, locations: BlockLocations, losers: npt.NDArray[np.intp]
) -> None:
    for chosen in _chunks(losers, TRASH_BLOCKS_MAX):
        with writer.begin() as batch:
            record = TrashRecord(batch.counters.next_trash_id, instance_id, 0, locations.take(chosen))
            batch.put_trash(record)


def _chunks(items: npt.NDArray[np.intp], size: int) -> Iterator[npt.NDArray[np.intp]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
