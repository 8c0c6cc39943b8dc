"""Our calls for watching groups: statistics, history, events, what became of blocks, hot prefixes.

What is answered are plain JSON values as the group's actor made them; see `kvcm_ray.actors.service`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from kvcm_ray.actors.prefixes import DEPTH, LIMIT
from kvcm_ray.errors import InvalidArgument, KvcmError
from kvcm_ray.serve_app import observe_messages as o
from kvcm_ray.serve_app.endpoint import Call
from kvcm_ray.serve_app.handlers_meta import keys_of
from kvcm_ray.serve_app.validation import require, require_blocks

EVENTS_DEFAULT = 100


async def get_statistics(call: Call) -> dict[str, Any]:
    """Of one group, or of all; a group that does not answer says why."""
    request: o.GetStatisticsRequest = call.request
    if request.instance_group:
        group = call.backend.group(request.instance_group).name
        return {"statistics": (await call.backend.ask(group, "statistics", not request.without_instances),)}
    asked = (_told(call, name) for name in sorted(call.backend.groups()))
    return {"statistics": tuple(await asyncio.gather(*asked))}


async def _told(call: Call, group: str) -> dict[str, Any]:
    try:
        return await call.backend.ask(group, "statistics", not call.request.without_instances)
    except KvcmError as error:
        return {"group": group, "unavailable": error.message}


async def get_history(call: Call) -> dict[str, Any]:
    """The last hour of a group in rows of 1 s or 10 s."""
    require("GetHistory", call.request, "instance_group")
    request: o.GetHistoryRequest = call.request
    group = call.backend.group(request.instance_group)
    return {"history": await call.backend.ask(group.name, "history", request.since_s)}


async def get_events(call: Call) -> dict[str, Any]:
    """What happened in a group behind an event."""
    require("GetEvents", call.request, "instance_group")
    request: o.GetEventsRequest = call.request
    if request.limit < 0 or request.after_id < 0:
        raise InvalidArgument(f"after_id {request.after_id} and limit {request.limit} must not be negative")
    group = call.backend.group(request.instance_group)
    limit = request.limit or EVENTS_DEFAULT
    return {"journal": await call.backend.ask(group.name, "events", request.after_id, limit)}


async def explain_cache(call: Call) -> dict[str, Any]:
    """Where each block of a prompt is, or when and why it went."""
    require_blocks("ExplainCache", call.request)
    info = call.instance
    keys = await keys_of(info, call.request)
    group = info.instance_group_name
    return {"explanation": await call.backend.ask(group, "explain", info.instance_id, keys)}


async def get_hot_prefixes(call: Call) -> dict[str, Any]:
    """The prefixes that recent look-ups found, as a tree."""
    require("GetHotPrefixes", call.request, "instance_group")
    request: o.GetHotPrefixesRequest = call.request
    group = call.backend.group(request.instance_group)
    depth, limit = request.depth or DEPTH, request.limit or LIMIT
    return {"prefixes": await call.backend.ask(group.name, "hot_prefixes", depth, limit)}
