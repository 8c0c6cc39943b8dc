"""A few threads for copying and hashing. Large copies, system calls and hashes release the GIL.

The threads are shared by all adapters of a process, start on first use, and are forgotten in a
forked child (where they do not exist).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

THREADS_MAX = 4  #: the calling thread included
THREADS = max(1, min(THREADS_MAX, len(os.sched_getaffinity(0))))
#: A call moves at least this much before a second thread is worth waking.
BYTES_PER_THREAD_MIN = 1 << 20
BLOCK_BYTES_MIN = 64 * 1024  #: smaller blocks spend their time under the GIL anyway

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run all tasks, the first one in this thread. Returns or raises after every one has ended."""
    others: list[Future[None]] = [_submit(task) for task in tasks[1:]]
    errors: list[BaseException] = []
    try:
        if tasks:
            tasks[0]()
    except BaseException as error:
        errors.append(error)
    errors += [failure for f in others if (failure := f.exception()) is not None]
    if errors:
        raise errors[0]


def shares(total_bytes: int, block_bytes: int) -> int:
    """How many threads a call that moves so many bytes in such blocks should use."""
    if block_bytes < BLOCK_BYTES_MIN:
        return 1
    return max(1, min(THREADS, total_bytes // BYTES_PER_THREAD_MIN))


def _submit(task: Callable[[], None]) -> Future[None]:
    try:
        return _executor().submit(task)
    except RuntimeError:  # the interpreter is shutting down and starts no threads any more
        future: Future[None] = Future()
        try:
            task()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
        return future


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kvcm-storage")
        return _pool


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
