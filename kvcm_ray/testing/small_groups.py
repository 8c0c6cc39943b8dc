"""Groups of a few blocks on a fast and a slow tier, for tests of making room.

All blocks have `BLOCK` bytes, so quotas are given in blocks. Tiers: ``shm``, then ``nfs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcm_ray.core.model import (
    CacheConfig,
    CachePreferStrategy,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecInfo,
    MetaIndexerConfig,
    NfsSpec,
    QuotaConfig,
    ReclaimPolicy,
    ShmSpec,
    StorageConfig,
    StorageType,
    TriggerStrategy,
)
from kvcm_ray.testing.group_driver import GroupDriver

BLOCK = 10
SHM, NFS = StorageType.ST_TAIRMEMPOOL, StorageType.ST_NFS
STORAGES = {
    "shm": StorageConfig("shm", shm=ShmSpec("/dev/shm/x")),
    "nfs": StorageConfig("nfs", nfs=NfsSpec("/n")),
}


def instance(instance_id: str, **facts: Any) -> InstanceInfo:
    """Its blocks have `BLOCK` bytes in two specs."""
    specs = (LocationSpecInfo("a", 6), LocationSpecInfo("b", BLOCK - 6))
    return InstanceInfo(
        instance_group_name="g", instance_id=instance_id, location_spec_infos=specs, uid="00000000", **facts
    )


def group_of(
    blocks: int,
    *,
    shm: int | None = None,
    nfs: int | None = None,
    storages: Sequence[str] = ("nfs",),
    policy: ReclaimPolicy = ReclaimPolicy.POLICY_LRU,
    prefer: CachePreferStrategy = CachePreferStrategy.CPS_UNSPECIFIED,
    high: float = 0.0,
    low: float = 0.0,
    used_bytes: int = 0,
    max_keys: int = 0,
    period_s: int = 0,
    step: int = 0,
    step_percent: int = 0,
    delay_ms: int = 0,
    ttl_s: int = 0,
) -> InstanceGroup:
    """A group with a quota of so many blocks, in total and by tier."""
    quotas = {SHM: shm, NFS: nfs}
    entries = tuple(QuotaConfig(kind, n * BLOCK) for kind, n in quotas.items() if n is not None)
    reclaim = CacheReclaimStrategy(
        reclaim_policy=policy,
        trigger_strategy=TriggerStrategy(used_size=used_bytes, used_percentage=high),
        trigger_period_seconds=period_s,
        reclaim_step_size=step,
        reclaim_step_percentage=step_percent,
        delay_before_delete_ms=delay_ms,
        low_water_percentage=low,
        ttl_seconds=ttl_s,
    )
    return InstanceGroup(
        name="g",
        storage_candidates=tuple(storages),
        quota=InstanceGroupQuota(blocks * BLOCK, entries),
        cache_config=CacheConfig(
            reclaim_strategy=reclaim,
            data_storage_strategy=prefer,
            meta_indexer_config=MetaIndexerConfig(max_key_count=max_keys),
        ),
    )


def driver(blocks: int, *instances: str, **settings: Any) -> GroupDriver:
    """A driver of `group_of`, with the instances named, or one called ``i``."""
    infos = [instance(name) for name in instances or ("i",)]
    return GroupDriver(group_of(blocks, **settings), STORAGES, infos)


def two_tiers(blocks: int, shm: int, nfs: int | None = None, **settings: Any) -> GroupDriver:
    """A driver of a group that prefers shm and has nfs below it."""
    return driver(blocks, shm=shm, nfs=nfs, storages=("shm", "nfs"), **settings)


def tier_of(d: GroupDriver, instance_id: str = "i") -> dict[int, str]:
    """The storage of each SERVING block."""
    kept = d.index.instances[instance_id]
    return {key: kept.segments[place[0]].storage for key, place in sorted(kept.served.items())}
