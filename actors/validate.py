"""What the registry accepts. Every check names the field and the value that it refuses.

Candidates of a group need not be registered yet (the protocol's clients create groups first); a write
with no registered candidate is refused when it comes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from kvcm_ray.core.limits import NAME_BYTES_MAX, SPEC_BYTES_MAX, SPECS_PER_INSTANCE_MAX
from kvcm_ray.core.model import (
    CachePreferStrategy,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceInfo,
    MooncakeSpec,
    ReclaimerSettings,
    ReclaimPolicy,
    StorageConfig,
    TriggerStrategy,
)
from kvcm_ray.errors import InvalidArgument, Unsupported

INT64_MAX = 2**63 - 1
RECLAIMERS_MAX = 64


def check_name(field: str, name: str) -> None:
    """1..NAME_BYTES_MAX bytes of UTF-8 without control characters."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{field} is not valid Unicode: {error}") from error
    if not 0 < size <= NAME_BYTES_MAX:
        raise InvalidArgument(f"{field} has {size} bytes; it needs 1 to {NAME_BYTES_MAX}")
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise InvalidArgument(f"{field} {name!r} contains a control character")


def check_storage(config: StorageConfig) -> None:
    """The protocol's rules for each kind of storage.

    Raises:
        InvalidArgument: a required field is missing or a path is not absolute.
        Unsupported: a kind of storage without an adapter here.
    """
    name = config.global_unique_name
    check_name("global_unique_name", name)
    if "/" in name or "?" in name:
        raise InvalidArgument(f"global_unique_name {name!r}: '/' and '?' cannot be in a location URI")
    missing = _missing_fields(config)
    if missing:
        raise InvalidArgument(f"storage {name!r}: missing or invalid {', '.join(missing)}")
    if config.nfs is None and config.shm is None and config.threefs is None:
        raise Unsupported(
            f"storage {name!r}: this version has no adapter for {config.storage_type.name}; "
            "use nfs, threefs (a mounted 3FS) or shm"
        )
    if not config.root_path.startswith("/"):
        raise InvalidArgument(f"storage {name!r}: {config.root_path!r} is not an absolute path")
    if any(ord(c) < 32 or c in "\x7f?" for c in config.root_path):
        raise InvalidArgument(
            f"storage {name!r}: path {config.root_path!r} has a character that a location URI cannot carry"
        )


def check_apart(config: StorageConfig, others: Iterable[StorageConfig]) -> None:
    """Two storages in one directory would each take the other's blocks for leftovers.

    Raises:
        InvalidArgument: the root is that of another storage, or one of them lies within the other.
    """
    own = os.path.normpath(config.root_path)
    for other in others:
        theirs = os.path.normpath(other.root_path)
        if other.global_unique_name == config.global_unique_name or not other.root_path:
            continue
        if os.path.commonpath([own, theirs]) in (own, theirs):
            raise InvalidArgument(
                f"storage {config.global_unique_name!r}: {config.root_path} overlaps "
                f"{other.root_path} of storage {other.global_unique_name!r}; give each a directory of its own"
            )


def _missing_fields(config: StorageConfig) -> list[str]:
    if config.nfs is not None:
        return _empty(config.nfs, "root_path")
    if config.shm is not None:
        return _empty(config.shm, "root_path")
    if config.threefs is not None:
        return _empty(config.threefs, "mountpoint", "root_dir")
    if config.vcnsthreefs is not None:
        fields = ("mountpoint", "root_dir", "remote_host", "remote_port", "meta_storage_uri")
        return _empty(config.vcnsthreefs, *fields)
    if config.mooncake is not None:
        return _missing_mooncake(config.mooncake)
    if config.tair_mem_pool is not None:
        return _empty(config.tair_mem_pool, "domain")
    return ["storage_spec"]


def _missing_mooncake(spec: MooncakeSpec) -> list[str]:
    fields = ["local_hostname", "metadata_connstring", "protocol", "master_service_entry"]
    return _empty(spec, *fields, *(["rdma_device"] if spec.protocol == "rdma" else []))


def _empty(spec: object, *fields: str) -> list[str]:
    values = {field: getattr(spec, field) for field in fields}
    return [f for f, v in values.items() if not v or (isinstance(v, int) and v < 0)]


def check_group(group: InstanceGroup) -> None:
    """Raises `InvalidArgument`."""
    check_name("name", group.name)
    if not group.storage_candidates:
        raise InvalidArgument(f"group {group.name!r}: storage_candidates is empty")
    for candidate in group.storage_candidates:
        check_name("storage_candidates", candidate)
    if len(set(group.storage_candidates)) != len(group.storage_candidates):
        raise InvalidArgument(f"group {group.name!r}: storage_candidates names a storage twice")
    cache = group.cache_config
    if cache is None:
        raise InvalidArgument(f"group {group.name!r}: cache_config is missing")
    if cache.data_storage_strategy is CachePreferStrategy.CPS_UNSPECIFIED:
        raise InvalidArgument(f"group {group.name!r}: data_storage_strategy is CPS_UNSPECIFIED")
    if cache.reclaim_strategy is not None:
        _check_reclaim(f"group {group.name!r}: ", cache.reclaim_strategy)
    for entry in group.quota.quota_config if group.quota else ():
        if entry.capacity < 0:
            raise InvalidArgument(f"group {group.name!r}: quota_config capacity is negative")
    if group.quota_bytes < 0:
        raise InvalidArgument(f"group {group.name!r}: quota capacity is negative")
    if group.max_key_count < 0:
        raise InvalidArgument(f"group {group.name!r}: max_key_count is negative")


def _check_reclaim(prefix: str, strategy: CacheReclaimStrategy) -> None:
    trigger = strategy.trigger_strategy or TriggerStrategy()
    if strategy.reclaim_policy not in set(ReclaimPolicy):
        known = ", ".join(policy.name for policy in ReclaimPolicy)
        raise InvalidArgument(f"{prefix}reclaim_policy {strategy.reclaim_policy} is none of {known}")
    counts = {
        name: getattr(strategy, name)
        for name in ("trigger_period_seconds", "reclaim_step_size", "reclaim_step_percentage",
                     "delay_before_delete_ms", "ttl_seconds")
    }  # fmt: skip
    for name, value in {**counts, "used_size": trigger.used_size}.items():
        if value < 0:
            raise InvalidArgument(f"{prefix}{name} is negative")
    if strategy.reclaim_step_percentage > 100:
        raise InvalidArgument(
            f"{prefix}reclaim_step_percentage {strategy.reclaim_step_percentage} is over 100"
        )
    high, low = trigger.used_percentage, strategy.low_water_percentage
    for name, value in (("used_percentage", high), ("low_water_percentage", low)):
        if not 0 <= value <= 1:
            raise InvalidArgument(f"{prefix}{name} {value:g} is a fraction: 0.8 is 80 %, at most 1")
    if low > (high or 1.0):
        raise InvalidArgument(
            f"{prefix}low_water_percentage {low:g} is above the mark that starts reclaiming, "
            f"used_percentage {high or 1.0:g}; lower it too, or set it to 0 for 0.05 below that one"
        )


def check_instance(info: InstanceInfo) -> None:
    """The block size is not checked: only callers who send token ids need one.

    Raises:
        InvalidArgument
    """
    check_name("instance_id", info.instance_id)
    check_name("instance_group", info.instance_group_name)
    specs = info.location_spec_infos
    if not 0 < len(specs) <= SPECS_PER_INSTANCE_MAX:
        raise InvalidArgument(
            f"location_spec_infos has {len(specs)} entries; it needs 1 to {SPECS_PER_INSTANCE_MAX}"
        )
    for spec in specs:
        check_name("location_spec_infos.name", spec.name)
        if not 0 < spec.size <= SPEC_BYTES_MAX:
            raise InvalidArgument(
                f"location spec {spec.name!r} has size {spec.size}; it needs 1 to {SPEC_BYTES_MAX}"
            )
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise InvalidArgument("location_spec_infos names a spec twice")
    _check_spec_groups(info, set(names))
    _check_upgrade(info)


def _check_upgrade(info: InstanceInfo) -> None:
    for field in ("model_version", "supersedes"):
        if getattr(info, field):
            check_name(field, getattr(info, field))
    if info.supersedes == info.instance_id:
        raise InvalidArgument(f"supersedes: instance {info.instance_id!r} cannot supersede itself")
    if info.handover_seconds < 0:
        raise InvalidArgument(f"handover_seconds is {info.handover_seconds}; it needs 0 (an hour) or more")


def _check_spec_groups(info: InstanceInfo, names: set[str]) -> None:
    seen: set[str] = set()
    for group in info.location_spec_groups:
        check_name("location_spec_groups.name", group.name)
        if group.name in seen:
            raise InvalidArgument(f"location_spec_groups names {group.name!r} twice")
        seen.add(group.name)
        unknown = set(group.spec_names) - names
        if unknown or not group.spec_names:
            what = f"unknown specs {sorted(unknown)}" if unknown else "no spec"
            raise InvalidArgument(f"location spec group {group.name!r} names {what}")


def check_reclaimer(settings: ReclaimerSettings) -> None:
    """1 to RECLAIMERS_MAX reclaimers; a rate that is not negative."""
    if not 1 <= settings.reclaimers <= RECLAIMERS_MAX:
        raise InvalidArgument(f"reclaimers {settings.reclaimers} is not in 1..{RECLAIMERS_MAX}")
    if not 0 <= settings.max_bytes_per_second <= INT64_MAX:
        raise InvalidArgument(
            f"max_bytes_per_second {settings.max_bytes_per_second} is negative or too large; 0 is no limit"
        )
