"""Recording what a group is asked for, as a trace: begin, end, and what there is."""

from __future__ import annotations

import asyncio
from typing import Any

from kvcm_ray.errors import InstanceNotFound
from kvcm_ray.serve_app import admin_messages as a
from kvcm_ray.serve_app.endpoint import Call
from kvcm_ray.serve_app.validation import require


async def start_recording(call: Call) -> dict[str, Any]:
    request: a.StartRecordingRequest = call.request
    require("StartRecording", request, "instance_group")
    group = call.backend.group(request.instance_group)
    options: dict[str, Any] = {"instance_id": request.instance_id, "seconds": request.seconds}
    if request.max_bytes:
        options["max_bytes"] = request.max_bytes
    if request.sample_rate is not None:
        options["sample_rate"] = request.sample_rate
    options["block_tokens"] = _block_tokens(call, group.name, request.instance_id)
    return {"recording": await call.backend.ask(group.name, "record_start", options)}


async def stop_recording(call: Call) -> dict[str, Any]:
    require("StopRecording", call.request, "instance_group")
    group = call.backend.group(call.request.instance_group)
    return {"recording": await call.backend.ask(group.name, "record_stop")}


async def list_recordings(call: Call) -> dict[str, Any]:
    name = call.request.instance_group
    names = [call.backend.group(name).name] if name else sorted(call.backend.groups())
    found = await asyncio.gather(*(call.backend.ask(each, "recordings") for each in names))
    return {"recordings": tuple(recording for each in found for recording in each["recordings"])}


def _block_tokens(call: Call, group: str, instance_id: str) -> int:
    """Tokens of a block, if all instances that are recorded agree on that; else 0.

    Raises:
        InstanceNotFound: the instance that was asked for is not in the group.
    """
    found = {
        info.instance_id: info.block_size
        for info in call.backend.instances().values()
        if info.instance_group_name == group and instance_id in ("", info.instance_id)
    }
    if instance_id and not found:
        raise InstanceNotFound(f"group {group!r} has no instance {instance_id!r}")
    sizes = set(found.values())
    return sizes.pop() if len(sizes) == 1 else 0
