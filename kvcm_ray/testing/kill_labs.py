"""What `killing_reclaim` kills: a group of two tiers as plain processes, or as the actors of a manager."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.paths import shm_dir
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.cluster.defaults import default_group, parse_tiers
from kvcm_ray.core.model import CacheReclaimStrategy, InstanceGroup, TriggerStrategy
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.requests import Reply, Request, StartWrite
from kvcm_ray.errors import Fenced, KvcmError, Unavailable
from kvcm_ray.testing.blocks import instance
from kvcm_ray.testing.crash_child import Caller, address_of

TIERS = ("shm:1MiB", "file:4MiB")
INSTANCE = "killed"
RECLAIMERS = 2
RETRY_S = 0.01


def eager(group: InstanceGroup, delay_ms: int = 20) -> InstanceGroup:
    """The group with marks that keep its reclaimers busy."""
    assert group.cache_config is not None
    strategy = CacheReclaimStrategy(
        trigger_strategy=TriggerStrategy(used_percentage=0.9),
        low_water_percentage=0.75,
        delay_before_delete_ms=delay_ms,
    )
    cache = dataclasses.replace(group.cache_config, reclaim_strategy=strategy)
    return dataclasses.replace(group, cache_config=cache)


class NoGroups:
    """`GroupControl` for a registry without actors."""

    def refresh(self, group: str) -> None: ...

    def remove(self, group: str) -> None: ...

    def resize(self, reclaimers: int) -> None: ...


class ProcessHandle:
    """A `GroupHandle` of sockets: sends a request again while its group is restarting, and lets a write
    that is refused wait for room. For one thread."""

    def __init__(self, address: str) -> None:
        self._caller = Caller(address)

    def call_sync(self, request: Request, timeout_s: float = 10.0) -> Reply:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._ask(request, deadline)
            except (OSError, EOFError) as error:
                answer = Unavailable(f"no group: {error!r}")
            if not isinstance(answer, KvcmError):
                return answer
            if not isinstance(answer, Unavailable | Fenced) or time.monotonic() > deadline:
                raise answer
            time.sleep(RETRY_S)

    def _ask(self, request: Request, deadline: float) -> Reply | KvcmError:
        left_s = deadline - time.monotonic()
        (answer,) = self._caller.call(("submit", ([request],)), left_s)
        waits = isinstance(request, StartWrite) and isinstance(answer, KvcmError)
        if waits and want_of(request.instance_id, answer) is not None:
            wait_ms = int((deadline - time.monotonic()) * 1_000)
            answer = self._caller.call(("submit_waiting", (request, wait_ms)), left_s)
        result: Reply | KvcmError = answer
        return result


class ProcessLab:
    """See `crash_child`; use `process_lab`."""

    def __init__(self, data_dir: Path, nursery: subprocess.Popen[str], reclaimers: int) -> None:
        self.data_dir = data_dir
        self.instance_id = INSTANCE
        self.reclaimers = reclaimers
        self._sockets = tempfile.mkdtemp(prefix="kvcm-kill-")
        self._nursery = nursery
        self._pids: dict[str, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def handle(self) -> ProcessHandle:
        return ProcessHandle(self._address())

    def usage(self) -> dict[str, Any]:
        if not hasattr(self._local, "caller"):
            self._local.caller = Caller(self._address())
        caller: Caller = self._local.caller
        try:
            return dict(caller.call(("usage", ()), 5.0))
        except (OSError, EOFError):  # of the incarnation before this one
            return dict(caller.call(("usage", ()), 5.0))

    def kill_group(self) -> None:
        self._kill("group")

    def kill_reclaimer(self, number: int) -> None:
        self._kill(f"reclaimer-{number}")

    def revive(self) -> None:
        for number in range(self.reclaimers):
            if f"reclaimer-{number}" not in self._pids:
                pid = self._order(["reclaimer", self._sockets, str(self.data_dir), number])
                self._pids[f"reclaimer-{number}"] = pid
        if "group" not in self._pids:
            self._pids["group"] = self._order(["group", self._sockets, str(self.data_dir), "default"])

    def close(self) -> None:
        for name in list(self._pids):
            self._kill(name)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _kill(self, name: str) -> None:
        self._order(["kill", self._pids.pop(name)])

    def _address(self) -> str:
        return address_of(self._sockets, "group-default")

    def _order(self, order: list[Any]) -> int:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        with self._lock:
            self._nursery.stdin.write(json.dumps(order) + "\n")
            self._nursery.stdin.flush()
            return int(self._nursery.stdout.readline())


@contextlib.contextmanager
def process_lab(
    data_dir: Path, tiers: Sequence[str] = TIERS, reclaimers: int = RECLAIMERS
) -> Iterator[ProcessLab]:
    """A lab in a fresh data directory; ends its processes and removes its shared memory."""
    registry = RegistryBody(data_dir, NoGroups())
    parsed = parse_tiers(tiers, data_dir)
    for tier in parsed:
        registry.add_storage(tier.storage)
    registry.create_group(eager(default_group(parsed)))
    registry.register_instance(instance(INSTANCE))
    registry.close()
    nursery = subprocess.Popen(
        [sys.executable, "-m", "kvcm_ray.testing.crash_child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lab = ProcessLab(data_dir, nursery, reclaimers)
    try:
        lab.revive()
        yield lab
        lab.close()
    finally:
        nursery.kill()  # and its children with it
        nursery.wait()
        shutil.rmtree(shm_dir(data_dir), ignore_errors=True)


class RayLab:
    """A group of its own in a running manager, whose Ray this process has joined; on the storages of
    the group "default", with quotas of `TIERS`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.instance_id = f"killed-{secrets.token_hex(4)}"
        self._group = f"kill-{secrets.token_hex(4)}"
        self._registry = RegistryHandle()
        self.reclaimers = int(self._registry.call_sync("reclaimer_settings").reclaimers)
        default = self._registry.call_sync("get_group", "default")
        small = default_group(parse_tiers(TIERS, data_dir))
        names = default.storage_candidates
        group = dataclasses.replace(eager(small), name=self._group, storage_candidates=names, version=1)
        self._registry.call_sync("create_group", group)
        self._registry.call_sync("register_instance", instance(self.instance_id, self._group))
        self._handle = GroupHandle(self._group)

    def handle(self) -> GroupHandle:
        return self._handle

    def usage(self) -> dict[str, Any]:
        return self._handle.ask_sync("usage", timeout_s=30.0)

    def kill_group(self) -> None:
        _kill_and_wait(lambda: int(self.usage()["pid"]))

    def kill_reclaimer(self, number: int) -> None:
        _kill_and_wait(lambda: self._reclaimer_pid(number))

    def revive(self) -> None:
        """Ray starts them again; waits for that."""
        self.usage()
        for number in range(self.reclaimers):
            self._reclaimer_pid(number)

    def close(self) -> None:
        self._registry.call_sync("remove_instance", self.instance_id)
        self._registry.call_sync("remove_group", self._group)

    def _reclaimer_pid(self, number: int) -> int:
        import ray
        from ray.exceptions import RayError

        from kvcm_ray.actors.names import NAMESPACE, reclaimer_name

        deadline = time.monotonic() + 30
        while True:
            try:
                actor = ray.get_actor(reclaimer_name(number, self.reclaimers), namespace=NAMESPACE)
                return int(ray.get(actor.pid.remote(), timeout=10))
            except (RayError, ValueError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _kill_and_wait(find: Callable[[], int]) -> None:
    """kill -9 a process that is not a child; waits until it is gone."""
    deadline = time.monotonic() + 30
    while True:
        pid = find()
        try:
            os.kill(pid, signal.SIGKILL)
            break
        except ProcessLookupError:  # it ended between its answer and this; ask its successor
            assert time.monotonic() < deadline, f"process {pid} cannot be killed"
    while _is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} does not die"
        time.sleep(0.002)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # gone, or going while its file is being read
        return False
