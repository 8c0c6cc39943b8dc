"""What the HTTP handlers need of a manager, and the two ways to get it.

Reads (instances, storages, the prefix index) happen in this process without an RPC. Changes go to
the registry actor and the group actors through their handles. `touch` reports read traffic back in
batches, in the background, and drops reports rather than queue them without bound.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig
from kvcm_ray.core.requests import Reply, Request, Touch
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

TOUCH_KEYS_MAX = 262_144  #: keys, of all instances, that wait to be reported
TOUCHES_MAX = 4_096  #: look-ups that wait to be reported; those beyond either bound are not
TOUCH_PERIOD_S = 0.05
ENCODERS_MAX = 4096
READERS_MAX = 512  #: open indexes of this process
DAMAGE_PERIOD_S = 5.0  #: how often damaged records that readers met are counted
REFRESH_PERIOD_S = 0.5  #: how often a reader looks whether its index was replaced


def unknown_instance(instance_id: str) -> InstanceNotFound:
    """The one refusal of an instance that does not exist, or not for the caller."""
    return InstanceNotFound(f"instance {instance_id!r} is not registered")


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
        self._touches: list[tuple[str, Touch]] = []  #: with the group, in the order of the reads
        self._touched_keys = 0
        self._flushing: asyncio.Task[None] | None = None
        self.touches_dropped = 0

        #: Takes (what, group, how many) for the metrics; see `metrics.Metrics.add`.
        self.count: Callable[[str, str, int], None] = lambda what, group, many: None
        self._damage: dict[str, int] = {}  #: damaged records that each reader has met and that were counted
        self._damage_due_s = 0.0

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
            raise unknown_instance(instance_id)
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
    async def ask(self, group: str, method: str, *args: Any) -> dict[str, Any]:
        """What a method of the group's actor answers: `usage`, `capacity` ... Raises a `KvcmError`."""

    @abstractmethod
    async def health(self) -> dict[str, str]:
        """Each dependency and "ok", or what is wrong with it."""

    # ------------------------------------------------------------------------------------ touches

    def touch(self, info: InstanceInfo, touch: Touch) -> None:
        """Report a look-up to the group of `info`, soon."""
        count = sum(len(keys) for keys in (touch.keys, touch.missed, touch.held) if keys is not None)
        if self._touched_keys + count > TOUCH_KEYS_MAX or len(self._touches) >= TOUCHES_MAX:
            self._drop_touches(info.instance_group_name, 1)
            return
        self._touches.append((info.instance_group_name, touch))
        self._touched_keys += count
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        """Send what gathered; ends when nothing is pending."""
        while self._touches:
            await asyncio.sleep(TOUCH_PERIOD_S)
            await self._send_touches()
            if time.monotonic() >= self._damage_due_s:
                self._damage_due_s = time.monotonic() + DAMAGE_PERIOD_S
                self.count_damage()

    async def _send_touches(self) -> None:
        """A report that cannot be sent is lost."""
        waiting, self._touches, self._touched_keys = self._touches, [], 0
        by_group: dict[str, list[Touch]] = {}
        for group, touch in waiting:
            by_group.setdefault(group, []).append(touch)
        for group, touches in by_group.items():
            try:
                await self.send_touches(group, touches)
            except KvcmError:
                self._drop_touches(group, len(touches))

    def _drop_touches(self, group: str, many: int) -> None:
        self.touches_dropped += many
        self.count("dropped_reports", group, many)

    def commits_seen(self) -> dict[str, int]:
        """The last commit that this process sees, of each instance that it reads."""
        seen = {}
        for info in self.instances().values():
            if (reader := self._readers.get(info.uid)) is not None:
                with suppress(KvcmError):
                    seen[info.instance_id] = reader.commit_seq()
        return seen

    def count_damage(self) -> None:
        """Tell the metrics of damaged records that readers here met since the last time."""
        for info in self.instances().values():
            if (reader := self._readers.get(info.uid)) is None:
                continue
            met, known = reader.corrupt_records, self._damage.get(info.uid, 0)
            if new := met if met < known else met - known:  # a reader that was opened again begins at 0
                self.count("corrupt_records", info.instance_group_name, new)
            self._damage[info.uid] = met

    @abstractmethod
    async def send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        """In this order."""

    async def flush_touches(self) -> None:
        """Wait until the reports so far were sent."""
        if self._flushing is not None:
            await self._flushing
