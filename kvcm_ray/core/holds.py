"""What keeps blocks from being reclaimed: leases of readers, and pins of operators.

A lease lasts seconds, is kept in memory only and needs no renewal to end. A pin names keys, whether
their blocks are there yet or not, is kept in the index and ends when it says so or is taken back.
"""

from __future__ import annotations

import numpy as np

from kvcm_ray.core import limits
from kvcm_ray.core.effects import DropPin, Effect, Outcome, PutPin
from kvcm_ray.core.events import LeaseEvent, PinEvent, UnpinEvent
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.records import PinRecord
from kvcm_ray.core.requests import Leased, Pinned
from kvcm_ray.errors import InvalidArgument, LimitReached, NotFound


def lease(ledger: Ledger, event: LeaseEvent) -> Outcome:
    """Keep the SERVING blocks of the request for a while; those that are moved meanwhile as well.

    Raises:
        InstanceNotFound
        InvalidArgument: lease_ms is not within 1..LEASE_MAX_MS.
    """
    request = event.request
    instance = ledger.instance(request.instance_id)
    if not 1 <= request.lease_ms <= limits.LEASE_MAX_MS:
        raise InvalidArgument(f"lease_ms {request.lease_ms} is not within 1..{limits.LEASE_MAX_MS}")
    ids = ledger.find(instance, event.hits, event.found)
    ledger.order.lease(ids, event.now_ms + request.lease_ms)
    ledger.touch(ids, event.now_ms, chained=False)
    return Outcome(Leased(len(ids), request.lease_ms), [])


def pin(ledger: Ledger, event: PinEvent) -> Outcome:
    """Pin keys under a name, in place of what the name pinned before.

    Raises:
        InstanceNotFound
        InvalidArgument: no name, no keys, or too many of them.
        LimitReached: the instance has PINS_PER_INSTANCE_MAX pins.
    """
    request = event.request
    instance = ledger.instance(request.instance_id)
    _check(instance, event)
    keys = np.unique(request.keys)
    record = PinRecord(request.name, request.instance_id, keys, request.until_s)
    before = instance.pins.get(request.name)
    instance.pins[request.name] = record
    instance.pinned.update(keys.tolist())
    ids = ledger.find(instance, event.hits, event.found)
    ledger.hold_pinned(instance, ids)
    if before is not None:
        _uncount(instance, before)
        _release_unnamed(ledger, instance)
    return Outcome(Pinned(len(keys), len(ids)), [PutPin(request.instance_id, record)])


def unpin(ledger: Ledger, event: UnpinEvent) -> Outcome:
    """Take a pin back; its blocks are as recent as any other from now on.

    Raises:
        InstanceNotFound
        NotFound: no pin of that name.
    """
    request = event.request
    instance = ledger.instance(request.instance_id)
    if request.name not in instance.pins:
        known = ", ".join(sorted(instance.pins)[:8]) or "none"
        raise NotFound(
            f"instance {request.instance_id!r} has no pin {request.name!r}; it has: {known}",
            hint="`kvcm pin list` shows the pins of an instance.",
        )
    return Outcome(Pinned(0, 0), drop_pin(ledger, instance, request.name))


def drop_pin(ledger: Ledger, instance: Instance, name: str) -> list[Effect]:
    _uncount(instance, instance.pins.pop(name))
    _release_unnamed(ledger, instance)
    return [DropPin(instance.info.instance_id, name)]


def expire_pins(ledger: Ledger, now_s: int) -> list[Effect]:
    """Pins whose time is over."""
    effects: list[Effect] = []
    for instance in ledger.instances.values():
        over = [n for n, record in instance.pins.items() if 0 < record.until_s <= now_s]
        for name in over:
            effects += drop_pin(ledger, instance, name)
    return effects


def restore_pins(ledger: Ledger, instance: Instance, records: list[PinRecord]) -> None:
    for record in records:
        instance.pins[record.name] = record
        instance.pinned.update(record.keys.tolist())
    ledger.hold_pinned(instance, ledger.table.of_instance(instance.number))


def _check(instance: Instance, event: PinEvent) -> None:
    request = event.request
    if not request.name or len(request.name.encode()) > limits.NAME_BYTES_MAX:
        raise InvalidArgument(f"the name of a pin has 1..{limits.NAME_BYTES_MAX} bytes")
    if not 1 <= len(request.keys) <= limits.PINNED_KEYS_MAX:
        raise InvalidArgument(
            f"pin {request.name!r} names {len(request.keys)} blocks, not 1..{limits.PINNED_KEYS_MAX}"
        )
    if request.until_s < 0:
        raise InvalidArgument(f"until_s {request.until_s} is a unix time in seconds, or 0 for no end")
    if request.name not in instance.pins and len(instance.pins) >= limits.PINS_PER_INSTANCE_MAX:
        raise LimitReached(f"instance {request.instance_id!r} has {len(instance.pins)} pins already")


def _uncount(instance: Instance, record: PinRecord) -> None:
    instance.pinned.subtract(record.keys.tolist())
    for key in record.keys.tolist():
        if instance.pinned[key] <= 0:
            del instance.pinned[key]


def _release_unnamed(ledger: Ledger, instance: Instance) -> None:
    """Blocks that are marked as pinned but that no pin names any more. Reads the whole table."""
    table = ledger.table
    ids = table.of_instance(instance.number)
    ids = ids[table.pinned[ids]]
    named = np.fromiter((k in instance.pinned for k in table.keys[ids].tolist()), np.bool_, len(ids))
    table.pinned[ids[~named]] = False
    ledger.order.release(ids[~named])
