"""The blocking client: the coroutines of `aio`, `instance` and `session`, driven to their end.

Only signatures are here; each method is documented at its namesake. Threads may share all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvcm_ray.client.aio import AsyncClient
from kvcm_ray.client.buffers import SpecBuffers
from kvcm_ray.client.instance import AsyncInstance, KeyList
from kvcm_ray.client.results import GetResult, Lookup, Match, PutResult, WritePlan
from kvcm_ray.client.runtime import drive
from kvcm_ray.client.session import AsyncWriteSession, Success
from kvcm_ray.client.transfer import Blocks, Moved
from kvcm_ray.core.model import InstanceInfo, ModelDeployment
from kvcm_ray.core.requests import BlockLocations, Flags, Keys, Pinned, WriteFinished


class WriteSession:
    """See `AsyncWriteSession`; a ``with`` block finishes it, or fails it on an exception."""

    def __init__(self, session: AsyncWriteSession) -> None:
        self._session = session

    @property
    def plan(self) -> WritePlan:
        return self._session.plan

    @property
    def session_id(self) -> str:
        return self._session.session_id

    @property
    def mask(self) -> Flags:
        return self._session.mask

    @property
    def todo(self) -> npt.NDArray[np.intp]:
        return self._session.todo

    @property
    def locations(self) -> BlockLocations:
        return self._session.locations

    @property
    def written(self) -> Flags:
        return self._session.written

    def uris(self, spec: str) -> list[str]:
        return self._session.uris(spec)

    def write(self, buffers: SpecBuffers, spec: str | None = None) -> Moved:
        return drive(self._session.write(buffers, spec))

    def finish(self, success: Success | None = None) -> WriteFinished:
        return drive(self._session.finish(success))

    def __enter__(self) -> WriteSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        drive(self._session.__aexit__(kind, error, trace))

    def __repr__(self) -> str:
        return repr(self._session).replace("Async", "", 1)


class Instance:
    """See `AsyncInstance`."""

    def __init__(self, instance: AsyncInstance) -> None:
        self._instance = instance

    @property
    def info(self) -> InstanceInfo:
        return self._instance.info

    @property
    def instance_id(self) -> str:
        return self._instance.instance_id

    @property
    def specs(self) -> dict[str, int]:
        return self._instance.specs

    def block_keys(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> Keys:
        return self._instance.block_keys(tokens)

    def match(
        self, keys: KeyList, *, limit: int | None = None, lease_s: float = 0, timeout_s: float = 2.0
    ) -> Match:
        return drive(self._instance.match(keys, limit=limit, lease_s=lease_s, timeout_s=timeout_s))

    def lease(self, keys: KeyList, seconds: float, *, timeout_s: float = 2.0) -> int:
        return drive(self._instance.lease(keys, seconds, timeout_s=timeout_s))

    def match_length(self, keys: KeyList, *, limit: int | None = None, timeout_s: float = 2.0) -> int:
        return drive(self._instance.match_length(keys, limit=limit, timeout_s=timeout_s))

    def lookup(self, keys: KeyList, *, timeout_s: float = 2.0) -> Lookup:
        return drive(self._instance.lookup(keys, timeout_s=timeout_s))

    def start_write(
        self,
        keys: KeyList,
        timeout_s: float = 30,
        spec_groups: Sequence[str] | None = None,
        *,
        partial_tail: bool = False,
    ) -> WriteSession:
        started = self._instance.start_write(keys, timeout_s, spec_groups, partial_tail=partial_tail)
        return WriteSession(drive(started))

    def write(self, plan: WritePlan, buffers: SpecBuffers, spec: str | None = None) -> Moved:
        return drive(self._instance.write(plan, buffers, spec))

    def put(
        self,
        keys: KeyList,
        buffers: SpecBuffers,
        *,
        spec: str | None = None,
        partial_tail: bool = False,
        timeout_s: float = 30,
    ) -> PutResult:
        return drive(
            self._instance.put(keys, buffers, spec=spec, partial_tail=partial_tail, timeout_s=timeout_s)
        )

    def get(
        self,
        keys: KeyList,
        buffers: SpecBuffers,
        *,
        spec: str | None = None,
        deadline_s: float | None = 2.0,
    ) -> GetResult:
        return drive(self._instance.get(keys, buffers, spec=spec, deadline_s=deadline_s))

    def read(
        self,
        blocks: Blocks,
        buffers: SpecBuffers,
        *,
        spec: str | None = None,
        deadline_s: float | None = 2.0,
    ) -> GetResult:
        return drive(self._instance.read(blocks, buffers, spec=spec, deadline_s=deadline_s))

    def pin(self, name: str, keys: KeyList, until_s: int = 0) -> Pinned:
        return drive(self._instance.pin(name, keys, until_s))

    def unpin(self, name: str) -> Pinned:
        return drive(self._instance.unpin(name))

    def remove(self, keys: KeyList) -> int:
        return drive(self._instance.remove(keys))

    def trim(self, begin_s: int = 0, end_s: int = 2**32 - 1, *, drop_sessions: bool = False) -> int:
        return drive(self._instance.trim(begin_s, end_s, drop_sessions=drop_sessions))

    def __repr__(self) -> str:
        return repr(self._instance).replace("Async", "", 1)


class Client:
    """See `AsyncClient`; made by `kvcm_ray.client.connect`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def address(self) -> str:
        return self._client.address

    def register(
        self,
        instance_id: str,
        group: str = "default",
        *,
        block_size: int,
        specs: Mapping[str, int],
        model_name: str = "unnamed",
        dtype: str = "bytes",
        spec_groups: Mapping[str, Sequence[str]] | None = None,
        deployment: ModelDeployment | None = None,
        model_version: str = "",
        supersedes: str = "",
        handover_s: int = 0,
    ) -> Instance:
        found = self._client.register(
            instance_id,
            group,
            block_size=block_size,
            specs=specs,
            model_name=model_name,
            dtype=dtype,
            spec_groups=spec_groups,
            deployment=deployment,
            model_version=model_version,
            supersedes=supersedes,
            handover_s=handover_s,
        )
        return Instance(drive(found))

    def instance(self, instance_id: str) -> Instance:
        return Instance(drive(self._client.instance(instance_id)))

    def flush_touches(self) -> None:
        drive(self._client.flush_touches())

    def close(self) -> None:
        drive(self._client.close())

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._client).replace("Async", "", 1)


def _document(blocking: type, coroutine: type) -> None:
    """Give each method the text of its namesake, for ``help()``."""
    for name, method in vars(blocking).items():
        if callable(method) and not name.startswith("_") and not method.__doc__:
            method.__doc__ = getattr(coroutine, name).__doc__


for _blocking, _coroutine in (
    (WriteSession, AsyncWriteSession),
    (Instance, AsyncInstance),
    (Client, AsyncClient),
):
    _document(_blocking, _coroutine)
