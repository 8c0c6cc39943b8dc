"""What the HTTP handlers need of a manager, and the two ways to get it.

Reads (instances, storages, the prefix index) happen in this process without an RPC. Changes go to
the registry actor and the group actors through their handles. `touch` reports read traffic back in
batches, in the background, and drops reports rather than queue them without bound.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig
from kvcm_ray.core.requests import Keys, Reply, Request, Touch
from kvcm_ray.errors import (
    GroupNotFound,
    InstanceNotFound,
    KvcmError,
    NotFound,
    Unavailable,
)
from kvcm_ray.index import IndexReader
from kvcm_ray.serve_app.locations import LocationEncoder
from kvcm_ray.serve_app.sealing import Sealer

TOUCH_KEYS_MAX = 262_144  #: found blocks in one report; lookups beyond them are not reported
TOUCH_PERIOD_S = 0.05
ENCODERS_MAX = 4096
READERS_MAX = 512  #: open indexes of this process
REFRESH_PERIOD_S = 0.5  #: how often a reader looks whether its index was replaced


@dataclass(slots=True)
class _Report:
    """Lookups of one instance since the last report."""

    keys: list[Keys] = field(default_factory=list)
    blocks: int = 0
    lookups: int = 0


class Backend(ABC):
    """Access to one manager.

    Args:
        view: the registry's facts, read in this process.
    """

    def __init__(self, view: RegistryView) -> None:
        self.view = view
        self.sealer = Sealer()
        self._readers: dict[str, IndexReader] = {}
        self._checked_at: dict[str, float] = {}
        self._encoders: dict[str, LocationEncoder] = {}
        self._reports: dict[tuple[str, str], _Report] = {}
        self._flushing: asyncio.Task[None] | None = None
        self.touches_dropped = 0

    # ----------------------------------------------------------------------- reads without an RPC

    def storages(self) -> Mapping[str, StorageConfig]:
        return self.view.storages()

    def groups(self) -> Mapping[str, InstanceGroup]:
        return self.view.groups()

    def instances(self) -> Mapping[str, InstanceInfo]:
        return self.view.instances()

    def reader(self, info: InstanceInfo) -> IndexReader:
        """The instance's index. Raises `Unavailable` while its group has not made it yet."""
        reader = self._readers.get(info.uid)
        now = time.monotonic()
        if reader is not None and now - self._checked_at[info.uid] < REFRESH_PERIOD_S:
            return reader
        if reader is not None and not reader.refresh():
            self._readers.pop(info.uid).close()
            reader = None
        if reader is None:
            reader = self._open_reader(info)
        self._checked_at[info.uid] = now
        return reader

    def _open_reader(self, info: InstanceInfo) -> IndexReader:
        if len(self._readers) >= READERS_MAX:
            for stale in [uid for uid in self._readers if uid != info.uid]:
                self._readers.pop(stale).close()
        try:
            reader = IndexReader(self.view.index_path(info))
        except NotFound as error:
            raise Unavailable(f"the index of {info.instance_id!r} is not open yet: {error}") from error
        self._readers[info.uid] = reader
        return reader

    def instance(self, instance_id: str) -> InstanceInfo:
        """Raises `InstanceNotFound` if no instance of that id is registered."""
        if not instance_id:
            raise InstanceNotFound("instance_id is empty")
        info = self.view.instances().get(instance_id)
        if info is None:
            raise InstanceNotFound(f"instance {instance_id!r} is not registered")
        return info

    def group(self, name: str) -> InstanceGroup:
        group = self.groups().get(name)
        if group is None:
            raise GroupNotFound(f"no instance group is named {name!r}")
        return group

    async def seal(
        self, info: InstanceInfo, session_id: str, success: BlockMask, storages: Mapping[str, StorageConfig]
    ) -> None:
        """Write the headers that successful blocks of a session still lack; see `sealing`."""
        with suppress(Unavailable):  # no index yet: no session either
            await self.sealer.seal(self.reader(info), self.encoder(info), storages, session_id, success)

    def encoder(self, info: InstanceInfo) -> LocationEncoder:
        encoder = self._encoders.get(info.uid)
        if encoder is None:
            if len(self._encoders) >= ENCODERS_MAX:
                self._encoders.clear()
            encoder = self._encoders[info.uid] = LocationEncoder(info)
        return encoder

    # --------------------------------------------------------------------------------- by actors

    @abstractmethod
    async def call(self, info: InstanceInfo, request: Request) -> Reply:
        """Ask the instance's group. Raises a `KvcmError`."""

    @abstractmethod
    async def registry(self, method: str, *args: Any) -> Any:
        """Call a method of the registry. Raises a `KvcmError`."""

    @abstractmethod
    async def usage(self, group: str) -> dict[str, Any]:
        """`GroupState.usage` of a group. Raises a `KvcmError`."""

    @abstractmethod
    async def health(self) -> dict[str, str]:
        """Each dependency and "ok", or what is wrong with it."""

    # ------------------------------------------------------------------------------------ touches

    def touch(self, info: InstanceInfo, keys: Keys, lookups: int) -> None:
        """Report that `lookups` blocks were looked up and the prefix `keys` was found."""
        name = (info.instance_group_name, info.instance_id)
        report = self._reports.get(name)
        if report is None:
            report = self._reports[name] = _Report()
        if report.blocks + len(keys) > TOUCH_KEYS_MAX:
            self.touches_dropped += 1
            return
        report.keys.append(keys)
        report.blocks += len(keys)
        report.lookups += lookups
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        """Send what gathered; ends when nothing is pending."""
        while self._reports:
            await asyncio.sleep(TOUCH_PERIOD_S)
            await self._send_reports()

    async def _send_reports(self) -> None:
        """One request for each instance. A report that cannot be sent is lost.

        Prefixes one after the other are as good as one by one: a group takes the keys of a report
        last to first, so a parent still counts as touched after its children.
        """
        reports, self._reports = self._reports, {}
        for (group, instance_id), report in reports.items():
            keys = np.concatenate(report.keys)
            try:
                await self.send_touch(group, Touch(instance_id, keys, report.lookups))
            except KvcmError:
                self.touches_dropped += len(report.keys)

    @abstractmethod
    async def send_touch(self, group: str, touch: Touch) -> None: ...

    async def flush_touches(self) -> None:
        """Wait until the reports so far were sent."""
        if self._flushing is not None:
            await self._flushing
