"""Reading all facts of an instance from its index, or finding that it has to be repaired first."""

from __future__ import annotations

from typing import Any

from kvcm_ray.core.records import RecoveredInstance, ServedBlocks
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.index import codec, copies
from kvcm_ray.index.codec import Counters
from kvcm_ray.index.survey import Survey, census, survey
from kvcm_ray.index.tables import Tables, sealed_records

SEALED = ("segments", "sessions", "trash", "answers", "pins")


def read_instance(txn: Any, tables: Tables, counters: Counters) -> RecoveredInstance | None:
    """None if anything is damaged or contradicts itself: repair (`IndexBatch.repair`), read again."""
    records = {name: _values(txn, tables, name) for name in SEALED}
    if any(value is None for found in records.values() for value in found):
        return None
    segments = [codec.unpack_segment(value) for value in records["segments"]]
    known = {segment.segment_id for segment in segments}
    blocks = survey(txn, tables)
    if not census(txn, blocks).is_sound(counters.blocks, known):
        return None
    copy_keys, copy_places, damaged = copies.everything(txn, tables)
    if damaged or not set(copy_places.segment.tolist()) <= known or (blocks.places(copy_keys) < 0).any():
        return None
    return RecoveredInstance(
        segments=segments,
        sessions=[codec.unpack_session(value) for value in records["sessions"]],
        trash=[codec.unpack_trash(value) for value in records["trash"]],
        blocks=_served(blocks),
        copy_keys=copy_keys,
        copies=copy_places,
        pins=[codec.unpack_pin(value) for value in records["pins"]],
        next_generation=counters.next_generation,
        next_trash_id=counters.next_trash_id,
        next_segment_id=counters.next_segment_id,
        answers=dict(records["answers"]),
    )


def _values(txn: Any, tables: Tables, name: str) -> list[Any]:
    """Values of a table of sealed records; None for damaged ones."""
    return [value for _, value in sealed_records(txn, name.encode(), getattr(tables, name))]


def _served(blocks: Survey) -> ServedBlocks:
    columns = blocks.columns
    locations = BlockLocations(columns[0], columns[1], columns[2])
    return ServedBlocks(blocks.keys, locations, columns[3], blocks.parents())
