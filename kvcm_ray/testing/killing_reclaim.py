"""Killing the group and the reclaimers while they evict, demote and promote.

Writers fill a small fast tier and a larger slow one without pause, so that every write has to wait for
room; readers verify every byte, touch (which promotes), lease and remove. Meanwhile processes die by
kill -9. What is checked:

* no read gives other bytes than were written, and no location that the index names before and after a
  read is without its bytes (generations are never used twice, so it was the same block throughout);
* used + reserved is within the quotas in every sample, and so are the bytes on the storages whenever the
  group is dead;
* in the end nothing is left over: no session, no trash, and `fsck` reads everything and finds nothing.

`Lab` is what is killed: plain processes (`crash_child`), or the actors of a manager.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvcm_ray import fsck
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import StorageType
from kvcm_ray.core.records import SessionKind
from kvcm_ray.core.requests import Keys, LeaseBlocks, RemoveBlocks, Touch
from kvcm_ray.errors import KvcmError, NotFound, StorageError
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import open_storage
from kvcm_ray.testing.blocks import Engine, Group, some_keys

TIMEOUT_S = 30.0
CHAIN_BLOCKS_MAX = 48
CHAINS_KEPT = 60  #: that readers ask for; more than fit the quota
SAMPLE_S = 0.02


class Lab(Protocol):
    """A group of two tiers that can be killed."""

    data_dir: Path
    instance_id: str
    reclaimers: int

    def handle(self) -> Group:
        """For one thread."""
        ...

    def usage(self) -> dict[str, Any]: ...

    def kill_group(self) -> None:
        """It is dead when this returns."""
        ...

    def kill_reclaimer(self, number: int) -> None: ...

    def revive(self) -> None:
        """Everything runs again when this returns."""
        ...


@dataclass(slots=True)
class Tally:
    """What happened. Only `problems` are bad."""

    kills: Counter[str] = field(default_factory=Counter)  #: by what was killed
    busy: Counter[str] = field(default_factory=Counter)  #: kills that left moves or trash in progress
    reclaimed: Counter[str] = field(default_factory=Counter)  #: blocks evicted, demoted...
    written: int = 0  #: acknowledged blocks
    read: int = 0  #: blocks verified
    missed: int = 0
    samples: int = 0
    checks: int = 0  #: of everything, after a pause
    refused: Counter[str] = field(default_factory=Counter)  #: calls that ran out of time, by error
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"kills {dict(self.kills)}, with work in progress {dict(self.busy)}; blocks "
            f"{dict(self.reclaimed)}; {self.written} written, {self.read} read and verified, "
            f"{self.missed} missed; {self.samples} samples of the quota; {self.checks} deep checks; "
            f"refused {dict(self.refused)}; problems {self.problems}"
        )


class Load:
    """Writers, readers and the sampler; can pause."""

    def __init__(self, lab: Lab, writers: int, readers: int) -> None:
        self.lab, self.tally = lab, Tally()
        self.view = RegistryView(lab.data_dir)
        self.chains: deque[Keys] = deque(maxlen=CHAINS_KEPT)
        self.lock = threading.Lock()
        self._stop, self._go = threading.Event(), threading.Event()
        self._idle = threading.Semaphore(0)
        bodies: list[Callable[[Engine], None]] = [self.write] * writers + [self.read] * readers
        self._threads = [threading.Thread(target=self._loop, args=(b,), daemon=True) for b in bodies]
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._counted: dict[str, int] = {}  #: of the present incarnation of the group

    # -------------------------------------------------------------------------------- threads

    def start(self) -> None:
        self._go.set()
        for thread in [*self._threads, self._sampler]:
            thread.start()

    def pause(self) -> None:
        """Returns when no call is in progress."""
        self._go.clear()
        for _ in self._threads:
            assert self._idle.acquire(timeout=2 * TIMEOUT_S), "a client hangs"

    def resume(self) -> None:
        self._go.set()

    def stop(self) -> None:
        self._stop.set()
        self._go.set()
        for thread in [*self._threads, self._sampler]:
            thread.join(2 * TIMEOUT_S)

    def _loop(self, body: Callable[[Engine], None]) -> None:
        engine = Engine(self.view, self.lab.instance_id, self.lab.handle())
        while not self._stop.is_set():
            if not self._go.is_set():
                self._idle.release()
                self._go.wait()
                continue
            try:
                body(engine)
            except (KvcmError, OSError, EOFError) as error:
                with self.lock:
                    self.tally.refused[type(error).__name__] += 1
            except AssertionError as error:
                self.problem(str(error))

    def problem(self, text: str) -> None:
        with self.lock:
            self.tally.problems.append(text)

    # ----------------------------------------------------------------------------------- work

    def write(self, engine: Engine) -> None:
        """A chain of its own, or one that begins as another does."""
        keys = some_keys(random.randint(1, CHAIN_BLOCKS_MAX))
        with self.lock:
            other = random.choice(self.chains) if self.chains and random.random() < 0.4 else None
        if other is not None:
            keys = np.concatenate([other[: random.randint(1, len(other))], keys])
        finished = engine.put(keys, TIMEOUT_S, partial_tail=random.random() < 0.5)
        with self.lock:
            self.chains.append(keys)
            self.tally.written += finished.committed

    def read(self, engine: Engine) -> None:
        with self.lock:
            keys = random.choice(self.chains) if self.chains else None
        if keys is None:
            time.sleep(0.01)
            return
        name, dice = engine.info.instance_id, random.random()
        if dice < 0.05:
            engine.handle.call_sync(RemoveBlocks(secrets.token_hex(8), name, keys[-4:]), TIMEOUT_S)
        elif dice < 0.15:
            engine.handle.call_sync(LeaseBlocks(name, keys, 200), TIMEOUT_S)
        verified = sum(self.verify(engine, keys, copies) for copies in (False, True))
        if verified:
            hits = IndexLook(self.view, engine).hits(keys)
            engine.handle.call_sync(Touch(name, keys[hits], len(keys)), TIMEOUT_S)

    def verify(self, engine: Engine, keys: Keys, copies: bool) -> int:
        """Blocks whose bytes are right; a place that stays named although its bytes are lost is a
        problem."""
        hits, right, at = engine.looked_at(keys, copies=copies)
        missed = np.flatnonzero(hits & ~right)
        if len(missed):
            there, _, again = engine.looked_at(keys[missed], copies=copies)
            same = there & (again.segment == at.segment[missed]) & (again.slot == at.slot[missed])
            same &= again.generation == at.generation[missed]
            if same.any():
                self.problem(f"dangling{' copies' if copies else ''}: {keys[missed][same].tolist()[:5]}")
        with self.lock:
            self.tally.read += int(right.sum())
            self.tally.missed += len(missed)
        return int(right.sum())

    # ------------------------------------------------------------------------------- sampling

    def _sample(self) -> None:
        while not self._stop.is_set():
            time.sleep(SAMPLE_S)
            with contextlib.suppress(KvcmError, OSError, EOFError):
                self.sample()

    def sample(self) -> dict[str, Any]:
        usage = self.lab.usage()
        rows = {"total": usage, **usage["by_type"]}
        for name, row in rows.items():
            held, quota = row["used_bytes"] + row["reserved_bytes"], row["quota_bytes"]
            if quota is not None and held > quota:
                self.problem(f"{name}: {held} bytes held of a quota of {quota}")
        with self.lock:
            self.tally.samples += 1
            self._count(usage["reclaim"])
        return usage

    def _count(self, reclaim: dict[str, Any]) -> None:
        """Counters begin at 0 with every incarnation."""
        for name, value in reclaim.items():
            if name.endswith("_blocks"):
                before = self._counted.get(name, 0)
                self.tally.reclaimed[name] += value - before if value >= before else value
                self._counted[name] = value

    def stored(self) -> dict[StorageType, int]:
        """Bytes of the instance on the storages, by type, as the file systems know them."""
        total: Counter[StorageType] = Counter()
        uid = self.view.instance(self.lab.instance_id).uid
        for config in self.view.storages().values():
            adapter = open_storage(config)
            try:
                for found in adapter.list_segments():
                    ours = found.owner is not None and found.owner.uid == uid
                    for spec in found.segment.specs if ours and found.segment else ():
                        with contextlib.suppress(StorageError):
                            written = adapter.written_slots(found.segment, spec.name)
                            total[config.storage_type] += int(written.sum()) * spec.size
            finally:
                adapter.close()
        return total

    def check_stored(self) -> None:
        """While the group is dead nothing more is reserved, so this is within the quota as well."""
        group = self.view.group(self.view.instance(self.lab.instance_id).instance_group_name)
        quotas = {q.storage_type: q.capacity for q in group.quota.quota_config} if group.quota else {}
        for kind, nbytes in self.stored().items():
            if nbytes > quotas.get(kind, group.quota_bytes):
                self.problem(f"{kind.name}: {nbytes} bytes stored of a quota of {quotas[kind]}")


class IndexLook:
    """What an index says at one moment."""

    def __init__(self, view: RegistryView, engine: Engine) -> None:
        self._reader = IndexReader(view.index_path(engine.info))

    def hits(self, keys: Keys) -> np.ndarray[Any, np.dtype[np.bool_]]:
        found, _ = self._reader.lookup(keys)
        self._reader.close()
        return found

    def in_progress(self) -> set[str]:
        """Kinds of work that somebody is at."""
        kinds = {session.kind.value for session in self._reader.sessions()} - {SessionKind.WRITE.value}
        if self._reader.trash():
            kinds.add("erase")
        self._reader.close()
        return kinds


# ------------------------------------------------------------------------------------------- rounds


def kill_rounds(
    lab: Lab,
    rounds: int,
    *,
    writers: int = 2,
    readers: int = 2,
    check_every: int = 50,
    pause_s: float = 0.15,
    targets: Sequence[str] = ("group", "reclaimer", "both"),
) -> Tally:
    """Kill `rounds` times, in turn what `targets` say, and check everything now and then.

    Raises:
        AssertionError: something is wrong; says what, and all that was counted.
    """
    load = Load(lab, writers, readers)
    load.start()
    try:
        _await_eviction(load)
        for number in range(rounds):
            time.sleep(random.uniform(0, pause_s))
            _kill(lab, load, targets[number % len(targets)])
            if (number + 1) % check_every == 0 or number + 1 == rounds:
                _check_all(lab, load)
            assert not load.tally.problems, load.tally
    finally:
        load.stop()
    assert not load.tally.problems, load.tally
    return load.tally


def _await_eviction(load: Load) -> None:
    """Until the tiers are full, so that every kill finds somebody at work."""
    deadline = time.monotonic() + 60
    while not (load.tally.reclaimed["evicted_blocks"] and load.tally.reclaimed["demoted_blocks"]):
        assert time.monotonic() < deadline, load.tally
        time.sleep(SAMPLE_S)


def _kill(lab: Lab, load: Load, target: str) -> None:
    if target in ("reclaimer", "both"):
        for number in range(lab.reclaimers) if target == "both" else [random.randrange(lab.reclaimers)]:
            lab.kill_reclaimer(number)
    if target in ("group", "both"):
        lab.kill_group()
        load.check_stored()
        engine = Engine(load.view, lab.instance_id, lab.handle())
        with contextlib.suppress(NotFound):
            load.tally.busy.update(IndexLook(load.view, engine).in_progress())
    load.tally.kills[target] += 1
    lab.revive()


def _check_all(lab: Lab, load: Load) -> None:
    load.pause()
    _await_quiet(load)
    report = fsck.check(lab.data_dir, deep=True)
    if not report.ok:
        load.problem(f"fsck: {report.to_dict()}")
    _verify_all(load, Engine(load.view, lab.instance_id, lab.handle()))
    load.tally.checks += 1
    load.resume()


def _verify_all(load: Load, engine: Engine) -> None:
    """Every block of the index has the bytes that its key says."""
    reader = IndexReader(load.view.index_path(engine.info))
    keys = np.concatenate([run.keys[run.alive] for run in reader.runs()] or [np.zeros(0, np.int64)])
    reader.close()
    hits, right, _ = engine.looked_at(keys)
    if not (hits & right).all():
        load.problem(f"{int((~(hits & right)).sum())} of {len(keys)} blocks are not there")


def _await_quiet(load: Load) -> None:
    """Until nothing is being written, moved or erased. Abandoned moves expire within a minute."""
    deadline = time.monotonic() + 90
    while True:
        usage = load.sample()
        if not (usage["sessions"] or usage["pending_delete_bytes"]):
            return
        assert time.monotonic() < deadline, f"never quiet: {usage}"
        time.sleep(0.05)
