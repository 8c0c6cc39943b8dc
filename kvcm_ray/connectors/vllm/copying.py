"""Saves on a worker: blocks are copied out of the engine's cache, and then written.

A block is copied layer by layer, while the step that computes it goes on with the next layers; what the
engine does not announce by layers (graphs that run as a whole, steps that compute nothing) is copied when
the step is done. One thread copies and another one writes, so that a storage that is slow does not keep the
engine's blocks from it.
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

from kvcm_ray.client.runtime import drive
from kvcm_ray.client.transfer import Transfer
from kvcm_ray.connectors.vllm.device import computed
from kvcm_ray.connectors.vllm.memory import Bytes, Staging, WorkerMemory
from kvcm_ray.connectors.vllm.notes import Notes
from kvcm_ray.connectors.vllm.orders import Capture, Orders, Plan
from kvcm_ray.core.requests import Flags

log = logging.getLogger("vllm.kvcm")


@dataclass(slots=True)
class _Job:
    capture: Capture
    rows: dict[int, Bytes] | None = None  #: copied bytes by group; None: not copied
    buffers: list[Bytes] = field(default_factory=list)
    left: dict[int, list[range]] = field(default_factory=dict)  #: of each group, what is not copied yet


class Saves:
    """All saves of a worker. What is public is for the engine's thread."""

    def __init__(self, memory: WorkerMemory, staging: Staging, transfer: Transfer, notes: Notes) -> None:
        self._memory = memory
        self._groups = list(memory.specs.items())
        self._staging = staging
        self._transfer = transfer
        self._notes = notes
        self._copies, self._writes = InOrder("kvcm-copies"), InOrder("kvcm-writes")
        self._begun: list[_Job] | None = None  #: of the step that computes now
        self._lock = threading.Lock()  #: of all below
        self._jobs: dict[int, _Job] = {}  #: copied
        self._writing: set[int] = set()
        self._dropped: set[int] = set()

    # ------------------------------------------------------------------------------------ steps

    def layer_computed(self, orders: Orders, name: str) -> None:
        """The step has filled this layer: copy it."""
        for job in self._of_step(orders):
            for group, spans in job.left.items():
                span = self._groups[group][1].of_layer.get(name)
                if span in spans:
                    spans.remove(span)
                    self._copy(job, group, [span])

    def end_step(self, orders: Orders, *, void: bool) -> None:
        """All is computed: copy the rest, and write what has a plan.

        Args:
            void: what this step computed is wrong.
        """
        with self._lock:
            self._dropped.update(orders.drops)
        jobs, self._begun = self._of_step(orders), None
        for job in jobs:
            if not void:
                for group, spans in job.left.items():
                    self._copy(job, group, spans)
            self._copies.submit(functools.partial(self._copied, job, void))
        for plan in orders.plans:
            self._writes.submit(functools.partial(self._write, plan))
        for number in orders.drops:
            self._copies.submit(functools.partial(self._forget, number))

    def close(self) -> None:
        """Finish what is on its way, for a moment; the threads are daemons."""
        end_s = time.monotonic() + 2.0
        for thread in (self._copies, self._writes):
            thread.close(max(0.1, end_s - time.monotonic()))

    def _of_step(self, orders: Orders) -> list[_Job]:
        if self._begun is None:
            self._begun = [self._begin(capture) for capture in orders.captures]
        return self._begun

    # ----------------------------------------------------------------------------------- copying

    def _begin(self, capture: Capture) -> _Job:
        job, rows = _Job(capture), {}
        for group, ids in zip(capture.groups, capture.ids, strict=True):
            memory = self._groups[group][1]
            size = len(ids) * memory.bytes
            buffer = self._staging.take(size)
            if buffer is None:
                return job  # too much is on its way already
            job.buffers.append(buffer)
            rows[group] = buffer[:size].reshape(len(ids), memory.bytes)
        job.rows = rows
        job.left = {group: self._groups[group][1].layers for group in capture.groups}
        return job

    def _copy(self, job: _Job, group: int, spans: list[range]) -> None:
        if job.rows is None or not spans:
            return
        ids = job.capture.ids[job.capture.groups.index(group)]
        memory, rows = self._groups[group][1], job.rows[group]
        ready = computed(self._memory)

        def work() -> None:
            try:
                ready()
                for span in spans:
                    memory.gather(ids, rows, span)
            except Exception as error:
                log.warning("kvcm: blocks are not saved: %s", error)
                job.rows = None

        self._copies.submit(work)

    def _copied(self, job: _Job, void: bool) -> None:
        number = job.capture.job
        if void:
            job.rows = None
        with self._lock:
            self._jobs[number] = job
        with self._notes.lock:
            self._notes.report.captured[number] += 1
            if job.rows is None:
                self._notes.report.uncaptured.add(number)
                self._notes.moved.unsaved_blocks += len(job.capture.ids[0])

    # ----------------------------------------------------------------------------------- writing

    def _write(self, plan: Plan) -> None:
        good: Flags = np.zeros(len(plan.blocks), np.bool_)
        begin = time.perf_counter()
        with self._lock:
            job = None if plan.job in self._dropped else self._jobs.get(plan.job)
            self._writing.add(plan.job)
        if job is not None and job.rows is not None:
            try:
                good = self._write_groups(plan, job.rows)
            except Exception as error:
                log.warning("kvcm: blocks are not saved: %s", error)
        with self._lock:
            self._writing.discard(plan.job)
        self._forget(plan.job)
        size = sum(self._groups[group][1].bytes for group in job.capture.groups) if job is not None else 0
        with self._notes.lock:
            self._notes.report.written[plan.job] = (1, good)
            self._notes.moved.saved_bytes += int(good.sum()) * size
            self._notes.moved.save_seconds.append(time.perf_counter() - begin)
            self._notes.moved.unsaved_blocks += int((~good).sum())

    def _write_groups(self, plan: Plan, copied: dict[int, Bytes]) -> Flags:
        good: Flags = np.ones(len(plan.blocks), np.bool_)
        for group, rows in copied.items():
            new = rows if len(plan.rows) == len(rows) else [rows[row] for row in plan.rows.tolist()]
            moved = drive(self._transfer.write(self._groups[group][0], plan.blocks, new, plan.deadline_s))
            good &= moved.flags
            if moved.error is not None:
                log.debug("kvcm: %s", moved.error)
        return good

    def _forget(self, number: int) -> None:
        """The job has ended. One that is being written is forgotten when that is over."""
        with self._lock:
            if number in self._writing:
                return
            job = self._jobs.pop(number, None)
            self._dropped.discard(number)
        for buffer in job.buffers if job is not None else ():
            self._staging.give(buffer)


class InOrder:
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
