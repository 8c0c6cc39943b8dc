"""Replaying a trace against a live manager with real bytes, every byte read verified.

Each request looks up its leading hits, reads and checks them, and writes what is missing; of a trace that
tells look-ups and writes apart, each does only that. Counts are those of a replay one request at a time:
look-ups happen in the trace's order, and a request that shares a block with writes still in flight waits
for them. Only then are up to `window` requests' writes under way at once.

What is evicted depends on the order in which the manager hears of reads and writes. With a window of 1
it hears of them in the trace's order: what was read is reported before the next write begins (`flush`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.client import AsyncInstance, Match
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import KvcmError
from kvcm_ray.traces.formats import READ, WRITE
from kvcm_ray.traces.pattern import block_pattern, wrong_bytes
from kvcm_ray.traces.reader import TraceRequest

CALLS = ("lookup", "read", "start_write", "write", "finish_write")


@dataclass(slots=True)
class Report:
    """What a replay saw. Times are kept per call, in seconds."""

    requests: int = 0
    accessed_blocks: int = 0
    hit_blocks: int = 0
    written_blocks: int = 0
    wrong_bytes: int = 0  #: of blocks that the cache said it read
    unreadable_blocks: int = 0  #: found by the look-up, yet not readable
    refused_blocks: int = 0  #: not stored: no room, or a failure
    lost_blocks: int | None = None  #: see `Replay.count_lost`; None if nobody asked
    bytes_written: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    first_error: KvcmError | None = None
    times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CALLS})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; ``lookup_p50_us`` and so on for each of `CALLS`, None without calls."""
        plain: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "requests", "accessed_blocks", "hit_blocks", "written_blocks", "wrong_bytes",
                "unreadable_blocks", "refused_blocks", "lost_blocks", "bytes_written", "bytes_read",
                "seconds",
            )
        }  # fmt: skip
        plain["seconds"] = round(self.seconds, 3)
        plain["requests_per_s"] = round(self.requests / max(self.seconds, 1e-9), 1)
        plain["hit_ratio"] = round(self.hit_blocks / max(1, self.accessed_blocks), 6)
        for name in ("bytes_written", "bytes_read"):
            plain[f"{name}_per_s"] = int(getattr(self, name) / max(self.seconds, 1e-9))
        for name, values in self.times.items():
            for percent in (50, 99):
                us = round(float(np.percentile(values, percent)) * 1e6, 1) if values else None
                plain[f"{name}_p{percent}_us"] = us
        plain["first_error"] = self.first_error.to_dict() if self.first_error else None
        return plain


@dataclass(slots=True)
class Replay:
    """One replay of `requests` into `instance`, whose only spec has `block_bytes` bytes.

    `speed` is a factor on the trace's own pace; None is as fast as it goes. `until_s` (monotonic)
    ends it early. `progress` is called after each request. `flush` is awaited before each write, to
    tell the manager of the reads so far. With `partial_tail` the writes say which prompts fill their
    last block only partly.
    """

    instance: AsyncInstance
    block_bytes: int
    window: int = 8
    speed: float | None = None
    until_s: float | None = None
    progress: Callable[[Report], None] | None = None
    flush: Callable[[], Awaitable[None]] | None = None
    partial_tail: bool = False
    report: Report = field(default_factory=Report)
    _writing: dict[int, asyncio.Task[None]] = field(default_factory=dict)  #: by key
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _acknowledged: list[Keys] = field(default_factory=list)  #: of each write that was

    async def run(self, requests: Iterable[TraceRequest]) -> Report:
        """Replay them all; may be called again to go on with more."""
        begin_s = time.monotonic()
        first_s: float | None = None
        before_s = self.report.seconds
        try:
            for request in requests:
                if self.until_s is not None and time.monotonic() >= self.until_s:
                    break
                first_s = request.timestamp_s if first_s is None else first_s
                await self._pace(begin_s, request.timestamp_s - first_s)
                await self._one(request)
                self.report.seconds = before_s + time.monotonic() - begin_s
                if self.progress:
                    self.progress(self.report)
            await self._drain()
        finally:
            for task in self._tasks:
                task.cancel()
        self.report.seconds = before_s + time.monotonic() - begin_s
        return self.report

    async def count_lost(self) -> None:
        """Count the blocks whose write was acknowledged and that are not there now, evicted ones included.

        Raises:
            KvcmError: they cannot be looked up.
        """
        lost = 0
        for keys in self._acknowledged:
            lost += int((~(await self.instance.lookup(keys)).flags).sum())
        self.report.lost_blocks = lost

    async def _pace(self, begin_s: float, offset_s: float) -> None:
        if self.speed is not None:
            wait_s = begin_s + offset_s / self.speed - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)

    async def _one(self, request: TraceRequest) -> None:
        keys = request.keys.tolist()
        while waiting := {self._writing[key] for key in keys if key in self._writing}:
            await asyncio.wait(waiting)
            self._reap()
        found = await self._look_up(request) if request.op & READ else None
        self.report.requests += 1
        while len(self._tasks) >= self.window:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._reap()
        new = keys[found.length if found else 0 :] if request.op & WRITE else []
        task = asyncio.create_task(self._move(request, found, new))
        self._tasks.add(task)
        for key in new:
            self._writing[key] = task
        if self.window == 1:
            await self._drain()

    async def _look_up(self, request: TraceRequest) -> Match:
        with _timed(self.report, "lookup"):
            found = await self.instance.match(request.keys)
        self._note(found.error)
        self.report.accessed_blocks += len(request.keys)
        self.report.hit_blocks += found.length
        return found

    async def _move(self, request: TraceRequest, found: Match | None, new: list[int]) -> None:
        try:
            if found is not None and found.length:
                await self._read(found)
            if new:
                await self._write(request)
        finally:
            for key in new:
                self._writing.pop(key, None)

    async def _read(self, found: Match) -> None:
        out = np.empty((found.length, self.block_bytes), np.uint8)
        with _timed(self.report, "read"):
            got = await self.instance.read(found.blocks, out)
        self._note(got.error)
        good = got.flags
        self.report.unreadable_blocks += int((~good).sum())
        self.report.bytes_read += int(good.sum()) * self.block_bytes
        keys, rows = found.blocks.keys, out
        if not good.all():
            keys, rows = keys[good], out[good]
        self.report.wrong_bytes += wrong_bytes(keys, rows)

    async def _write(self, request: TraceRequest) -> None:
        new = 0
        committed = 0
        tail = self.partial_tail and request.partial_tail
        try:
            if self.flush:
                await self.flush()
            with _timed(self.report, "start_write"):
                session = await self.instance.start_write(request.keys, partial_tail=tail)
            new = len(session.todo)
            if new:
                rows = block_pattern(session.plan.keys, self.block_bytes)
                with _timed(self.report, "write"):
                    moved = await session.write(rows)
                self._note(moved.error)
                with _timed(self.report, "finish_write"):
                    committed = (await session.finish()).committed
                stored = session.plan.keys[session.written]
                if committed == len(stored):  # else it is not known which
                    self._acknowledged.append(stored)
        except KvcmError as error:
            self._note(error)
            new = new or len(request.keys)  # how many were new is not known
        self.report.written_blocks += committed
        self.report.bytes_written += committed * self.block_bytes
        self.report.refused_blocks += new - committed

    async def _drain(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._reap()

    def _reap(self) -> None:
        """Forget tasks that ended; one that failed is our bug and is raised."""
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()

    def _note(self, error: KvcmError | None) -> None:
        self.report.first_error = self.report.first_error or error


class _timed:
    """Adds the time within to a report. (A class: a generator costs more than some calls here.)"""

    __slots__ = ("_begin", "_values")

    def __init__(self, report: Report, name: str) -> None:
        self._values = report.times[name]

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._values.append(time.perf_counter() - self._begin)
