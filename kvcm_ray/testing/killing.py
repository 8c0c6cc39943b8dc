"""The group actor is killed at random moments while blocks with real bytes are written.

Every block whose finish was acknowledged must be found with its bytes, after every kill and at the end,
when `kvcm_ray.fsck` must find nothing wrong either.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvcm_ray import fsck
from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.requests import Keys, RemoveBlocks
from kvcm_ray.errors import KvcmError
from kvcm_ray.testing.blocks import Engine, instance, some_keys

CALL_TIMEOUT_S = 30.0
BLOCKS_MAX = 32
KEPT_MAX = 4_000  #: acknowledged blocks of one writer; the older half is removed beyond that


@dataclass(slots=True)
class Tally:
    """What happened."""

    kills: int = 0
    acknowledged: int = 0
    removed: int = 0
    lost: int = 0
    refused: list[str] = field(default_factory=list)


class Writer(threading.Thread):
    """Writes without pause; removes the older half of its blocks now and then."""

    def __init__(self, view: RegistryView, instance_id: str, tally: Tally) -> None:
        super().__init__(daemon=True)
        self.engine = Engine(view, instance_id)
        self.tally = tally
        self.kept: list[Keys] = []
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def run(self) -> None:
        while not self.stop.is_set():
            keys = some_keys(random.randint(1, BLOCKS_MAX))
            try:
                finished = self.engine.put(keys, CALL_TIMEOUT_S)
            except KvcmError as error:
                self.tally.refused.append(repr(error))
                continue
            with self.lock:
                self.kept.append(keys)
                self.tally.acknowledged += finished.committed
            if sum(len(k) for k in self.kept) > KEPT_MAX:
                self._remove_half()

    def _remove_half(self) -> None:
        with self.lock:
            half = len(self.kept) // 2
            old, self.kept = np.concatenate(self.kept[:half]), self.kept[half:]
        request = RemoveBlocks(secrets.token_hex(8), self.engine.info.instance_id, old)
        with contextlib.suppress(KvcmError):
            self.engine.handle.call_sync(request, CALL_TIMEOUT_S)
        self.tally.removed += len(old)

    def lost(self) -> int:
        """Acknowledged blocks that are not found with their bytes."""
        with self.lock:
            kept = list(self.kept)
        keys = np.concatenate([*kept, np.zeros(0, np.int64)])
        missing = keys[~self.engine.found(keys)]
        if not len(missing):
            return 0
        # Those removed while we looked are not lost.
        with self.lock:
            still = np.concatenate([*self.kept, np.zeros(0, np.int64)])
        return int(np.isin(missing, still).sum())


def kill_group_rounds(data_dir: Path, group: str, rounds: int, writers: int = 2) -> Tally:
    """Kill the group's actor `rounds` times under load and check. The process has joined its Ray.

    Raises:
        AssertionError: a block was lost, or fsck found something.
    """
    view, handle, registry = RegistryView(data_dir), GroupHandle(group), RegistryHandle()
    tally = Tally()
    threads = []
    for _ in range(writers):
        name = f"kill-{secrets.token_hex(4)}"
        registry.call_sync("register_instance", instance(name, group))
        threads.append(Writer(view, name, tally))
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        time.sleep(random.uniform(0.02, 0.5))
        os.kill(handle.ask_sync("usage", timeout_s=CALL_TIMEOUT_S)["pid"], signal.SIGKILL)
        tally.kills += 1
        handle.ask_sync("usage", timeout_s=CALL_TIMEOUT_S)
        tally.lost += sum(thread.lost() for thread in threads)
        assert not tally.lost, tally
    for thread in threads:
        thread.stop.set()
    for thread in threads:
        thread.join(2 * CALL_TIMEOUT_S)
    tally.lost += sum(thread.lost() for thread in threads)
    assert not tally.lost, tally
    _await_quiet(handle)
    report = fsck.check(data_dir, deep=True)
    assert report.ok, (tally, report.notes)
    for thread in threads:
        registry.call_sync("remove_instance", thread.engine.info.instance_id)
    return tally


def _await_quiet(handle: GroupHandle) -> None:
    """Until nothing is being written or erased: abandoned sessions expire within 30 s."""
    deadline = time.monotonic() + 60
    while True:
        usage = handle.ask_sync("usage", timeout_s=CALL_TIMEOUT_S)
        if not (usage["sessions"] or usage["pending_delete_bytes"]):
            return
        assert time.monotonic() < deadline, usage
        time.sleep(0.2)
