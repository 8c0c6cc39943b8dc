"""A whole manager in one process: the real registry, group loops, reclaimer, indexes and storages.

What is missing against a running manager is only Ray: the registry and the reclaimer have a thread
each instead of an actor, and every group has the loop thread that it has in its actor. Used by the
HTTP tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import Any

from kvcm_ray.actors.chores import ErasureDone, MoveDone
from kvcm_ray.actors.reclaimer import ReclaimerBody
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.service import GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.requests import Flags, Reply, Request, StartWrite, Touch
from kvcm_ray.errors import KvcmError, Unavailable
from kvcm_ray.serve_app.backend import Backend


def _end(why: str) -> None:
    """There is no process of the group's own to end: its loop ends."""
    raise Unavailable(why)


class LocalGroups:
    """`GroupControl` and `Pool` without actors."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._reclaimer = ThreadPoolExecutor(1, thread_name_prefix="reclaimer")
        self.services: dict[str, GroupService] = {}

    def open_view(self) -> None:
        """Once the registry exists."""
        self._view = RegistryView(self._data_dir)
        self._body = ReclaimerBody(self._view)

    def refresh(self, group: str) -> None:
        if group not in self.services:
            self.services[group] = GroupService(self._view, group, self, _end)
        self.services[group].refresh().result()

    def remove(self, group: str) -> None:
        service = self.services.pop(group, None)
        if service is not None:
            service.retire().result()
            service.stop()

    def resize(self, reclaimers: int) -> None:
        """There is one, whatever is asked for."""

    def erase(
        self, number: int, size: int, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        def finished(future: Future[tuple[list[int], str]]) -> None:
            done(*future.result())

        self._reclaimer.submit(self._body.erase, index_path, trash_ids).add_done_callback(finished)

    def move(self, number: int, size: int, index_path: str, session_id: str, done: MoveDone) -> None:
        def finished(future: Future[dict[str, Flags]]) -> None:
            done(future.result().get(session_id), "")

        self._reclaimer.submit(self._body.move, index_path, [session_id]).add_done_callback(finished)

    def close(self) -> None:
        for service in self.services.values():
            service.stop()
        self._reclaimer.shutdown()
        self._view.close()


class LocalBackend(Backend):
    """Backend of the HTTP application on a manager in this process."""

    def __init__(self, data_dir: Path) -> None:
        self.groups_control = LocalGroups(data_dir)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._registry = self._thread.submit(RegistryBody, data_dir, self.groups_control).result()
        self.groups_control.open_view()
        self._thread.submit(self._registry.refresh_all).result()
        super().__init__(RegistryView(data_dir))
        self.touched: list[Touch] = []  #: every report that was sent, for tests
        self.wait_ms = 5_000  #: that a write may wait for room
        self.failing = False  #: makes every call fail, as if the actors were gone

    async def call(self, info: InstanceInfo, request: Request) -> Reply:
        reply = (await self._submit(info.instance_group_name, [request]))[0]
        if isinstance(request, StartWrite) and isinstance(reply, KvcmError):
            reply = await self._wait_for_room(info, request, reply)
        if isinstance(reply, KvcmError):
            raise reply
        return reply

    async def _wait_for_room(
        self, info: InstanceInfo, request: StartWrite, refusal: KvcmError
    ) -> Reply | KvcmError:
        """As `GroupHandle` does."""
        if want_of(info.instance_id, refusal) is None:
            return refusal
        service = self._service(info.instance_group_name)
        return await asyncio.wrap_future(service.submit_waiting(request, self.wait_ms))

    async def registry(self, method: str, *args: Any) -> Any:
        self._check()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._registry.call, token_hex(16), method, *args)

    async def ask(self, group: str, method: str, *args: Any) -> dict[str, Any]:
        future: Future[dict[str, Any]] = getattr(self._service(group), method)(*args)
        return await asyncio.wrap_future(future)

    async def health(self) -> dict[str, str]:
        return {"registry": "unreachable" if self.failing else "ok"}

    async def send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        self.touched += touches
        await self._submit(group, touches)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self.sealer.close()
        self.groups_control.close()
        self._thread.submit(self._registry.close).result()
        self._thread.shutdown()
        self.view.close()

    async def _submit(self, group: str, requests: Sequence[Request]) -> list[Reply | KvcmError]:
        return await asyncio.wrap_future(self._service(group).submit(requests))

    def _service(self, group: str) -> GroupService:
        self._check()
        service = self.groups_control.services.get(group)
        if service is None:
            raise Unavailable(f"group {group!r} has no actor")
        return service

    def _check(self) -> None:
        if self.failing:
            raise Unavailable("the manager cannot be reached")
