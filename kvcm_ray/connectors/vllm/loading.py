"""Loads on a worker: blocks come into memory of ours, are verified, and then go into the engine's cache.

So a read that comes too late cannot touch blocks that belong to another request by then, and a load ends in
time, whatever becomes of it. A load between steps goes piece by piece, all layers of a block at once.

A load *within* a step is waited for layer by layer. Nothing of it is computed upon before all of its blocks
were verified (a block has one checksum over all layers): the first layer waits for the reading, the others
only for a copy between two places in memory. If blocks do not come, the step computes nonsense for that
request, and says so at its end: the engine drops its output and computes those blocks; nothing is saved.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvcm_ray.client.backend import Backend
from kvcm_ray.client.instance import AsyncInstance
from kvcm_ray.client.runtime import Pool, drive
from kvcm_ray.client.transfer import Blocks, Transfer
from kvcm_ray.connectors.vllm.device import computed
from kvcm_ray.connectors.vllm.memory import Bytes, GroupMemory, Staging, WorkerMemory
from kvcm_ray.connectors.vllm.node import backend_of
from kvcm_ray.connectors.vllm.notes import Notes
from kvcm_ray.connectors.vllm.orders import BlockIds, Load, LoadPart
from kvcm_ray.connectors.vllm.settings import Settings
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.errors import Corrupt, KvcmError, SegmentMissing

log = logging.getLogger("vllm.kvcm")

PIECE_BYTES = 4 * 1024 * 1024  #: read and copied at a time, so that the copy finds it in the CPU cache
GRACE_S = 1.0  #: for a read to notice that its time is over


@dataclass(slots=True)
class Rows:
    """Blocks that were read: bytes of one group, and the engine blocks that they are for."""

    memory: GroupMemory
    ids: BlockIds
    rows: Bytes
    buffer: Bytes

    def scatter(self, matrices: range | None = None) -> None:
        self.memory.scatter(self.ids, self.rows, matrices)


class Loads:
    """All loads of a worker. `begin` and `begin_in_step` are for the engine's thread."""

    def __init__(
        self, settings: Settings, memory: WorkerMemory, staging: Staging, transfer: Transfer, notes: Notes
    ) -> None:
        self._settings = settings
        self._memory = memory
        self._groups = list(memory.specs.items())
        self._staging = staging
        self._transfer = transfer
        self._notes = notes
        self._backend: Backend | None = None
        self._pool = Pool("loads")
        self._finished: dict[str, set[int]] = {}  #: under the lock of the notes
        self.info: InstanceInfo | None = None  #: comes with the first load

    def begin(self, load: Load) -> None:
        """Load between steps."""
        end_s = self._end_s()  # waiting for a thread counts
        ready = computed(self._memory)

        def work() -> None:
            missing = self._load(load, end_s, ready)
            with self._notes.lock:
                self._finished[load.request_id] = missing

        try:
            self._pool.submit(work)
        except KvcmError:
            with self._notes.lock:
                self._finished[load.request_id] = load.parts[0].ids_from(0)

    def begin_in_step(self, load: Load) -> LayerLoad:
        """Load for the step that begins."""
        end_s, ready = self._end_s(), computed(self._memory)
        note = functools.partial(self._note, load, time.perf_counter())
        layers = LayerLoad(self._memory, load, end_s, note)

        def work() -> None:
            pieces = self.read(load.parts[0], end_s, ready)
            layers.run(pieces, self._settings.staging_bytes, self._staging)

        try:
            self._pool.submit(work)
        except KvcmError:
            layers.abandon()
        return layers

    def finished(self) -> dict[str, set[int]]:
        """Requests whose loads ended since the last call, and their engine blocks that did not come."""
        with self._notes.lock:
            finished, self._finished = self._finished, {}
        return finished

    def close(self) -> None:
        self._pool.close()
        if self._backend is not None:
            drive(self._backend.close())

    def _end_s(self) -> float:
        return time.monotonic() + self._settings.load_timeout_s

    def _note(self, load: Load, begin: float, blocks: int, size: int, failed: bool) -> None:
        with self._notes.lock:
            moved = self._notes.moved
            moved.loaded_blocks += blocks
            moved.loaded_bytes += size
            moved.load_seconds.append(time.perf_counter() - begin)
            if failed:
                self._notes.report.failed_loads.add(load.request_id)

    def _load(self, load: Load, end_s: float, ready: Callable[[], None]) -> set[int]:
        """Engine blocks that were not filled. Never raises."""
        begin, size, done = time.perf_counter(), 0, [0] * len(load.parts)
        try:
            for number, part in enumerate(load.parts):
                for count, pieces in self.read(part, end_s, ready):
                    try:
                        for piece in pieces:
                            piece.scatter()
                            size += piece.rows.nbytes
                    finally:
                        self._give(pieces)
                    done[number] += count
        except Exception as error:
            # A cache never breaks serving: what it is, the engine computes these blocks.
            log.warning("kvcm: blocks of %s were not loaded: %s", load.request_id, error)
        missing = set().union(*map(LoadPart.ids_from, load.parts, done))
        self._note(load, begin, done[0], size, bool(missing))
        return missing

    def _give(self, pieces: list[Rows]) -> None:
        for piece in pieces:
            self._staging.give(piece.buffer)

    def read(
        self, part: LoadPart, end_s: float, ready: Callable[[], None]
    ) -> Iterator[tuple[int, list[Rows]]]:
        """Read piece by piece: so many blocks, and their verified bytes for the caller to give back.

        Ends early with the first block that does not come. `ready` waits until the cache may be written.
        """
        sizes = [self._groups[group][1].bytes for group in part.groups]
        step = max(1, PIECE_BYTES // max(sizes))
        for begin in range(0, len(part.blocks), step):
            blocks = part.blocks.take(slice(begin, begin + step))
            count, found = len(blocks), []
            try:
                for group, ids in zip(part.groups, part.ids, strict=True):
                    good, rows = self._read_group(blocks, ids[begin : begin + step], group, end_s)
                    count = min(count, good)
                    found += rows
                ready()
            except BaseException:
                self._give(found)
                raise
            yield count, found
            if count < len(blocks):
                return

    def _read_group(self, blocks: Blocks, ids: BlockIds, group: int, end_s: float) -> tuple[int, list[Rows]]:
        """How many leading blocks have this group's bytes now, or need none of it; and the bytes."""
        spec, memory = self._groups[group]
        wanted = np.flatnonzero((ids >= 0).any(axis=1))
        if not len(wanted):
            return len(blocks), []
        size = len(wanted) * memory.bytes
        buffer = self._staging.take_anyway(size)
        try:
            rows = buffer[:size].reshape(len(wanted), memory.bytes)
            good = self._read_rows(blocks.take(wanted), rows, spec, end_s - time.monotonic())
        except BaseException:
            self._staging.give(buffer)
            raise
        whole = len(blocks) if good == len(wanted) else int(wanted[good])
        return whole, [Rows(memory, ids[wanted[:good]], rows[:good], buffer)]

    def _read_rows(self, blocks: Blocks, rows: Bytes, spec: str, left_s: float) -> int:
        assert self.info is not None, "a load comes with its instance"
        instance = AsyncInstance(self._metadata(), self._transfer, self.info, False)
        result = drive(instance.read(blocks, rows, spec=spec, deadline_s=max(0.001, left_s)))
        if not result.flags.all() and isinstance(result.error, SegmentMissing | Corrupt | None):
            with self._notes.lock:
                self._notes.report.lost += blocks.keys[~result.flags].tolist()
        return int(result)

    def _metadata(self) -> Backend:
        """For blocks that were moved since they were found."""
        if self._backend is None:
            self._backend = backend_of(self._settings)
        return self._backend


class LayerLoad:
    """A load that a step computes upon. One thread runs it, the engine's waits for it.

    Args:
        note: is told once, at the end: blocks and bytes that came, and whether some did not.
    """

    def __init__(
        self, memory: WorkerMemory, load: Load, end_s: float, note: Callable[[int, int, bool], None]
    ) -> None:
        (group,) = memory.specs.values()  # with several, loads are made between steps
        self._memory = memory
        self._load = load
        self._end_s = end_s
        self._note = note
        self._matrices = group.layers
        self._of_layer = {name: self._matrices.index(span) for name, span in group.of_layer.items()}
        self._changed = threading.Condition()
        self._copying = threading.Lock()  #: copies, and being abandoned, exclude each other
        self._read = False
        self._there = 0  #: layers that are in the cache
        self._missing: set[int] | None = None  #: once the load has ended

    def wait(self, layer: str) -> None:
        """Until this layer is in the cache, or will not come."""
        number = self._of_layer.get(layer)
        if number is not None:
            self._wait(lambda: self._there > number)

    def end(self) -> set[int]:
        """Wait for all of it; engine blocks that did not come."""
        self._wait(lambda: False)
        assert self._missing is not None
        return self._missing

    def abandon(self) -> None:
        """It takes too long, or cannot begin: from here on it copies nothing."""
        with self._copying:
            self._ended(0)

    def run(self, pieces: Iterator[tuple[int, list[Rows]]], keep_bytes: int, staging: Staging) -> None:
        """Read all, then copy layer by layer the last `keep_bytes` (what comes before, at once)."""
        done, kept, left = 0, [], self._bytes()
        try:
            for count, rows in pieces:
                kept += rows
                done += count
                while kept and left > keep_bytes:
                    self._copy([kept[0]], None)
                    left -= kept[0].rows.nbytes
                    staging.give(kept.pop(0).buffer)
            self._all_read()
            for span in self._matrices:
                self._copy(kept, span)
                with self._changed:
                    self._there += 1
                    self._changed.notify_all()
        except Exception as error:
            log.warning("kvcm: blocks of %s were not loaded: %s", self._load.request_id, error)
            done = 0
        finally:
            for piece in kept:
                staging.give(piece.buffer)
            self._ended(done)

    def _bytes(self) -> int:
        return len(self._load.parts[0].blocks) * sum(self._memory.sizes.values())

    def _all_read(self) -> None:
        with self._changed:
            self._read = True
            self._changed.notify_all()

    def _copy(self, pieces: list[Rows], span: range | None) -> None:
        with self._copying:
            if self._missing is not None:
                return  # abandoned
            for piece in pieces:
                piece.scatter(span)

    def _ended(self, done: int) -> None:
        """So many leading blocks are in the cache."""
        missing = self._load.parts[0].ids_from(done)
        with self._changed:
            if self._missing is not None:
                return
            self._note(done, done * sum(self._memory.sizes.values()), bool(missing))
            self._missing = missing
            self._changed.notify_all()

    def _wait(self, there: Callable[[], bool]) -> None:
        """Reading may take until its time is over; copies are only waited for."""
        limit_s = self._end_s + GRACE_S
        with self._changed:
            while self._missing is None and not there():
                left_s = None if self._read else limit_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self._changed.wait(left_s)
            else:
                return
        self.abandon()
