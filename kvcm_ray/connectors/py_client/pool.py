"""Threads that move blocks: a fixed number, a bounded queue, and none that keeps the process from ending."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from kvcm_ray.connectors.py_client.types import ClientError, ClientErrorCode

Work = Callable[[], None]


class Pool:
    """At most `threads` daemon threads, and at most `queue_size` pieces of work that wait for one."""

    def __init__(self, threads: int, queue_size: int) -> None:
        self._threads_max = threads
        self._works_max = threads + queue_size
        self._queue: deque[tuple[Future[None], Work]] = deque()
        self._ready = threading.Condition()
        self._threads = 0
        self._works = 0  #: waiting or being done
        self._closed = False

    def submit(self, works: Sequence[Work]) -> list[Future[None]]:
        """Queue all of `works`, or none. Raises ClientError if there is no room for them."""
        futures: list[Future[None]] = [Future() for _ in works]
        with self._ready:
            if self._closed or self._works + len(works) > self._works_max:
                text = f"the transfer pool is full: {self._works} of {self._works_max} are under way"
                raise ClientError(ClientErrorCode.ER_THREADPOOL_ERROR, text)
            self._works += len(works)
            self._queue.extend(zip(futures, works, strict=True))
            while self._threads < min(self._works, self._threads_max):
                self._threads += 1
                threading.Thread(target=self._work, name="kvcm-transfer", daemon=True).start()
            self._ready.notify(len(works))
        return futures

    def close(self) -> None:
        """Let the threads end once the queue is empty."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def _next(self) -> tuple[Future[None], Work] | None:
        with self._ready:
            while not self._queue and not self._closed:
                self._ready.wait()
            return self._queue.popleft() if self._queue else None

    def _work(self) -> None:
        while (task := self._next()) is not None:
            future, work = task
            error: BaseException | None = None
            try:
                if future.set_running_or_notify_cancel():
                    work()
            except BaseException as failure:  # the caller's to judge
                error = failure
            with self._ready:
                self._works -= 1
            if not future.cancelled():
                future.set_exception(error) if error is not None else future.set_result(None)
            del task, future, work  # else an idle thread keeps the last call's memory
