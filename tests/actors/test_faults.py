"""Trouble with disks and files: it stays where it is, names itself, and passes. No Ray."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray import fsck
from kvcm_ray.actors.engine import GroupEngine, Now
from kvcm_ray.actors.reclaimer import ReclaimerBody
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.service import GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceGroupQuota
from kvcm_ray.core.requests import FinishWrite, Keys, RemoveBlocks, Removed, WriteFinished, WriteStarted
from kvcm_ray.core.segments import by_segment
from kvcm_ray.errors import StorageFull, StorageIOError, Unsupported
from kvcm_ray.index import IndexReader
from kvcm_ray.testing.blocks import (
    SPEC,
    finish_request,
    instance,
    payloads,
    some_keys,
    start_request,
)


def put(engine: GroupEngine, name: str, keys: Keys) -> WriteStarted:
    """Write blocks with their bytes."""
    (started,) = engine.submit_batch([start_request(name, keys)])
    assert isinstance(started, WriteStarted), started
    where, data = started.locations, payloads(keys)
    for segment_id, slots in by_segment(where):
        here = where.segment == segment_id
        engine.adapter(started.storage).write(
            started.segments[segment_id], SPEC, slots, keys[here], where.generation[here], data[here]
        )
    assert engine.submit_batch([finish_request(name, started)]) == [WriteFinished(len(keys), 0)]
    return started


def hits(engine: GroupEngine, name: str, keys: Keys) -> int:
    reader = IndexReader(engine.index_path(name))
    try:
        return int(reader.lookup(keys)[0].sum())
    finally:
        reader.close()


@pytest.fixture
def restart(
    registry: RegistryBody, groups: Any, view: RegistryView, tmp_path: Path
) -> Iterator[Callable[[], GroupEngine]]:
    """Ends the engine of group "default" and starts the next one; instances "one" and "two"."""
    registry.register_instance(instance("one"))
    registry.register_instance(instance("two"))
    groups.services.pop("default").stop()
    running: list[GroupEngine] = []

    def start() -> GroupEngine:
        while running:
            running.pop().close()
        infos = view.instances().values()
        running.append(GroupEngine(tmp_path, view.group("default"), view.storages(), infos))
        return running[0]

    yield start
    while running:
        running.pop().close()


@pytest.mark.parametrize("lost", ["identity", "data", "folder"])
def test_an_index_that_vanished_is_rebuilt(
    restart: Callable[[], GroupEngine], tmp_path: Path, lost: str
) -> None:
    engine, keys = restart(), some_keys(20)
    put(engine, "one", keys)
    path = engine.index_path("one")
    engine.close()
    if lost == "folder":
        shutil.rmtree(path)
    else:
        (path / ("index.json" if lost == "identity" else "data.mdb")).unlink()
    engine = restart()
    assert hits(engine, "one", keys) == 20
    put(engine, "one", some_keys(3))
    report = fsck.check(tmp_path, deep=True)
    assert report.ok, report
    assert report.blocks == 23


def test_what_cannot_be_moved_aside_costs_one_instance(restart: Callable[[], GroupEngine]) -> None:
    engine, keys = restart(), some_keys(4)
    put(engine, "two", keys)
    path = engine.index_path("one")
    engine.close()
    os.truncate(path / "data.mdb", 8192)
    (path / "untrusted").write_text("in the way")
    engine = restart()
    assert isinstance(engine.broken["one"], StorageIOError)
    assert hits(engine, "two", keys) == 4


def test_a_broken_tenant_is_no_news_to_others(
    registry: RegistryBody, groups: Any, tmp_path: Path
) -> None:
    """Neither the instances of its group nor other groups are refused for it."""
    info = registry.register_instance(instance("one"))
    groups.services.pop("default").stop()
    path = next((tmp_path / "groups" / "default").glob(f"one-{info.uid}"))
    text = (path / "index.json").read_text()
    newer = re.sub(r'"format": \d+', '"format": 99', text)
    assert newer != text
    (path / "index.json").write_text(newer)
    groups.refresh("default")
    service: GroupService = groups.services["default"]
    registry.register_instance(instance("two"))
    (refused,) = service.submit([start_request("one", some_keys(1))]).result(10)
    assert isinstance(refused, Unsupported)
    (started,) = service.submit([start_request("two", some_keys(1))]).result(10)
    assert isinstance(started, WriteStarted)
    registry.remove_instance("one")
    assert service.usage().result(10)["broken"] == {}


def test_a_vanished_segment_is_made_anew(
    restart: Callable[[], GroupEngine], view: RegistryView
) -> None:
    engine = restart()
    started = put(engine, "one", some_keys(2))
    (segment,) = started.segments.values()
    storage = view.storages()[segment.storage]
    shutil.rmtree(Path(storage.root_path) / segment.path)
    (failing,) = engine.submit_batch([start_request("one", some_keys(2))])
    failed = FinishWrite("", "one", failing.session_id, BlockMask(offset=0))
    engine.submit_batch([failed])
    (record,) = engine.due_trash()
    body = ReclaimerBody(view)
    assert body.erase(str(engine.index_path("one")), [record.trash_id]) == ([record.trash_id], "")
    assert engine.confirm_deletes("one", (record.trash_id,)) is None
    again = put(engine, "one", some_keys(2))
    assert again.segments == {segment.segment_id: segment}


def test_a_reclaimer_lets_go_of_removed_indexes(
    restart: Callable[[], GroupEngine], registry: RegistryBody, view: RegistryView
) -> None:
    engine = restart()
    body = ReclaimerBody(view)
    paths = [engine.index_path(name) for name in ("one", "two")]
    body.erase(str(paths[0]), [1])
    engine.drop_instance(view.instance("one"))
    body.erase(str(paths[1]), [1])
    assert str(paths[0]) not in Path("/proc/self/maps").read_text()


def test_thousands_of_sessions_expire_together(restart: Callable[[], GroupEngine]) -> None:
    engine = restart()
    now, count = Now.read(), 4_000
    for first in range(0, count, 500):
        starts = [start_request("one", some_keys(4), 5_000) for _ in range(first, first + 500)]
        assert all(isinstance(s, WriteStarted) for s in engine.submit_batch(starts, now))
    later = Now(now.ms + 5_000, now.s)
    began = time.perf_counter()
    while (due := engine.state.next_session_ms()) is not None and due <= later.ms:
        assert engine.tick(later) is None
    assert time.perf_counter() - began < 0.5  # 40 ms where nothing else runs
    usage = engine.usage()
    assert (usage["sessions"], usage["reserved_bytes"]) == (0, 0)
    assert usage["pending_delete_bytes"] == usage["used_bytes"] == count * 4 * 4096
    assert usage["trash_records"] <= count // 128


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of all indexes, on a file system of 12 MiB."""
    folder = tmp_path / "groups"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "kvcm-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_of_indexes(
    small_disk: Path, restart: Callable[[], GroupEngine], registry: RegistryBody, groups: Any
) -> None:
    """Refused by name; reads, removes and a restart go on; room again, writes again."""
    group = registry.get_group("default")
    plenty = dataclasses.replace(
        group, quota=InstanceGroupQuota(1 << 40), version=group.version + 1
    )
    registry.update_group(plenty, group.version)
    groups.services.pop("default").stop()
    engine, written = restart(), list[Keys]()
    while True:
        keys = some_keys(400)
        (started,) = engine.submit_batch([start_request("one", keys)])
        if not isinstance(started, WriteStarted):
            break
        (finished,) = engine.submit_batch([finish_request("one", started)])
        if not isinstance(finished, WriteFinished):
            break
        written.append(keys)
    refusal = finished if isinstance(started, WriteStarted) else started
    assert isinstance(refusal, StorageFull)
    junk = small_disk / "junk"
    free = os.statvfs(small_disk).f_bavail * 4096
    junk.write_bytes(bytes(free))
    assert os.statvfs(small_disk).f_bavail == 0
    engine = restart()
    assert engine.broken == {}
    assert all(hits(engine, "one", keys) == 400 for keys in written)
    removals = [RemoveBlocks(f"r{i}", "one", keys) for i, keys in enumerate(written)]
    assert [engine.submit_batch([r]) for r in removals] == [[Removed(400)]] * len(written)
    junk.unlink()
    put(engine, "two", np.arange(1, 50, dtype=np.int64))
