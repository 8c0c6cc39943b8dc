"""The admin API: storages, groups, instances, and the manager itself."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from kvcm_ray.core.model import InstanceGroup
from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.serve_app import admin_messages as a
from kvcm_ray.serve_app.endpoint import Call
from kvcm_ray.serve_app.handlers_meta import shown
from kvcm_ray.serve_app.metrics import Counts, Series
from kvcm_ray.serve_app.validation import check_group, check_storage, require

_LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARN": logging.WARNING}
_LEVELS["ERROR"] = logging.ERROR
#: What reclaiming has done since the group's actor started; the rest of its numbers are levels.
_RECLAIM_COUNTERS = ("demoted_blocks", "promoted_blocks", "drained_blocks", "failed_moves")
_RECLAIM_GAUGES = ("paused", "moves_in_flight", "promotions_waiting", "trash_records")
_NO_ELECTION = "this manager holds no leader election: group actors are fenced one by one"


# ------------------------------------------------------------------------------------- storages


async def add_storage(call: Call) -> dict[str, Any]:
    require("AddStorage", call.request, "storage")
    check_storage(call.request.storage)
    await call.backend.registry("add_storage", call.request.storage)
    return {}


async def update_storage(call: Call) -> dict[str, Any]:
    require("UpdateStorage", call.request, "storage")
    storage = call.request.storage
    check_storage(storage)
    if stored := call.backend.storages().get(storage.global_unique_name):
        states = {"is_available": stored.is_available, "is_draining": stored.is_draining}
        storage = dataclasses.replace(storage, **states)
    await call.backend.registry("update_storage", storage, call.request.force_update)
    return {}


async def enable_storage(call: Call) -> dict[str, Any]:
    require("EnableStorage", call.request, "storage_unique_name")
    await call.backend.registry("enable_storage", call.request.storage_unique_name)
    return {}


async def disable_storage(call: Call) -> dict[str, Any]:
    require("DisableStorage", call.request, "storage_unique_name")
    await call.backend.registry("disable_storage", call.request.storage_unique_name)
    return {}


async def remove_storage(call: Call) -> dict[str, Any]:
    require("RemoveStorage", call.request, "storage_unique_name")
    name, force = call.request.storage_unique_name, call.request.force
    await call.backend.registry("remove_storage", name, force)
    return {}


async def list_storage(call: Call) -> dict[str, Any]:
    storages = [s for _, s in sorted(call.backend.storages().items())]
    if call.caller.groups is not None:
        used = {name for group in call.backend.groups().values() for name in group.storage_candidates}
        storages = [s for s in storages if s.global_unique_name in used]
    states = tuple(
        a.StorageState(s.global_unique_name, s.is_available, s.is_draining)
        for s in storages
        if s.is_draining or not s.is_available
    )
    return {"storage": tuple(storages), "storage_state": states}


# --------------------------------------------------------------------------------------- groups


async def create_instance_group(call: Call) -> dict[str, Any]:
    require("CreateInstanceGroup", call.request, "instance_group")
    group: InstanceGroup = call.request.instance_group
    check_group(group)
    await call.backend.registry("create_group", group)
    return {}


async def update_instance_group(call: Call) -> dict[str, Any]:
    require("UpdateInstanceGroup", call.request, "instance_group")
    group: InstanceGroup = call.request.instance_group
    stored = call.backend.groups().get(group.name)
    check_group(group, stored)
    if stored is not None:
        group = dataclasses.replace(group, durability=stored.durability)
    await call.backend.registry("update_group", group, call.request.current_version)
    return {}


async def remove_instance_group(call: Call) -> dict[str, Any]:
    require("RemoveInstanceGroup", call.request, "name")
    await call.backend.registry("remove_group", call.request.name, call.request.force)
    return {}


async def get_instance_group(call: Call) -> dict[str, Any]:
    require("GetInstanceGroup", call.request, "name")
    return {"instance_group": call.backend.group(call.request.name)}


async def list_instance_group(call: Call) -> dict[str, Any]:
    return {"instance_group": tuple(g for _, g in sorted(call.backend.groups().items()))}


# ------------------------------------------------------------------------------------ instances


async def remove_instance(call: Call) -> dict[str, Any]:
    require("RemoveInstance", call.request, "instance_id")
    await call.backend.registry("remove_instance", call.request.instance_id)
    return {}


async def list_instance_info(call: Call) -> dict[str, Any]:
    wanted = call.request.instance_group_name
    instances = [i for _, i in sorted(call.backend.instances().items())]
    chosen = (i for i in instances if wanted in ("", i.instance_group_name))
    return {"instance_info": tuple(shown(i) for i in chosen)}


# ---------------------------------------------------------------------------- the manager itself


async def gen_config_snapshot(call: Call) -> dict[str, Any]:
    return {"config_snapshot": await call.backend.registry("save_snapshot")}


async def load_config_snapshot(call: Call) -> dict[str, Any]:
    require("LoadConfigSnapshot", call.request, "config_snapshot")
    await call.backend.registry("load_snapshot", call.request.config_snapshot)
    return {}


async def check_health(call: Call) -> dict[str, Any]:
    health = await call.backend.health()
    return {
        "is_leader": True,
        "is_health": all(state == "ok" for state in health.values()),
        "elector_last_loop_time_ms": time.time_ns() // 1_000_000,
    }


async def get_manager_cluster_info(call: Call) -> dict[str, Any]:
    described = await call.backend.registry("describe")
    node = str(described.get("node_id", ""))
    now_us = time.time_ns() // 1000
    return {
        "info_updated_time": now_us // 1000,
        "self_leader_expiration_time": now_us + 10_000_000,
        "self_node_id": node,
        "leader_node_id": node,
    }


async def leader_demote(call: Call) -> dict[str, Any]:
    raise Unsupported(_NO_ELECTION)


async def get_leader_elector_config(call: Call) -> dict[str, Any]:
    return {"campaign_delay_time_ms": 0}


async def update_leader_elector_config(call: Call) -> dict[str, Any]:
    if call.request.campaign_delay_time_ms:
        raise Unsupported(_NO_ELECTION)
    return {}


async def update_logger(call: Call) -> dict[str, Any]:
    level = _LEVELS.get(call.request.log_level.upper())
    if level is None:
        raise InvalidArgument(f"{call.request.log_level!r} is none of {', '.join(_LEVELS)}")
    logging.getLogger("kvcm_ray").setLevel(level)
    return {}


# -------------------------------------------------------------------------------------- metrics


async def get_metrics(call: Call) -> dict[str, Any]:
    """The protocol's metrics, of what the caller may see; from the same figures as ``GET /metrics``."""
    totals = call.metrics.totals().items()
    metrics = [m for s, c in totals if call.caller.sees(s.group) for m in _service_metrics(s, c)]
    assert call.figures is not None
    groups = (await call.figures.read(fresh_s=0.0)).groups
    for name in sorted(call.backend.groups()):
        report = groups.get(name)
        metrics.append(_gauge("cache_manager_group.available", int(report is not None), instance_group=name))
        if report is not None:
            metrics += _group_metrics(name, report)
    return {"timestamp": time.time_ns() // 1_000_000, "metrics": tuple(metrics)}


def _service_metrics(series: Series, counts: Counts) -> list[a.Metric]:
    tags = {"api_name": series.api}
    if series.instance:
        tags |= {"instance_group": series.group, "instance_id": series.instance}
    return [
        _counter("service.query_counter", counts.calls, **tags),
        _counter("service.error_counter", counts.errors, **tags),
        _gauge("service.query_rt_us", counts.last_us, **tags),
        _counter("service.query_rt_us_total", counts.total_us, **tags),
    ]


def _group_metrics(name: str, report: dict[str, Any]) -> list[a.Metric]:
    """Every number that the group reports, under its own name."""
    gauges, counters = report["gauges"], report["counters"]
    quota = gauges["quota_bytes"]
    values = {**gauges, "hit_blocks": counters["hit_blocks"], "lookup_blocks": counters["lookup_blocks"]}
    if quota > 0:
        values["usage_ratio"] = gauges["used_bytes"] / quota
    metrics = [_gauge(f"cache_manager_group.{k}", v, instance_group=name) for k, v in values.items()]
    return metrics + _reclaim_metrics(name, gauges, counters)


def _reclaim_metrics(name: str, gauges: dict[str, Any], counters: dict[str, Any]) -> list[a.Metric]:
    by_reason = counters["evicted_blocks_by_reason"]
    others = {reason: by_reason.get(reason, 0) for reason in ("expired", "retired")}
    counted = {
        "evicted_blocks": counters["evicted_blocks"] - sum(others.values()),
        **{f"{reason}_blocks": blocks for reason, blocks in others.items()},
        **{key: counters[key] for key in _RECLAIM_COUNTERS},
    }
    levels = {key: gauges[key] for key in _RECLAIM_GAUGES}
    return [
        *(_counter(f"cache_reclaimer.{key}", value, instance_group=name) for key, value in counted.items()),
        *(_gauge(f"cache_reclaimer.{key}", value, instance_group=name) for key, value in levels.items()),
    ]


def _counter(name: str, value: int, **tags: str) -> a.Metric:
    return a.Metric(name, a.MetricValue(int_value=value), _tags(tags))


def _gauge(name: str, value: float, **tags: str) -> a.Metric:
    return a.Metric(name, a.MetricValue(float_value=float(value)), _tags(tags))


def _tags(tags: dict[str, str]) -> tuple[a.MetricTag, ...]:
    return tuple(a.MetricTag(k, v) for k, v in tags.items())
