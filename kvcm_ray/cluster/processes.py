"""Finding and ending the processes of one manager.

Every process that a manager starts, directly or not, has ``KVCM_MANAGER_ID=<id>`` in its environment, so
none is missed and none of anybody else is touched. Used by the manager, by ``down``, and by the reaper,
which runs as a plain script without site-packages: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time

VARIABLE = "KVCM_MANAGER_ID"


def members(manager_id: str, apart_from: frozenset[int] = frozenset()) -> list[int]:
    """Pids of living processes of the manager, the caller's own left out."""
    mark = f"{VARIABLE}={manager_id}".encode()
    skip = apart_from | {os.getpid()}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in skip:
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if mark in file.read().split(b"\0"):
                found.append(int(name))
    return found


def end_all(manager_id: str, timeout_s: float, apart_from: frozenset[int] = frozenset()) -> bool:
    """Kill what is left of a manager until nothing is; False if something is at the end."""
    deadline = time.monotonic() + timeout_s
    clear = 0
    while clear < 2:  # a process may be between fork and being seen
        found = members(manager_id, apart_from)
        clear = 0 if found else clear + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return not found
        time.sleep(0.05)
    return True


def remove_temp_dir(temp_dir: str) -> None:
    """Only a directory that a manager made."""
    if os.path.basename(temp_dir).startswith("kvcm-") and os.path.isdir(temp_dir):
        shutil.rmtree(temp_dir, ignore_errors=True)
