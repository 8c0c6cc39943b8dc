"""Our calls about capacity: leases and pins, drains, report and advice, upgrades, the reclaimers."""

from __future__ import annotations

import dataclasses
import time
from secrets import token_hex
from typing import Any

from kvcm_ray.actors.advisor import FACTORS
from kvcm_ray.core.model import ReclaimerSettings
from kvcm_ray.core.requests import LeaseBlocks, Leased, PinBlocks, Pinned, UnpinBlocks
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app import admin_messages as a
from kvcm_ray.serve_app import messages as m
from kvcm_ray.serve_app.endpoint import Call
from kvcm_ray.serve_app.handlers_meta import keys_of
from kvcm_ray.serve_app.validation import require, require_blocks

# ------------------------------------------------------------------------------ leases and pins


async def lease_cache(call: Call) -> dict[str, Any]:
    request: m.LeaseCacheRequest = call.request
    require_blocks("LeaseCache", request)
    keys = await keys_of(call.instance, request)
    reply = await call.backend.call(
        call.instance, LeaseBlocks(call.instance.instance_id, keys, request.lease_ms)
    )
    assert isinstance(reply, Leased)
    return {"blocks": reply.blocks, "lease_ms": reply.lease_ms}


async def pin_cache(call: Call) -> dict[str, Any]:
    request: m.PinCacheRequest = call.request
    require("PinCache", request, "name")
    require_blocks("PinCache", request)
    _require_future(request.until_s)
    keys = await keys_of(call.instance, request)
    if not len(keys):
        size = call.instance.block_size
        raise InvalidArgument(f"{len(request.token_ids)} tokens are no whole block of {size}; nothing to pin")
    event = PinBlocks(token_hex(16), call.instance.instance_id, request.name, keys, request.until_s)
    return _pinned(await call.backend.call(call.instance, event))


async def unpin_cache(call: Call) -> dict[str, Any]:
    require("UnpinCache", call.request, "name")
    event = UnpinBlocks(token_hex(16), call.instance.instance_id, call.request.name)
    return _pinned(await call.backend.call(call.instance, event))


def _require_future(until_s: int) -> None:
    """A number of seconds from now, or a date long gone, would be a pin that ends before it began."""
    if until_s and until_s <= time.time():
        raise InvalidArgument(
            f"until_s {until_s} is not in the future; it is the unix time at which the pin ends, "
            f"{int(time.time()) + 3600} for one hour; 0 for no end"
        )


def _pinned(reply: Any) -> dict[str, Any]:
    assert isinstance(reply, Pinned)
    return {"keys": reply.keys, "blocks": reply.blocks}


# ------------------------------------------------------------------------------ administration


async def drain_storage(call: Call) -> dict[str, Any]:
    require("DrainStorage", call.request, "storage_unique_name")
    request: a.DrainStorageRequest = call.request
    await call.backend.registry("set_draining", request.storage_unique_name, request.draining)
    return {}


async def get_capacity(call: Call) -> dict[str, Any]:
    require("GetCapacity", call.request, "instance_group")
    group = call.backend.group(call.request.instance_group)
    return {"capacity": await call.backend.ask(group.name, "capacity")}


async def get_advice(call: Call) -> dict[str, Any]:
    require("GetAdvice", call.request, "instance_group")
    request: a.GetAdviceRequest = call.request
    group = call.backend.group(request.instance_group)
    return {"advice": await call.backend.ask(group.name, "advice", request.factors or FACTORS)}


async def rollback_instance(call: Call) -> dict[str, Any]:
    require("RollbackInstance", call.request, "instance_id")
    await call.backend.registry("rollback_instance", call.request.instance_id)
    return {}


async def get_reclaimer(call: Call) -> dict[str, Any]:
    return dataclasses.asdict(await call.backend.registry("reclaimer_settings"))


async def update_reclaimer(call: Call) -> dict[str, Any]:
    request: a.UpdateReclaimerRequest = call.request
    known: ReclaimerSettings = await call.backend.registry("reclaimer_settings")
    names = [field.name for field in dataclasses.fields(ReclaimerSettings)]
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    settings = dataclasses.replace(known, **given)
    if settings != known:
        await call.backend.registry("set_reclaimer_settings", settings)
    return dataclasses.asdict(settings)
