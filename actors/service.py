"""The group actor's loop, on a thread of its own, without Ray.

    inbox → drain → (refresh if an instance is new) → one micro-batch → answers
          → expire sessions that are due → hand due trash to the eraser → wait

The thread wakes up for a request, for a finished deletion, or exactly when the next session or trash
record is due. Everything that touches the engine runs on this thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from kvcm_ray.actors import paths
from kvcm_ray.actors.engine import GroupEngine, Now
from kvcm_ray.actors.prepare import Preparer
from kvcm_ray.actors.sweep import remove_leftovers
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.requests import Reply, Request
from kvcm_ray.errors import KvcmError, Unavailable

log = logging.getLogger(__name__)

INBOX_REQUESTS_MAX = 65_536
BATCH_REQUESTS_MAX = 1_024
TRASH_PER_CALL_MAX = 16
TRASH_IN_FLIGHT_MAX = 64
FAILED_PAUSE_MS = 100  #: before trying again what a commit failed for, on a full disk say

Answers = list[Reply | KvcmError]
#: (ids that are erased, what went wrong with the others or "")
ErasureDone = Callable[[list[int], str], None]


class Eraser(Protocol):
    """Reaches the reclaimers."""

    def erase(
        self, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        """Start erasing. `done` is called once, later, by any thread; also if a reclaimer dies."""


@dataclass(slots=True)
class _Job:
    work: Callable[[], Any]
    future: Future[Any]


@dataclass(slots=True)
class _Submit:
    requests: Sequence[Request]
    future: Future[Answers]


class GroupService:
    """Runs a `GroupEngine`.

    Args:
        view: registry of the manager.
        name: the group.
        eraser: who erases trash.
        on_end: called on the loop's thread, before anything else is answered, when this incarnation
            must answer no more; told why. It ends the process, so that callers find the next one.

    Raises:
        GroupNotFound: the group is not registered.
    """

    def __init__(
        self, view: RegistryView, name: str, eraser: Eraser, on_end: Callable[[str], None]
    ) -> None:
        self.name = name
        self._view = view
        self._eraser = eraser
        self._on_end = on_end
        self._inbox: queue.SimpleQueue[_Job | _Submit | None] = queue.SimpleQueue()
        self._waiting = 0
        self._waiting_lock = threading.Lock()
        self._expire_after_ms = 0
        self._erase_after_ms = 0
        self._in_flight: dict[str, set[int]] = {}
        self._preparer = Preparer()
        self.counters: Counter[str] = Counter()
        group = view.group(name)
        self.engine = GroupEngine(view.data_dir, group, view.storages(), self._registered())
        self._sweep()
        self._thread = threading.Thread(target=self._run, name=f"group-{name}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- from any thread

    def submit(self, requests: Sequence[Request]) -> Future[Answers]:
        """Queue requests; the future gives one reply or error for each.

        Raises:
            Unavailable: the inbox is full.
        """
        count = len(requests)
        with self._waiting_lock:
            if self._waiting + count > INBOX_REQUESTS_MAX:
                raise Unavailable(f"group {self.name!r} has {self._waiting} requests waiting already")
            self._waiting += count
        job = _Submit(requests, Future[Answers]())
        self._inbox.put(job)
        return job.future

    def refresh(self) -> Future[None]:
        """Read the registry again."""
        return self._ask(self._refresh)

    def retire(self) -> Future[None]:
        """Erase all instances that are not registered, the group's own removal included."""
        return self._ask(self._retire)

    def usage(self) -> Future[dict[str, Any]]:
        return self._ask(lambda: {**self.engine.usage(), "loop": dict(self.counters)})

    def stop(self) -> None:
        """End the loop and close everything; waits for it."""
        self._inbox.put(None)
        self._thread.join()

    def _ask(self, work: Callable[[], Any]) -> Future[Any]:
        job = _Job(work, Future[Any]())
        self._inbox.put(job)
        return job.future

    # ------------------------------------------------------------------------ the loop's thread

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception:
            log.exception("group %s: the loop broke", self.name)
            self._on_end("the loop broke")
            raise
        finally:
            self._preparer.stop()
            self.engine.close()

    def _step(self) -> bool:
        submits: deque[_Submit] = deque()
        for job in self._drain():
            if job is None:
                return False
            if isinstance(job, _Submit):
                submits.append(job)
            else:
                self._run_job(job)
        self._expire()
        while submits:
            self._run_batch(submits)
            self._expire()
        self._clear_trash()
        if self.engine.fenced:
            self._on_end("a newer incarnation owns the index")
        return True

    def _drain(self) -> list[_Job | _Submit | None]:
        """What is in the inbox; waits for the first piece or the next deadline."""
        jobs: list[_Job | _Submit | None] = []
        with contextlib.suppress(queue.Empty):
            jobs.append(self._inbox.get(timeout=self._patience_s()))
            while True:
                jobs.append(self._inbox.get_nowait())
        return jobs

    def _patience_s(self) -> float | None:
        state = self.engine.state
        times: list[int] = []
        if (session_ms := state.next_session_ms()) is not None:
            times.append(max(session_ms, self._expire_after_ms))
        trash_ms = state.next_trash_ms()
        if trash_ms is not None and self._flying() < TRASH_IN_FLIGHT_MAX:
            times.append(max(trash_ms, self._erase_after_ms))
        due = min(times, default=None)
        if due is None or self.engine.fenced:
            return None
        return max(due - Now.read().ms, 0) / 1000

    def _run_job(self, job: _Job) -> None:
        try:
            result = job.work()
        except Exception as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _run_batch(self, submits: deque[_Submit]) -> None:
        """Answer as many calls as fit one micro-batch."""
        batch: list[_Submit] = []
        requests: list[Request] = []
        while submits and (not batch or len(requests) < BATCH_REQUESTS_MAX):
            batch.append(submits.popleft())
            requests.extend(batch[-1].requests)
        with self._waiting_lock:
            self._waiting -= len(requests)
        self._open_new(requests)
        answers = self.engine.submit_batch(requests)
        if self.engine.fenced:
            self._on_end("a newer incarnation owns the index")
        self.counters["batches"] += 1
        self.counters["requests"] += len(requests)
        begin = 0
        for submit in batch:
            end = begin + len(submit.requests)
            submit.future.set_result(answers[begin:end])
            begin = end
        self._preparer.started(answers, self.engine)

    def _open_new(self, requests: Sequence[Request]) -> None:
        """Instances registered a moment ago may be asked for before the registry told us."""
        unknown = {r.instance_id for r in requests} - set(self.engine.instances)
        registered = self._view.instances()
        for instance_id in unknown:
            info = registered.get(instance_id)
            if info is not None and info.instance_group_name == self.name:
                self.engine.try_open_instance(info)

    def _expire(self) -> None:
        """Sessions whose deadline is reached, before anybody can finish one of them."""
        now = Now.read()
        while now.ms >= self._expire_after_ms and self._is_due(now):
            if self.engine.tick(now) is not None:
                self._expire_after_ms = now.ms + FAILED_PAUSE_MS

    def _is_due(self, now: Now) -> bool:
        due = self.engine.state.next_session_ms()
        return due is not None and due <= now.ms

    def _clear_trash(self) -> None:
        room = TRASH_IN_FLIGHT_MAX - self._flying()
        if room > 0 and not self.engine.fenced and Now.read().ms >= self._erase_after_ms:
            self._erase(self.engine.due_trash(room))
        for segment in self.engine.take_dropped_segments():
            self._drop_files(segment)

    def _drop_files(self, segment: Any) -> None:
        try:
            self.engine.adapter(segment.storage).drop_segment(segment)
        except KvcmError as error:
            log.warning("segment %s stays until the group starts again: %s", segment.path, error)

    # ---------------------------------------------------------------------------------- trash

    def _flying(self) -> int:
        return sum(len(ids) for ids in self._in_flight.values())

    def _erase(self, records: Sequence[Any]) -> None:
        by_instance: dict[str, list[int]] = {}
        for record in records:
            by_instance.setdefault(record.instance_id, []).append(record.trash_id)
        for instance_id, ids in by_instance.items():
            for begin in range(0, len(ids), TRASH_PER_CALL_MAX):
                self._start_erasing(instance_id, ids[begin : begin + TRASH_PER_CALL_MAX])

    def _start_erasing(self, instance_id: str, ids: list[int]) -> None:
        path = self.engine.index_path(instance_id)
        self._in_flight.setdefault(instance_id, set()).update(ids)

        def done(erased: list[int], problem: str) -> None:
            self._ask(lambda: self._erased(instance_id, ids, erased, problem))

        self._eraser.erase(str(path), ids, done)

    def _erased(self, instance_id: str, ids: list[int], erased: list[int], problem: str) -> None:
        flying = self._in_flight.get(instance_id, set())
        flying.difference_update(ids)
        if not flying:
            self._in_flight.pop(instance_id, None)
        failed = tuple(i for i in ids if i not in set(erased))
        if problem:
            log.warning("group %s: %d trash records not erased: %s", self.name, len(failed), problem)
        if failed:
            self.counters["erase_failures"] += len(failed)
            self.engine.trash_failed(instance_id, failed)
        if erased and self.engine.confirm_deletes(instance_id, tuple(erased)) is not None:
            self._erase_after_ms = Now.read().ms + FAILED_PAUSE_MS  # all of it is due again at once

    # -------------------------------------------------------------------------------- registry

    def _registered(self) -> list[Any]:
        infos = self._view.instances().values()
        return [info for info in infos if info.instance_group_name == self.name]

    def _refresh(self) -> None:
        self.engine.configure(self._view.group(self.name), self._view.storages())
        self._follow_instances()

    def _follow_instances(self) -> None:
        registered = {info.instance_id: info for info in self._registered()}
        for info in self.engine.infos():
            if registered.get(info.instance_id, info).uid != info.uid or (
                info.instance_id not in registered
            ):
                self._in_flight.pop(info.instance_id, None)
                self.engine.drop_instance(info)
        told = set(self.engine.broken)
        for instance_id in told - registered.keys():
            del self.engine.broken[instance_id]
        problems = {i.instance_id: self._open(i) for i in registered.values()}
        self._sweep()
        for instance_id, problem in problems.items():
            if problem is not None and instance_id not in told:
                raise problem  # once: what others change must not fail for it again and again

    def _open(self, info: Any) -> KvcmError | None:
        self.engine.try_open_instance(info)
        return self.engine.broken.get(info.instance_id)

    def _retire(self) -> None:
        self._follow_instances()

    def _sweep(self) -> None:
        """Erase what removed instances left behind, those of earlier incarnations included."""
        uids = {info.uid for info in self._registered()}
        folder = paths.group_dir(self._view.data_dir, self.name)
        try:
            remove_leftovers(folder, uids, self.engine.open_adapters().values())
        except KvcmError as error:
            log.warning("group %s: leftovers stay for now: %s", self.name, error)

