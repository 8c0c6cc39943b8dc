"""One write transaction at a time among processes, with a deadline instead of a wait for ever.

LMDB's own writer mutex has no time-out: a process that is stopped inside a transaction stops all
other writers (a dead one does not; the kernel releases its mutex). So every writer takes an
advisory lock on ``writer.lock`` first. Whoever holds LMDB's mutex then holds this lock too, the
kernel drops it when the holder dies, and waiting for it can be given up. The file says who took it
last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from kvcm_ray.errors import StorageIOError, Unavailable

LOCK_FILE = "writer.lock"
_POLL_S = 0.002


class WriterLock:
    """Lock of one writer object. Not re-entrant; not for several threads at once."""

    def __init__(self, path: Path) -> None:
        self._file = path / LOCK_FILE
        try:
            self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageIOError(f"cannot open {self._file}: {error}") from error
        identity = {"pid": os.getpid(), "started": process_start(os.getpid())}
        self._identity = json.dumps(identity).encode().ljust(64)

    def acquire(self, timeout_s: float) -> None:
        """Raises Unavailable, naming the holder, if it is not free within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Unavailable(self._held(timeout_s)) from None
                time.sleep(_POLL_S)
        with contextlib.suppress(OSError):  # a full disk: a later message would name an old holder
            os.pwrite(self._fd, self._identity, 0)

    def release(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._fd)

    def _held(self, timeout_s: float) -> str:
        text = os.pread(self._fd, 256, 0).decode(errors="replace")
        try:
            holder = json.loads(text)
            pid, started = int(holder["pid"]), int(holder["started"])
        except (ValueError, KeyError, TypeError):
            return f"{self._file} has been locked for {timeout_s} s by an unknown process"
        state = process_state(pid) if process_start(pid) == started else "gone"
        advice = {"T": ", stopped: continue or kill it", "gone": ""}.get(state, "")
        return (
            f"another writer has been inside a transaction for over {timeout_s} s: process {pid} "
            f"(state {state}{advice}) holds {self._file}"
        )


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def process_state(pid: int) -> str:
    """One letter as in ps(1): T = stopped; "gone" if there is no such process."""
    fields = _stat_fields(pid)
    return fields[0] if fields else "gone"


def process_start(pid: int) -> int:
    """Start in clock ticks since boot, which tells a process from a later one of its pid; or 0."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else 0
