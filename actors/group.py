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
import threading
from collections.abc import Sequence
from typing import Any

import ray

from kvcm_ray.actors import detached
from kvcm_ray.actors.names import NAMESPACE, group_actor_name, reclaimer_name
from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT
from kvcm_ray.actors.service import Answers, ErasureDone, GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.requests import Request

log = logging.getLogger(__name__)

END_EXIT_CODE = 75


class RayEraser:
    """Sends trash to the pool of reclaimers: each record always to the same one."""

    def __init__(self, reclaimers: int = RECLAIMERS_DEFAULT) -> None:
        self._count = reclaimers
        self._handles: dict[int, Any] = {}

    def erase(self, index_path: str, trash_ids: Sequence[int], done: ErasureDone) -> None:
        parts = [[i for i in trash_ids if i % self._count == n] for n in range(self._count)]
        asked = [number for number, part in enumerate(parts) if part]
        gather = _Gather(len(asked), done)
        for number in asked:
            self._send(number, index_path, parts[number], gather.part)

    def _send(self, number: int, index_path: str, ids: list[int], done: ErasureDone) -> None:
        def failed(error: Exception) -> None:
            self._handles.pop(number, None)
            done([], f"{reclaimer_name(number)}: {error}")

        def finished(future: Any) -> None:
            try:
                erased, problem = future.result()
            except Exception as error:
                failed(error)
            else:
                done(erased, problem)

        try:
            if number not in self._handles:
                name = reclaimer_name(number)
                self._handles[number] = ray.get_actor(name, namespace=NAMESPACE)
            ref = self._handles[number].erase.remote(index_path, ids)
        except Exception as error:
            failed(error)
        else:
            ref.future().add_done_callback(finished)


class _Gather:
    """Joins the reclaimers' answers to one."""

    def __init__(self, parts: int, done: ErasureDone) -> None:
        self._missing = parts
        self._done = done
        self._erased: list[int] = []
        self._problem = ""
        self._lock = threading.Lock()

    def part(self, erased: list[int], problem: str) -> None:
        with self._lock:
            self._erased += erased
            self._problem = self._problem or problem
            self._missing -= 1
            last = self._missing == 0
        if last:
            self._done(self._erased, self._problem)


class GroupActor:
    """Async actor; see `GroupService` for what the methods do.

    Args:
        data_dir: data directory of the manager.
        name: the group, registered already.
        reclaimers: size of the pool.
    """

    def __init__(self, data_dir: str, name: str, reclaimers: int = RECLAIMERS_DEFAULT) -> None:
        # The loop's thread and Ray's threads hand over often; the default of 5 ms would show.
        sys.setswitchinterval(0.0005)
        self._name = name
        view = RegistryView(data_dir)
        self._service = GroupService(view, name, RayEraser(reclaimers), self._end)

    def __repr__(self) -> str:
        return f"InstanceGroup({self._name})"

    async def submit(self, requests: Sequence[Request]) -> Answers:
        """One reply or one `KvcmError` value for each request, in order."""
        return await asyncio.wrap_future(self._service.submit(requests))

    async def refresh(self) -> None:
        """Read the registry again: configuration, storages, instances."""
        await asyncio.wrap_future(self._service.refresh())

    async def retire(self) -> None:
        """Erase the instances that are not registered (any more); before the actor is removed."""
        await asyncio.wrap_future(self._service.retire())

    async def usage(self) -> dict[str, Any]:
        usage = await asyncio.wrap_future(self._service.usage())
        return {**usage, "pid": os.getpid()}

    def _end(self, why: str) -> None:
        log.error("%r: %s; ending process %d", self, why, os.getpid())
        os._exit(END_EXIT_CODE)


def get_or_create(data_dir: str, name: str, reclaimers: int) -> Any:
    """Handle of the group's actor, which is made if there is none."""
    name_of_actor = group_actor_name(name)
    return detached.get_or_create(GroupActor, name_of_actor, data_dir, name, reclaimers, max_concurrency=1000)
