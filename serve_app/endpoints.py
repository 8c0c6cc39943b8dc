"""Every call of the HTTP interface, as one table.

A path that the protocol serves on both of its ports (registerInstance, getInstanceInfo,
getCacheMeta, removeCache) exists once here, as the meta API has it.
"""

from __future__ import annotations

from typing import Any

from kvcm_ray.serve_app import admin_messages as a
from kvcm_ray.serve_app import debug_messages as d
from kvcm_ray.serve_app import handlers_accounts as accounts
from kvcm_ray.serve_app import handlers_admin as admin
from kvcm_ray.serve_app import handlers_capacity as capacity
from kvcm_ray.serve_app import handlers_debug as debug
from kvcm_ray.serve_app import handlers_hot as hot
from kvcm_ray.serve_app import handlers_meta as meta
from kvcm_ray.serve_app import handlers_observe as observe
from kvcm_ray.serve_app import handlers_traces as traces
from kvcm_ray.serve_app import messages as m
from kvcm_ray.serve_app import observe_messages as o
from kvcm_ray.serve_app.endpoint import Endpoint, Handler

_BLOCKS: dict[str, Any] = {"trace_id": "t", "instance_id": "i1", "block_keys": [1, 2, 3]}
_NFS = {"global_unique_name": "nfs_02", "nfs": {"root_path": "/data/kv/"}}
_GROUP = {
    "name": "chat",
    "storage_candidates": ["nfs_01"],
    "global_quota_group_name": "chat_quota",
    "max_instance_count": 10,
    "quota": {"capacity": 1 << 30, "quota_config": []},
    "cache_config": {
        "data_storage_strategy": "CPS_PREFER_3FS",
        "meta_indexer_config": {
            "max_key_count": 1_000_000,
            "meta_storage_backend_config": {"storage_type": "local"},
            "meta_cache_policy_config": {"type": "LRU"},
        },
    },
    "version": 1,
}
_INSTANCE = {
    "trace_id": "t",
    "instance_group": "default",
    "instance_id": "i1",
    "block_size": 128,
    "model_deployment": {"model_name": "m", "dtype": "FP8", "tp_size": 1},
    "location_spec_infos": [{"name": "tp0", "size": 1024}],
}

HOT = (
    Endpoint(
        "GetCacheLocation", m.GetCacheLocationRequest, m.GetCacheLocationResponse,
        hot.get_cache_location, "Cache locations retrieved successfully",
        "Failed to get cache locations", about_blocks=True,
        example=_BLOCKS | {"query_type": "QT_PREFIX_MATCH", "block_mask": {"offset": 0}},
    ),
    Endpoint(
        "StartWriteCache", m.StartWriteCacheRequest, m.StartWriteCacheResponse,
        hot.start_write_cache, "Write cache session started successfully",
        "Failed to start write cache", about_blocks=True,
        example=_BLOCKS | {"write_timeout_seconds": 30},
    ),
    Endpoint(
        "FinishWriteCache", m.FinishWriteCacheRequest, m.MetaResponse,
        hot.finish_write_cache, "Write cache session finished successfully",
        "Failed to finish write cache", about_blocks=True,
        example={
            "trace_id": "t", "instance_id": "i1", "write_session_id": "<from startWriteCache>",
            "success_blocks": {"bool_masks": {"values": [True, True, True]}},
        },
    ),
)  # fmt: skip

META = (
    Endpoint(
        "RegisterInstance", m.RegisterInstanceRequest, m.RegisterInstanceResponse,
        meta.register_instance, "Instance registered successfully", "Failed to register instance",
        example=_INSTANCE,
    ),
    Endpoint(
        "GetInstanceInfo", m.GetInstanceInfoRequest, m.GetInstanceInfoResponse,
        meta.get_instance_info, "", "", example={"instance_id": "i1"},
    ),
    Endpoint(
        "GetCacheMeta", m.GetCacheMetaRequest, m.GetCacheMetaResponse,
        meta.get_cache_meta, "Cache metadata retrieved successfully",
        "Failed to get cache metadata", about_blocks=True, example=_BLOCKS,
    ),
    Endpoint(
        "RemoveCache", m.RemoveCacheRequest, m.MetaResponse, meta.remove_cache,
        "Cache removed successfully", "Failed to remove cache", about_blocks=True,
        example=_BLOCKS,
    ),
    Endpoint(
        "TrimCache", m.TrimCacheRequest, m.MetaResponse, meta.trim_cache,
        "Cache trimmed successfully", "Failed to trim cache", about_blocks=True,
        example={"instance_id": "i1", "strategy": "TS_REMOVE_ALL_CACHE"},
    ),
    Endpoint(
        "TouchCache", m.TouchCacheRequest, m.MetaResponse, hot.touch_cache,
        "Look-ups reported successfully", "Failed to report look-ups", about_blocks=True,
        example={
            "trace_id": "t", "instance_id": "i1",
            "look_ups": [{"block_keys": [1, 2], "missed_keys": [3]}],
        },
    ),
    Endpoint(
        "ExplainCache", o.ExplainCacheRequest, o.ExplainCacheResponse, observe.explain_cache,
        "Cache explained successfully", "Failed to explain cache", about_blocks=True, example=_BLOCKS,
    ),
    Endpoint(
        "LeaseCache", m.LeaseCacheRequest, m.LeaseCacheResponse, capacity.lease_cache,
        "Cache leased successfully", "Failed to lease cache", about_blocks=True,
        example=_BLOCKS | {"lease_ms": 5000},
    ),
    Endpoint(
        "PinCache", m.PinCacheRequest, m.PinCacheResponse, capacity.pin_cache,
        "Cache pinned successfully", "Failed to pin cache", about_blocks=True,
        example=_BLOCKS | {"name": "system-prompt", "until_s": 0},
    ),
    Endpoint(
        "UnpinCache", m.UnpinCacheRequest, m.PinCacheResponse, capacity.unpin_cache,
        "Cache unpinned successfully", "Failed to unpin cache", about_blocks=True,
        example={"instance_id": "i1", "name": "system-prompt"},
    ),
)  # fmt: skip


def _admin(
    rpc: str, request: type[Any], response: type[Any], handle: Handler, ok: str, failure: str,
    example: dict[str, Any] | None = None,
) -> Endpoint:  # fmt: skip
    return Endpoint(rpc, request, response, handle, ok, failure, admin=True, example=example)


ADMIN = (
    _admin("AddStorage", a.AddStorageRequest, a.CommonResponse, admin.add_storage,
           "Storage added successfully", "Failed to add storage", {"storage": _NFS}),
    _admin("EnableStorage", a.StorageNameRequest, a.CommonResponse, admin.enable_storage,
           "Storage enabled successfully", "Failed to enable storage",
           {"storage_unique_name": "nfs_02"}),
    _admin("DisableStorage", a.StorageNameRequest, a.CommonResponse, admin.disable_storage,
           "Storage disabled successfully", "Failed to disable storage",
           {"storage_unique_name": "nfs_02"}),
    _admin("DrainStorage", a.DrainStorageRequest, a.CommonResponse, capacity.drain_storage,
           "Storage draining changed successfully", "Failed to drain storage",
           {"storage_unique_name": "nfs_02", "draining": True}),
    _admin("UpdateStorage", a.UpdateStorageRequest, a.CommonResponse, admin.update_storage,
           "Storage updated successfully", "Failed to update storage", {"storage": _NFS}),
    _admin("RemoveStorage", a.RemoveStorageRequest, a.CommonResponse, admin.remove_storage,
           "Storage removed successfully", "Failed to remove storage",
           {"storage_unique_name": "nfs_02", "force": False}),
    _admin("ListStorage", m.Request, a.ListStorageResponse, admin.list_storage,
           "Storage listed successfully", "Failed to list storage", {}),
    _admin("CreateInstanceGroup", a.CreateInstanceGroupRequest, a.CommonResponse,
           admin.create_instance_group, "Instance group created successfully",
           "Failed to create instance group", {"instance_group": _GROUP}),
    _admin("UpdateInstanceGroup", a.UpdateInstanceGroupRequest, a.CommonResponse,
           admin.update_instance_group, "Instance group updated successfully",
           "Failed to update instance group",
           {"instance_group": _GROUP | {"version": 2}, "current_version": 1}),
    _admin("RemoveInstanceGroup", a.RemoveInstanceGroupRequest, a.CommonResponse,
           admin.remove_instance_group, "Instance group removed successfully",
           "Failed to remove instance group", {"name": "chat", "force": False}),
    _admin("GetInstanceGroup", a.GroupNameRequest, a.GetInstanceGroupResponse,
           admin.get_instance_group, "Instance group retrieved successfully",
           "Failed to get instance group", {"name": "default"}),
    _admin("ListInstanceGroup", m.Request, a.ListInstanceGroupResponse,
           admin.list_instance_group, "Instance groups listed successfully",
           "Failed to list instance groups", {}),
    _admin("GetCapacity", a.GetCapacityRequest, a.GetCapacityResponse, capacity.get_capacity,
           "Capacity retrieved successfully", "Failed to get capacity",
           {"instance_group": "default"}),
    _admin("GetAdvice", a.GetAdviceRequest, a.GetAdviceResponse, capacity.get_advice,
           "Advice retrieved successfully", "Failed to get advice",
           {"instance_group": "default", "factors": [0.5, 1, 2, 4]}),
    _admin("StartRecording", a.StartRecordingRequest, a.RecordingResponse, traces.start_recording,
           "Recording started successfully", "Failed to start recording",
           {"instance_group": "default", "seconds": 600, "sample_rate": 1}),
    _admin("StopRecording", a.RecordingsRequest, a.RecordingResponse, traces.stop_recording,
           "Recording stopped successfully", "Failed to stop recording",
           {"instance_group": "default"}),
    _admin("ListRecordings", a.RecordingsRequest, a.ListRecordingsResponse, traces.list_recordings,
           "Recordings listed successfully", "Failed to list recordings", {"instance_group": ""}),
    _admin("RollbackInstance", a.RollbackInstanceRequest, a.CommonResponse,
           capacity.rollback_instance, "Instance rolled back successfully",
           "Failed to roll back instance", {"instance_id": "i2"}),
    _admin("RemoveInstance", a.RemoveInstanceRequest, a.CommonResponse, admin.remove_instance,
           "Instance removed successfully", "Failed to remove instance", {"instance_id": "i1"}),
    _admin("ListInstanceInfo", a.ListInstanceInfoRequest, a.ListInstanceInfoResponse,
           admin.list_instance_info, "", "", {"instance_group_name": ""}),
    _admin("AddAccount", a.AddAccountRequest, a.CommonResponse, accounts.add_account,
           "Account added successfully", "Failed to add account",
           {"user_name": "alice", "password": "secret", "role": "ROLE_USER", "instance_groups": ["default"]}),
    _admin("UpdateAccount", a.UpdateAccountRequest, a.CommonResponse, accounts.update_account,
           "Account updated successfully", "Failed to update account",
           {"user_name": "alice", "password": "another"}),
    _admin("CreateToken", a.CreateTokenRequest, a.CreateTokenResponse, accounts.create_token,
           "Token created successfully", "Failed to create token",
           {"user_name": "alice", "label": "engine 1", "lifetime_s": "86400"}),
    _admin("ListToken", m.Request, a.ListTokenResponse, accounts.list_token,
           "Tokens listed successfully", "Failed to list tokens", {}),
    _admin("RevokeToken", a.RevokeTokenRequest, a.CommonResponse, accounts.revoke_token,
           "Token revoked successfully", "Failed to revoke token", {"token_id": "<from createToken>"}),
    _admin("DeleteAccount", a.DeleteAccountRequest, a.CommonResponse, accounts.delete_account,
           "Account deleted successfully", "Failed to delete account", {"user_name": "alice"}),
    _admin("ListAccount", m.Request, a.ListAccountResponse, accounts.list_account,
           "list account successfully", "Failed to list account", {}),
    _admin("ListAudit", a.ListAuditRequest, a.ListAuditResponse, accounts.list_audit,
           "Audit log retrieved successfully", "Failed to read the audit log", {"limit": 20}),
    _admin("GenConfigSnapshot", m.Request, a.ConfigSnapShotResponse, admin.gen_config_snapshot,
           "Config snapshot generated successfully", "Failed to generate config snapshot", {}),
    _admin("LoadConfigSnapshot", a.LoadConfigSnapshotRequest, a.CommonResponse,
           admin.load_config_snapshot, "Config snapshot loaded successfully",
           "Failed to load config snapshot", {"config_snapshot": "<from genConfigSnapshot>"}),
    _admin("GetStatistics", o.GetStatisticsRequest, o.GetStatisticsResponse, observe.get_statistics,
           "Statistics retrieved successfully", "Failed to get statistics", {"instance_group": ""}),
    _admin("GetHistory", o.GetHistoryRequest, o.GetHistoryResponse, observe.get_history,
           "History retrieved successfully", "Failed to get history",
           {"instance_group": "default", "since_s": 0}),
    _admin("GetEvents", o.GetEventsRequest, o.GetEventsResponse, observe.get_events,
           "Events retrieved successfully", "Failed to get events",
           {"instance_group": "default", "after_id": "0", "limit": 100}),
    _admin("GetHotPrefixes", o.GetHotPrefixesRequest, o.GetHotPrefixesResponse, observe.get_hot_prefixes,
           "Hot prefixes retrieved successfully", "Failed to get hot prefixes",
           {"instance_group": "default", "depth": 8, "limit": 100}),
    _admin("GetMetrics", m.Request, a.GetMetricsResponse, admin.get_metrics,
           "Metrics retrieved successfully", "Failed to get metrics", {}),
    _admin("GetReclaimer", m.Request, a.ReclaimerResponse, capacity.get_reclaimer,
           "Reclaimer settings retrieved successfully", "Failed to get reclaimer settings", {}),
    _admin("UpdateReclaimer", a.UpdateReclaimerRequest, a.ReclaimerResponse,
           capacity.update_reclaimer, "Reclaimer settings updated successfully",
           "Failed to update reclaimer settings",
           {"reclaimers": 4, "max_bytes_per_second": "0", "paused": False}),
    _admin("CheckHealth", m.Request, a.CheckHealthResponse, admin.check_health,
           "Health check completed", "Failed to check health", {}),
    _admin("GetManagerClusterInfo", m.Request, a.GetManagerClusterInfoResponse,
           admin.get_manager_cluster_info, "Manager cluster info retrieved",
           "Failed to get manager cluster info", {}),
    _admin("LeaderDemote", m.Request, a.CommonResponse, admin.leader_demote,
           "Leader demote request accepted", "Failed to demote", {}),
    _admin("GetLeaderElectorConfig", m.Request, a.GetLeaderElectorConfigResponse,
           admin.get_leader_elector_config, "Leader elector config retrieved",
           "Failed to get leader elector config", {}),
    _admin("UpdateLeaderElectorConfig", a.UpdateLeaderElectorConfigRequest, a.CommonResponse,
           admin.update_leader_elector_config, "Leader elector config updated",
           "Failed to update leader elector config", {"campaign_delay_time_ms": 0}),
    _admin("UpdateLogger", a.UpdateLoggerRequest, a.CommonResponse, admin.update_logger,
           "Update logger success", "Invalid log level string", {"log_level": "INFO"}),
)  # fmt: skip

ENDPOINTS = HOT + META + ADMIN

#: Served only by a manager that was started with it.
DEBUG = (
    Endpoint(
        "InjectFault", d.InjectFaultRequest, a.CommonResponse, debug.inject_fault, "", "",
        admin=True, debug=True,
        example={"api_name": "GetCacheLocation", "fault_trigger_strategy": "ONCE", "trigger_at_call": 3},
    ),
    Endpoint(
        "RemoveFault", d.RemoveFaultRequest, a.CommonResponse, debug.remove_fault, "", "",
        admin=True, debug=True, example={"api_name": "GetCacheLocation"},
    ),
    Endpoint(
        "ClearFaults", m.Request, a.CommonResponse, debug.clear_faults, "Clear faults successfully", "",
        admin=True, debug=True, example={},
    ),
)  # fmt: skip
