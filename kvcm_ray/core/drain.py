"""Storages that are to become empty: drained by the operator, or registered no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvcm_ray.core.blocks import NO_IDS, Ids
from kvcm_ray.core.effects import DropSegment, Effect
from kvcm_ray.core.ledger import KINDS, Instance, Ledger
from kvcm_ray.core.requests import Flags


@dataclass(frozen=True, slots=True)
class Leaving:
    """What an instance still has on a storage that is to become empty."""

    instance: Instance
    storage: str
    segment_ids: tuple[int, ...]

    def blocks(self, ledger: Ledger) -> Ids:
        """Blocks whose first location is there."""
        parts = [ledger.table.in_segment(self.instance.number, i) for i in self.segment_ids]
        ids: Ids = np.concatenate([NO_IDS, *parts])
        return ids

    def copies(self, ledger: Ledger) -> Ids:
        """Blocks whose copy is there."""
        table = ledger.table
        queued = [block for queue in ledger.copies.values() for block in queue]
        ids = np.array(queued, np.int64)
        ids = ids[table.instance[ids] == self.instance.number]
        here: Flags = np.isin(table.copies.segment[ids], self.segment_ids)
        found: Ids = ids[here]
        return found


def leaves(ledger: Ledger, storage: str) -> bool:
    config = ledger.storages.get(storage)
    return config is None or config.is_draining


def leaving(ledger: Ledger) -> list[Leaving]:
    """All there is to do; empty once these storages are."""
    found = []
    for instance in ledger.instances.values():
        by_storage: dict[str, list[int]] = {}
        for segment_id, segment in instance.segments.segments.items():
            if leaves(ledger, segment.storage):
                by_storage.setdefault(segment.storage, []).append(segment_id)
        found += [Leaving(instance, name, tuple(ids)) for name, ids in by_storage.items()]
    return found


def drop_unused_segments(ledger: Ledger, found: Iterable[Leaving]) -> list[Effect]:
    """Also the newest of a class goes, as nothing will be written there."""
    effects: list[Effect] = []
    for part in found:
        for segment_id in part.segment_ids:
            if part.instance.segments.drop_unused(segment_id):
                ledger.table.drop_segment(part.instance.number, segment_id)
                effects.append(DropSegment(part.instance.info.instance_id, segment_id))
    return effects


def follow_types(ledger: Ledger) -> None:
    """Storages were registered anew or removed: blocks and copies belong to the tier of their present
    type."""
    table = ledger.table
    queued = [block for queue in ledger.copies.values() for block in queue]
    ledger.copies.clear()
    for instance, ids in ledger.by_instance(np.array(queued, np.int64)) if queued else ():
        ledger.queue_copies(instance, ids)
    for instance in ledger.instances.values():
        for segment_id, segment in instance.segments.segments.items():
            ids = table.in_segment(instance.number, segment_id)
            kind = ledger.quota_kind(segment.storage)
            ids = ids[table.kind[ids] != kind]
            if len(ids):
                table.kind[ids] = kind
                ledger.order.move(ids, instance.lane(KINDS[kind]))
