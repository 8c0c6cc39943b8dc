"""What `TransferClient.Create` is given: checked, defaults filled in, storages opened.

Every failure is a `ClientError` with the code that the contract names for it. Keys that nobody knows are
ignored, because connectors write more of them than they need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcm_ray.connectors.py_client.types import ClientError, ClientErrorCode, InitParams, RoleType
from kvcm_ray.core.model import NfsSpec, ShmSpec, StorageConfig, ThreeFSSpec
from kvcm_ray.errors import KvcmError
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

_SHM = "/dev/shm/"
_BY_DEFAULT = frozenset({"file", "hf3fs", "vcns_hf3fs", "pace"})  #: need no entry in sdk_backend_configs
_KNOWN = _BY_DEFAULT | {"mooncake"}


@dataclass(frozen=True, slots=True)
class Backend:
    """One storage of ``storage_configs``."""

    config: StorageConfig
    adapter: StorageAdapter

    @property
    def may_hang(self) -> bool:
        return not self.config.is_shared_memory


@dataclass(frozen=True, slots=True)
class Settings:
    spec_name: str
    spec_size: int  #: bytes of this process's part of one block
    threads: int
    queue_size: int
    get_timeout_s: float
    put_timeout_s: float
    backends: Mapping[str, Backend]  #: by the name that URIs have as their host


def parse(config_json: str, init: InitParams) -> Settings:
    """Raises ClientError."""
    role = init.role_type.value if isinstance(init.role_type, RoleType) else 0
    if not role & RoleType.WORKER.value:
        raise ClientError(ClientErrorCode.ER_SKIPINIT, f"{init.role_type} moves no blocks")
    name = init.self_location_spec_name
    if not isinstance(name, str) or not name:
        raise ClientError(ClientErrorCode.ER_INVALID_PARAMS, "self_location_spec_name is empty")
    config = _config(config_json)
    specs = _specs(config)
    _require(name in specs, f"location_spec_infos has no {name!r}, only {', '.join(specs)}")
    sdk = config.get("sdk_config")
    _require(isinstance(sdk, dict), "sdk_config is missing")
    assert isinstance(sdk, dict)
    limits = _sdk(sdk)
    return Settings(name, specs[name], *limits, _backends(init.storage_configs, _configured(sdk)))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ClientError(ClientErrorCode.ER_INVALID_CLIENT_CONFIG, message)


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ClientError(
            ClientErrorCode.ER_INVALID_CLIENT_CONFIG, f"the config is no JSON: {error}"
        ) from error
    _require(isinstance(config, dict), "the config is no JSON object")
    for name in ("instance_group", "instance_id"):
        _require(isinstance(config.get(name), str) and config[name] != "", f"{name} must be a name")
    _require(_number(config.get("block_size")), "block_size must be 1 or more")
    return dict(config)


def _specs(config: Mapping[str, Any]) -> dict[str, int]:
    specs = config.get("location_spec_infos")
    _require(isinstance(specs, dict) and bool(specs), "location_spec_infos must name at least one spec")
    assert isinstance(specs, dict)
    for name, size in specs.items():
        _require(_number(size), f"location_spec_infos: {name} must have 1 byte or more, got {size!r}")
    groups = config.get("location_spec_groups") or {}
    _require(isinstance(groups, dict), "location_spec_groups must be an object")
    for group, names in groups.items():
        good = isinstance(names, list) and all(isinstance(name, str) and name in specs for name in names)
        _require(good, f"location_spec_groups: {group} must name specs of location_spec_infos")
    return specs


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _sdk(sdk: Mapping[str, Any]) -> tuple[int, int, float, float]:
    """Threads, queue size, seconds for a get and for a put."""
    timeouts = sdk.get("timeout_config", {})
    if not isinstance(timeouts, dict):
        raise _bad_sdk("timeout_config must be an object")
    given = {
        "thread_num": sdk.get("thread_num", 8),
        "queue_size": sdk.get("queue_size", 2000),
        "get_timeout_ms": timeouts.get("get_timeout_ms", 2000),
        "put_timeout_ms": timeouts.get("put_timeout_ms", 2000),
    }
    for name, value in given.items():
        if not _number(value):
            raise _bad_sdk(f"{name} must be 1 or more, got {value!r}")
    threads, queue, get_ms, put_ms = given.values()
    return threads, queue, get_ms / 1000, put_ms / 1000


def _configured(sdk: Mapping[str, Any]) -> frozenset[str]:
    """The storage types that have backend settings, those by default included."""
    entries = sdk.get("sdk_backend_configs", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _bad_sdk("sdk_backend_configs must be a list of objects")
    return _BY_DEFAULT | {entry["type"] for entry in entries if entry.get("type") in _KNOWN}


def _bad_sdk(message: str) -> ClientError:
    return ClientError(ClientErrorCode.ER_INVALID_SDKWRAPPER_CONFIG, f"sdk_config: {message}")


def _backends(text: str, configured: frozenset[str]) -> dict[str, Backend]:
    try:
        entries = json.loads(text)
        if not isinstance(entries, list) or not entries:
            raise ValueError("not a JSON array with at least one storage")
        found = [(entry["type"], entry["global_unique_name"], entry["storage_spec"]) for entry in entries]
    except (TypeError, ValueError, KeyError) as error:
        raise ClientError(ClientErrorCode.ER_INVALID_STORAGE_CONFIG, f"storage_configs: {error!r}") from error
    for kind, name, _ in found:
        if kind not in configured:
            text = f"storage {name!r}: no backend settings for the type {kind!r}"
            raise ClientError(ClientErrorCode.ER_INVALID_SDKBACKEND_CONFIG, text)
    return {name: _open(kind, name, spec) for kind, name, spec in found}


def _open(kind: str, name: str, spec: Any) -> Backend:
    try:
        config = _storage(kind, name, dict(spec))
        return Backend(config, open_storage(config))
    except (KvcmError, TypeError, ValueError, KeyError) as error:
        text = f"storage {name!r} of type {kind!r} cannot be opened: {error}"
        raise ClientError(ClientErrorCode.ER_CREATESDK_ERROR, text) from error


def _storage(kind: str, name: str, spec: Mapping[str, Any]) -> StorageConfig:
    """As our adapters want it. Shared memory is told to plain clients as files; it is mapped, not read."""
    if kind == "file":
        root = str(spec["root_path"])
        if root.startswith(_SHM):
            return StorageConfig(name, shm=ShmSpec(root))
        return StorageConfig(name, nfs=NfsSpec(root))
    if kind in ("hf3fs", "vcns_hf3fs"):  # mounted, it is a directory like any other
        mounted = ThreeFSSpec(mountpoint=str(spec["mountpoint"]), root_dir=str(spec["root_dir"]))
        return StorageConfig(name, threefs=mounted)
    raise ValueError("this client has no adapter for it")
