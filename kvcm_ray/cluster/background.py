"""``up --detach``, ``down`` and ``attach``: what is done to a manager from outside of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcm_ray.actors.join import join, join_data_dir
from kvcm_ray.actors.paths import manager_file, resolve, shm_dir
from kvcm_ray.cluster import door, processes
from kvcm_ray.cluster.defaults import parse_tiers
from kvcm_ray.cluster.environment import haproxy_binary
from kvcm_ray.cluster.facts import DataDirLock, Manager, find, read_owner
from kvcm_ray.cluster.inside import down_inside, is_inside
from kvcm_ray.cluster.launch import check_port, clear_up_after
from kvcm_ray.cluster.options import PORT, Options
from kvcm_ray.errors import InUse, Unavailable

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_BYTES = 2_000


def up_detached(
    data_dir: str | os.PathLike[str],
    port: int = PORT,
    tiers: Sequence[str] = (),
    *,
    timeout_s: float = START_TIMEOUT_S,
    **others: Any,
) -> Manager:
    """Start a manager in the background and wait until it is ready. Its output is ``D/manager.log``.

    Args:
        others: further fields of `Options`, where all are explained.

    Raises:
        InUse: a manager runs on the data directory, or the port is taken.
        InvalidArgument: a tier is written wrongly.
        Unavailable: it did not get ready; the message ends with its last words.
    """
    folder = resolve(data_dir)
    options = Options(folder, port, tuple(tiers), **others)
    parse_tiers(options.tiers, folder)
    door.check(options, haproxy=haproxy_binary() is not None)
    DataDirLock(folder).release()  # says at once who else has it
    check_port(options.host, port)
    command = [sys.executable, "-m", "kvcm_ray.cluster", options.to_json()]
    log_file = folder / "manager.log"
    with log_file.open("ab") as output:
        begin = output.tell()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return _await_ready(folder, child, log_file, begin, timeout_s)


def _await_ready(
    folder: Path, child: subprocess.Popen[bytes], log_file: Path, begin: int, timeout_s: float
) -> Manager:
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            manager = find(folder)
            if manager is not None and manager.pid == child.pid:
                return manager
            if child.poll() is not None:
                words = _last_words(log_file, begin)
                failed = InUse if "InUse" in words else Unavailable
                raise failed(f"the manager ended while starting: {words or child.returncode}")
            time.sleep(0.05)
        raise Unavailable(f"the manager was not ready after {timeout_s:g} s; see {log_file}")
    except BaseException:
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_TIMEOUT_S)
        raise


def _last_words(log_file: Path, begin: int) -> str:
    with log_file.open("rb") as file:
        file.seek(max(begin, log_file.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def down(data_dir: str | os.PathLike[str], *, purge: bool = False) -> bool:
    """Stop the manager of a data directory; with `purge` remove the directory and its shared memory.

    Returns False if none ran. Blocks in shared memory survive (until the machine boots) without
    `purge`. Nothing that another manager uses is touched.

    Raises:
        Unavailable: it could not be stopped.
    """
    folder = resolve(data_dir)
    if inside := is_inside(folder):
        down_inside(inside)
    owner = read_owner(folder) if folder.is_dir() else None
    ran = owner is not None and owner.alive
    if owner is not None and ran:
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGTERM)
        _await_end(owner.pid, lambda: owner.alive)
    if folder.is_dir():
        _clear_up(folder)
    if purge:
        shutil.rmtree(shm_dir(folder), ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    return ran or inside is not None


def _await_end(pid: int, alive: object) -> None:
    assert callable(alive)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while alive():
        _reap(pid)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline += STOP_TIMEOUT_S
        time.sleep(0.05)


def _reap(pid: int) -> None:
    """If the manager is a child of this process, its death must be taken note of."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _clear_up(folder: Path) -> None:
    try:
        lock = DataDirLock(folder)
    except InUse as error:
        raise Unavailable(f"not stopped: {error}") from error
    clear_up_after(folder)
    lock.release()
    with contextlib.suppress(FileNotFoundError):
        manager_file(folder).unlink()


def attach(target: str | os.PathLike[str]) -> None:
    """Connect this process to a manager's Ray: by its data directory or by its ``ray_address``.

    Raises:
        Unavailable: no manager there.
    """
    if Path(target).is_dir():
        join_data_dir(target)
    else:
        join(str(target))


def leftovers(manager: Manager) -> list[int]:
    """Pids of processes that a manager started and that live; for tests and `kvcm doctor`."""
    return processes.members(manager.manager_id)
