"""Saves on their way, as the scheduler's side sees them.

While a job's blocks are being copied out, the engine may not reuse them: they are *held*, by the count of
references that the engine's own block pool keeps. So it does not matter whether their request finishes, is
preempted, or slides its window past them.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvcm_ray.client.sync import WriteSession
from kvcm_ray.connectors.vllm.link import Link
from kvcm_ray.connectors.vllm.orders import BlockIds, Capture, Orders, Plan, Report
from kvcm_ray.connectors.vllm.windows import Part
from kvcm_ray.core.requests import Flags, Keys

JOBS_MAX = 256
Hold = Callable[[list[int]], None]


@dataclass(slots=True)
class _Opened:
    """A job's session, and what became of its blocks."""

    session: WriteSession
    asked: Flags  #: which of the session's blocks the workers write
    good: Flags  #: of those, the ones that every worker so far wrote
    reports: int = 0


@dataclass(slots=True)
class _Job:
    number: int
    first: int  #: of our blocks, within the prompt
    count: int
    keys: Keys  #: of the prompt, up to the last block of the job
    part: str  #: whose blocks these are
    held: list[int]  #: engine blocks; none once they are copied
    capturing: int  #: workers that have not copied yet
    deadline_s: float = math.inf  #: counts from when they have
    opened: _Opened | None = None


class Saving:
    """Jobs from their begin until their session is finished. Not thread-safe, but for `_opened`."""

    def __init__(self, link: Link, writers: int, hold: Hold, release: Hold) -> None:
        self._link = link
        self._writers = writers  #: workers that write their specs
        self._hold, self._release = hold, release
        self._numbers = itertools.count(1)
        self._jobs: dict[int, _Job] = {}
        self._opened: deque[tuple[int, WriteSession | None]] = deque()  #: filled by the link's threads
        self._lock = threading.Lock()
        self._saved = 0  #: blocks that became readable; under the lock
        self._uncaptured: set[int] = set()  #: jobs to be dropped with the next step

    @property
    def pending(self) -> bool:
        """Whether steps are needed although there may be nothing to compute."""
        return bool(self._jobs)

    @property
    def holds(self) -> bool:
        """Whether engine blocks will be let go of soon."""
        return any(job.held for job in self._jobs.values())

    def take_saved(self) -> int:
        """Blocks that became readable since the last call."""
        with self._lock:
            saved, self._saved = self._saved, 0
        return saved

    def begin(
        self, orders: Orders, part: Part, keys: Keys, first: int, ids: tuple[BlockIds, ...]
    ) -> None:
        """Save the last ``len(keys) - first`` blocks of a chain, unless it is not the time for that."""
        count = len(keys) - first
        if len(self._jobs) >= JOBS_MAX or not self._link.can_save:
            return
        number = next(self._numbers)
        held = np.unique(np.concatenate([group.reshape(-1) for group in ids])).tolist()
        self._hold(held)
        self._jobs[number] = _Job(number, first, count, keys, part.name, held, self._writers)
        orders.captures.append(Capture(number, part.groups, ids))

    def advance(self, orders: Orders) -> None:
        """Send the plans that came, and give up what takes too long."""
        while self._opened:
            number, session = self._opened.popleft()
            job = self._jobs.get(number)
            if job is None:
                if session is not None:
                    self._finish(session, np.zeros(len(session.todo), np.bool_))
            elif session is None:
                self._drop(job, orders)
            else:
                self._send_plan(job, session, orders)
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if now > job.deadline_s or job.number in self._uncaptured:
                self._drop(job, orders)
        self._uncaptured.clear()

    def _send_plan(self, job: _Job, session: WriteSession, orders: Orders) -> None:
        plan = session.plan
        rows = plan.todo - job.first
        positions = (rows >= 0) & (rows < job.count)
        if not positions.any():  # all of it is there, or is being written by another engine
            if len(rows):
                self._finish(session, positions)
            self._drop(job, orders)
            return
        job.opened = _Opened(session, positions, np.ones(int(positions.sum()), np.bool_))
        orders.plans.append(Plan(job.number, plan.blocks.take(positions), rows[positions], plan.deadline_s))

    def _drop(self, job: _Job, orders: Orders) -> None:
        self._jobs.pop(job.number)
        self._let_go(job)
        orders.drops.append(job.number)
        if job.opened is not None:
            self._finish(job.opened.session, np.zeros(len(job.opened.asked), np.bool_))

    def heard(self, report: Report) -> None:
        """Workers copied blocks, or wrote them."""
        self._uncaptured |= report.uncaptured & self._jobs.keys()
        for number, workers in report.captured.items():
            job = self._jobs.get(number)
            if job is not None:
                job.capturing -= workers
                if job.capturing <= 0:
                    self._captured(job)
        for number, (workers, good) in report.written.items():
            job = self._jobs.get(number)
            if job is not None and job.opened is not None:
                self._wrote(job, job.opened, workers, good)

    def _captured(self, job: _Job) -> None:
        """All workers have copied the blocks, so the engine may have them again; find room for them."""
        self._let_go(job)
        job.deadline_s = time.monotonic() + self._link.settings.save_timeout_s
        number = job.number
        if number not in self._uncaptured:
            self._link.start_write(job.keys, job.part, lambda session: self._opened.append((number, session)))

    def _let_go(self, job: _Job) -> None:
        if job.held:
            self._release(job.held)
            job.held = []

    def _wrote(self, job: _Job, opened: _Opened, workers: int, good: Flags) -> None:
        opened.good &= good
        opened.reports += workers
        if opened.reports < self._writers:
            return
        self._jobs.pop(job.number)
        success = opened.asked.copy()
        success[success] = opened.good
        self._finish(opened.session, success)

    def _finish(self, session: WriteSession, success: Flags) -> None:
        self._link.finish_write(session, success, self._count)

    def _count(self, committed: int) -> None:
        with self._lock:
            self._saved += committed
