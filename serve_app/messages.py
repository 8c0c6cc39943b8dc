"""Requests and responses of the meta API, and what both APIs share.

Field names, order and integer widths are the protocol's; the codec (`protojson`) and the OpenAPI
page (`openapi`) are derived from these classes. Fields that the protocol lacks say "additive". The
admin API's messages are in `admin_messages`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.core.mask import BlockMask as CoreMask
from kvcm_ray.core.model import (
    InstanceInfo,
    Int32,
    Int64,
    LocationSpecGroup,
    LocationSpecInfo,
    ModelDeployment,
    StorageType,
)
from kvcm_ray.serve_app.protojson import Int64Array


class ErrorCode(enum.IntEnum):
    UNSPECIFIED = 0
    OK = 1
    UNSUPPORTED = 2
    INTERNAL_ERROR = 3
    SERVICE_NOT_READY = 4
    INVALID_ARGUMENT = 5
    DUPLICATE_ENTITY = 6
    REACH_MAX_ENTITY_CAPACITY = 7
    INSTANCE_NOT_EXIST = 8
    SERVER_NOT_LEADER = 9
    IO_ERROR = 20
    UNKNOWN_ERROR = 100
    ERROR_MAX = 65535


class QueryType(enum.IntEnum):
    QT_UNSPECIFIED = 0
    QT_BATCH_GET = 1
    QT_PREFIX_MATCH = 2
    QT_REVERSE_ROLL_SW_MATCH = 3


class TrimStrategy(enum.IntEnum):
    TS_UNSPECIFIED = 0
    TS_REMOVE_ALL_CACHE = 1
    TS_REMOVE_ALL_META = 2
    TS_TIMESTAMP = 3


# -------------------------------------------------------------------------------------- headers


@dataclass(frozen=True, slots=True)
class Status:
    code: ErrorCode = ErrorCode.UNSPECIFIED
    message: str = ""


@dataclass(frozen=True, slots=True)
class MetaHeader:
    status: Status | None = None
    request_id: str = ""  #: <trace_id>_<microseconds>
    tracer_result: str = ""


@dataclass(frozen=True, slots=True)
class AdminHeader:
    status: Status | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    trace_id: str = ""  #: any text; echoed in request_id


@dataclass(frozen=True, slots=True)
class MetaResponse:
    """Also the answer of the calls that have nothing but a header."""

    header: MetaHeader | None = None


# ------------------------------------------------------------------------------- shared objects


@dataclass(frozen=True, slots=True)
class BoolMasks:
    values: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockMask:
    """On reads: true = skip this key. In finishWriteCache: true = this new block was written."""

    offset: Int32 | None = field(default=None, metadata={"oneof": "info"})
    bool_masks: BoolMasks | None = field(default=None, metadata={"oneof": "info"})

    def to_core(self) -> CoreMask:
        return CoreMask(self.offset, None if self.bool_masks is None else self.bool_masks.values)

    @staticmethod
    def from_core(mask: CoreMask) -> BlockMask:
        if mask.offset is not None:
            return BlockMask(offset=mask.offset)
        return BlockMask(bool_masks=BoolMasks(mask.values or ()))


@dataclass(frozen=True, slots=True)
class LocationSpec:
    name: str = ""
    uri: str = ""  #: "" in placeholders


@dataclass(frozen=True, slots=True)
class CacheLocation:
    type: StorageType = StorageType.ST_UNSPECIFIED
    spec_size: Int32 = 0
    location_specs: tuple[LocationSpec, ...] = ()


def _no_numbers() -> Int64Array:
    return np.zeros(0, np.int64)


# ------------------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class RegisterInstanceRequest(Request):
    instance_group: str = ""
    instance_id: str = ""
    block_size: Int32 = 0  #: tokens a block
    location_spec_infos: tuple[LocationSpecInfo, ...] = ()
    model_deployment: ModelDeployment | None = None
    location_spec_groups: tuple[LocationSpecGroup, ...] = ()
    model_version: str = ""  #: additive, as are the next two
    supersedes: str = ""  #: instance of the same group that this one replaces
    handover_seconds: Int32 = 0  #: time in which that one gives up its share; 0 = an hour


@dataclass(frozen=True, slots=True)
class RegisterInstanceResponse(MetaResponse):
    storage_configs: str = ""  #: JSON text: an array of the group's storages, ordered by name


@dataclass(frozen=True, slots=True)
class GetInstanceInfoRequest(Request):
    instance_id: str = ""


@dataclass(frozen=True, slots=True)
class GetInstanceInfoResponse(MetaResponse):
    instance_group: str = ""
    instance_info: InstanceInfo | None = None


@dataclass(frozen=True, slots=True)
class BlocksRequest(Request):
    """A request about blocks: by keys, or by tokens that are hashed here."""

    instance_id: str = ""
    block_keys: Int64Array = field(default_factory=_no_numbers)
    token_ids: Int64Array = field(default_factory=_no_numbers)


@dataclass(frozen=True, slots=True)
class GetCacheLocationRequest(BlocksRequest):
    query_type: QueryType = QueryType.QT_UNSPECIFIED
    block_mask: BlockMask | None = None  #: honoured by QT_PREFIX_MATCH only
    sw_size: Int32 = 0
    location_spec_names: tuple[str, ...] = ()  #: keep only these specs; empty = all


@dataclass(frozen=True, slots=True)
class GetCacheLocationResponse(MetaResponse):
    locations: tuple[CacheLocation, ...] = ()


@dataclass(frozen=True, slots=True)
class LookUp:
    """A look-up that a reader made by itself, as it would have asked getCacheLocation (additive).

    QT_PREFIX_MATCH (also for unset): the prompt's keys are `held_keys`, `block_keys`, `missed_keys`, in
    this order. The other queries: `block_keys` were found among `asked_blocks`.
    """

    query_type: QueryType = QueryType.QT_UNSPECIFIED
    block_keys: Int64Array = field(default_factory=_no_numbers)  #: that were found, in order
    missed_keys: Int64Array = field(default_factory=_no_numbers)  #: that were asked for behind them
    held_keys: Int64Array = field(default_factory=_no_numbers)  #: the reader's own, before them
    asked_blocks: Int32 = 0
    time_us: Int64 = 0  #: unix time of the look-up in microseconds; 0 = now


@dataclass(frozen=True, slots=True)
class TouchCacheRequest(Request):
    """Report look-ups, so that they count as hits and keep blocks from being evicted (additive)."""

    instance_id: str = ""
    look_ups: tuple[LookUp, ...] = ()  #: in the order they were made


@dataclass(frozen=True, slots=True)
class GetCacheMetaRequest(BlocksRequest):
    block_mask: BlockMask | None = None
    detail_level: Int32 = 0  #: 2 and above add written_s to each meta (additive)


@dataclass(frozen=True, slots=True)
class GetCacheMetaResponse(MetaResponse):
    locations: tuple[CacheLocation, ...] = ()
    metas: tuple[str, ...] = ()  #: JSON texts, one for each location


@dataclass(frozen=True, slots=True)
class StartWriteCacheRequest(BlocksRequest):
    location_spec_group_names: tuple[str, ...] = ()  #: empty, or one for each block
    write_timeout_seconds: Int32 = 0  #: 0 or less: 30 s
    partial_tail: bool = False  #: additive: the last block is one that the prompt fills only partly


@dataclass(frozen=True, slots=True)
class StartWriteCacheResponse(MetaResponse):
    write_session_id: str = ""
    block_mask: BlockMask | None = None  #: which blocks exist already
    locations: tuple[CacheLocation, ...] = ()  #: one for each block to be written


@dataclass(frozen=True, slots=True)
class FinishWriteCacheRequest(Request):
    instance_id: str = ""
    write_session_id: str = ""
    success_blocks: BlockMask | None = None  #: over the NEW blocks of the session
    locations: tuple[CacheLocation, ...] = ()  #: ignored


@dataclass(frozen=True, slots=True)
class RemoveCacheRequest(BlocksRequest):
    block_mask: BlockMask | None = None


@dataclass(frozen=True, slots=True)
class LeaseCacheRequest(BlocksRequest):
    """Keep blocks that are there from being evicted for a while (additive)."""

    lease_ms: Int32 = 0  #: from now on


@dataclass(frozen=True, slots=True)
class LeaseCacheResponse(MetaResponse):
    blocks: Int32 = 0  #: of the request, that are there and stay
    lease_ms: Int32 = 0  #: granted


@dataclass(frozen=True, slots=True)
class PinCacheRequest(BlocksRequest):
    """Never evict these blocks, those that come later included (additive)."""

    name: str = ""  #: pinning under a name that exists replaces what it pinned
    until_s: Int64 = 0  #: unix seconds; 0 = until unpinned


@dataclass(frozen=True, slots=True)
class UnpinCacheRequest(Request):
    instance_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class PinCacheResponse(MetaResponse):
    keys: Int32 = 0  #: that the pin names
    blocks: Int32 = 0  #: of them that are there


@dataclass(frozen=True, slots=True)
class TrimCacheRequest(Request):
    instance_id: str = ""
    strategy: TrimStrategy = TrimStrategy.TS_UNSPECIFIED
    begin_timestamp: Int32 = 0  #: TS_TIMESTAMP: unix seconds, inclusive
    end_timestamp: Int32 = 0  #: TS_TIMESTAMP: unix seconds, inclusive; 0 = no bound
