"""Requests and responses of the admin API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvcm_ray.core.model import (
    Account,
    AccountRole,
    Double,
    InstanceGroup,
    InstanceInfo,
    Int32,
    Int64,
    StorageConfig,
    Token,
)
from kvcm_ray.serve_app.messages import AdminHeader, Request


@dataclass(frozen=True, slots=True)
class CommonResponse:
    header: AdminHeader | None = None


# ------------------------------------------------------------------------------------- storages


@dataclass(frozen=True, slots=True)
class AddStorageRequest(Request):
    storage: StorageConfig | None = None


@dataclass(frozen=True, slots=True)
class UpdateStorageRequest(Request):
    storage: StorageConfig | None = None
    force_update: bool = False  #: change it although blocks or groups use it


@dataclass(frozen=True, slots=True)
class StorageNameRequest(Request):
    storage_unique_name: str = ""


@dataclass(frozen=True, slots=True)
class RemoveStorageRequest(StorageNameRequest):
    force: bool = False  #: additive: remove it although groups list it


@dataclass(frozen=True, slots=True)
class DrainStorageRequest(StorageNameRequest):
    """Let a storage's blocks move elsewhere or expire (additive)."""

    draining: bool = False  #: false ends it: blocks go there again


@dataclass(frozen=True, slots=True)
class StorageState:
    global_unique_name: str = ""
    is_available: bool = False  #: false: disabled
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class ListStorageResponse(CommonResponse):
    storage: tuple[StorageConfig, ...] = ()
    #: additive: those that are disabled or draining
    storage_state: tuple[StorageState, ...] = field(default=(), metadata={"extension": True})


# --------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True)
class CreateInstanceGroupRequest(Request):
    instance_group: InstanceGroup | None = None


@dataclass(frozen=True, slots=True)
class UpdateInstanceGroupRequest(Request):
    instance_group: InstanceGroup | None = None
    current_version: Int64 = 0  #: the version that this update replaces


@dataclass(frozen=True, slots=True)
class GroupNameRequest(Request):
    name: str = ""


@dataclass(frozen=True, slots=True)
class RemoveInstanceGroupRequest(GroupNameRequest):
    force: bool = False  #: additive: remove its instances, and their blocks, too


@dataclass(frozen=True, slots=True)
class GetInstanceGroupResponse(CommonResponse):
    instance_group: InstanceGroup | None = None


@dataclass(frozen=True, slots=True)
class ListInstanceGroupResponse(CommonResponse):
    instance_group: tuple[InstanceGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class GetCapacityRequest(Request):
    instance_group: str = ""


@dataclass(frozen=True, slots=True)
class GetCapacityResponse(CommonResponse):
    """What holds a group's quota, and for how long it lasts (additive)."""

    capacity: dict[str, Any] | None = None  #: numbers here are JSON numbers


@dataclass(frozen=True, slots=True)
class GetAdviceRequest(Request):
    """What other quotas would be worth to a group (additive)."""

    instance_group: str = ""
    factors: tuple[Double, ...] = ()  #: multiples of the quota; 0.5, 1, 2 and 4 by default


@dataclass(frozen=True, slots=True)
class GetAdviceResponse(CommonResponse):
    advice: dict[str, Any] | None = None  #: numbers here are JSON numbers


@dataclass(frozen=True, slots=True)
class StartRecordingRequest(Request):
    """Write what a group is asked for into a trace file (additive)."""

    instance_group: str = ""
    instance_id: str = ""  #: only of this instance; "": of all
    seconds: Double = 0.0  #: 0: until stopRecording
    max_bytes: Int64 = 0  #: of the file; 0: 1 GiB
    sample_rate: Double | None = None  #: of the blocks; all by default


@dataclass(frozen=True, slots=True)
class RecordingResponse(CommonResponse):
    """The recording that was begun or ended; its `file` is on the group's node (additive)."""

    recording: dict[str, Any] | None = None  #: numbers here are JSON numbers


@dataclass(frozen=True, slots=True)
class RecordingsRequest(Request):
    """stopRecording, listRecordings (additive)."""

    instance_group: str = ""  #: for the list, "": of all groups


@dataclass(frozen=True, slots=True)
class ListRecordingsResponse(CommonResponse):
    recordings: tuple[dict[str, Any], ...] = ()


# ------------------------------------------------------------------------------------ instances


@dataclass(frozen=True, slots=True)
class RollbackInstanceRequest(Request):
    """End a model upgrade: the superseded instance serves on, this one retires (additive)."""

    instance_id: str = ""  #: the successor


@dataclass(frozen=True, slots=True)
class RemoveInstanceRequest(Request):
    instance_group: str = ""  #: ignored
    instance_id: str = ""


@dataclass(frozen=True, slots=True)
class ListInstanceInfoRequest(Request):
    instance_group_name: str = ""  #: "" lists the instances of all groups


@dataclass(frozen=True, slots=True)
class ListInstanceInfoResponse(CommonResponse):
    instance_info: tuple[InstanceInfo, ...] = ()


# ------------------------------------------------------------------------------------- accounts


@dataclass(frozen=True, slots=True)
class AddAccountRequest(Request):
    user_name: str = ""
    password: str = ""  #: empty: the account has tokens only
    role: AccountRole = AccountRole.ROLE_USER
    instance_groups: tuple[str, ...] = ()  #: additive: those that exist for a user; "*" for all


@dataclass(frozen=True, slots=True)
class UpdateAccountRequest(Request):
    """What is not set stays (additive)."""

    user_name: str = ""
    password: str = ""
    role: AccountRole | None = None
    instance_groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeleteAccountRequest(Request):
    user_name: str = ""


@dataclass(frozen=True, slots=True)
class ListAccountResponse(CommonResponse):
    accounts: tuple[Account, ...] = ()


@dataclass(frozen=True, slots=True)
class CreateTokenRequest(Request):
    """A secret that stands for an account (additive)."""

    user_name: str = ""
    label: str = ""  #: for people
    lifetime_s: Int64 = 0  #: seconds; 0: 90 days
    no_expiry: bool = False
    metrics_only: bool = False  #: it reads /metrics and nothing else


@dataclass(frozen=True, slots=True)
class CreateTokenResponse(CommonResponse):
    secret: str = ""  #: shown this once; only a hash of it is kept
    token: Token | None = None


@dataclass(frozen=True, slots=True)
class RevokeTokenRequest(Request):
    token_id: str = ""


@dataclass(frozen=True, slots=True)
class ListTokenResponse(CommonResponse):
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class ListAuditRequest(Request):
    """The last entries of the audit log (additive)."""

    limit: Int32 = 0  #: 0: 100


@dataclass(frozen=True, slots=True)
class ListAuditResponse(CommonResponse):
    entries: tuple[dict[str, Any], ...] = ()  #: oldest first; numbers here are JSON numbers


# ---------------------------------------------------------------------------- the manager itself


@dataclass(frozen=True, slots=True)
class UpdateReclaimerRequest(Request):
    """What is not set stays (additive)."""

    reclaimers: Int32 | None = None  #: actors in the pool
    max_bytes_per_second: Int64 | None = None  #: that the pool may copy or erase; 0 = no limit
    paused: bool | None = None  #: nothing is evicted, moved or erased


@dataclass(frozen=True, slots=True)
class ReclaimerResponse(CommonResponse):
    reclaimers: Int32 = 0
    max_bytes_per_second: Int64 = 0
    paused: bool = False


@dataclass(frozen=True, slots=True)
class ConfigSnapShotResponse(CommonResponse):
    config_snapshot: str = ""  #: JSON text


@dataclass(frozen=True, slots=True)
class LoadConfigSnapshotRequest(Request):
    config_snapshot: str = ""


@dataclass(frozen=True, slots=True)
class MetricValue:
    int_value: Int64 | None = field(default=None, metadata={"oneof": "value"})
    float_value: Double | None = field(default=None, metadata={"oneof": "value"})
    string_value: str | None = field(default=None, metadata={"oneof": "value"})


@dataclass(frozen=True, slots=True)
class MetricTag:
    tag_key: str = ""
    tag_value: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    metric_name: str = ""
    metric_value: MetricValue | None = None
    metric_tags: tuple[MetricTag, ...] = ()


@dataclass(frozen=True, slots=True)
class GetMetricsResponse(CommonResponse):
    timestamp: Int64 = 0  #: unix milliseconds
    metrics: tuple[Metric, ...] = ()
    extra_data: str = ""


@dataclass(frozen=True, slots=True)
class CheckHealthResponse(CommonResponse):
    is_leader: bool = False
    is_health: bool = False
    elector_last_loop_time_ms: Int64 = 0


@dataclass(frozen=True, slots=True)
class GetManagerClusterInfoResponse(CommonResponse):
    info_updated_time: Int64 = 0
    self_leader_expiration_time: Int64 = 0
    self_node_id: str = ""
    leader_node_id: str = ""


@dataclass(frozen=True, slots=True)
class GetLeaderElectorConfigResponse(CommonResponse):
    campaign_delay_time_ms: Int64 = 0


@dataclass(frozen=True, slots=True)
class UpdateLeaderElectorConfigRequest(Request):
    campaign_delay_time_ms: Int64 = 0


@dataclass(frozen=True, slots=True)
class UpdateLoggerRequest(Request):
    log_level: str = ""
    module_name: str = ""
