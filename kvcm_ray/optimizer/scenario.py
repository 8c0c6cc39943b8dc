"""What is to be simulated: storages, groups with their tiers and instances, and how fast engines write.

A scenario says what a manager's configuration says, plus what only the hardware knows: capacity,
bandwidth and latency of each storage. It comes from a file (`Scenario.from_file`), from the
configuration of live groups (`live_scenario`), or is put together in Python.

Files are YAML or JSON with the field names below. Sizes are numbers of bytes or texts such as
``64GiB``; ``quota_blocks`` and ``capacity_blocks`` may stand in for ``quota_bytes`` and
``capacity_bytes`` where all blocks of a group have one size. None is "no limit".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from kvcm_ray.core.eviction import POLICIES
from kvcm_ray.core.marks import policy_of, ttl_ms
from kvcm_ray.core.model import (
    CacheConfig,
    CachePreferStrategy,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    QuotaConfig,
    ReclaimPolicy,
    StorageConfig,
    StorageType,
    from_plain,
)
from kvcm_ray.core.placement import candidates
from kvcm_ray.core.quota import Quota, quota_type
from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.optimizer.accesses import I32, I64, Accesses

OTHERS = "*"  #: name of an instance that stands for all that no group names

T = TypeVar("T")


def _at_least(least: int, where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not least <= value < float("inf"):
            raise InvalidArgument(f"{where}: {name} must be a number of at least {least}, got {value}")


def _distinct(where: str, names: Any) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidArgument(f"{where}: {name!r} is there twice")
        seen.add(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A device. Groups that use it share its capacity, its bandwidth is each reader's own."""

    name: str
    kind: str = ""  #: only shown
    capacity_bytes: int | None = None  #: of all groups together
    read_bytes_per_s: float = 0  #: 0: not known; reading takes only the latency then
    write_bytes_per_s: float = 0  #: 0: not known
    latency_s: float = 0  #: of a read of some blocks at once
    price_gib_month: float = 0

    def __post_init__(self) -> None:
        _at_least(1, f"storage {self.name!r}", capacity_bytes=self.capacity_bytes)
        _at_least(
            0,
            f"storage {self.name!r}",
            read_bytes_per_s=self.read_bytes_per_s,
            write_bytes_per_s=self.write_bytes_per_s,
            latency_s=self.latency_s,
            price_gib_month=self.price_gib_month,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A group's part of a storage."""

    storage: str
    capacity_bytes: int | None = None

    def __post_init__(self) -> None:
        _at_least(1, f"tier {self.storage!r}", capacity_bytes=self.capacity_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance of the trace by its name there, or `OTHERS`."""

    name: str = OTHERS
    block_bytes: int

    def __post_init__(self) -> None:
        _at_least(1, f"instance {self.name!r}", block_bytes=self.block_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One quota, one policy, one list of tiers; a block is on one tier at a time."""

    name: str
    tiers: tuple[Tier, ...]  #: fastest first
    instances: tuple[Instance, ...]
    quota_bytes: int | None = None  #: over all tiers
    policy: str = "lru"
    ttl_s: float = 0  #: blocks that nobody touched for so long are dropped; 0 is "never"

    def __post_init__(self) -> None:
        where = f"group {self.name!r}"
        _at_least(1, where, quota_bytes=self.quota_bytes)
        _at_least(0, where, ttl_s=self.ttl_s)
        if self.policy not in POLICIES:
            raise InvalidArgument(f"{where}: no policy {self.policy!r}; there are {', '.join(POLICIES)}")
        for name, found in (("tiers", self.tiers), ("instances", self.instances)):
            if not found:
                raise InvalidArgument(f"{where}: {name} must have at least one")
        _distinct(f"{where}: tiers", (tier.storage for tier in self.tiers))

    @property
    def block_bytes_max(self) -> int:
        return max(instance.block_bytes for instance in self.instances)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteDelay:
    """When what a request misses becomes visible to others: so long after its look-up.

    Writes that a trace has of their own take effect at their time, whatever this says.
    """

    seconds: float = 0
    seconds_per_missed_token: float = 0  #: as long as its prefill takes

    def __post_init__(self) -> None:
        _at_least(
            0,
            "write_delay",
            seconds=self.seconds,
            seconds_per_missed_token=self.seconds_per_missed_token,
        )

    def __bool__(self) -> bool:
        return self.seconds > 0 or self.seconds_per_missed_token > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    storages: tuple[Storage, ...]
    groups: tuple[Group, ...]
    write_delay: WriteDelay = WriteDelay()
    partial_first: bool = False  #: policies are told which prompts fill their last block only partly

    def __post_init__(self) -> None:
        known = {storage.name: storage for storage in self.storages}
        for name, found in (("storages", self.storages), ("groups", self.groups)):
            if not found:
                raise InvalidArgument(f"{name} must have at least one")
            _distinct(name, (entry.name for entry in found))
        _distinct("instances of all groups", (i.name for g in self.groups for i in g.instances))
        for group in self.groups:
            for tier in group.tiers:
                if tier.storage not in known:
                    raise InvalidArgument(
                        f"group {group.name!r}: no storage {tier.storage!r}; there are {', '.join(known)}"
                    )
                bounds = group.quota_bytes, tier.capacity_bytes, known[tier.storage].capacity_bytes
                if min(b for b in (*bounds, group.block_bytes_max) if b is not None) < group.block_bytes_max:
                    raise InvalidArgument(
                        f"group {group.name!r}: a block of {group.block_bytes_max} bytes does not fit "
                        f"storage {tier.storage!r}, or the tier, or the quota"
                    )

    @staticmethod
    def from_file(path: str | Path) -> Scenario:
        """Read a ``.json`` file, or a YAML file of any other name.

        Raises:
            InvalidArgument: it cannot be read, or a key is unknown, missing or has a bad value.
            Unsupported: it is YAML and PyYAML is not installed.
        """
        file = Path(path)
        try:
            text = file.read_bytes()
        except OSError as error:
            raise InvalidArgument(f"cannot read the scenario {file}: {error}") from error
        try:
            return scenario_of(orjson.loads(text) if file.suffix == ".json" else _yaml(text))
        except orjson.JSONDecodeError as error:
            raise InvalidArgument(f"{file} is not JSON: {error}") from error
        except InvalidArgument as error:
            raise InvalidArgument(f"{file}: {error.message}") from error

    def number(self, accesses: Accesses) -> tuple[I32, I64]:
        """For each instance of the trace: the number of its group, and the bytes of its blocks.

        Raises:
            InvalidArgument: no group has an instance of the trace.
        """
        found = {i.name: (n, i.block_bytes) for n, g in enumerate(self.groups) for i in g.instances}
        missing = [n for n in accesses.instance_names if n not in found] if OTHERS not in found else []
        if missing:
            raise InvalidArgument(
                f"no group has instance {missing[0]!r} of the trace; name it, or have a group take {OTHERS!r}"
            )
        chosen = [found[name if name in found else OTHERS] for name in accesses.instance_names]
        return np.array([n for n, _ in chosen], np.int32), np.array([b for _, b in chosen], np.int64)


# -------------------------------------------------------------------------------------- reading


def scenario_of(data: Any) -> Scenario:
    """A scenario from plain dictionaries and lists, as a file has them.

    Raises:
        InvalidArgument: a key is unknown, missing or has a bad value; the message says which.
    """
    return _read(
        Scenario,
        data,
        "",
        storages=_each(lambda entry, where: _read(Storage, entry, where)),
        groups=_each(_group),
        write_delay=lambda entry, where: _read(WriteDelay, entry or {}, where),
    )


def _group(data: Any, where: str) -> Group:
    """A group; `block_bytes` of its own is short for one instance that stands for all others."""
    data = dict(_mapping(data, where))
    if "block_bytes" in data and "instances" not in data:
        data["instances"] = [{"block_bytes": data.pop("block_bytes")}]
    sizes = {_size(i["block_bytes"], where) for i in data.get("instances") or () if _has(i, "block_bytes")}
    _in_bytes(data, "quota", sizes, where)
    return _read(
        Group,
        data,
        where,
        tiers=_each(lambda entry, inner: _tier(entry, inner, sizes)),
        instances=_each(lambda entry, inner: _read(Instance, entry, inner)),
    )


def _tier(data: Any, where: str, sizes: set[int]) -> Tier:
    """A tier; the name of its storage alone is short for one without a capacity of its own."""
    data = {"storage": data} if isinstance(data, str) else dict(_mapping(data, where))
    _in_bytes(data, "capacity", sizes, where)
    return _read(Tier, data, where)


def _in_bytes(data: dict[str, Any], name: str, sizes: set[int], where: str) -> None:
    blocks = data.pop(f"{name}_blocks", None)
    if blocks is None:
        return
    if f"{name}_bytes" in data:
        raise InvalidArgument(f"{where}: give {name}_bytes or {name}_blocks, not both")
    if len(sizes) != 1:
        raise InvalidArgument(f"{where}.{name}_blocks: the blocks of the group must have one size")
    data[f"{name}_bytes"] = _size(blocks, f"{where}.{name}_blocks") * next(iter(sizes))


def _has(data: Any, name: str) -> bool:
    return isinstance(data, Mapping) and name in data


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise InvalidArgument(f"{where or 'a scenario'} must be a mapping, not {type(data).__name__}")
    return data


def _each(read: Callable[[Any, str], T]) -> Callable[[Any, str], tuple[T, ...]]:
    def read_all(data: Any, where: str) -> tuple[T, ...]:
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise InvalidArgument(f"{where} must be a list, not {type(data).__name__}")
        return tuple(read(entry, f"{where}[{n}]") for n, entry in enumerate(data))

    return read_all


def _read(cls: type[T], data: Any, where: str, **readers: Callable[[Any, str], Any]) -> T:
    """A dataclass from its fields; those without a reader of their own are read by their type."""
    data = _mapping(data, where)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidArgument(
                f"{_at(where, str(name))}: no such key; {meant}there are {', '.join(known)}"
            )
    for name, field in known.items():
        if name not in data and field.default is MISSING:
            raise InvalidArgument(f"{_at(where, name)} is missing")
    readers = {
        name: _PLAIN[str(field.type)] for name, field in known.items() if name not in readers
    } | readers
    return cls(**{name: readers[name](value, _at(where, name)) for name, value in data.items()})


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)}


def _size(value: Any, where: str) -> int:
    return round(_number(value, where))


def _number(value: Any, where: str) -> float:
    """A number, or a text such as 64GiB or 20GB/s. (YAML reads 1e-4 as a text.)"""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    found = re.fullmatch(r"([-+0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)(?:/s)?", str(value).strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    try:
        if found is None or unit is None:
            raise ValueError
        return float(found[1]) * unit
    except ValueError:
        raise InvalidArgument(f"{where}: {value!r} is not a number; write 4096, 64MiB or 20GB/s") from None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{where} must be a text, not {value!r}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{where} must be true or false, not {value!r}")
    return value


_PLAIN: dict[str, Callable[[Any, str], Any]] = {
    "str": _text,
    "int": _size,
    "int | None": lambda value, where: None if value is None else _size(value, where),
    "float": _number,
    "bool": _flag,
}


def _yaml(text: bytes) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise Unsupported(
            "scenarios in YAML need PyYAML, which is not installed",
            hint="pip install pyyaml, or write the scenario as a .json file.",
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgument(f"not YAML: {error}") from error


# ---------------------------------------------------------------------------------- live groups


def live_scenario(
    groups: Sequence[Mapping[str, Any]],
    storages: Sequence[Mapping[str, Any]],
    instances: Sequence[Mapping[str, Any]],
    *,
    devices: Mapping[str, Storage] | None = None,
) -> Scenario:
    """What live groups are configured to be, from the JSON of the HTTP API.

    The storages of one type are one tier, as in a live group, under the name of the first one. If one
    group is given and its blocks have one size, it takes all instances of a trace.

    Args:
        groups: ``instance_group`` as getInstanceGroup answers.
        storages: ``storage`` of listStorage.
        instances: ``instance_info`` of listInstanceInfo.
        devices: capacity, bandwidth and latency of storages by name, which no manager knows.

    Raises:
        InvalidArgument: a group has no instances.
        NoStorageAvailable: no storage takes blocks of a group.
    """
    known = {str(data["global_unique_name"]): from_plain(StorageConfig, data) for data in storages}
    made = [_live_group(data, known, instances, alone=len(groups) == 1) for data in groups]
    used = dict.fromkeys(tier.storage for group in made for tier in group.tiers)
    kinds = {name: known[name].storage_type.name.removeprefix("ST_").lower() for name in used}
    given = devices or {}
    return Scenario(
        storages=tuple(given.get(name, Storage(name=name, kind=kinds[name])) for name in used),
        groups=tuple(made),
    )


def _live_group(
    data: Mapping[str, Any],
    storages: Mapping[str, StorageConfig],
    instances: Sequence[Mapping[str, Any]],
    *,
    alone: bool,
) -> Group:
    group = _configured(data)
    sizes = {
        str(instance["instance_id"]): sum(int(spec["size"]) for spec in instance["location_spec_infos"])
        for instance in instances
        if instance["instance_group_name"] == group.name
    }
    if not sizes:
        raise InvalidArgument(
            f"group {group.name!r} has no instances, which would say how large blocks are",
            hint="Register one, or write a scenario.",
        )
    if alone and len(set(sizes.values())) == 1:
        sizes = {OTHERS: next(iter(sizes.values()))}
    tiers: dict[StorageType, Tier] = {}
    capacities = Quota(group).capacities
    for storage in candidates(group, storages):
        kind = quota_type(storage.storage_type)
        tier = Tier(storage=storage.global_unique_name, capacity_bytes=capacities.get(kind))
        tiers.setdefault(kind, tier)
    return Group(
        name=group.name,
        tiers=tuple(tiers.values()),
        instances=tuple(Instance(name=name, block_bytes=size) for name, size in sizes.items()),
        quota_bytes=group.quota_bytes,
        policy=policy_of(group),
        ttl_s=ttl_ms(group) / 1000,
    )


def _configured(data: Mapping[str, Any]) -> InstanceGroup:
    """What matters here of a group in the API's JSON: numbers may be texts, enums are names."""
    quota, cache = data.get("quota") or {}, data.get("cache_config") or {}
    strategy = cache.get("reclaim_strategy") or {}
    entries = tuple(
        QuotaConfig(StorageType[str(entry["storage_type"])], int(entry["capacity"]))
        for entry in quota.get("quota_config") or ()
    )
    return InstanceGroup(
        name=str(data["name"]),
        storage_candidates=tuple(data.get("storage_candidates") or ()),
        quota=InstanceGroupQuota(int(quota.get("capacity") or 0), entries),
        cache_config=CacheConfig(
            reclaim_strategy=CacheReclaimStrategy(
                reclaim_policy=ReclaimPolicy[strategy.get("reclaim_policy", "POLICY_UNSPECIFIED")],
                ttl_seconds=int(strategy.get("ttl_seconds") or 0),
            ),
            data_storage_strategy=CachePreferStrategy[cache.get("data_storage_strategy", "CPS_UNSPECIFIED")],
        ),
    )
