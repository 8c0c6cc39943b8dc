"""Who may do what: one table, and nothing is allowed that is not in it.

A row names a call, the least role that may make it, and which fields of the request go to the audit log.
A user makes calls about its own instance groups only; what it may not know of does not exist for it (see
`scope`), so the table has no column for that. Calls without a row are for admins; a test refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcm_ray.serve_app.access.caller import ADMIN, METRICS, NOBODY, USER


@dataclass(frozen=True, slots=True)
class Rule:
    least: str  #: role
    audited: tuple[str, ...] | None = None  #: fields that say what the call is about; None: not audited


_USER = Rule(USER)
_ADMIN = Rule(ADMIN)


def _audited(*fields: str, least: str = ADMIN) -> Rule:
    return Rule(least, fields)


RULES: dict[str, Rule] = {
    # An instance's blocks.
    "GetCacheLocation": _USER,
    "StartWriteCache": _USER,
    "FinishWriteCache": _USER,
    "GetCacheMeta": _USER,
    "RemoveCache": _USER,
    "TrimCache": _USER,
    "LeaseCache": _USER,
    "PinCache": _USER,
    "UnpinCache": _USER,
    "TouchCache": _USER,
    "ExplainCache": _USER,
    # Instances.
    "RegisterInstance": _USER,
    "GetInstanceInfo": _USER,
    "ListInstanceInfo": _USER,
    "RemoveInstance": _audited("instance_id", least=USER),
    "RollbackInstance": _audited("instance_id", least=USER),
    # Groups.
    "GetInstanceGroup": _USER,
    "ListInstanceGroup": _USER,
    "GetCapacity": _USER,
    "GetAdvice": _USER,
    "GetStatistics": _USER,
    "GetHistory": _USER,
    "GetEvents": _USER,
    "GetHotPrefixes": _USER,
    "CreateInstanceGroup": _audited("instance_group.name"),
    "UpdateInstanceGroup": _audited("instance_group.name", "current_version"),
    "RemoveInstanceGroup": _audited("name", "force"),
    # Recordings are files on the manager's disk.
    "StartRecording": _audited("instance_group", "instance_id", "seconds"),
    "StopRecording": _audited("instance_group"),
    "ListRecordings": _ADMIN,
    # Storages.
    "AddStorage": _audited("storage.global_unique_name"),
    "UpdateStorage": _audited("storage.global_unique_name", "force_update"),
    "EnableStorage": _audited("storage_unique_name"),
    "DisableStorage": _audited("storage_unique_name"),
    "DrainStorage": _audited("storage_unique_name", "draining"),
    "RemoveStorage": _audited("storage_unique_name", "force"),
    "ListStorage": _USER,
    # Accounts.
    "AddAccount": _audited("user_name", "role", "instance_groups"),
    "UpdateAccount": _audited("user_name", "role", "instance_groups"),
    "DeleteAccount": _audited("user_name"),
    "ListAccount": _ADMIN,
    "CreateToken": _audited("user_name", "label", "lifetime_s", "no_expiry", "metrics_only"),
    "RevokeToken": _audited("token_id"),
    "ListToken": _ADMIN,
    "ListAudit": _ADMIN,
    # The manager.
    "GetMetrics": _USER,
    "CheckHealth": _USER,
    "GetManagerClusterInfo": _USER,
    "GenConfigSnapshot": _audited(),
    "LoadConfigSnapshot": _audited(),
    "GetReclaimer": _ADMIN,
    "UpdateReclaimer": _audited("reclaimers", "max_bytes_per_second", "paused"),
    "LeaderDemote": _audited(),
    "GetLeaderElectorConfig": _ADMIN,
    "UpdateLeaderElectorConfig": _audited("campaign_delay_time_ms"),
    "UpdateLogger": _audited("log_level"),
    "InjectFault": _audited("api_name"),
    "RemoveFault": _audited("api_name"),
    "ClearFaults": _audited(),
}

#: Pages that are read with GET or HEAD: path, or the beginning of paths that end with "/".
PAGES: dict[str, str] = {
    "/healthz": NOBODY,  # 200 or 503 for probes; what is wrong is told to accounts only
    "/healthz/ready": NOBODY,
    "/healthz/live": NOBODY,
    "/docs": NOBODY,  # the description of the API, the same on every manager
    "/docs/oauth2-redirect": NOBODY,
    "/openapi.json": NOBODY,
    "/static-offline-docs/": NOBODY,
    "/": NOBODY,  # goes on to the console
    "/console": NOBODY,  # static; its calls of the API are asked for credentials
    "/console/": NOBODY,
    "/metrics": METRICS,
}

_UNKNOWN = Rule(ADMIN)
#: Role -> the least roles that it satisfies.
_SATISFIES: dict[str, frozenset[str]] = {
    ADMIN: frozenset({ADMIN, USER, METRICS, NOBODY}),
    USER: frozenset({USER, NOBODY}),
    METRICS: frozenset({METRICS, NOBODY}),
    NOBODY: frozenset({NOBODY}),
}


def rule_of(rpc: str) -> Rule:
    return RULES.get(rpc, _UNKNOWN)


def page_role(path: str) -> str:
    """The least role that reads a page."""
    if path in PAGES:
        return PAGES[path]
    below = (role for begin, role in PAGES.items() if begin[1:].endswith("/") and path.startswith(begin))
    return next(below, ADMIN)


def satisfies(role: str, least: str) -> bool:
    return least in _SATISFIES[role]
