"""What is known about a running manager, and the two files that say it.

``D/lock`` is held (flock) by the manager's process for its whole life and names it from the first moment
on; ``D/manager.json`` appears, in one step, when the manager is ready, and goes when it ends.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from kvcm_ray.actors.paths import manager_file, resolve
from kvcm_ray.errors import InUse, InvalidArgument
from kvcm_ray.index.lock import process_start, process_state

#: A killed process counts as ended a moment before the kernel has closed its files.
RELEASE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Manager:
    """A manager that is ready."""

    url: str
    grpc: str | None
    ray_address: str
    data_dir: str
    ready_s: float  #: time that the start took
    pid: int
    started: int  #: start time of the process in clock ticks since boot
    manager_id: str  #: all its processes have it in their environment
    temp_dir: str
    dashboard_url: str
    haproxy: bool
    ray_auth_mode: str
    version: str
    inside: bool = False  #: a Ray cluster that others started; see `inside`

    @property
    def alive(self) -> bool:
        return is_process(self.pid, self.started)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a data directory, ready or not."""

    pid: int
    started: int
    manager_id: str
    temp_dir: str

    @property
    def alive(self) -> bool:
        return is_process(self.pid, self.started)


def is_process(pid: int, started: int) -> bool:
    """True if that very process lives (a later one with its pid, or a zombie, does not count)."""
    return started > 0 and process_start(pid) == started and process_state(pid) not in "ZX"


def find(data_dir: str | os.PathLike[str]) -> Manager | None:
    """The manager that runs on a data directory of this machine and is ready; None if none is."""
    manager = read_manager(resolve(data_dir))
    return manager if manager is not None and manager.alive else None


def read_manager(data_dir: Path) -> Manager | None:
    """What ``manager.json`` says, whether the process lives or not."""
    try:
        plain = json.loads(manager_file(data_dir).read_bytes())
        return Manager(**plain)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def version() -> str:
    """Of this package."""
    try:
        return importlib.metadata.version("kvcm-ray")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def write_manager(manager: Manager) -> None:
    file = manager_file(Path(manager.data_dir))
    draft = file.with_suffix(".json.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        json.dump(dataclasses.asdict(manager), handle, indent=1)
    draft.replace(file)


class DataDirLock:
    """Exclusive ownership of a data directory.

    Raises:
        InUse: another process owns it.
        InvalidArgument: the directory cannot be made or written.
    """

    def __init__(self, data_dir: Path) -> None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(_lock_file(data_dir), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidArgument(f"{data_dir} cannot be a data directory: {error}") from error
        self._data_dir = data_dir
        deadline = time.monotonic() + RELEASE_TIMEOUT_S
        while not self._try():
            owner = read_owner(data_dir)
            if owner is None or owner.alive or time.monotonic() > deadline:
                os.close(self._fd)
                remedy = f"`kvcm down --data-dir {data_dir}` stops it; another one needs another --data-dir."
                raise InUse(_owned(data_dir), hint=remedy)
            time.sleep(0.05)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def name_owner(self, owner: Owner) -> None:
        text = json.dumps(dataclasses.asdict(owner)).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def read_owner(data_dir: Path) -> Owner | None:
    """Who holds the data directory, or held it last and did not end in good order."""
    try:
        plain = json.loads(_lock_file(data_dir).read_bytes())
        return Owner(**{f.name: plain[f.name] for f in dataclasses.fields(Owner)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock_file(data_dir: Path) -> Path:
    return data_dir / "lock"


def _owned(data_dir: Path) -> str:
    manager, owner = find(data_dir), read_owner(data_dir)
    if manager is not None:
        return f"a manager runs on {data_dir} already: {manager.url}, process {manager.pid}"
    who = f", process {owner.pid}" if owner else ""
    return f"a manager is starting or ending on {data_dir}{who}"
