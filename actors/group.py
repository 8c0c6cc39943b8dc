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
import time
from collections.abc import Sequence
from typing import Any

import ray

from kvcm_ray import logs, tracing
from kvcm_ray.actors import detached, ray_metrics, status_line
from kvcm_ray.actors.names import group_actor_name
from kvcm_ray.actors.pool import RayPool
from kvcm_ray.actors.prefixes import DEPTH, LIMIT
from kvcm_ray.actors.service import Answers, GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.actors.waiting import WRITES_MAX
from kvcm_ray.core.requests import Keys, Reply, Request, StartWrite
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
        logs.configure()
        self._name = name
        view = RegistryView(data_dir)
        self._service = GroupService(view, name, RayPool(), self._end)
        if ray_metrics.wanted():
            ray_metrics.RayMetrics(name, lambda: self._service.statistics(instances=False))
        status_line.keep(self, status_line.group_status(name, self._service.history))

    def __repr__(self) -> str:
        return f"GroupActor({self._name})"

    async def submit(
        self, requests: Sequence[Request], traces: Sequence[str] = (), trace_ids: Sequence[str] = ()
    ) -> Answers:
        """One reply or one `KvcmError` value for each request, in order; see `kvcm_ray.tracing` for
        `traces`, and `kvcm_ray.logs` for `trace_ids`: one for each request if there are any."""
        began_ns = time.time_ns()
        answers = await asyncio.wrap_future(self._service.submit(requests))
        if traces:
            self._trace(requests, answers, traces, began_ns)
        if trace_ids:
            self._log(requests, answers, trace_ids)
        return answers

    @ray.method(concurrency_group=WAITING)
    async def submit_waiting(
        self, request: StartWrite, wait_ms: int, trace: str = "", trace_id: str = ""
    ) -> Reply | KvcmError:
        """Of a write that was refused for want of room: the reply once there is some, or the last
        refusal after `wait_ms`. Cancel the call to give up."""
        began_ns = time.time_ns()
        answer = await asyncio.wrap_future(self._service.submit_waiting(request, wait_ms))
        if trace:
            self._trace([request], [answer], [trace], began_ns)
        self._log([request], [answer], [trace_id])
        return answer

    def _log(self, requests: Sequence[Request], answers: Answers, trace_ids: Sequence[str]) -> None:
        """Lines about those that failed."""
        for request, answer, trace_id in zip(requests, answers, trace_ids, strict=True):
            if isinstance(answer, KvcmError):
                logs.set_trace_id(trace_id)
                what = f"group {self._name}: {type(request).__name__} of {request.instance_id}"
                logs.failed(log, what, answer)

    def _trace(
        self, requests: Sequence[Request], answers: Answers, traces: Sequence[str], began_ns: int
    ) -> None:
        about = [
            {
                "kvcm.group": self._name,
                "kvcm.instance_id": request.instance_id,
                "kvcm.requests_in_call": len(requests),
                "kvcm.code": answer.code if isinstance(answer, KvcmError) else "OK",
            }
            for request, answer in zip(requests, answers, strict=True)
        ]
        tracing.done([f"group {type(request).__name__}" for request in requests], traces, began_ns, about)

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

    async def statistics(self, instances: bool = True) -> dict[str, Any]:
        """See `Statistics.report`."""
        return await asyncio.wrap_future(self._service.statistics(instances))

    async def history(self, since_s: float = 0.0) -> dict[str, Any]:
        """The last hour in rows; see `GroupService.history`."""
        return await asyncio.wrap_future(self._service.history(since_s))

    async def events(self, after_id: int = 0, limit: int = 100) -> dict[str, Any]:
        """What happened; see `GroupService.events`."""
        return await asyncio.wrap_future(self._service.events(after_id, limit))

    async def explain(self, instance_id: str, keys: Keys) -> dict[str, Any]:
        """What became of each block; see `GroupService.explain`."""
        return await asyncio.wrap_future(self._service.explain(instance_id, keys))

    async def hot_prefixes(self, depth: int = DEPTH, limit: int = LIMIT) -> dict[str, Any]:
        """The prefixes that are hit; see `GroupService.hot_prefixes`."""
        return await asyncio.wrap_future(self._service.hot_prefixes(depth, limit))

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
