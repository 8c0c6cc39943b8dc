"""Storages and the group that a new data directory begins with.

A tier is ``shm:SIZE`` or ``file:SIZE[:PATH]``, fastest first; its size becomes a part of the quota of the
group "default". What exists is never overwritten: later changes are the administrator's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcm_ray.actors.paths import shm_dir, tier_dir
from kvcm_ray.core.model import (
    CacheConfig,
    CachePreferStrategy,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    MetaCachePolicyConfig,
    MetaIndexerConfig,
    MetaStorageBackendConfig,
    NfsSpec,
    QuotaConfig,
    ReclaimPolicy,
    ShmSpec,
    StorageConfig,
    TriggerStrategy,
    safe_name,
)
from kvcm_ray.errors import GroupNotFound, InvalidArgument, Unavailable

DEFAULT_GROUP = "default"
DEFAULT_TIERS = ("shm:256MiB", "file:8GiB")
READY_TIMEOUT_S = 90.0
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(iB|B|)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tier:
    storage: StorageConfig
    size_bytes: int


def parse_size(text: str) -> int:
    """Bytes of ``64MiB``, ``1.5G``, ``1000``; K, M, G and T are powers of 1024.

    Raises:
        InvalidArgument
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (size := int(float(match[1]) * _UNITS[match[2].upper()])) <= 0:
        raise InvalidArgument(f"{text!r} is not a size; write 64MiB, 8GiB or a number of bytes")
    return size


def parse_tiers(texts: Sequence[str], data_dir: Path) -> list[Tier]:
    """Tiers in order; the defaults if there are none.

    Raises:
        InvalidArgument: says which tier is wrong and how it is written.
    """
    tiers: list[Tier] = []
    counts = {"shm": 0, "file": 0}
    for text in texts or DEFAULT_TIERS:
        kind, _, rest = text.partition(":")
        size, _, path = rest.partition(":")
        if kind not in counts or (kind == "shm" and path):
            raise InvalidArgument(f"tier {text!r}: write shm:SIZE or file:SIZE[:PATH]")
        if path and not path.startswith("/"):
            raise InvalidArgument(f"tier {text!r}: the path must be absolute")
        counts[kind] += 1
        storage = _storage(kind, counts[kind], path, data_dir)
        try:
            tiers.append(Tier(storage, parse_size(size)))
        except InvalidArgument as error:
            raise InvalidArgument(f"tier {text!r}: {error.message}") from error
    return tiers


def _storage(kind: str, number: int, path: str, data_dir: Path) -> StorageConfig:
    if kind == "shm":
        name = f"shm_{number:02}"
        return StorageConfig(name, shm=ShmSpec(str(shm_dir(data_dir) / safe_name(name))))
    name = f"nfs_{number:02}"
    return StorageConfig(name, nfs=NfsSpec(path or str(tier_dir(data_dir, name)), 8))


def default_group(tiers: Sequence[Tier]) -> InstanceGroup:
    """The group "default" over all tiers."""
    by_type: dict[int, int] = {}
    for tier in tiers:
        kind = tier.storage.storage_type
        by_type[kind] = by_type.get(kind, 0) + tier.size_bytes
    quota = InstanceGroupQuota(
        sum(by_type.values()),
        tuple(QuotaConfig(tier.storage.storage_type, by_type.pop(tier.storage.storage_type))
              for tier in tiers if tier.storage.storage_type in by_type),
    )  # fmt: skip
    names = tuple(tier.storage.global_unique_name for tier in tiers)
    return InstanceGroup(
        name=DEFAULT_GROUP,
        storage_candidates=names,
        global_quota_group_name="default_quota_group",
        max_instance_count=100,
        quota=quota,
        cache_config=_cache_config(names[-1]),
        user_data=json.dumps({"description": "made by kvcm up"}),
        version=1,
    )


def _cache_config(storage: str) -> CacheConfig:
    return CacheConfig(
        reclaim_strategy=CacheReclaimStrategy(
            storage_unique_name=storage,
            reclaim_policy=ReclaimPolicy.POLICY_LRU,
            trigger_strategy=TriggerStrategy(used_percentage=0.95),
            delay_before_delete_ms=1000,
            low_water_percentage=0.90,
        ),
        # Of shm and file tiers it prefers none, so the order in which they were given decides.
        data_storage_strategy=CachePreferStrategy.CPS_PREFER_3FS,
        meta_indexer_config=MetaIndexerConfig(
            max_key_count=1_000_000,
            mutex_shard_num=16,
            batch_key_size=16,
            meta_storage_backend_config=MetaStorageBackendConfig("local", ""),
            meta_cache_policy_config=MetaCachePolicyConfig(capacity=10_000, type="LRU"),
        ),
    )


def differences(
    asked: Sequence[Tier], storages: Iterable[StorageConfig], group: InstanceGroup | None
) -> list[str]:
    """Sentences about tiers that were asked for but are not what the data directory has."""
    known = {storage.global_unique_name: storage for storage in storages}
    notes = []
    for tier in asked:
        name = tier.storage.global_unique_name
        if name not in known:
            notes.append(f"storage {name} is not registered (any more); `kvcm storage create` adds it")
        elif known[name].root_path != tier.storage.root_path:
            notes.append(f"storage {name} stays at {known[name].root_path}")
    quota = sum(tier.size_bytes for tier in asked)
    if group is not None and group.quota_bytes != quota:
        notes.append(
            f"the quota of group {group.name} stays {group.quota_bytes} bytes, not {quota}; "
            "`kvcm group update` changes it"
        )
    return notes


def apply(registry_actor: Any, tiers: Sequence[Tier], *, asked: bool, note: Callable[[str], None]) -> bool:
    """Wait for the registry, then make what a new data directory begins with; True if it was a new one.

    Args:
        asked: the tiers were given: say where what exists differs from them.

    Raises:
        Unavailable: the registry did not start.
    """
    import ray

    from kvcm_ray.actors.handles import RegistryHandle

    try:
        ray.get(registry_actor.wait_ready.remote(), timeout=READY_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise Unavailable(f"the registry did not start: {error}") from error
    registry = RegistryHandle()
    if not registry.call_sync("list_groups") and not registry.call_sync("list_storages"):
        for tier in tiers:
            registry.call_sync("add_storage", tier.storage)
        registry.call_sync("create_group", default_group(tiers), timeout_s=60)
        return True
    if asked:
        for sentence in differences(tiers, registry.call_sync("list_storages"), _default_group(registry)):
            note(f"note: {sentence}")
    return False


def _default_group(registry: Any) -> InstanceGroup | None:
    try:
        group: InstanceGroup = registry.call_sync("get_group", DEFAULT_GROUP)
    except GroupNotFound:
        return None
    return group
