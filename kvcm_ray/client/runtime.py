"""One implementation, two manners: the client is written once, as coroutines.

`AsyncRuntime` awaits for real. `SyncRuntime` blocks inside, so its coroutines never suspend, and
`drive` runs them to their end without an event loop, at the price of a function call. What may
block on a device runs in a `Pool`: a few daemon threads per storage, so that a storage that hangs
can neither hold its caller, nor other storages, nor the end of the process.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol, TypeVar

from kvcm_ray.errors import Unavailable

T = TypeVar("T")
THREADS_PER_POOL = 4
#: An event loop copies so much itself: some 50 us, less than to hand it to a thread.
INLINE_BYTES_MAX = 256 * 1024


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine of the blocking client suspended: a bug of kvcm-ray")


class Pool:
    """At most `THREADS_PER_POOL` daemon threads; work is refused while all of them are stuck."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads = 0
        self._stuck = 0  #: threads whose waiter gave up and that have not come back
        self._closed = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on a thread of the pool.

        Raises:
            Unavailable: every thread is held by a job that ran into its time limit; they count as
                usable again once those jobs return.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._stuck >= THREADS_PER_POOL or self._closed:
                raise Unavailable(f"storage {self._name!r} does not answer; it is left alone for now")
            if self._idle == 0 and self._threads < THREADS_PER_POOL:
                self._threads += 1
                name = f"kvcm-{self._name}-{self._threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
            else:
                self._idle -= 1  # may go below zero: jobs that wait for a thread
        self._jobs.put((future, job))
        return future

    def give_up(self, future: Future[Any]) -> None:
        """The waiter stops waiting; count the thread as stuck until the job ends."""
        with self._lock:
            self._stuck += 1
        future.add_done_callback(self._came_back)

    def close(self) -> None:
        """Let idle threads end. Jobs in progress run on, unobserved."""
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._jobs.put(None)

    def _came_back(self, _future: Future[Any]) -> None:
        with self._lock:
            self._stuck -= 1

    def _work(self) -> None:
        while (task := self._jobs.get()) is not None:
            future, job = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # the waiter's to judge
                    future.set_exception(error)
            with self._lock:
                self._idle += 1


class Runtime(Protocol):
    """How the client waits."""

    blocking: bool

    async def offload(self, pool: Pool, job: Callable[[], T], timeout_s: float | None) -> T:
        """`job()` on the pool. Raises Unavailable after `timeout_s` (None waits without limit)."""

    async def local(self, pool: Pool, job: Callable[[], T], size: int) -> T:
        """`job()`, which copies `size` bytes of memory and cannot hang.

        On this thread, unless that would hold up others.
        """


class SyncRuntime:
    blocking = True

    async def offload(self, pool: Pool, job: Callable[[], T], timeout_s: float | None) -> T:
        future = pool.submit(job)
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            if future.done():
                raise  # the job's own
            raise _gave_up(pool, future, timeout_s) from None

    async def local(self, pool: Pool, job: Callable[[], T], size: int) -> T:
        return job()


class AsyncRuntime:
    blocking = False

    async def offload(self, pool: Pool, job: Callable[[], T], timeout_s: float | None) -> T:
        future = pool.submit(job)
        waiter = asyncio.wrap_future(future)
        waiter.add_done_callback(lambda f: f.cancelled() or f.exception())  # seen, also if late
        done, _ = await asyncio.wait({waiter}, timeout=timeout_s)
        if done:
            return waiter.result()
        raise _gave_up(pool, future, timeout_s)

    async def local(self, pool: Pool, job: Callable[[], T], size: int) -> T:
        if size <= INLINE_BYTES_MAX:
            return job()
        return await self.offload(pool, job, None)


def _gave_up(pool: Pool, future: Future[Any], timeout_s: float | None) -> Unavailable:
    if not future.cancel():
        pool.give_up(future)
    return Unavailable(f"storage {pool._name!r} did not answer within {timeout_s:.3g} s")
