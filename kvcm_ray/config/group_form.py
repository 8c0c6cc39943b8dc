"""An instance group written as a handful of options; `kvcm group` and the configuration file share it.

A body is the protocol's JSON form of a group, or the plain form of a snapshot: both take enums as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcm_ray.core.model import CachePreferStrategy, ReclaimPolicy, StorageType

Json = dict[str, Any]

STRATEGIES = {
    "order": CachePreferStrategy.CPS_PREFER_3FS,  # no strategy of the protocol names files
    "memory": CachePreferStrategy.CPS_PREFER_TAIR_MEMPOOL,
    "memory-only": CachePreferStrategy.CPS_ALWAYS_TAIR_MEMPOOL,
    "3fs-only": CachePreferStrategy.CPS_ALWAYS_3FS,
}
POLICIES = {
    "lru": ReclaimPolicy.POLICY_LRU,
    "lfu": ReclaimPolicy.POLICY_LFU,
    "ttl": ReclaimPolicy.POLICY_TTL,
    "adaptive": ReclaimPolicy.POLICY_ADAPTIVE,
}
#: Option -> field of ``reclaim_strategy``.
RECLAIM_FIELDS = {
    "low_water": "low_water_percentage",
    "ttl": "ttl_seconds",
    "period": "trigger_period_seconds",
    "step": "reclaim_step_size",
    "step_percent": "reclaim_step_percentage",
    "delete_delay_ms": "delay_before_delete_ms",
}
QUOTAS = {"file_quota": StorageType.ST_NFS, "memory_quota": StorageType.ST_TAIRMEMPOOL}
OPTIONS = (
    "quota", *QUOTAS, "storages", "prefer", "policy", "high_water", "high_water_bytes",
    *RECLAIM_FIELDS, "max_instances", "max_keys",
)  # fmt: skip


def new_group(name: str, first_storage: str) -> Json:
    """A group that `fill` makes complete."""
    return {
        "name": name,
        "storage_candidates": [],
        "global_quota_group_name": name,
        "quota": {"capacity": 0, "quota_config": []},
        "cache_config": {
            "data_storage_strategy": int(STRATEGIES["order"]),
            "reclaim_strategy": {"storage_unique_name": first_storage},
            "meta_indexer_config": {
                "meta_storage_backend_config": {"storage_type": "local"},
                "meta_cache_policy_config": {"type": "lru"},
            },
        },
        "version": 1,
    }


def fill(body: Json, options: Mapping[str, Any]) -> None:
    """Write the options that are given (neither None nor an empty list) into a group's body."""
    given = {name: value for name, value in options.items() if value not in (None, (), [])}
    quota = _inner(body, "quota")
    if "quota" in given:
        quota["capacity"] = given["quota"]
    for option, kind in QUOTAS.items():
        if option in given:
            same = (kind.name, int(kind))
            others = [q for q in quota.get("quota_config") or [] if q["storage_type"] not in same]
            entry = {"storage_type": int(kind), "capacity": given[option]}
            quota["quota_config"] = [*others, entry]
    if "storages" in given:
        body["storage_candidates"] = list(given["storages"])
    if "max_instances" in given:
        body["max_instance_count"] = given["max_instances"]
    config = _inner(body, "cache_config")
    if "prefer" in given:
        config["data_storage_strategy"] = int(STRATEGIES[given["prefer"]])
    if "max_keys" in given:
        _inner(config, "meta_indexer_config")["max_key_count"] = given["max_keys"]
    _fill_reclaim(config, given)


def _fill_reclaim(config: Json, given: Mapping[str, Any]) -> None:
    fields = {field: given[name] for name, field in RECLAIM_FIELDS.items() if name in given}
    if "policy" in given:
        fields["reclaim_policy"] = int(POLICIES[given["policy"]])
    if fields:
        _inner(config, "reclaim_strategy").update(fields)
    for name, field in (("high_water", "used_percentage"), ("high_water_bytes", "used_size")):
        if name in given:
            _inner(_inner(config, "reclaim_strategy"), "trigger_strategy")[field] = given[name]


def _inner(body: Json, name: str) -> Json:
    """The object of that name, made if it is not there."""
    if body.get(name) is None:
        body[name] = {}
    found: Json = body[name]
    return found
