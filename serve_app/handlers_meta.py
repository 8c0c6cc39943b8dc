"""The meta API except its hot calls, which are in `handlers_hot`."""

from __future__ import annotations

import asyncio
import dataclasses
from secrets import token_hex
from typing import Any

import numpy as np

from kvcm_ray.core.block import WIRE_NAMES, BlockState
from kvcm_ray.core.hashing import block_keys_from_tokens
from kvcm_ray.core.model import InstanceInfo, LocationSpecGroup, StorageConfig, StorageType
from kvcm_ray.core.requests import BlockMeta, GetMeta, Keys, RemoveBlocks, TrimInstance
from kvcm_ray.core.uri import uri_parts
from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.serve_app import messages as m
from kvcm_ray.serve_app.backend import Backend
from kvcm_ray.serve_app.endpoint import Call, because
from kvcm_ray.serve_app.protojson import dumps
from kvcm_ray.serve_app.validation import check_registration, require, require_blocks

_TOKENS_INLINE_MAX = 32_768  #: more are hashed in a thread, so that others are served meanwhile


async def keys_of(info: InstanceInfo, request: m.BlocksRequest) -> Keys:
    """The request's block keys, or those of its tokens."""
    if len(request.block_keys):
        return request.block_keys
    if info.block_size <= 0:
        reason = f"instance {info.instance_id!r} has block_size {info.block_size}"
        raise because(InvalidArgument(reason), "tokens size per block error")
    if len(request.token_ids) <= _TOKENS_INLINE_MAX:
        return block_keys_from_tokens(request.token_ids, info.block_size)
    return await asyncio.to_thread(block_keys_from_tokens, request.token_ids, info.block_size)


# ------------------------------------------------------------------------------------ instances


async def register_instance(call: Call) -> dict[str, Any]:
    request: m.RegisterInstanceRequest = call.request
    check_registration(request)
    info = InstanceInfo(
        instance_group_name=request.instance_group,
        instance_id=request.instance_id,
        block_size=request.block_size,
        location_spec_infos=request.location_spec_infos,
        model_deployment=request.model_deployment,
        location_spec_groups=request.location_spec_groups,
        model_version=request.model_version,
        supersedes=request.supersedes,
        handover_seconds=request.handover_seconds,
    )
    stored: InstanceInfo = await call.backend.registry("register_instance", info)
    return {"storage_configs": storage_configs(call.backend, stored)}


def storage_configs(backend: Backend, info: InstanceInfo) -> str:
    """JSON text of the storages that the instance's group may use, ordered by name."""
    group = backend.groups().get(info.instance_group_name)
    candidates = set(group.storage_candidates) if group else set()
    storages = backend.storages()
    return dumps([_client_config(storages[n]) for n in sorted(candidates & set(storages))]).decode()


def _client_config(storage: StorageConfig) -> dict[str, Any]:
    """As a client opens it: all our locations are files, on whatever is mounted there."""
    spec = {
        "root_path": storage.nfs.root_path if storage.nfs else storage.root_path + "/",
        "key_count_per_file": storage.nfs.key_count_per_file if storage.nfs else 0,
    }
    return {
        "type": "file",
        "is_available": storage.is_available,
        "global_unique_name": storage.global_unique_name,
        "storage_spec": spec,
    }


async def get_instance_info(call: Call) -> dict[str, Any]:
    require("GetInstanceInfo", call.request, "instance_id")
    info = call.backend.instance(call.request.instance_id)
    return {"instance_group": info.instance_group_name, "instance_info": shown(info)}


def shown(info: InstanceInfo) -> InstanceInfo:
    """`info` as the wire shows it: spec groups and the names in them are sorted."""
    groups = sorted(info.location_spec_groups, key=lambda g: g.name)
    sorted_groups = tuple(LocationSpecGroup(g.name, tuple(sorted(g.spec_names))) for g in groups)
    return dataclasses.replace(info, location_spec_groups=sorted_groups)


# --------------------------------------------------------------------------------------- blocks


async def get_cache_meta(call: Call) -> dict[str, Any]:
    request: m.GetCacheMetaRequest = call.request
    require_blocks("GetCacheMeta", request)
    keys = _unmasked(await keys_of(call.instance, request), request.block_mask)
    meta = await call.backend.call(call.instance, GetMeta(call.instance.instance_id, keys))
    assert isinstance(meta, BlockMeta)
    storages = call.storages
    indexes = range(len(keys))
    locations = [_meta_location(meta, i, storages) for i in indexes]
    detailed = request.detail_level >= 2
    return {
        "locations": tuple(locations),
        "metas": tuple(_meta_text(meta, i, detailed) for i in indexes),
    }


def _unmasked(keys: Keys, mask: m.BlockMask | None) -> Keys:
    return keys[~mask.to_core().covers(len(keys))] if mask else keys


def _present(meta: BlockMeta, i: int) -> bool:
    """A block whose bytes are still to be erased is gone already."""
    return int(meta.states[i]) in (BlockState.WRITING, BlockState.SERVING)


def _meta_location(meta: BlockMeta, i: int, storages: Any) -> m.CacheLocation:
    segment = meta.segments.get(int(meta.locations.segment[i])) if _present(meta, i) else None
    storage = storages.get(segment.storage) if segment else None
    if segment is None:
        return m.CacheLocation()
    if storage is None:
        return m.CacheLocation(StorageType.ST_UNSPECIFIED, len(segment.specs))
    slot, generation = int(meta.locations.slot[i]), int(meta.locations.generation[i])
    specs = []
    for spec in segment.specs:
        before, between, after = uri_parts(storage, segment, spec.name, spec.size)
        specs.append(m.LocationSpec(spec.name, f"{before}{slot}{between}{generation}{after}"))
    return m.CacheLocation(storage.storage_type, len(segment.specs), tuple(specs))


def _meta_text(meta: BlockMeta, i: int, detailed: bool) -> str:
    if not _present(meta, i):
        return dumps({"status": WIRE_NAMES[BlockState.ABSENT]}).decode()
    where = meta.locations
    numbers = (where.segment[i], where.slot[i], where.generation[i])
    text: dict[str, Any] = {
        "id": "-".join(np.base_repr(int(n), 36).lower() for n in numbers),
        "status": WIRE_NAMES[BlockState(int(meta.states[i]))],
    }
    if detailed and meta.written_s is not None:
        text["written_s"] = int(meta.written_s[i])
    return dumps(text).decode()


async def remove_cache(call: Call) -> dict[str, Any]:
    request: m.RemoveCacheRequest = call.request
    require_blocks("RemoveCache", request)
    keys = _unmasked(await keys_of(call.instance, request), request.block_mask)
    if len(keys):
        event = RemoveBlocks(token_hex(16), call.instance.instance_id, keys)
        await call.backend.call(call.instance, event)
    return {}


async def trim_cache(call: Call) -> dict[str, Any]:
    request: m.TrimCacheRequest = call.request
    event_id, instance_id = token_hex(16), call.instance.instance_id
    if request.strategy == m.TrimStrategy.TS_REMOVE_ALL_CACHE:
        event = TrimInstance(event_id, instance_id)
    elif request.strategy == m.TrimStrategy.TS_REMOVE_ALL_META:
        event = TrimInstance(event_id, instance_id, drop_sessions=True)
    elif request.strategy == m.TrimStrategy.TS_TIMESTAMP:
        event = TrimInstance(event_id, instance_id, *_time_range(request))
    elif request.strategy == m.TrimStrategy.TS_UNSPECIFIED:
        raise InvalidArgument("strategy is not set; use TS_REMOVE_ALL_CACHE, TS_TIMESTAMP, ...")
    else:
        raise Unsupported(f"strategy {int(request.strategy)} is unknown")
    await call.backend.call(call.instance, event)
    return {}


def _time_range(request: m.TrimCacheRequest) -> tuple[int, int]:
    begin, end = request.begin_timestamp, request.end_timestamp
    if begin < 0 or end < 0 or (end and begin > end):
        raise InvalidArgument(f"begin_timestamp {begin} .. end_timestamp {end} is no time range")
    if not begin and not end:
        raise InvalidArgument("TS_TIMESTAMP needs begin_timestamp or end_timestamp (unix seconds)")
    return begin, end or 2**32 - 1
