"""The group actor's loop, on a thread of its own, without Ray.

    inbox → what reclaimers report → expire sessions → writes that wait
          → micro-batch, one reclaim step, next micro-batch … → chores for the reclaimers → wait

The foreground never waits for more than one reclaim step. The thread wakes up for a request, for a report
of a reclaimer, or exactly when the next session, trash record, step or waiting write is due. Everything
that touches the engine runs on this thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kvcm_ray.actors import paths
from kvcm_ray.actors.advisor import Advisor
from kvcm_ray.actors.chores import FAILED_PAUSE_MS, Chores, Pool
from kvcm_ray.actors.engine import GroupEngine
from kvcm_ray.actors.explaining import explain, resident
from kvcm_ray.actors.facts import Now
from kvcm_ray.actors.fences import Fences
from kvcm_ray.actors.observer import Observer
from kvcm_ray.actors.prefixes import DEPTH, LIMIT, HotPrefixes, to_json, walk
from kvcm_ray.actors.prepare import Preparer
from kvcm_ray.actors.recorder import Recorder
from kvcm_ray.actors.statistics import Statistics
from kvcm_ray.actors.sweep import remove_leftovers
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.actors.waiting import WaitingWrites
from kvcm_ray.core.events import Want
from kvcm_ray.core.requests import Keys, Reply, Request, StartWrite, Touch
from kvcm_ray.errors import KvcmError, Unavailable

log = logging.getLogger(__name__)

INBOX_REQUESTS_MAX = 65_536
BATCH_REQUESTS_MAX = 1_024
RETRY_WAITING_MS = 500  #: room may also appear by itself: a storage that failed is asked again

Answers = list[Reply | KvcmError]


@dataclass(slots=True)
class _Job:
    work: Callable[[], Any]
    future: Future[Any]


@dataclass(slots=True)
class _Submit:
    requests: Sequence[Request]
    future: Future[Answers]
    began_s: float  #: of `time.perf_counter`


@dataclass(slots=True)
class _Wait:
    request: StartWrite
    deadline_ms: int
    future: Future[Reply | KvcmError]


class _Wake:
    """Something was reported; see `Chores`."""


_Message = _Job | _Submit | _Wait | _Wake


class GroupService:
    """Runs a `GroupEngine`.

    Args:
        view: registry of the manager.
        name: the group.
        pool: who erases and copies.
        on_end: called on the loop's thread, before anything else is answered, when this incarnation
            must answer no more; told why. It ends the process, so that callers find the next one.

    Raises:
        GroupNotFound: the group is not registered.
    """

    def __init__(self, view: RegistryView, name: str, pool: Pool, on_end: Callable[[str], None]) -> None:
        self.name = name
        self._view = view
        self._on_end = on_end
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._queued = 0
        self._queued_lock = threading.Lock()
        self._expire_after_ms = 0
        self._reclaim_after_ms = 0
        self._retry_waiting_ms = 0  #: waiting writes are tried again by then
        self._freed = True  #: there may be more room than when waiting writes were tried
        self._stirred = True  #: since a reclaim step found nothing to do
        self._waiting = WaitingWrites()
        self._preparer = Preparer()
        self.counters: Counter[str] = Counter()
        group = view.group(name)
        self.engine = GroupEngine(view.data_dir, group, view.storages(), self._registered())
        self.advisor = Advisor()
        self.recorder = Recorder(paths.traces_dir(view.data_dir), name, lambda: self.observer.dropped)
        self.prefixes = HotPrefixes()
        self.observer = Observer([self.advisor, self.recorder, self.prefixes])
        fences = Fences(paths.group_dir(view.data_dir, name))
        self.figures = Statistics(self.engine, fences.count)
        self._fences = fences
        #: For what takes a while and needs nothing of the engine.
        self._aside = ThreadPoolExecutor(1, thread_name_prefix=f"aside-{name}")
        self._weigh()
        self._chores = Chores(self.engine, pool, lambda: self._inbox.put(_Wake()))
        self._chores.configure(view.reclaimer_settings())
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
        with self._queued_lock:
            if self._queued + count > INBOX_REQUESTS_MAX:
                raise Unavailable(f"group {self.name!r} has {self._queued} requests waiting already")
            self._queued += count
        job = _Submit(requests, Future[Answers](), time.perf_counter())
        self._inbox.put(job)
        return job.future

    def submit_waiting(self, request: StartWrite, wait_ms: int) -> Future[Reply | KvcmError]:
        """Queue a write that was refused for want of room, to be tried until there is some.

        The future gives the reply, the last refusal after `wait_ms`, or `Unavailable` if too many
        writes wait already. Cancelling it gives up.
        """
        wait = _Wait(request, Now.read().ms + wait_ms, Future[Reply | KvcmError]())
        wait.future.add_done_callback(lambda future: self._waited(request, future))
        self._inbox.put(wait)
        return wait.future

    def _waited(self, request: StartWrite, future: Future[Reply | KvcmError]) -> None:
        if future.cancelled():  # those behind it need not wait for it any more
            self._inbox.put(_Wake())
        elif isinstance(answer := future.result(), KvcmError):
            self.figures.refused_late(request, answer)

    def refresh(self) -> Future[None]:
        """Read the registry again."""
        return self._ask(self._refresh)

    def retire(self) -> Future[None]:
        """Erase all instances that are not registered, the group's own removal included."""
        return self._ask(self._retire)

    def usage(self) -> Future[dict[str, Any]]:
        return self._ask(self._usage)

    def capacity(self) -> Future[dict[str, Any]]:
        """The capacity report; see `GroupState.capacity`."""
        return self._ask(self.engine.capacity)

    def advice(self, factors: Sequence[float]) -> Future[dict[str, Any]]:
        """What other quotas would give; see `Advisor.report`."""
        return self._aside.submit(self._advise, factors)

    def record_start(self, options: dict[str, Any]) -> Future[dict[str, Any]]:
        """See `Recorder.start`."""
        return self._aside.submit(self.recorder.start, options)

    def record_stop(self) -> Future[dict[str, Any]]:
        """See `Recorder.stop`; all that was answered before is in the recording."""
        return self._aside.submit(self._stop_recording)

    def recordings(self) -> Future[dict[str, Any]]:
        """``{"recordings": [...]}``; see `Recorder.list`."""
        return self._aside.submit(lambda: {"recordings": self.recorder.list()})

    def statistics(self, instances: bool = True) -> Future[dict[str, Any]]:
        """Gauges, counters, histograms, tiers, instances; see `Statistics.report`."""
        return self._ask(lambda: self._statistics(instances))

    def history(self, since_s: float = 0.0) -> Future[dict[str, Any]]:
        """The last hour in rows, those that ended after unix time `since_s`; see `History.rows`."""
        return self._ask(lambda: self.figures.history.rows(since_s, self.figures.now_s()))

    def events(self, after_id: int = 0, limit: int = 100) -> Future[dict[str, Any]]:
        """What happened behind event `after_id`: ``{"events": [...], "next": pass it as after_id the next
        time, "dropped": forgotten meanwhile, "incarnation"}``."""
        return self._ask(lambda: self.figures.events(after_id, limit))

    def explain(self, instance_id: str, keys: Keys) -> Future[dict[str, Any]]:
        """For every key where its block is, or when and why it went; see `explaining`."""
        return self._ask(lambda: explain(self.engine, self.figures, instance_id, keys))

    def hot_prefixes(self, depth: int = DEPTH, limit: int = LIMIT) -> Future[dict[str, Any]]:
        """The prefixes that recent look-ups found, as a tree; see `prefixes`."""
        return self._aside.submit(self._hot_prefixes, depth, limit)

    def stop(self) -> None:
        """End the loop and close everything; waits for it."""
        self._aside.shutdown(cancel_futures=True)  # while the loop answers those under way
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
            self._waiting.answer_all(Unavailable(f"group {self.name!r} has ended"))
            self._preparer.stop()
            self.observer.stop()
            self.recorder.close()
            self.engine.close()

    def _step(self) -> bool:
        submits: deque[_Submit] = deque()
        messages = self._drain()
        self.figures.tick()
        for message in messages:
            if message is None:
                return False
            if isinstance(message, _Submit):
                submits.append(message)
            elif isinstance(message, _Wait):
                self._waiting.add(message.request, message.deadline_ms, message.future)
            elif isinstance(message, _Job):
                self._run_job(message)
        if self._chores.settle():
            self._note(freed=True)
        self._expire()
        self._retry_waiting()
        while submits:
            self._run_batch(submits)
            self._expire()
            if submits:
                self._reclaim()
        self._reclaim()
        self._chores.hand_out()
        if noted := self.engine.take_noted():
            self.figures.noted(noted)
        for segment in self.engine.take_dropped_segments():
            self._drop_files(segment)
        if self.engine.fenced:
            self._end_fenced()
        return True

    def _end_fenced(self) -> None:
        self._fences.note()
        self._on_end("a newer incarnation owns the index")

    def _note(self, *, freed: bool) -> None:
        """Something happened that reclaiming depends on; with `freed` waiting writes may fit now."""
        self._stirred = True
        self._freed |= freed

    def _drain(self) -> list[_Message | None]:
        """What is in the inbox; waits for the first piece or the next deadline."""
        messages: list[_Message | None] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._inbox.get(timeout=self._patience_s()))
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def _patience_s(self) -> float | None:
        if self.engine.fenced:
            return None
        now_ms = Now.read().ms
        times = [self._chores.next_ms(), self._reclaim_ms(now_ms), self._waiting.next_ms()]
        if (session_ms := self.engine.state.next_session_ms()) is not None:
            times.append(max(session_ms, self._expire_after_ms))
        if self._waiting:
            times.append(now_ms if self._freed else self._retry_waiting_ms)
        due = min((t for t in times if t is not None), default=None)
        return None if due is None else max(due - now_ms, 0) / 1000

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
        with self._queued_lock:
            self._queued -= len(requests)
        self._open_new(requests)
        answers = self.engine.submit_batch(requests, ahead_bytes=self._waiting.ahead_bytes())
        self.observer.note(requests, answers)
        self.figures.answered(requests, answers)
        self._note(freed=not all(isinstance(request, StartWrite | Touch) for request in requests))
        if self.engine.fenced:
            self._end_fenced()
        self.counters["batches"] += 1
        self.counters["requests"] += len(requests)
        begin, now_s = 0, time.perf_counter()
        for submit in batch:
            self.figures.calls.add(now_s - submit.began_s)
            end = begin + len(submit.requests)
            with contextlib.suppress(InvalidStateError):  # cancelled: its caller is gone
                submit.future.set_result(answers[begin:end])
            begin = end
        self._preparer.started(answers, self.engine)

    def _open_new(self, requests: Sequence[Request]) -> None:
        """Instances registered a moment ago may be asked for before the registry told us."""
        unknown = {r.instance_id for r in requests} - self.engine.instances.keys()
        registered = self._view.instances()
        for instance_id in unknown:
            info = registered.get(instance_id)
            if info is not None and info.instance_group_name == self.name:
                self.engine.try_open_instance(info)
                self._weigh()

    def _expire(self) -> None:
        """Sessions whose deadline is reached, before anybody can finish one of them."""
        now = Now.read()
        while now.ms >= self._expire_after_ms and self._is_due(now):
            if self.engine.tick(now) is not None:
                self._expire_after_ms = now.ms + FAILED_PAUSE_MS
            self._note(freed=True)

    def _is_due(self, now: Now) -> bool:
        due = self.engine.state.next_session_ms()
        return due is not None and due <= now.ms

    def _retry_waiting(self) -> None:
        if not self._waiting:
            return
        now_ms = Now.read().ms
        anew, self._freed = self._freed or now_ms >= self._retry_waiting_ms, False
        if anew:
            self._retry_waiting_ms = now_ms + RETRY_WAITING_MS
        self._waiting.retry(self._submit_waiting, anew=anew)
        if self._waiting.expire(now_ms):
            self._waiting.retry(self._submit_waiting, anew=False)

    def _submit_waiting(
        self, waiting: Sequence[tuple[StartWrite, Want]], ahead_bytes: int
    ) -> Sequence[Reply | KvcmError | None]:
        self._stirred = True
        answers = self.engine.submit_waiting(waiting, ahead_bytes)
        requests = [request for request, _ in waiting]
        self.observer.note(requests, answers)
        self.figures.answered(requests, answers)
        if self.engine.fenced:
            self._end_fenced()
        self.counters["waiting_tried"] += len(answers)
        self._preparer.started(answers, self.engine)
        return answers

    def _reclaim_ms(self, now_ms: int) -> int | None:
        """When the next step may have something to do."""
        if self._waiting and self._stirred and not self.engine.state.paused:
            return max(now_ms, self._reclaim_after_ms)
        due_ms = self.engine.state.next_reclaim_ms(now_ms)
        return None if due_ms is None else max(due_ms, self._reclaim_after_ms)

    def _reclaim(self) -> None:
        """One step, if one is due."""
        now = Now.read()
        due_ms = self._reclaim_ms(now.ms)
        if due_ms is None or due_ms > now.ms or self.engine.fenced:
            return
        done = self.engine.reclaim(now, self._waiting.wants())
        self.counters["reclaim_steps"] += 1
        if isinstance(done, KvcmError):
            self._reclaim_after_ms = now.ms + FAILED_PAUSE_MS
        elif done:
            self._note(freed=self._waiting.waits_for_keys())
        else:
            self._stirred = False

    def _drop_files(self, segment: Any) -> None:
        try:
            self.engine.adapter(segment.storage).drop_segment(segment)
        except KvcmError as error:
            log.warning("segment %s stays until the group starts again: %s", segment.path, error)

    def _advise(self, factors: Sequence[float]) -> dict[str, Any]:
        self.observer.flush()
        report = self.advisor.report(self.capacity().result(), self._block_bytes(), factors)
        report["observed"]["missing_requests"] = self.observer.dropped
        return report

    def _statistics(self, instances: bool) -> dict[str, Any]:
        report = self.figures.report(instances=instances)
        report["gauges"] |= {"waiting_writes": len(self._waiting), "inbox_requests": self._queued}
        return report

    def _hot_prefixes(self, depth: int, limit: int) -> dict[str, Any]:
        self.observer.flush()
        roots, looked, since_s = self.prefixes.tree(depth, limit)
        there = self._ask(lambda: resident(self.engine, walk(roots))).result()
        nodes = [to_json(root, there) for root in roots]
        return {"group": self.name, "lookups": looked, "since_s": since_s, "nodes": nodes}

    def _stop_recording(self) -> dict[str, Any]:
        self.observer.flush(all_of_it=True)
        return self.recorder.stop()

    def _usage(self) -> dict[str, Any]:
        return {
            **self.engine.usage(),
            "loop": {**self.counters, **self._chores.counters},
            "chores": self._chores.describe(),
            "waiting": {"writes": len(self._waiting), "bytes": self._waiting.ahead_bytes()},
        }

    # -------------------------------------------------------------------------------- registry

    def _weigh(self) -> None:
        self.advisor.weigh(self._block_bytes())

    def _block_bytes(self) -> dict[str, int]:
        return {info.instance_id: info.block_bytes for info in self.engine.instances.values()}

    def _registered(self) -> list[Any]:
        infos = self._view.instances().values()
        return [info for info in infos if info.instance_group_name == self.name]

    def _refresh(self) -> None:
        self._chores.configure(self._view.reclaimer_settings())
        self.engine.configure(self._view.group(self.name), self._view.storages())
        self._follow_instances()
        self._weigh()
        self._note(freed=True)

    def _follow_instances(self) -> None:
        registered = {info.instance_id: info for info in self._registered()}
        for info in list(self.engine.instances.values()):
            if registered.get(info.instance_id, info).uid != info.uid or (info.instance_id not in registered):
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
