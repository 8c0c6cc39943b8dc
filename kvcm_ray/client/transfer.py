"""Moving bytes between callers' buffers and the storages that locations name.

Work is cut into groups (one segment, one spec) and those into pieces of some MiB; before each piece
the time is checked. So nothing is written after the lease of its session, and a read ends in time.

A storage that cannot hang (shared memory) is copied straight between its memory and the caller's.
Any other one is read by a pool thread into memory of ours and then copied, unless the caller waits
without limit: a read that was given up must not fill buffers that belong to somebody else by then.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray import tracing
from kvcm_ray.client.buffers import PIECE_BYTES, Rows, select, staging
from kvcm_ray.client.runtime import Pool, Runtime
from kvcm_ray.core.model import Segment, StorageConfig
from kvcm_ray.core.requests import BlockLocations, Flags, Keys
from kvcm_ray.errors import KvcmError, StorageIOError, Unavailable
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

#: No piece of a write begins later than this before the lease ends.
LEASE_MARGIN_S = 0.1

Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks and all it takes to reach their bytes; `keys` and `locations` are parallel."""

    keys: Keys
    locations: BlockLocations
    segments: Mapping[int, Segment]
    storages: Mapping[str, StorageConfig]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, index: Index | Flags | slice) -> Blocks:
        return Blocks(self.keys[index], self.locations.take(index), self.segments, self.storages)


@dataclass(slots=True)
class Moved:
    """What became of a call's blocks: one flag each, and the first trouble, if any."""

    flags: Flags
    error: KvcmError | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks of one call that lie in one segment: their positions in the call, ascending."""

    segment: Segment
    index: Index


def group_by_segment(blocks: Blocks) -> list[Group]:
    """Groups in order of first appearance. Blocks of segments that are not known are left out."""
    segments = blocks.locations.segment
    if len(segments) and (segments == segments[0]).all():  # a prompt's blocks mostly lie together
        only = blocks.segments.get(int(segments[0]))
        return [] if only is None else [Group(only, np.arange(len(segments)))]
    ids, first, inverse = np.unique(segments, return_index=True, return_inverse=True)
    groups = []
    for position in np.argsort(first, kind="stable"):
        segment = blocks.segments.get(int(ids[position]))
        if segment is not None:
            groups.append(Group(segment, np.flatnonzero(inverse == position)))
    return groups


def pieces(index: Index, block_bytes: int) -> Iterator[Index]:
    """`index` in parts of at most `PIECE_BYTES` of blocks, at least one block each."""
    step = max(1, PIECE_BYTES // max(1, block_bytes))
    for start in range(0, len(index), step):
        yield index[start : start + step]


@dataclass(slots=True)
class _Storage:
    config: StorageConfig
    adapter: StorageAdapter
    pool: Pool

    @property
    def may_hang(self) -> bool:
        return not self.config.is_shared_memory


@dataclass(slots=True)
class _Job:
    """The blocks of one group. Filling callers' buffers and being abandoned exclude each other."""

    spec: str
    blocks: Blocks
    rows: Rows
    deadline_s: float | None
    moved: Moved
    group: Group
    storage: _Storage
    abandoned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def abandon(self) -> None:
        with self.lock:
            self.abandoned = True

    def read(self) -> None:
        blocks, group = self.blocks, self.group
        staged = self.storage.may_hang and self.deadline_s is not None
        for index in pieces(group.index, self.block_bytes):
            self._check_time(self.deadline_s)
            rows = select(self.rows, index)
            target = staging(len(index), self.block_bytes) if staged else rows
            flags = self.storage.adapter.read(
                group.segment, self.spec, blocks.locations.slot[index], blocks.keys[index],
                blocks.locations.generation[index], target,
            )  # fmt: skip
            with self.lock:
                if self.abandoned:
                    return
                if staged:
                    _copy(target, rows)
                self.moved.flags[index] = flags

    def write(self) -> None:
        assert self.deadline_s is not None, "a session always has a lease"
        blocks, group = self.blocks, self.group
        for index in pieces(group.index, self.block_bytes):
            self._check_time(self.deadline_s - LEASE_MARGIN_S)
            self.storage.adapter.write(
                group.segment, self.spec, blocks.locations.slot[index], blocks.keys[index],
                blocks.locations.generation[index], select(self.rows, index),
            )  # fmt: skip
            with self.lock:
                if self.abandoned:
                    return
                self.moved.flags[index] = True

    @property
    def block_bytes(self) -> int:
        return next(spec.size for spec in self.group.segment.specs if spec.name == self.spec)

    def _check_time(self, limit_s: float | None) -> None:
        if self.abandoned or (limit_s is not None and time.monotonic() >= limit_s):
            raise Unavailable("the time for this transfer was over before all its blocks were moved")


class Transfer:
    """Opens storages on first use and moves blocks. Safe for use by several threads."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._storages: dict[str, _Storage] = {}

    def close(self) -> None:
        with self._lock:
            storages, self._storages = list(self._storages.values()), {}
        for storage in storages:
            storage.pool.close()
            storage.adapter.close()

    async def read(self, spec: str, blocks: Blocks, out: Rows, deadline_s: float | None) -> Moved:
        """Fill `out`, one row a block; a block that cannot be read, or not in time, is False.

        `deadline_s` is on `time.monotonic()`; None waits without limit.
        """
        with tracing.span("storage read", _about(spec, blocks)):
            return await self._each_group(spec, blocks, out, deadline_s, _Job.read)

    async def write(self, spec: str, blocks: Blocks, rows: Rows, deadline_s: float) -> Moved:
        """Store `rows`, one a block; True for blocks whose bytes and headers are in place.

        No piece is begun within `LEASE_MARGIN_S` of `deadline_s`, the end of the session's lease.
        """
        with tracing.span("storage write", _about(spec, blocks)):
            return await self._each_group(spec, blocks, rows, deadline_s, _Job.write)

    async def _each_group(
        self, spec: str, blocks: Blocks, rows: Rows, deadline_s: float | None,
        work: Callable[[_Job], None],
    ) -> Moved:  # fmt: skip
        """Do `work` for each group; a failure is noted and costs the blocks of its group only."""
        moved = Moved(np.zeros(len(blocks), np.bool_))
        for group in group_by_segment(blocks):
            if all(info.name != spec for info in group.segment.specs):
                continue  # these blocks were written without this spec
            try:
                storage = self._storage(group.segment.storage, blocks.storages)
                job = _Job(spec, blocks, rows, deadline_s, moved, group, storage)
                await self._run(job, functools.partial(work, job))
            except KvcmError as error:
                moved.error = moved.error or error
            except (OSError, MemoryError) as error:
                moved.error = moved.error or StorageIOError(f"{group.segment.path}: {error}")
        return moved

    async def _run(self, job: _Job, work: Callable[[], None]) -> None:
        try:
            if job.storage.may_hang and job.deadline_s is not None:
                left_s = max(0.0, job.deadline_s - time.monotonic())
                await self._runtime.offload(job.storage.pool, work, left_s)
            else:
                size = len(job.group.index) * job.block_bytes
                await self._runtime.local(job.storage.pool, work, size)
        except BaseException:  # a cancelled task included
            job.abandon()
            raise

    def _storage(self, name: str, configs: Mapping[str, StorageConfig]) -> _Storage:
        config = configs.get(name)
        if config is None:
            raise StorageIOError(f"storage {name!r} is not registered (any more)")
        with self._lock:
            storage = self._storages.get(name)
            if storage is None or storage.config != config:
                storage = _Storage(config, open_storage(config), Pool(name))
                self._storages[name] = storage  # an older one lives on while calls use it
            return storage


def _about(spec: str, blocks: Blocks) -> dict[str, Any] | None:
    """What a span says of a transfer."""
    if not tracing.on:
        return None
    storages = sorted({segment.storage for segment in blocks.segments.values()})
    return {"kvcm.spec": spec, "kvcm.blocks": len(blocks), "kvcm.storage": ", ".join(storages)}


def _copy(source: Rows, target: Rows) -> None:
    if isinstance(target, np.ndarray):
        np.copyto(target, source)
        return
    for row, into in zip(source, target, strict=True):
        np.copyto(into, row)
