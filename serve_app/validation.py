"""Field checks and their texts: ``missing or invalid fields: {<Message>: {<field>}...}``.

A request names its first wrong field only; a nested message names all of its wrong fields. Checks
that the protocol lacks (enum numbers nobody knows, storage names that break URIs) answer in plain
words; the registry checks the rest (`kvcm_ray.actors`).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from kvcm_ray.core import limits
from kvcm_ray.core.model import (
    CacheConfig,
    CachePreferStrategy,
    InstanceGroup,
    MetaIndexerConfig,
    ModelDeployment,
    StorageConfig,
)
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app import messages as m
from kvcm_ray.serve_app.protojson import plan, strip_optional

_URI_SYNTAX = set("@?&:/#= ")  #: what clients split URIs at; they decode nothing
_URI_SYNTAX_OF_PATHS = set("@?")


def missing(*groups: str) -> InvalidArgument:
    return InvalidArgument("missing or invalid fields: " + "".join(groups))


def require(rpc: str, request: Any, *fields: str) -> None:
    """Each field must be set (not None, not empty).

    Raises:
        InvalidArgument: naming the first that is not.
    """
    for name in fields:
        value = getattr(request, name)
        if value is None or (isinstance(value, str | tuple) and not value):
            raise missing(_group(rpc, [name]))


def require_blocks(rpc: str, request: m.BlocksRequest) -> None:
    """Keys or tokens, within the limits."""
    if not len(request.block_keys) and not len(request.token_ids):
        raise missing(_group(rpc, ["block_keys and token_ids"]))
    if len(request.block_keys) > limits.KEYS_PER_CALL_MAX:
        count = len(request.block_keys)
        raise InvalidArgument(f"{count} block_keys, at most {limits.KEYS_PER_CALL_MAX} are allowed")
    if len(request.token_ids) > limits.TOKENS_PER_CALL_MAX:
        count = len(request.token_ids)
        raise InvalidArgument(f"{count} token_ids, at most {limits.TOKENS_PER_CALL_MAX} are allowed")


def check_enums(message: Any) -> None:
    """Refuse enum numbers without a name, at any depth.

    Raises:
        InvalidArgument: naming the field and the number.
    """
    for field in plan(type(message)).fields:
        hint, _ = strip_optional(field.hint)
        value = getattr(message, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                check_enums(item)
            elif isinstance(hint, type) and issubclass(hint, enum.Enum) and item not in set(hint):
                raise InvalidArgument(f"{field.name} {item} is no {hint.__name__}")


# ------------------------------------------------------------------------------------ instances


def check_registration(request: m.RegisterInstanceRequest) -> None:
    rpc = "RegisterInstance"
    require(rpc, request, "instance_group", "instance_id", "location_spec_infos", "model_deployment")
    unnamed = [
        f"index {i}: " + _group("LocationSpecInfo", ["name"])
        for i, spec in enumerate(request.location_spec_infos)
        if not spec.name
    ]
    deployment = request.model_deployment or ModelDeployment()
    unnamed.append(_group("ModelDeployment", _empty(deployment, "model_name", "dtype")))
    if any(unnamed):
        raise missing(*unnamed)


# ------------------------------------------------------------------------------------- storages

_REQUIRED_IN_SPEC = {
    "threefs": ("ThreeFSStorageSpec", ("mountpoint", "root_dir")),
    "vcnsthreefs": (
        "VcnsThreeFSStorageSpec",
        ("mountpoint", "root_dir", "remote_host", "remote_port", "meta_storage_uri"),
    ),
    "mooncake": (
        "MooncakeStorageSpec",
        (
            "local_hostname",
            "metadata_connstring",
            "protocol",
            "rdma_device",
            "master_service_entry",
        ),
    ),
    "tair_mem_pool": ("TairMemPoolStorageSpec", ("domain",)),
    "nfs": ("NfsStorageSpec", ("root_path",)),
    "shm": ("ShmStorageSpec", ("root_path",)),
}
_REPORTED_AS = {"master_service_entry": "master_server_entry"}


def check_storage(config: StorageConfig) -> None:
    wrong = [] if config.global_unique_name else ["{global_unique_name}"]
    kind = next((k for k in _REQUIRED_IN_SPEC if getattr(config, k) is not None), "")
    if not kind:
        wrong.append("{storage_spec}")
    else:
        message, fields = _REQUIRED_IN_SPEC[kind]
        if kind == "mooncake" and config.mooncake and config.mooncake.protocol != "rdma":
            fields = tuple(f for f in fields if f != "rdma_device")
        wrong.append(_group(message, _empty(getattr(config, kind), *fields)))
    if any(wrong):
        raise missing("{StorageConfig: " + "".join(wrong) + "}")
    if bad := sorted(set(config.global_unique_name) & _URI_SYNTAX):
        name = config.global_unique_name
        raise InvalidArgument(f"global_unique_name {name!r}: location URIs cannot carry {bad[0]!r}")
    if bad := sorted(set(config.root_path) & _URI_SYNTAX_OF_PATHS):
        raise InvalidArgument(f"path {config.root_path!r}: location URIs cannot carry {bad[0]!r}")


# --------------------------------------------------------------------------------------- groups


def group_problems(group: InstanceGroup) -> str:
    """The text of what is missing in `group`, "" if nothing is.

    ``reclaim_strategy.storage_unique_name`` is not asked for: it has no effect, and groups without
    it exist, so what getInstanceGroup returns can be sent back.
    """
    fields = "".join(
        f"{{{name}}}" for name in _empty(group, "name", "storage_candidates", "global_quota_group_name")
    )
    if group.cache_config is None:
        fields += "{cache_config}"
    else:
        fields += _cache_problems(group.cache_config)
    return f"{{InstanceGroup: {fields}}}" if fields else ""


def _cache_problems(config: CacheConfig) -> str:
    unset = config.data_storage_strategy == CachePreferStrategy.CPS_UNSPECIFIED
    fields = "{cache_prefer_strategy}" if unset else ""
    indexer = config.meta_indexer_config or MetaIndexerConfig()
    backend, policy = indexer.meta_storage_backend_config, indexer.meta_cache_policy_config
    nested = ""
    if backend is None or not backend.storage_type:
        nested += _group("MetaStorageBackendConfig", ["storage_type"])
    if policy is None or not policy.type:
        nested += _group("MetaCachePolicyConfig", ["type"])
    if nested:
        fields += f"{{MetaIndexerConfig: {nested}}}"
    return f"{{CacheConfig: {fields}}}" if fields else ""


def check_group(group: InstanceGroup, stored: InstanceGroup | None = None) -> None:
    """Refuse an incomplete group, unless `stored` (the one it replaces) lacks the same fields."""
    problems = group_problems(group)
    if problems and (stored is None or problems != group_problems(stored)):
        raise missing(problems)
    check_enums(group)


def _empty(message: Any, *fields: str) -> list[str]:
    """Names of those fields that are empty, zero or unset, as the protocol reports them."""
    return [_REPORTED_AS.get(f, f) for f in fields if not getattr(message, f)]


def _group(message: str, fields: list[str]) -> str:
    return f"{{{message}: " + "".join(f"{{{f}}}" for f in fields) + "}" if fields else ""
