"""How much is to go, and when somebody should look again. Nothing here changes anything.

What waits for deletion, and what is being copied to another tier, counts as gone from where it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcm_ray.core.ledger import Instance, Ledger, Plan
from kvcm_ray.core.marks import Levels, marks_of, strategy_of, total_levels, ttl_ms
from kvcm_ray.core.model import StorageType
from kvcm_ray.core.placement import tiers

RETRY_MS = 50  #: pause after a step that could do nothing
SHARES_EVERY_MS = 1_000  #: shares of retiring instances, and pins that end


def held(ledger: Ledger, kind: StorageType | None) -> int:
    """Bytes of a type, or of all (None), reserved ones included."""
    account = ledger.quota.total() if kind is None else ledger.quota.account(kind)
    leaving = ledger.moves.leaving
    going = sum(leaving.values()) if kind is None else leaving[kind]
    return account.used - account.pending - going + account.reserved


def excess(ledger: Ledger, kind: StorageType | None, order: Sequence[StorageType]) -> int:
    """Bytes above the marks of a type, or of all (None); `order` are the tiers. 0 without a quota."""
    levels = levels_of(ledger, kind, order)
    return 0 if levels is None else levels.excess(held(ledger, kind), kind in ledger.plan.falling)


def excess_keys(ledger: Ledger, instance: Instance) -> int:
    """Keys of an instance above its marks."""
    limit, falling = ledger.group.max_key_count, instance.info.instance_id in ledger.plan.falling
    return marks_of(ledger.group).of(limit).excess(keys(instance), falling) if limit > 0 else 0


def keys(instance: Instance) -> int:
    """Keys that count against the limit of an instance."""
    return instance.key_count + len(instance.writing)


def levels_of(ledger: Ledger, kind: StorageType | None, order: Sequence[StorageType]) -> Levels | None:
    """Marks of a type in bytes, or of all (None); None without a quota of its own."""
    if kind is None:
        return total_levels(ledger.group)
    capacity = ledger.quota.capacities.get(kind)
    return None if capacity is None else marks_of(ledger.group, upper_tier=kind in order[:-1]).of(capacity)


def missing(ledger: Ledger, kind: StorageType | None, nbytes: int) -> int:
    """Bytes to go so that `nbytes` more fit the quota of a type, or the total (None)."""
    capacity = ledger.quota.capacity if kind is None else ledger.quota.capacities.get(kind)
    return 0 if capacity is None else max(held(ledger, kind) + nbytes - capacity, 0)


def next_reclaim_ms(ledger: Ledger, now_ms: int) -> int | None:
    """When a step may find something to do though nobody waits for room; may be in the past."""
    plan, instances = ledger.plan, ledger.instances.values()
    if plan.paused:
        return None
    times: list[int] = []
    retry_ms = now_ms if plan.retry_ms is None else plan.retry_ms
    if plan.draining or plan.promotions:
        times.append(retry_ms)
    if _over_marks(ledger):
        times.append(max(retry_ms, marks_due_ms(ledger)))
    if ttl_ms(ledger.group) and len(ledger.table):
        times.append(now_ms if plan.expiry_ms is None else plan.expiry_ms)
    shrinking = any(i.info.retiring_since_s and i.serving_bytes for i in instances)
    if shrinking or any(record.until_s for i in instances for record in i.pins.values()):
        times.append(shares_due_ms(plan))
    return min(times, default=None)


def marks_due_ms(ledger: Ledger) -> int:
    """When the marks are to be looked at next, by the group's trigger period; at once as long as what
    was above one is not down."""
    period_s = strategy_of(ledger.group).trigger_period_seconds
    if period_s <= 0 or ledger.plan.marks_ms is None or ledger.plan.falling:
        return 0
    return ledger.plan.marks_ms + period_s * 1_000


def shares_due_ms(plan: Plan) -> int:
    return 0 if plan.shares_ms is None else plan.shares_ms + SHARES_EVERY_MS


def _over_marks(ledger: Ledger) -> bool:
    order = tiers(ledger.group, ledger.storages)
    kinds: list[StorageType | None] = [None, *ledger.quota.capacities]
    return any(excess(ledger, kind, order) for kind in kinds) or any(
        excess_keys(ledger, instance) for instance in ledger.instances.values()
    )
