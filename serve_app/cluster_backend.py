"""The backend of a running manager: view and indexes in this process, actors for the rest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Reply, Request, StartWrite, Touch
from kvcm_ray.errors import GroupNotFound, InstanceNotFound, KvcmError
from kvcm_ray.serve_app.backend import Backend

CALL_TIMEOUT_S = 15.0
START_LEAST_S = 2.0
REGISTRY_TIMEOUT_S = 60.0  #: registering may make an index, removing erases one
HEALTH_TIMEOUT_S = 2.0


class ClusterBackend(Backend):
    """Raises `Unavailable` if no manager was ever started on `data_dir`."""

    def __init__(self, data_dir: str | os.PathLike[str]) -> None:
        super().__init__(RegistryView(data_dir))
        self._registry = RegistryHandle()
        self._groups: dict[str, GroupHandle] = {}

    async def call(self, info: InstanceInfo, request: Request) -> Reply:
        try:
            return await self._group(info.instance_group_name).call(request, _patience_s(request))
        except GroupNotFound as error:
            raise InstanceNotFound(f"instance {info.instance_id!r}: {error.message}") from error

    async def registry(self, method: str, *args: Any) -> Any:
        return await self._registry.call(method, *args, timeout_s=REGISTRY_TIMEOUT_S)

    async def ask(self, group: str, method: str, *args: Any) -> dict[str, Any]:
        return await self._group(group).ask(method, *args, timeout_s=HEALTH_TIMEOUT_S)

    async def send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        handle = self._group(group)
        await asyncio.gather(*(handle.call(touch, HEALTH_TIMEOUT_S) for touch in touches))

    async def health(self) -> dict[str, str]:
        checks = {"registry": self.registry("describe")}
        checks |= {f"group:{name}": self.ask(name, "usage") for name in self.groups()}
        states = await asyncio.gather(*(_state(check) for check in checks.values()))
        return dict(zip(checks, states, strict=True))

    def _group(self, name: str) -> GroupHandle:
        handle = self._groups.get(name)
        if handle is None:
            handle = self._groups[name] = GroupHandle(name)
        return handle


def _patience_s(request: Request) -> float:
    """A start may wait for room: for half of the time that its caller wants to write in, because
    that is how long ours wait for the answer, and what nobody waits for must not get room."""
    if not isinstance(request, StartWrite) or request.timeout_ms <= 0:
        return CALL_TIMEOUT_S
    return min(CALL_TIMEOUT_S, max(START_LEAST_S, request.timeout_ms / 2_000))


async def _state(check: Any) -> str:
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            await check
    except TimeoutError:
        return f"no answer within {HEALTH_TIMEOUT_S:g} s"
    except KvcmError as error:
        return error.message
    return "ok"
