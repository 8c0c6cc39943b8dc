"""A group with small tiers and its reclaimers in this process, to see blocks go down, up and away.

Real registry, LMDB, shared memory and files; each reclaimer is a thread instead of an actor.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.actors.chores import ErasureDone, MoveDone
from kvcm_ray.actors.reclaimer import ReclaimerBody
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.service import GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster.defaults import default_group, parse_tiers
from kvcm_ray.core.model import (
    CacheReclaimStrategy,
    InstanceGroup,
    ShmSpec,
    TriggerStrategy,
)
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.requests import Flags, Keys, Reply, StartWrite, WriteFinished, WriteStarted
from kvcm_ray.core.segments import by_segment
from kvcm_ray.errors import KvcmError
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import StorageAdapter, open_storage
from kvcm_ray.testing.blocks import SPEC, finish_request, payloads, start_request


class ThreadPool:
    """`GroupControl` and `Pool`: group loops and reclaimers as threads."""

    def __init__(self, data_dir: Path, reclaimer: Callable[[RegistryView], ReclaimerBody]) -> None:
        self.data_dir = data_dir
        self._reclaimer = reclaimer
        self.services: dict[str, GroupService] = {}
        self.sizes: list[int] = []  #: of the pools that were asked for
        self.dead = False  #: reclaimers die with every call
        self._threads: dict[int, tuple[ReclaimerBody, ThreadPoolExecutor]] = {}

    def refresh(self, group: str) -> None:
        if group not in self.services:
            view = RegistryView(self.data_dir)
            self.services[group] = GroupService(view, group, self, lambda why: None)
        self.services[group].refresh().result(10)

    def remove(self, group: str) -> None:
        service = self.services.pop(group)
        service.retire().result(10)
        service.stop()

    def resize(self, reclaimers: int) -> None:
        self.sizes.append(reclaimers)

    def erase(
        self, number: int, size: int, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        self._start(
            number,
            lambda body: body.erase(index_path, trash_ids),
            lambda result, problem: done(*(result or ([], problem))),
        )

    def move(self, number: int, size: int, index_path: str, session_id: str, done: MoveDone) -> None:
        self._start(
            number,
            lambda body: body.move(index_path, [session_id]),
            lambda result, problem: done((result or {}).get(session_id), problem),
        )

    def close(self) -> None:
        for service in self.services.values():
            service.stop()
        for _, thread in self._threads.values():
            thread.shutdown()

    def _start(
        self, number: int, work: Callable[[ReclaimerBody], Any], done: Callable[[Any, str], None]
    ) -> None:
        if self.dead:
            threading.Timer(0.005, done, (None, "dead")).start()
            return
        if number not in self._threads:
            body = self._reclaimer(RegistryView(self.data_dir))
            self._threads[number] = body, ThreadPoolExecutor(1, thread_name_prefix=f"reclaimer-{number}")
        body, thread = self._threads[number]

        def finished(future: Future[Any]) -> None:
            done(future.result(), "")

        thread.submit(work, body).add_done_callback(finished)


class ReclaimLab:
    """Group "default" on the given tiers (see `parse_tiers`), water marks at `high` and `low`.

    New blocks go to the first tier that has room; nothing waits before it is erased.
    """

    def __init__(
        self,
        data_dir: Path,
        tiers: Sequence[str],
        *,
        high: float = 0.0,
        low: float = 0.0,
        reclaimer: Callable[[RegistryView], ReclaimerBody] = ReclaimerBody,
    ) -> None:
        self.data_dir = data_dir
        self.pool = ThreadPool(data_dir, reclaimer)
        self.registry = RegistryBody(data_dir, self.pool)
        self._shm = Path("/dev/shm") / f"kvcm-lab-{secrets.token_hex(4)}"
        self._adapters: dict[str, StorageAdapter] = {}
        parsed = parse_tiers(tiers, data_dir)
        for tier in parsed:
            storage = tier.storage
            if storage.shm is not None:
                storage = dataclasses.replace(
                    storage, shm=ShmSpec(str(self._shm / storage.global_unique_name))
                )
            self.registry.add_storage(storage)
        group = default_group(parsed)
        assert group.cache_config is not None
        reclaim = CacheReclaimStrategy(
            trigger_strategy=TriggerStrategy(used_percentage=high), low_water_percentage=low
        )
        cache = dataclasses.replace(group.cache_config, reclaim_strategy=reclaim)
        self.registry.create_group(dataclasses.replace(group, cache_config=cache))
        self.view = RegistryView(data_dir)

    @property
    def service(self) -> GroupService:
        return self.pool.services["default"]

    def update(self, change: Callable[[InstanceGroup], InstanceGroup]) -> None:
        """Change the group's configuration."""
        group = self.registry.get_group("default")
        changed = dataclasses.replace(change(group), version=group.version + 1)
        self.registry.update_group(changed, group.version)

    def restart(self) -> None:
        """End the group's loop and start the next incarnation."""
        self.pool.services.pop("default").stop()
        self.pool.refresh("default")

    def close(self) -> None:
        self.pool.close()
        self.registry.close()
        shutil.rmtree(self._shm, ignore_errors=True)

    # --------------------------------------------------------------------------------- a client

    def start(self, name: str, keys: Keys, wait_s: float = 10.0) -> Reply | KvcmError:
        """As `GroupHandle` does: a write that is refused for want of room waits for some."""
        request = start_request(name, keys)
        (answer,) = self.service.submit([request]).result(30)
        if isinstance(answer, KvcmError) and want_of(name, answer) is not None:
            answer = self.waiting(request, wait_s).result(30)
        return answer

    def waiting(self, request: StartWrite, wait_s: float = 10.0) -> Future[Reply | KvcmError]:
        return self.service.submit_waiting(request, int(wait_s * 1_000))

    def put(self, name: str, keys: Keys, wait_s: float = 10.0) -> WriteStarted:
        """Write blocks with their bytes; raises the refusal."""
        started = self.start(name, keys, wait_s)
        if isinstance(started, KvcmError):
            raise started
        assert isinstance(started, WriteStarted)
        where, new = started.locations, keys[~started.exists]
        size = self.view.instance(name).block_bytes
        for segment_id, slots in by_segment(where):
            here = where.segment == segment_id
            segment = started.segments[segment_id]
            self.adapter(segment.storage).write(
                segment, SPEC, slots, new[here], where.generation[here], payloads(new[here], size)
            )
        (finished,) = self.service.submit([finish_request(name, started)]).result(30)
        assert finished == WriteFinished(len(new), 0), finished
        return started

    def adapter(self, storage: str) -> StorageAdapter:
        if storage not in self._adapters:
            self._adapters[storage] = open_storage(self.view.storages()[storage])
        return self._adapters[storage]

    def where(self, name: str, keys: Keys) -> list[str]:
        """Storage of each block; "" for one that is not there."""
        reader = IndexReader(self.view.index_path(self.view.instance(name)))
        try:
            hits, at = reader.lookup(keys)
            segments = reader.segments()
        finally:
            reader.close()
        places = zip(hits.tolist(), at.segment.tolist(), strict=True)
        return [segments[segment].storage if hit else "" for hit, segment in places]

    def readable(self, name: str, keys: Keys) -> Flags:
        """True for each block that is there with the right bytes; looked up again if it moved."""
        for _ in range(5):
            good, hits = self._readable(name, keys)
            if good[hits].all():
                break
        return good

    def _readable(self, name: str, keys: Keys) -> tuple[Flags, Flags]:
        reader = IndexReader(self.view.index_path(self.view.instance(name)))
        try:
            hits, at = reader.lookup(keys)
            segments = reader.segments()
        finally:
            reader.close()
        good = np.zeros(len(keys), np.bool_)
        size = self.view.instance(name).block_bytes
        for segment_id in np.unique(at.segment[hits]).tolist():
            part = hits & (at.segment == segment_id)
            segment, where = segments[segment_id], at.take(part)
            out = np.zeros((int(part.sum()), size), np.uint8)
            read = self.adapter(segment.storage).read(
                segment, SPEC, where.slot, keys[part], where.generation, out
            )
            good[part] = read & (out == payloads(keys[part], size)).all(axis=1)
        return good, hits

    def usage(self) -> dict[str, Any]:
        return self.service.usage().result(10)

    def reclaimed(self, name: str) -> int:
        """A counter of the capacity report."""
        return int(self.service.capacity().result(10)["reclaim"][name])

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.usage()}"
            time.sleep(0.01)

    def settled(self) -> bool:
        """Nothing is on its way out or between storages."""
        usage = self.usage()
        return not usage["pending_delete_bytes"] and not usage["reserved_bytes"]
