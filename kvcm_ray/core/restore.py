"""The block table and the eviction order of an instance, from what its index holds."""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.blocks import I64
from kvcm_ray.core.holds import restore_pins
from kvcm_ray.core.ledger import KINDS, Instance, Ledger
from kvcm_ray.core.records import RecoveredInstance
from kvcm_ray.core.requests import Keys

Recency = tuple[Keys, I64]  #: keys in ascending order, and when their blocks were last touched
NOTHING_KNOWN: Recency = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def recency(ledger: Ledger, instance: Instance) -> Recency:
    """What an open instance knows of its blocks that its index does not."""
    ids = ledger.table.of_instance(instance.number)
    keys = ledger.table.keys[ids]
    order = np.argsort(keys)
    return keys[order], ledger.order.touched_ms(ids)[order]


def written_ms(recovered: RecoveredInstance, now_ms: int, now_s: int) -> I64:
    """When each block was written, on the clock of `now_ms`."""
    ages_s = np.maximum(now_s - recovered.blocks.written_s.astype(np.int64), 0)
    times: I64 = now_ms - ages_s * 1_000
    return times


def restore_blocks(
    ledger: Ledger, instance: Instance, recovered: RecoveredInstance, touched_ms: I64, known: Recency
) -> None:
    """Enter all SERVING blocks of an instance that was just opened, with copies and pins.

    `touched_ms` is for blocks that are not `known`.
    """
    table, blocks = ledger.table, recovered.blocks
    for segment_id, segment in instance.segments.segments.items():
        table.open_segment(instance.number, segment_id, segment.slots)
    if len(blocks):
        ids = ledger.enter(instance, blocks.keys, blocks.locations)
        parents = np.where(blocks.parents >= 0, ids[blocks.parents], -1)
        touched_ms = _touched(blocks.keys, touched_ms, known)
        for kind in np.unique(table.kind[ids]).tolist():
            own = table.kind[ids] == kind
            ledger.order.restore(
                instance.lane(KINDS[kind]), ids[own], blocks.keys[own], parents[own], touched_ms[own]
            )
        _restore_copies(ledger, instance, recovered)
    restore_pins(ledger, instance, recovered.pins)


def _touched(keys: Keys, otherwise_ms: I64, known: Recency) -> I64:
    known_keys, times = known
    if not len(known_keys):
        return otherwise_ms
    at = np.minimum(np.searchsorted(known_keys, keys), len(known_keys) - 1)
    found: I64 = np.where(known_keys[at] == keys, times[at], otherwise_ms)
    return found


def _restore_copies(ledger: Ledger, instance: Instance, recovered: RecoveredInstance) -> None:
    if not len(recovered.copy_keys):
        return
    keys = recovered.blocks.keys
    order = np.argsort(keys)
    at = order[np.searchsorted(keys, recovered.copy_keys, sorter=order)]
    ids = ledger.table.find(instance.number, recovered.blocks.locations.take(at))
    ledger.note_copies(instance, ids, recovered.copies)


def forget_blocks(ledger: Ledger, instance: Instance) -> None:
    """Take all blocks of an instance out of the books; it is being closed."""
    table = ledger.table
    ids = table.of_instance(instance.number)
    ledger.forget_copies(ids[table.copied[ids]])
    ledger.order.remove(ids, table.keys[ids], evicted=False)
    for block in ids.tolist() if ledger.plan.promotions else ():
        ledger.plan.promotions.pop(block, None)
    table.forget_instance(instance.number)
