"""The metadata side of the client: how it learns where blocks are, and reserves room for new ones.

    http.HttpBackend        all by HTTP
    indexed.IndexBackend    reads the index in this process; changes go through a `Channel`:
      actors.ActorChannel     actor calls, from a process in the manager's Ray
      manager.ManagerChannel  to the manager that runs now: by actor calls if it can, else by HTTP

All answer in the same terms. With `blocking` true their coroutines never suspend (see `runtime`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvcm_ray.client.results import Lookup, WritePlan
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import (
    BlockLocations,
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

CALL_TIMEOUT_S = 15.0  #: of a metadata call whose caller has no deadline of its own
NO_SEGMENT = 2**32 - 1  #: in locations: there is none; no such segment exists


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """What a write session is asked for; see `Instance.start_write`."""

    keys: Keys
    lease_s: float
    spec_groups: tuple[str, ...] = ()
    partial_tail: bool = False


class Changes(Protocol):
    """What is changed at the manager. All calls raise `KvcmError` only; `Unavailable` once
    `timeout_s` has passed."""

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        """Register an instance, or find it registered with the same shape."""

    async def lease(self, info: InstanceInfo, keys: Keys, lease_s: float, timeout_s: float) -> Leased: ...

    async def start_write(self, info: InstanceInfo, new: NewBlocks, timeout_s: float) -> WritePlan:
        """A write that finds no room waits for it within `timeout_s`, if waiting may help."""

    async def finish_write(
        self, info: InstanceInfo, session_id: str, success: BlockMask, timeout_s: float
    ) -> WriteFinished: ...

    async def remove(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Removed:
        """`Removed.blocks` is -1 where the protocol does not say how many."""

    async def trim(self, info: InstanceInfo, what: TrimInstance, timeout_s: float) -> Removed: ...

    async def pin(self, info: InstanceInfo, what: PinBlocks | UnpinBlocks, timeout_s: float) -> Pinned: ...

    async def close(self) -> None: ...


class Channel(Changes, Protocol):
    """A way to a manager, for those who read the index themselves."""

    def tell(self, group: str, touches: Sequence[Touch], timeout_s: float) -> None:
        """Report look-ups and wait until the group knows. Blocks, so it is for a thread of its own."""


class Backend(Changes, Protocol):
    """All that an instance is asked and told."""

    @property
    def address(self) -> str:
        """What it is connected to, for messages."""

    async def instance(self, instance_id: str, timeout_s: float) -> InstanceInfo: ...

    async def match_length(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> int: ...

    async def match(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Blocks:
        """The blocks of the leading run of present keys."""

    async def lookup(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Lookup: ...

    async def elsewhere(self, info: InstanceInfo, tried: Blocks, timeout_s: float) -> Blocks:
        """The same keys in the same order, at another place than they were looked for: they were moved
        since, or have a copy. `NO_SEGMENT` for those that have none."""

    async def flush_touches(self) -> None:
        """Wait until the manager has been told of all reads so far."""


def new_id() -> str:
    """A session or event id: 32 characters of [a-z0-9]."""
    return secrets.token_hex(16)


def no_blocks() -> Blocks:
    return Blocks(np.zeros(0, np.int64), BlockLocations.empty(), {}, {})
