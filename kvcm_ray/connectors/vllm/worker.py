"""A worker's side: copies blocks between the engine's cache and the tiers, by threads of its own.

Blocks are read into memory of ours, verified, and then copied into the cache; so a read that comes too late
cannot touch blocks that belong to another request by then. A load ends in time, whatever becomes of it. Saves
are copied out of the cache by one thread, in order; the engine computes meanwhile.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.client.backend import Backend
from kvcm_ray.client.instance import AsyncInstance
from kvcm_ray.client.results import GetResult
from kvcm_ray.client.runtime import Pool, SyncRuntime, drive
from kvcm_ray.client.transfer import Blocks, Transfer
from kvcm_ray.connectors.vllm.memory import Bytes, Staging, WorkerMemory
from kvcm_ray.connectors.vllm.node import backend_of
from kvcm_ray.connectors.vllm.orders import Capture, Load, Orders, Plan, Report
from kvcm_ray.connectors.vllm.settings import Settings
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Flags
from kvcm_ray.errors import Corrupt, KvcmError, SegmentMissing

log = logging.getLogger("vllm.kvcm")

PIECE_BYTES = 4 * 1024 * 1024  #: read and copied at a time, so that the copy finds it in the CPU cache


@dataclass(slots=True)
class Moved:
    """Since the last time it was taken."""

    loaded_bytes: int = 0
    loaded_blocks: int = 0
    load_seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    save_seconds: list[float] = field(default_factory=list)
    unsaved_blocks: int = 0


@dataclass(slots=True)
class _Job:
    rows: dict[str, Bytes] | None  #: captured bytes by spec; None: not captured
    buffers: list[Bytes]


class WorkerSide:
    """Args:
    writes: this worker writes its specs (another one holds the same bytes otherwise).
    """

    def __init__(self, settings: Settings, memory: WorkerMemory, *, writes: bool) -> None:
        self._settings = settings
        self._memory = memory
        self._writes = writes
        self._staging = Staging(settings.staging_bytes)
        self._transfer = Transfer(SyncRuntime())
        self._backend: Backend | None = None
        self._info: InstanceInfo | None = None
        self._loads, self._saves = Pool("loads"), _InOrder("kvcm-saves")
        self._jobs: dict[int, _Job] = {}  #: of the saving thread
        self._dropped: set[int] = set()
        self._lock = threading.Lock()  #: of all below
        self._report = Report()
        self._moved = Moved()
        self._finished: dict[str, set[int]] = {}  #: loads that ended: the engine blocks that did not come
        self._failed_steps = 0

    # ------------------------------------------------------------------------------------ steps

    def begin_step(self, orders: Orders) -> set[int]:
        """Start the loads; those that the step itself needs are done when this returns.

        Returns:
            Engine blocks that such a load should have filled and did not.
        """
        if orders.info is not None:
            self._info = orders.info
        missing: set[int] = set()
        for load in orders.loads:
            if load.in_step:
                missing |= self._load(load, self._end_s())
            else:
                self._start_load(load)
        if missing:
            self._failed_steps += 1
            with self._lock:
                self._report.failed_steps += 1
        return missing

    def end_step(self, orders: Orders) -> None:
        """The step is computed: start the saves."""
        if not self._writes:
            return
        self._dropped.update(orders.drops)
        # Whatever is computed upon missing blocks is wrong, until the scheduler has heard of it.
        void = orders.failed_steps < self._failed_steps
        for capture in orders.captures:
            self._saves.submit(functools.partial(self._capture, capture, void))
        for plan in orders.plans:
            self._saves.submit(functools.partial(self._write, plan))
        for number in orders.drops:
            self._saves.submit(functools.partial(self._forget, number))

    def finished_loads(self) -> dict[str, set[int]]:
        """Requests whose loads ended since the last call, and their engine blocks that did not come."""
        with self._lock:
            finished, self._finished = self._finished, {}
        return finished

    def report(self) -> Report | None:
        with self._lock:
            if not self._report:
                return None
            report, self._report = self._report, Report()
            return report

    def moved(self) -> Moved:
        with self._lock:
            moved, self._moved = self._moved, Moved()
            return moved

    def close(self) -> None:
        """Finish what is being saved, for a moment; the threads are daemons."""
        self._saves.close(timeout_s=2.0)
        self._loads.close()
        self._transfer.close()
        if self._backend is not None:
            drive(self._backend.close())

    # ------------------------------------------------------------------------------------ loads

    def _start_load(self, load: Load) -> None:
        end_s = self._end_s()  # waiting for a thread counts

        def work() -> None:
            missing = self._load(load, end_s)
            with self._lock:
                self._finished[load.request_id] = missing

        try:
            self._loads.submit(work)
        except KvcmError:
            with self._lock:
                self._finished[load.request_id] = self._ids(load, 0)

    def _end_s(self) -> float:
        return time.monotonic() + self._settings.load_timeout_s

    def _load(self, load: Load, end_s: float) -> set[int]:
        """Engine blocks that were not filled. Never raises."""
        begin, done = time.perf_counter(), 0
        try:
            done = self._fill(load, end_s)
        except Exception as error:
            # A cache never breaks serving: what it is, the engine computes these blocks.
            log.warning("kvcm: blocks of %s were not loaded: %s", load.request_id, error)
        missing = self._ids(load, done)
        with self._lock:
            self._moved.loaded_blocks += done
            self._moved.loaded_bytes += done * sum(self._memory.sizes.values())
            self._moved.load_seconds.append(time.perf_counter() - begin)
            if missing:
                self._report.failed_loads.add(load.request_id)
        return missing

    @staticmethod
    def _ids(load: Load, begin: int) -> set[int]:
        found: set[int] = set()
        for group in load.ids:
            found.update(group[begin:].reshape(-1).tolist())
        return found - {-1}

    def _fill(self, load: Load, end_s: float) -> int:
        """How many leading blocks are in the cache now, with all specs."""
        step = max(1, PIECE_BYTES // max(self._memory.sizes.values()))
        for begin in range(0, len(load.blocks), step):
            part = slice(begin, min(begin + step, len(load.blocks)))
            count = part.stop - part.start
            for ids, (spec, memory) in zip(load.ids, self._memory.specs.items(), strict=True):
                good = self._fill_spec(load.blocks.take(part), ids[part], spec, memory.bytes, end_s)
                count = min(count, good)
            if begin + count < part.stop:
                return begin + count
        return len(load.blocks)

    def _fill_spec(self, blocks: Blocks, ids: np.ndarray, spec: str, size: int, end_s: float) -> int:
        """How many leading blocks have this spec now, or need none of it."""
        wanted = np.flatnonzero((ids >= 0).any(axis=1))
        if not len(wanted):
            return len(blocks)
        buffer = self._staging.take_anyway(len(wanted) * size)
        try:
            rows = buffer[: len(wanted) * size].reshape(len(wanted), size)
            result = self._read(blocks.take(wanted), rows, spec, end_s - time.monotonic())
            good = int(result)
            self._memory.specs[spec].scatter(ids[wanted[:good]], rows[:good])
        finally:
            self._staging.give(buffer)
        return len(blocks) if good == len(wanted) else int(wanted[good])

    def _read(self, blocks: Blocks, rows: Bytes, spec: str, left_s: float) -> GetResult:
        assert self._info is not None, "a load comes with its instance"
        instance = AsyncInstance(self._metadata(), self._transfer, self._info, False)
        result = drive(instance.read(blocks, rows, spec=spec, deadline_s=max(0.001, left_s)))
        if not result.flags.all() and isinstance(result.error, SegmentMissing | Corrupt | None):
            with self._lock:
                self._report.lost += blocks.keys[~result.flags].tolist()
        return result

    def _metadata(self) -> Backend:
        """For blocks that were moved since they were found."""
        if self._backend is None:
            self._backend = backend_of(self._settings)
        return self._backend

    # ------------------------------------------------------------------------------------ saves

    def _capture(self, capture: Capture, void: bool) -> None:
        job = _Job(None, [])
        if not void and capture.job not in self._dropped:
            try:
                self._copy_out(capture, job)
            except Exception as error:
                log.warning("kvcm: blocks are not saved: %s", error)
        self._jobs[capture.job] = job
        with self._lock:
            self._report.captured[capture.job] += 1
            if job.rows is None:
                self._report.uncaptured.add(capture.job)
                self._moved.unsaved_blocks += len(capture.ids[0])

    def _copy_out(self, capture: Capture, job: _Job) -> None:
        rows = {}
        for ids, (spec, memory) in zip(capture.ids, self._memory.specs.items(), strict=True):
            buffer = self._staging.take(len(ids) * memory.bytes)
            if buffer is None:
                return  # too much is on its way already
            job.buffers.append(buffer)
            rows[spec] = buffer[: len(ids) * memory.bytes].reshape(len(ids), memory.bytes)
            memory.gather(ids, rows[spec])
        job.rows = rows

    def _write(self, plan: Plan) -> None:
        job = self._jobs.get(plan.job)
        good: Flags = np.zeros(len(plan.blocks), np.bool_)
        begin = time.perf_counter()
        if job is not None and job.rows is not None and plan.job not in self._dropped:
            try:
                good = self._write_specs(plan, job.rows)
            except Exception as error:
                log.warning("kvcm: blocks are not saved: %s", error)
        self._forget(plan.job)
        with self._lock:
            self._report.written[plan.job] = (1, good)
            self._moved.saved_bytes += int(good.sum()) * sum(self._memory.sizes.values())
            self._moved.save_seconds.append(time.perf_counter() - begin)
            self._moved.unsaved_blocks += int((~good).sum())

    def _write_specs(self, plan: Plan, captured: dict[str, Bytes]) -> Flags:
        good: Flags = np.ones(len(plan.blocks), np.bool_)
        for spec, rows in captured.items():
            new = rows if len(plan.rows) == len(rows) else [rows[row] for row in plan.rows.tolist()]
            moved = drive(self._transfer.write(spec, plan.blocks, new, plan.deadline_s))
            good &= moved.flags
            if moved.error is not None:
                log.debug("kvcm: %s", moved.error)
        return good

    def _forget(self, number: int) -> None:
        job = self._jobs.pop(number, None)
        self._dropped.discard(number)
        for buffer in job.buffers if job is not None else ():
            self._staging.give(buffer)


class _InOrder:
    """One daemon thread that does one job after the other."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self, timeout_s: float) -> None:
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("kvcm: a save failed")
