"""Which storage the blocks of one write go to.

Candidates are the group's storages in its order of preference, without those that are not
registered, disabled or being drained. The strategy filters them (ALWAYS) or puts some first (PREFER); the
first one left whose quota has room is taken. One storage serves the whole write.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvcm_ray.core.model import CachePreferStrategy, InstanceGroup, StorageConfig, StorageType
from kvcm_ray.core.quota import Quota, quota_type
from kvcm_ray.errors import NoStorageAvailable

_S, _T = CachePreferStrategy, StorageType

#: strategy -> (type it names, whether other types are out of the question)
STRATEGIES: dict[CachePreferStrategy, tuple[StorageType, bool]] = {
    _S.CPS_ALWAYS_3FS: (_T.ST_3FS, True),
    _S.CPS_PREFER_3FS: (_T.ST_3FS, False),
    _S.CPS_ALWAYS_MOONCAKE: (_T.ST_MOONCAKE, True),
    _S.CPS_PREFER_MOONCAKE: (_T.ST_MOONCAKE, False),
    _S.CPS_ALWAYS_TAIR_MEMPOOL: (_T.ST_TAIRMEMPOOL, True),
    _S.CPS_PREFER_TAIR_MEMPOOL: (_T.ST_TAIRMEMPOOL, False),
    _S.CPS_ALWAYS_VCNS_3FS: (_T.ST_VCNS_3FS, True),
    _S.CPS_PREFER_VCNS_3FS: (_T.ST_VCNS_3FS, False),
}


def candidates(group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> tuple[StorageConfig, ...]:
    """Storages that new blocks of the group may go to, best first.

    Raises:
        NoStorageAvailable: there is none; the message says why for each candidate.
    """
    enabled = [
        storages[name]
        for name in group.storage_candidates
        if name in storages and storages[name].is_available and not storages[name].is_draining
    ]
    strategy = group.cache_config.data_storage_strategy if group.cache_config else _S(0)
    kind, exclusive = STRATEGIES.get(strategy, (None, False))
    if exclusive:
        enabled = [s for s in enabled if s.storage_type is kind]
    if not enabled:
        raise NoStorageAvailable(_why_none(group, storages, strategy))
    return tuple(sorted(enabled, key=lambda s: kind is not None and s.storage_type is not kind))


def tiers(group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> list[StorageType]:
    """Types of the storages that take blocks, best first; none if no storage does."""
    try:
        ranked = candidates(group, storages)
    except NoStorageAvailable:
        return []
    return list(dict.fromkeys(quota_type(storage.storage_type) for storage in ranked))


def choose_storage(
    ranked: tuple[StorageConfig, ...], quota: Quota, nbytes: int, ahead_bytes: int = 0
) -> StorageConfig:
    """The first of `ranked` (from `candidates`, not empty) whose quota has room for `nbytes`, and
    for `ahead_bytes` of others that wait.

    Raises:
        QuotaExceeded: none has; it names the largest of the quotas that stopped them.
    """
    refusals = []
    for storage in ranked:
        refusal = quota.refusal(storage.storage_type, nbytes, ahead_bytes)
        if refusal is None:
            return storage
        refusals.append(refusal)
    raise max(refusals, key=lambda refusal: int(refusal.details["capacity"]))


def _why_none(
    group: InstanceGroup, storages: Mapping[str, StorageConfig], strategy: CachePreferStrategy
) -> str:
    if not group.storage_candidates:
        return f"group {group.name!r} has no storage_candidates"
    reasons = []
    for name in group.storage_candidates:
        config = storages.get(name)
        if config is None:
            reasons.append(f"{name} is not registered")
        elif config.is_draining:
            reasons.append(f"{name} is being drained")
        elif not config.is_available:
            reasons.append(f"{name} is disabled")
        else:
            reasons.append(f"{name} is {config.storage_type.name}, which {strategy.name} excludes")
    return f"no storage for group {group.name!r}: {'; '.join(reasons)}"
