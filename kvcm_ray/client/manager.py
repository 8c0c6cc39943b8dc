"""Changes to the manager that runs on a data directory now, whatever becomes of it.

``manager.json`` names it. As long as that is the manager whose Ray this process is in, its actors are
called; else, and in a process without Ray always, its URL is. The file is read again every
`LOOK_EVERY_S`, and at once when nothing listens at the URL: a manager that was started again, on another
port, is found by the very call that missed the old one. While none runs a change fails at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvcm_ray.actors import paths
from kvcm_ray.actors.join import joined_manager
from kvcm_ray.client.backend import Channel, NewBlocks
from kvcm_ray.client.credentials import Credentials
from kvcm_ray.client.http import HttpBackend, NotReached
from kvcm_ray.client.results import WritePlan
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import (
    Keys,
    Leased,
    PinBlocks,
    Pinned,
    Removed,
    Touch,
    TrimInstance,
    UnpinBlocks,
    WriteFinished,
)
from kvcm_ray.errors import Unavailable

T = TypeVar("T")
LOOK_EVERY_S = 0.25


def manager_facts(data_dir: Path) -> dict[str, Any]:
    """What ``manager.json`` says. Raises Unavailable."""
    file = paths.manager_file(data_dir)
    try:
        facts = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise Unavailable(f"no manager runs on {data_dir} ({file} is missing)") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"cannot read {file}: {error}") from error
    if not isinstance(facts, dict):
        raise Unavailable(f"{file} holds no JSON object")
    return facts


def manager_id(data_dir: Path) -> str:
    """Of the manager that runs there; "" if none does."""
    try:
        return str(manager_facts(data_dir).get("manager_id", ""))
    except Unavailable:
        return ""


class ManagerChannel:
    """`Channel` to the manager of a data directory; see `kvcm_ray.client.backend`. Thread-safe.

    Args:
        data_dir: of the manager, on this node.
        blocking: see `kvcm_ray.client.runtime`.
        credentials: shown to the manager's URL.
        actors: a channel to the actors of the manager whose Ray this process is in; None without Ray.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        blocking: bool,
        credentials: Credentials | None = None,
        actors: Channel | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._blocking = blocking
        self._credentials = credentials
        self._actors = actors
        self._actors_of = joined_manager(data_dir) or manager_id(data_dir) if actors else ""
        self._http: dict[str, HttpBackend] = {}  #: by URL; an earlier one may be in use by other threads
        self._lock = threading.Lock()
        self._look_at = 0.0
        self._now: Channel | Unavailable = Unavailable("")

    async def close(self) -> None:
        for http in self._http.values():
            await http.close()

    # --------------------------------------------------------------------------------- changes

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        return await self._ask(lambda to, left_s: to.register(info, left_s), timeout_s)

    async def lease(self, info: InstanceInfo, keys: Keys, lease_s: float, timeout_s: float) -> Leased:
        return await self._ask(lambda to, left_s: to.lease(info, keys, lease_s, left_s), timeout_s)

    async def start_write(self, info: InstanceInfo, new: NewBlocks, timeout_s: float) -> WritePlan:
        return await self._ask(lambda to, left_s: to.start_write(info, new, left_s), timeout_s)

    async def finish_write(
        self, info: InstanceInfo, session_id: str, success: BlockMask, timeout_s: float
    ) -> WriteFinished:
        return await self._ask(
            lambda to, left_s: to.finish_write(info, session_id, success, left_s), timeout_s
        )

    async def remove(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Removed:
        return await self._ask(lambda to, left_s: to.remove(info, keys, left_s), timeout_s)

    async def trim(self, info: InstanceInfo, what: TrimInstance, timeout_s: float) -> Removed:
        return await self._ask(lambda to, left_s: to.trim(info, what, left_s), timeout_s)

    async def pin(self, info: InstanceInfo, what: PinBlocks | UnpinBlocks, timeout_s: float) -> Pinned:
        return await self._ask(lambda to, left_s: to.pin(info, what, left_s), timeout_s)

    def tell(self, group: str, touches: Sequence[Touch], timeout_s: float) -> None:
        try:
            self._channel().tell(group, touches, timeout_s)
        except NotReached:
            self._channel(look=True).tell(group, touches, timeout_s)

    # ------------------------------------------------------------------------------- internals

    async def _ask(self, call: Callable[[Channel, float], Awaitable[T]], timeout_s: float) -> T:
        """`call` with the manager that runs now, and once more if that one is another than was thought."""
        end_s = time.monotonic() + timeout_s
        used = self._channel()
        try:
            return await call(used, timeout_s)
        except NotReached:  # nothing was sent
            now = self._channel(look=True)
            if now is used:
                raise
            return await call(now, max(0.001, end_s - time.monotonic()))

    def _channel(self, *, look: bool = False) -> Channel:
        """Raises Unavailable while no manager runs."""
        with self._lock:
            now_s = time.monotonic()
            if look or now_s >= self._look_at or isinstance(self._now, Unavailable):
                self._look_at = now_s + LOOK_EVERY_S
                self._now = self._find()
            if isinstance(self._now, Unavailable):
                raise Unavailable(self._now.message)
            return self._now

    def _find(self) -> Channel | Unavailable:
        try:
            facts = manager_facts(self._data_dir)
        except Unavailable as error:
            return self._actors or error
        if self._actors is not None and facts.get("manager_id", "") == self._actors_of:
            return self._actors
        url = str(facts.get("url", ""))
        if not url:
            return Unavailable(f"no manager answers for {self._data_dir}: its manager.json has no url")
        if url not in self._http:
            self._http[url] = HttpBackend(url, blocking=self._blocking, credentials=self._credentials)
        return self._http[url]
