"""The actor of an instance group: the only writer of its indexes and its quota.

`GroupActor` is a thin shell around `GroupService`. A stale incarnation (a restart elsewhere while this
process was stopped, say) learns from the first transaction that it is fenced and ends its process
without answering; its callers repeat their requests to the newer incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import ray

from kvcm_ray.actors import detached
from kvcm_ray.actors.names import group_actor_name
from kvcm_ray.actors.pool import RayPool
from kvcm_ray.actors.service import Answers, GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.actors.waiting import WRITES_MAX
from kvcm_ray.core.requests import Reply, Request, StartWrite
from kvcm_ray.errors import KvcmError

log = logging.getLogger(__name__)

END_EXIT_CODE = 75
WAITING = "waiting"  #: concurrency group of its own, so that writes that wait hold nobody up


class GroupActor:
    """Async actor; see `GroupService` for what the methods do.

    Args:
        data_dir: data directory of the manager.
        name: the group, registered already.
    """

    def __init__(self, data_dir: str, name: str) -> None:
        # The loop's thread and Ray's threads hand over often; the default of 5 ms would show.
        sys.setswitchinterval(0.0005)
        self._name = name
        view = RegistryView(data_dir)
        self._service = GroupService(view, name, RayPool(), self._end)

    def __repr__(self) -> str:
        return f"InstanceGroup({self._name})"

    async def submit(self, requests: Sequence[Request]) -> Answers:
        """One reply or one `KvcmError` value for each request, in order."""
        return await asyncio.wrap_future(self._service.submit(requests))

    @ray.method(concurrency_group=WAITING)
    async def submit_waiting(self, request: StartWrite, wait_ms: int) -> Reply | KvcmError:
        """Of a write that was refused for want of room: the reply once there is some, or the last
        refusal after `wait_ms`. Cancel the call to give up."""
        return await asyncio.wrap_future(self._service.submit_waiting(request, wait_ms))

    async def refresh(self) -> None:
        """Read the registry again: configuration, storages, instances."""
        await asyncio.wrap_future(self._service.refresh())

    async def retire(self) -> None:
        """Erase the instances that are not registered (any more); before the actor is removed."""
        await asyncio.wrap_future(self._service.retire())

    async def usage(self) -> dict[str, Any]:
        usage = await asyncio.wrap_future(self._service.usage())
        return {**usage, "pid": os.getpid()}

    async def capacity(self) -> dict[str, Any]:
        """The capacity report; see `GroupState.capacity`."""
        return await asyncio.wrap_future(self._service.capacity())

    async def advice(self, factors: Sequence[float]) -> dict[str, Any]:
        """What other quotas would give; see `Advisor.report`."""
        return await asyncio.wrap_future(self._service.advice(factors))

    async def record_start(self, options: dict[str, Any]) -> dict[str, Any]:
        """Begin to record accesses; see `Recorder.start`."""
        return await asyncio.wrap_future(self._service.record_start(options))

    async def record_stop(self) -> dict[str, Any]:
        """End the recording; see `Recorder.stop`."""
        return await asyncio.wrap_future(self._service.record_stop())

    async def recordings(self) -> dict[str, Any]:
        """``{"recordings": [...]}``; see `Recorder.list`."""
        return await asyncio.wrap_future(self._service.recordings())

    def _end(self, why: str) -> None:
        log.error("%r: %s; ending process %d", self, why, os.getpid())
        os._exit(END_EXIT_CODE)


def get_or_create(data_dir: str, name: str) -> Any:
    """Handle of the group's actor, which is made if there is none."""
    return detached.get_or_create(
        GroupActor, group_actor_name(name), data_dir, name,
        max_concurrency=1000, concurrency_groups={WAITING: WRITES_MAX},
    )  # fmt: skip
