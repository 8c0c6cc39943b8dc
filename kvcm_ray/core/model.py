"""The nouns of kvcm-ray: storages, groups, instances, segments.

Field names and integer widths of everything that travels on the wire are those of the Tair KVCM
protocol, so the JSON codec (`kvcm_ray.serve_app.protojson`), the OpenAPI page and the registry's
records are all derived from these dataclasses and nothing is spelled twice. A width is given by the
aliases ``Int32``, ``Int64`` and ``Double``; a field with ``wire=False`` is ours and stays internal.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NewType, TypeVar, get_args, get_origin, get_type_hints

BlockKey = NewType("BlockKey", int)  #: signed 64-bit hash that chains over the block's prefix
InstanceId = NewType("InstanceId", str)
GroupName = NewType("GroupName", str)
StorageName = NewType("StorageName", str)
SessionId = NewType("SessionId", str)  #: 32 characters of [a-z0-9]

Int32 = Annotated[int, "int32"]
Int64 = Annotated[int, "int64"]
Double = Annotated[float, "double"]

T = TypeVar("T")


class StorageType(enum.IntEnum):
    """Kind of a location, numbered as on the wire."""

    ST_UNSPECIFIED = 0
    ST_3FS = 1
    ST_MOONCAKE = 2
    ST_TAIRMEMPOOL = 3
    ST_NFS = 4
    ST_VCNS_3FS = 5


class CachePreferStrategy(enum.IntEnum):
    """Which storage type new blocks go to."""

    CPS_UNSPECIFIED = 0
    CPS_ALWAYS_3FS = 1
    CPS_PREFER_3FS = 2
    CPS_ALWAYS_MOONCAKE = 3
    CPS_PREFER_MOONCAKE = 4
    CPS_ALWAYS_TAIR_MEMPOOL = 5
    CPS_PREFER_TAIR_MEMPOOL = 6
    CPS_ALWAYS_VCNS_3FS = 7
    CPS_PREFER_VCNS_3FS = 8


class ReclaimPolicy(enum.IntEnum):
    POLICY_UNSPECIFIED = 0
    POLICY_LRU = 1
    POLICY_LFU = 2
    POLICY_TTL = 3
    POLICY_ADAPTIVE = 100  #: ours: recency, boosted by a frequency that is learned


class AccountRole(enum.IntEnum):
    ROLE_USER = 0
    ROLE_ADMIN = 1


class Durability(enum.StrEnum):
    """When an acknowledged commit survives what (design D4)."""

    PROCESS = "process"  #: survives the death of any process; not power loss
    COMMIT = "commit"  #: fsync before every reply; survives power loss


# ------------------------------------------------------------------------------------ storages


@dataclass(frozen=True, slots=True)
class LocalSpec:
    """Accepted by the wire's parser only; no such backend exists."""


@dataclass(frozen=True, slots=True)
class ThreeFSSpec:
    cluster_name: str = ""
    mountpoint: str = ""
    root_dir: str = ""
    key_count_per_file: Int32 = 0
    touch_file_when_create: bool = False


@dataclass(frozen=True, slots=True)
class VcnsThreeFSSpec:
    cluster_name: str = ""
    mountpoint: str = ""
    root_dir: str = ""
    key_count_per_file: Int32 = 0
    touch_file_when_create: bool = False
    remote_host: str = ""
    remote_port: Int32 = 0
    meta_storage_uri: str = ""


@dataclass(frozen=True, slots=True)
class MooncakeSpec:
    local_hostname: str = ""
    metadata_connstring: str = ""
    protocol: str = ""
    rdma_device: str = ""
    master_service_entry: str = ""


@dataclass(frozen=True, slots=True)
class TairMemPoolSpec:
    domain: str = ""
    timeout: Int32 = 0
    enable_vipserver: bool = False


@dataclass(frozen=True, slots=True)
class NfsSpec:
    """Any POSIX directory. ``root_path`` must be absolute."""

    root_path: str = ""
    key_count_per_file: Int32 = 0


@dataclass(frozen=True, slots=True)
class ShmSpec:
    """Shared memory of the node: a directory on a tmpfs, normally below /dev/shm (our extension)."""

    root_path: str = ""


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """A backend and its parameters; exactly one of the spec fields is set."""

    global_unique_name: str = ""
    local: LocalSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    threefs: ThreeFSSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    mooncake: MooncakeSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    tair_mem_pool: TairMemPoolSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    nfs: NfsSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    vcnsthreefs: VcnsThreeFSSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    shm: ShmSpec | None = field(default=None, metadata={"oneof": "storage_spec"})
    check_storage_available_when_open: bool = False
    is_available: bool = field(default=True, metadata={"wire": False})  #: enabled by the operator
    is_draining: bool = field(default=False, metadata={"wire": False})  #: takes no blocks, gives them away

    @property
    def storage_type(self) -> StorageType:
        """The wire's type. Shared memory is a memory pool and counts as one in quotas."""
        if self.shm is not None or self.tair_mem_pool is not None:
            return StorageType.ST_TAIRMEMPOOL
        if self.nfs is not None:
            return StorageType.ST_NFS
        if self.threefs is not None:
            return StorageType.ST_3FS
        if self.vcnsthreefs is not None:
            return StorageType.ST_VCNS_3FS
        if self.mooncake is not None:
            return StorageType.ST_MOONCAKE
        return StorageType.ST_UNSPECIFIED

    @property
    def root_path(self) -> str:
        """Absolute directory of a path-based storage, without a trailing slash; "" if not one."""
        if self.nfs is not None:
            return _clean_path(self.nfs.root_path)
        if self.shm is not None:
            return _clean_path(self.shm.root_path)
        if self.threefs is not None:
            return _clean_path(f"{self.threefs.mountpoint}/{self.threefs.root_dir}")
        return ""

    @property
    def is_shared_memory(self) -> bool:
        return self.shm is not None


def _clean_path(path: str) -> str:
    return re.sub("/+", "/", path).rstrip("/")


# -------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True)
class QuotaConfig:
    storage_type: StorageType = StorageType.ST_UNSPECIFIED
    capacity: Int64 = 0  #: bytes


@dataclass(frozen=True, slots=True)
class InstanceGroupQuota:
    capacity: Int64 = 0  #: bytes over all storage types
    quota_config: tuple[QuotaConfig, ...] = ()  #: types without an entry are bounded by capacity only


@dataclass(frozen=True, slots=True)
class TriggerStrategy:
    used_size: Int64 = 0
    used_percentage: Double = 0.0  #: a fraction: 0.8 is 80 %


@dataclass(frozen=True, slots=True)
class CacheReclaimStrategy:
    storage_unique_name: str = ""
    reclaim_policy: ReclaimPolicy = ReclaimPolicy.POLICY_UNSPECIFIED
    trigger_strategy: TriggerStrategy | None = None
    trigger_period_seconds: Int32 = 0
    reclaim_step_size: Int32 = 0
    reclaim_step_percentage: Int32 = 0
    delay_before_delete_ms: Int32 = 0
    #: Ours. The fraction that reclaiming goes down to; 0 means 0.05 below the trigger.
    low_water_percentage: Double = field(default=0.0, metadata={"extension": True})
    #: Ours. Blocks that nobody touched for so long are dropped; 0 is "never" (POLICY_TTL: an hour).
    ttl_seconds: Int32 = field(default=0, metadata={"extension": True})


@dataclass(frozen=True, slots=True)
class MetaStorageBackendConfig:
    storage_type: str = ""
    storage_uri: str = ""


@dataclass(frozen=True, slots=True)
class MetaCachePolicyConfig:
    capacity: Int64 = 0
    type: str = ""
    cache_shard_bits: Int32 = 0
    high_pri_pool_ratio: Double = 0.0


@dataclass(frozen=True, slots=True)
class MetaIndexerConfig:
    max_key_count: Int64 = 0  #: blocks an instance may hold; 0 is "no limit" here
    mutex_shard_num: Int64 = 0  #: kept and returned; our index needs no lock shards
    batch_key_size: Int64 = 0  #: kept and returned
    meta_storage_backend_config: MetaStorageBackendConfig | None = None
    meta_cache_policy_config: MetaCachePolicyConfig | None = None


@dataclass(frozen=True, slots=True)
class CacheConfig:
    reclaim_strategy: CacheReclaimStrategy | None = None
    data_storage_strategy: CachePreferStrategy = CachePreferStrategy.CPS_UNSPECIFIED
    meta_indexer_config: MetaIndexerConfig | None = None


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """A team or model family: one quota, one list of storages, one actor."""

    name: str = ""
    storage_candidates: tuple[str, ...] = ()  #: in order of preference
    global_quota_group_name: str = ""
    max_instance_count: Int64 = 0  #: 0 is "no limit"
    quota: InstanceGroupQuota | None = None
    cache_config: CacheConfig | None = None
    user_data: str = ""
    version: Int64 = 0
    durability: Durability = field(default=Durability.PROCESS, metadata={"wire": False})

    @property
    def quota_bytes(self) -> int:
        return self.quota.capacity if self.quota else 0

    @property
    def delay_before_delete_ms(self) -> int:
        strategy = self.cache_config.reclaim_strategy if self.cache_config else None
        return strategy.delay_before_delete_ms if strategy else 0

    @property
    def max_key_count(self) -> int:
        config = self.cache_config.meta_indexer_config if self.cache_config else None
        return config.max_key_count if config else 0


# ----------------------------------------------------------------------------------- instances


@dataclass(frozen=True, slots=True)
class LocationSpecInfo:
    name: str = ""
    size: Int64 = 0  #: bytes of this part of one block


@dataclass(frozen=True, slots=True)
class LocationSpecGroup:
    name: str = ""
    spec_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelDeployment:
    model_name: str = ""
    dtype: str = ""
    use_mla: bool = False
    tp_size: Int32 = 0
    dp_size: Int32 = 0
    lora_name: str = ""
    pp_size: Int32 = 0
    extra: str = ""
    user_data: str = ""  #: not compared on re-registration


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """One model configuration in one group."""

    quota_group_name: str = ""
    instance_group_name: str = ""
    instance_id: str = ""
    block_size: Int32 = 0  #: tokens a block
    location_spec_infos: tuple[LocationSpecInfo, ...] = ()
    model_deployment: ModelDeployment | None = None
    location_spec_groups: tuple[LocationSpecGroup, ...] = ()
    #: Ours. Names the weights (and whatever else makes blocks of two instances differ).
    model_version: str = field(default="", metadata={"extension": True})
    #: Ours. Instance of the same group that this one replaces; that one retires.
    supersedes: str = field(default="", metadata={"extension": True})
    #: Ours. Time in which the share of the replaced instance goes from all to nothing; 0 is an hour.
    handover_seconds: Int32 = field(default=0, metadata={"extension": True})
    #: Unix time since which this instance retires, and how long that takes; 0 = it does not.
    retiring_since_s: int = field(default=0, metadata={"wire": False})
    retiring_seconds: int = field(default=0, metadata={"wire": False})
    #: Made at registration, so that an instance registered again under an old id shares neither
    #: paths nor headers with the removed one. 8 characters of [0-9a-f].
    uid: str = field(default="", metadata={"wire": False})

    @property
    def block_bytes(self) -> int:
        """Bytes of one block with all its specs."""
        return sum(spec.size for spec in self.location_spec_infos)

    def specs_of(self, spec_group: str) -> tuple[LocationSpecInfo, ...]:
        """Specs of a named spec group in instance order; all specs for "". KeyError if unknown."""
        if not spec_group:
            return self.location_spec_infos
        names = {g.name: set(g.spec_names) for g in self.location_spec_groups}[spec_group]
        return tuple(s for s in self.location_spec_infos if s.name in names)

    def same_shape(self, other: InstanceInfo) -> bool:
        """True if a re-registration with `other` is the same instance (order of groups is free)."""
        return self._shape() == other._shape()

    def difference(self, other: InstanceInfo) -> str:
        """The first part of the shape that `other` has differently, and both values; "" if none."""
        names = (
            "instance_id", "block_size", "location_spec_infos", "model_deployment", "location_spec_groups",
        )  # fmt: skip
        for name, own, theirs in zip(names, self._shape(), other._shape(), strict=True):
            if own == theirs:
                continue
            if name == "block_size":
                return f"{name} {own}, not {theirs}"
            if name == "model_deployment":
                plain, wanted = to_plain(own), to_plain(theirs)
                name = next(field for field in plain if plain[field] != wanted[field])
                return f"{name} {plain[name]!r}, not {wanted[name]!r}"
            return name
        return ""

    def _shape(self) -> tuple[Any, ...]:
        deployment = self.model_deployment or ModelDeployment()
        groups = frozenset((g.name, frozenset(g.spec_names)) for g in self.location_spec_groups)
        return (
            self.instance_id,
            self.block_size,
            self.location_spec_infos,
            dataclasses.replace(deployment, user_data=""),
            groups,
        )


@dataclass(frozen=True, slots=True)
class ReclaimerSettings:
    """The pool of reclaimers, for the whole manager; changed at run time."""

    reclaimers: Int32 = 2  #: actors, 1..64
    max_bytes_per_second: Int64 = 0  #: that the pool may copy or erase; 0 is "no limit"
    paused: bool = False  #: nothing is evicted, moved or erased


ALL_GROUPS = "*"  #: in place of an instance group's name


@dataclass(frozen=True, slots=True)
class Account:
    user_name: str = ""
    role: AccountRole = AccountRole.ROLE_USER
    password_hash: str = field(default="", metadata={"wire": False})  #: "" for none: tokens only
    instance_groups: tuple[str, ...] = field(default=(), metadata={"extension": True})  #: that a user sees


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a secret that stands for an account."""

    digest: str = field(default="", metadata={"wire": False})  #: SHA-256 of the secret in hexadecimal
    token_id: str = ""  #: the first characters of the digest; names the token, proves nothing
    user_name: str = ""
    label: str = ""  #: for people
    metrics_only: bool = False  #: reads the metrics and nothing else
    created_s: Int64 = 0  #: unix time
    expires_s: Int64 = 0  #: unix time; 0 for never


@dataclass(frozen=True, slots=True)
class AccessSettings:
    required: bool = False  #: calls need an account; kept with the data, so that a restart cannot open it


# ------------------------------------------------------------------------------------ segments


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of equal slots on one storage. One data file and one header file for each spec.

    Slot ``i`` of spec ``s`` is ``size`` bytes at offset ``i * size`` of ``<path>/<s>.dat`` (so the
    wire's ``offset = blkid * size`` holds) and its header is 64 bytes at ``i * 64`` of
    ``<path>/<s>.hdr``. A location ``(segment id, slot, generation)`` thereby names all its specs.
    """

    segment_id: int  #: unique within the instance, never reused
    storage: str
    path: str  #: relative to the storage's root
    specs: tuple[LocationSpecInfo, ...]
    slots: int

    @property
    def slot_bytes(self) -> int:
        """Payload bytes of one slot over all specs; what one block costs its quota."""
        return sum(spec.size for spec in self.specs)

    @property
    def tag(self) -> int:
        """Unsigned 64-bit identity written in every block header of this segment."""
        return int.from_bytes(hashlib.blake2b(self.path.encode(), digest_size=8).digest(), "little")


def segment_path(instance_id: str, uid: str, segment_id: int) -> str:
    """Directory of a segment, relative to its storage's root."""
    return f"{safe_name(instance_id)}/{uid}-{segment_id:06x}"


def safe_name(name: str) -> str:
    """`name` as a file or URI component: anything outside [A-Za-z0-9._-] becomes ``~XX``.

    Injective, so two names never share a directory. The wire does not percent-decode URIs.
    """
    encoded = "".join(
        chr(b) if chr(b).isascii() and (chr(b).isalnum() or chr(b) in "._-") else f"~{b:02X}"
        for b in name.encode()
    )
    return f"~{ord(encoded[0]):02X}{encoded[1:]}" if encoded.startswith(".") else encoded


# --------------------------------------------------------------------- plain dictionaries (disk)


def to_plain(value: Any) -> Any:
    """A dataclass tree as dicts, lists and scalars for msgpack; every field, unset ones included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, enum.IntEnum):
        return int(value)
    if isinstance(value, enum.StrEnum):
        return str(value)
    return value


def from_plain(cls: type[T], data: Mapping[str, Any]) -> T:
    """Inverse of `to_plain`; unknown keys are ignored and missing ones keep their defaults."""
    hints = get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: _from_plain(hints[k], v) for k, v in data.items() if k in names})


def _from_plain(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    args = get_args(hint)
    if get_origin(hint) is tuple:
        return tuple(_from_plain(args[0], v) for v in value)
    if args and type(None) in args:
        hint = next(a for a in args if a is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return value
