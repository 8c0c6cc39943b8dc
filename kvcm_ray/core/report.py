"""What holds a group's quota, for operators and for writes that are refused.

Bytes are payload bytes of all locations. *Reclaimable* is what reclaiming could free: readable, not
pinned, not leased. Rates are over the last minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcm_ray.core import retire
from kvcm_ray.core.blocks import Ids
from kvcm_ray.core.drain import leaves
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.marks import policy_of, total_levels
from kvcm_ray.core.model import StorageConfig, StorageType
from kvcm_ray.core.placement import tiers
from kvcm_ray.core.pressure import levels_of
from kvcm_ray.core.quota import Account, quota_type
from kvcm_ray.errors import QuotaExceeded


def explained(
    ledger: Ledger,
    refusal: QuotaExceeded,
    ranked: Sequence[StorageConfig],
    nbytes: int,
    blocks: int,
    own: Ids,
    now_ms: int,
) -> QuotaExceeded:
    """A refusal with what holds the quota, and whether waiting for room makes sense: not if there is no
    room for all blocks of the request at once, those included that it has already (`own`)."""
    pinned, leased = _pinned_bytes(ledger), ledger.leased_bytes(now_ms)
    total = ledger.quota.total()
    reclaimable = max(total.used - pinned - leased, 0)
    may_wait = ledger.quota.capacity - pinned >= nbytes  # leases and sessions end, pins need not
    if ledger.plan.paused or not _can_fit(ledger, ranked, nbytes, own):
        reclaimable, may_wait = 0, False
    message = f"{refusal.message}; {pinned} pinned, {leased} leased by readers"
    if ledger.plan.paused:
        message += "; reclaiming is paused"
    details = {
        **refusal.details,
        "asked": nbytes,
        "asked_bytes": nbytes,
        "asked_blocks": blocks,
        "pinned": pinned,
        "leased": leased,
        "reclaimable": reclaimable,
        "may_wait": may_wait,
    }
    return QuotaExceeded(message, **details)


def _can_fit(ledger: Ledger, ranked: Sequence[StorageConfig], nbytes: int, own: Ids) -> bool:
    table, quota = ledger.table, ledger.quota
    if int(table.nbytes[own].sum()) + nbytes > quota.capacity:
        return False
    kinds = {quota_type(storage.storage_type) for storage in ranked}
    return any(
        int(table.nbytes[own[table.kind[own] == kind]].sum()) + nbytes <= quota.ceiling(kind)
        for kind in kinds
    )


def capacity(ledger: Ledger, now_ms: int, now_s: int) -> dict[str, Any]:
    """The capacity report of the group, as plain JSON values."""
    living = ledger.table.living()
    leased = living[ledger.order.leased_until(living) > now_ms]
    marks = total_levels(ledger.group)
    return {
        "group": ledger.group.name,
        "policy": policy_of(ledger.group),
        "quota_bytes": ledger.quota.capacity,
        **_row(ledger, ledger.quota.total(), living, leased, None, now_ms),
        "high_bytes": marks.high,
        "low_bytes": marks.low,
        "blocks": len(living),
        "tiers": [_tier(ledger, kind, living, leased, now_ms) for kind in _kinds(ledger)],
        "instances": [_instance(ledger, i, now_s) for _, i in sorted(ledger.instances.items())],
        "draining": _draining(ledger),
        "pins": [_pin(ledger, i, name) for i in ledger.instances.values() for name in sorted(i.pins)],
        "reclaim": reclaimed(ledger),
    }


def reclaimed(ledger: Ledger) -> dict[str, Any]:
    """What reclaiming has done since the start of the process, and what it is at."""
    names = (
        "evicted_blocks",
        "expired_blocks",
        "retired_blocks",
        "demoted_blocks",
        "promoted_blocks",
        "drained_blocks",
        "failed_moves",
    )
    return {
        "paused": ledger.plan.paused,
        **{name: ledger.counters[name] for name in names},
        "moves_in_flight": len(ledger.moves.by_id),
        "promotions_waiting": len(ledger.plan.promotions),
        "trash_records": len(ledger.trash),
    }


def held(ledger: Ledger) -> dict[StorageType, int]:
    """Bytes of each type that are not about to be free."""
    return {kind: a.held - a.pending for kind, a in ledger.quota.accounts.items()}


def retiring(instance: Instance, quota_bytes: int, now_s: int) -> dict[str, Any] | None:
    """How far the replacement of an instance is; None if it is not being replaced."""
    share = retire.share(instance.info, now_s)
    if share is None:
        return None
    return {
        "share": round(share, 4),
        "allowed_bytes": retire.allowed_bytes(instance.info, quota_bytes, now_s),
        "seconds_left": retire.seconds_left(instance.info, now_s),
        "empty": instance.key_count == 0 and not instance.writing,
    }


def _kinds(ledger: Ledger) -> list[StorageType]:
    """Tiers in order, then types that have blocks or a quota but take none."""
    order = tiers(ledger.group, ledger.storages)
    held_kinds = {kind for kind, account in ledger.quota.accounts.items() if account != Account()}
    return order + sorted((held_kinds | ledger.quota.capacities.keys()) - set(order))


def _tier(ledger: Ledger, kind: StorageType, living: Ids, leased: Ids, now_ms: int) -> dict[str, Any]:
    table, quota = ledger.table, ledger.quota
    ids, order = living[table.kind[living] == kind], tiers(ledger.group, ledger.storages)
    limit = quota.capacities.get(kind)
    marks = levels_of(ledger, kind, order)
    coldest = ledger.order.coldest_ms([instance.lane(kind) for instance in ledger.instances.values()])
    names = [
        name
        for name in ledger.group.storage_candidates
        if name in ledger.storages and ledger.quota_kind(name) is kind
    ]
    row = _row(
        ledger, quota.accounts.get(kind, Account()), ids, leased[table.kind[leased] == kind], kind, now_ms
    )
    return {
        "storage_type": kind.name,
        "storages": names,
        "quota_bytes": limit,
        **row,
        "high_bytes": None if marks is None else marks.high,
        "low_bytes": None if marks is None else marks.low,
        "blocks": len(ids),
        "copies": len(ledger.copies.get(kind, ())),
        "coldest_age_s": None if coldest is None else round(max(now_ms - coldest, 0) / 1000, 3),
    }


def _row(
    ledger: Ledger, account: Account, ids: Ids, leased: Ids, kind: StorageType | None, now_ms: int
) -> dict[str, Any]:
    table, quota = ledger.table, ledger.quota
    pinned = int(table.nbytes[ids[table.pinned[ids]]].sum())
    leased_bytes = int(table.nbytes[leased[~table.pinned[leased]]].sum())
    rate = ledger.growth.bytes_per_s(now_ms, held(ledger), kind)
    limit = quota.capacity if kind is None else quota.capacities.get(kind, quota.capacity)
    room = max(limit - account.held + account.pending, 0)
    return {
        "used_bytes": account.used,
        "reserved_bytes": account.reserved,
        "pending_delete_bytes": account.pending,
        "reclaimable_bytes": max(account.used - account.pending - pinned - leased_bytes, 0),
        "pinned_bytes": pinned,
        "leased_bytes": leased_bytes,
        "fill_bytes_per_s": round(rate, 1),
        "seconds_to_full": 0.0 if not room else round(room / rate, 1) if rate > 0 else None,
    }


def _instance(ledger: Ledger, instance: Instance, now_s: int) -> dict[str, Any]:
    info = instance.info
    return {
        "instance_id": info.instance_id,
        "blocks": instance.key_count,
        "used_bytes": instance.serving_bytes,
        "max_key_count": ledger.group.max_key_count,
        "model_version": info.model_version,
        "supersedes": info.supersedes,
        "retiring": retiring(instance, ledger.quota.capacity, now_s),
    }


def _draining(ledger: Ledger) -> list[dict[str, Any]]:
    """Storages that are to become empty, those without anything left included."""
    rows: dict[str, list[int]] = {
        name: [0, 0, 0] for name, config in ledger.storages.items() if config.is_draining
    }
    for instance in ledger.instances.values():
        table = instance.segments
        for segment_id, segment in table.segments.items():
            if leaves(ledger, segment.storage):
                row = rows.setdefault(segment.storage, [0, 0, 0])
                row[0] += len(ledger.table.in_segment(instance.number, segment_id))
                row[1] += table.taken(segment_id) * table.slot_bytes[segment_id]
                row[2] += 1
    return [
        {"storage": name, "blocks": blocks, "used_bytes": used, "empty": segments == 0}
        for name, (blocks, used, segments) in sorted(rows.items())
    ]


def _pin(ledger: Ledger, instance: Instance, name: str) -> dict[str, Any]:
    table, record = ledger.table, instance.pins[name]
    ids = table.of_instance(instance.number)
    ids = ids[np.isin(table.keys[ids], record.keys)]
    return {
        "instance_id": instance.info.instance_id,
        "name": name,
        "keys": len(record.keys),
        "blocks": len(ids),
        "bytes": int(table.nbytes[ids].sum()),
        "until_s": record.until_s,
    }


def _pinned_bytes(ledger: Ledger) -> int:
    if not any(instance.pinned for instance in ledger.instances.values()):
        return 0
    table, ids = ledger.table, ledger.table.living()
    return int(table.nbytes[ids[table.pinned[ids]]].sum())
