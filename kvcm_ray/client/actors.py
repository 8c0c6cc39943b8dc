"""Changes by actor calls, for processes in the Ray cluster of the manager."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.client.backend import NewBlocks, new_id
from kvcm_ray.client.results import WritePlan
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import (
    FinishWrite,
    Keys,
    LeaseBlocks,
    Leased,
    PinBlocks,
    Pinned,
    RemoveBlocks,
    Removed,
    Request,
    StartWrite,
    Touch,
    TrimInstance,
    UnpinBlocks,
    WriteFinished,
    WriteStarted,
)


class ActorChannel:
    """`Channel` on actor handles; see `kvcm_ray.client.backend`. Thread-safe."""

    def __init__(self, view: RegistryView, *, blocking: bool) -> None:
        self.blocking = blocking
        self._view = view
        self._registry = RegistryHandle()
        self._groups: dict[str, GroupHandle] = {}
        self._lock = threading.Lock()

    async def close(self) -> None:
        """Handles need no closing."""

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        stored: InstanceInfo
        if self.blocking:
            stored = self._registry.call_sync("register_instance", info, timeout_s=timeout_s)
        else:
            stored = await self._registry.call("register_instance", info, timeout_s=timeout_s)
        return stored

    async def lease(self, info: InstanceInfo, keys: Keys, lease_s: float, timeout_s: float) -> Leased:
        request = LeaseBlocks(info.instance_id, keys, max(1, int(lease_s * 1000)))
        leased: Leased = await self._call(info, request, timeout_s)
        return leased

    async def start_write(self, info: InstanceInfo, new: NewBlocks, timeout_s: float) -> WritePlan:
        begin_s = time.monotonic()
        lease_ms = max(1, int(new.lease_s * 1000))
        request = StartWrite(
            new_id(), info.instance_id, new.keys, new_id(), lease_ms, new.spec_groups, new.partial_tail
        )
        reply: WriteStarted = await self._call(info, request, timeout_s)
        blocks = Blocks(new.keys[~reply.exists], reply.locations, reply.segments, self._view.storages())
        deadline_s = begin_s + reply.lease_ms / 1000  # before the manager's own, by the call's time
        return WritePlan(reply.session_id, reply.exists, blocks, deadline_s)

    async def finish_write(
        self, info: InstanceInfo, session_id: str, success: BlockMask, timeout_s: float
    ) -> WriteFinished:
        event_id = f"finish-{session_id}"  # calling again must not be another event
        request = FinishWrite(event_id, info.instance_id, session_id, success)
        finished: WriteFinished = await self._call(info, request, timeout_s)
        return finished

    async def remove(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Removed:
        removed: Removed = await self._call(info, RemoveBlocks(new_id(), info.instance_id, keys), timeout_s)
        return removed

    async def trim(self, info: InstanceInfo, what: TrimInstance, timeout_s: float) -> Removed:
        removed: Removed = await self._call(info, what, timeout_s)
        return removed

    async def pin(self, info: InstanceInfo, what: PinBlocks | UnpinBlocks, timeout_s: float) -> Pinned:
        pinned: Pinned = await self._call(info, what, timeout_s)
        return pinned

    def tell(self, group: str, touches: Sequence[Touch], timeout_s: float) -> None:
        handle = self._group(group)
        for future in [handle.start(touch, timeout_s) for touch in touches]:
            handle.wait(future, timeout_s)

    async def _call(self, info: InstanceInfo, request: Request, timeout_s: float) -> Any:
        handle = self._group(info.instance_group_name)
        if self.blocking:
            return handle.call_sync(request, timeout_s)
        return await handle.call(request, timeout_s)

    def _group(self, name: str) -> GroupHandle:
        handle = self._groups.get(name)
        if handle is None:
            with self._lock:
                handle = self._groups.setdefault(name, GroupHandle(name))
        return handle
