"""The engine: what it answers, and what it does when a commit cannot be made. No Ray."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.actors.engine import GroupEngine, Now
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.requests import (
    GetMeta,
    RemoveBlocks,
    Touch,
    TrimInstance,
    WriteFinished,
    WriteStarted,
)
from kvcm_ray.errors import Fenced, InstanceNotFound, StorageError, StorageFull, Unavailable
from kvcm_ray.index import IndexReader, IndexWriter
from kvcm_ray.testing.blocks import finish_request, instance, some_keys, start_request


@pytest.fixture
def engine(registry: RegistryBody, view: RegistryView, groups, tmp_path: Path) -> GroupEngine:
    """Of group "default" with instance "one"; the service that the fixture made is ended."""
    registry.register_instance(instance("one"))
    groups.services.pop("default").stop()
    return GroupEngine(
        tmp_path, view.group("default"), view.storages(), view.instances().values()
    )


def write(engine: GroupEngine, keys) -> None:
    (started,) = engine.submit_batch([start_request("one", keys)])
    assert isinstance(started, WriteStarted), started
    assert engine.submit_batch([finish_request("one", started)]) == [WriteFinished(len(keys), 0)]


def test_a_batch_sees_its_own_changes(engine: GroupEngine) -> None:
    keys = some_keys(3)
    start = start_request("one", keys)
    (started,) = engine.submit_batch([start])
    finish = finish_request("one", started)
    answers = engine.submit_batch(
        [
            finish,
            start_request("one", keys),
            GetMeta("one", keys),
            RemoveBlocks("r", "one", keys[:1]),
            Touch("one", keys[1:], 3),
        ]
    )
    assert answers[0] == WriteFinished(3, 0)
    assert answers[1].exists.all()
    assert answers[2].states.tolist() == [3, 3, 3]
    assert answers[3].blocks == 1
    usage = engine.usage()
    assert (usage["blocks"], usage["hit_blocks"], usage["lookup_blocks"]) == (2, 2, 3)


def test_trim_removes_what_was_written_in_a_time(engine: GroupEngine) -> None:
    for second in (100, 200):
        (started,) = engine.submit_batch([start_request("one", some_keys(5))], Now(0, second))
        engine.submit_batch([finish_request("one", started)], Now(1, second))
    (removed,) = engine.submit_batch([TrimInstance("t", "one", 150, 250)])
    assert removed.blocks == 5
    (again,) = engine.submit_batch([TrimInstance("t", "one", 150, 250)])
    assert again == removed


def test_unknown_instance_does_not_disturb_the_batch(engine: GroupEngine) -> None:
    good, bad = engine.submit_batch(
        [start_request("one", some_keys(1)), start_request("two", some_keys(1))]
    )
    assert isinstance(good, WriteStarted)
    assert isinstance(bad, InstanceNotFound)


def test_the_older_of_two_engines_is_fenced(
    engine: GroupEngine, view: RegistryView, tmp_path: Path
) -> None:
    write(engine, some_keys(4))
    newer = GroupEngine(tmp_path, view.group("default"), view.storages(), view.instances().values())
    keys = some_keys(2)
    answers = engine.submit_batch([start_request("one", keys), start_request("one", some_keys(1))])
    assert [type(a) for a in answers] == [Fenced, Fenced]
    assert engine.fenced
    assert isinstance(engine.submit_batch([start_request("one", keys)])[0], Fenced)
    write(newer, keys)
    assert newer.usage()["blocks"] == 6


def test_a_restart_finds_everything(
    engine: GroupEngine, view: RegistryView, tmp_path: Path
) -> None:
    keys = some_keys(20)
    write(engine, keys)
    open_start = start_request("one", some_keys(3))
    (pending,) = engine.submit_batch([open_start])
    engine.submit_batch([RemoveBlocks("r", "one", keys[:5])])
    before = engine.usage()
    engine.close()
    again = GroupEngine(tmp_path, view.group("default"), view.storages(), view.instances().values())
    after = again.usage()
    for name in ("used_bytes", "reserved_bytes", "pending_delete_bytes", "blocks", "sessions"):
        assert after[name] == before[name], name
    (same,) = again.submit_batch([open_start])
    assert (same.locations.slot == pending.locations.slot).all()
    assert again.submit_batch([finish_request("one", pending)]) == [WriteFinished(3, 0)]


def test_a_storage_that_makes_no_segment_fails_the_batch_only(
    engine: GroupEngine, tmp_path: Path
) -> None:
    """Files take the place of the directories; later the storage is repaired."""
    root = tmp_path / "tiers" / "nfs_01"
    shutil.rmtree(root)
    root.write_text("in the way")
    answers = engine.submit_batch([start_request("one", some_keys(1)) for _ in range(3)])
    assert all(isinstance(a, StorageError) for a in answers), answers
    usage = engine.usage()
    assert (usage["reserved_bytes"], usage["sessions"]) == (0, 0)
    root.unlink()
    root.mkdir()
    write(engine, some_keys(3))


def test_an_instance_in_trouble_does_not_fail_the_others(
    registry: RegistryBody, view: RegistryView, groups, tmp_path: Path
) -> None:
    """Both in one batch: "one" has its segment already, "two" cannot make its first one."""
    for name in ("one", "two"):
        registry.register_instance(instance(name))
    groups.services.pop("default").stop()
    engine = GroupEngine(tmp_path, view.group("default"), view.storages(), view.instances().values())
    write(engine, some_keys(1))
    (tmp_path / "tiers" / "nfs_01" / "two").write_text("in the way")
    requests = [
        start_request("one", some_keys(4)),
        start_request("two", some_keys(4)),
        start_request("one", some_keys(6)),
    ]
    first, second, third = engine.submit_batch(requests)
    assert isinstance(second, StorageError), second
    assert isinstance(first, WriteStarted)
    assert isinstance(third, WriteStarted)
    assert engine.submit_batch([finish_request("one", third)]) == [WriteFinished(len(third.locations), 0)]


def test_a_full_index_refuses_writes_before_anything_changes(
    engine: GroupEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index says it is full: starting is refused, removing and reading go on."""
    keys = some_keys(3)
    write(engine, keys)
    full = StorageFull("no room for the index")
    monkeypatch.setattr(IndexWriter, "_full", lambda self, txn: full)
    before = engine.usage()
    assert engine.submit_batch([start_request("one", some_keys(9)[3:])]) == [full]
    assert engine.usage() == before
    (removed,) = engine.submit_batch([RemoveBlocks("r", "one", keys)])
    assert removed.blocks == 3


def test_a_damaged_index_is_rebuilt_from_headers(
    registry: RegistryBody, view: RegistryView, groups, tmp_path: Path
) -> None:
    from kvcm_ray.storage_adapters import open_storage
    from kvcm_ray.testing.blocks import payloads

    info = registry.register_instance(instance("one"))
    groups.services.pop("default").stop()
    configuration = view.group("default"), view.storages()
    engine = GroupEngine(tmp_path, *configuration, [info])
    keys = some_keys(6)
    (started,) = engine.submit_batch([start_request("one", keys)])
    segment = next(iter(started.segments.values()))
    adapter = open_storage(view.storages()["nfs_01"])
    at = started.locations
    adapter.write(segment, "tp0", at.slot, keys, at.generation, payloads(keys))
    engine.submit_batch([finish_request("one", started)])
    engine.close()
    os.truncate(view.index_path(info) / "data.mdb", 5000)
    again = GroupEngine(tmp_path, *configuration, [info])
    assert again.usage()["blocks"] == 6
    assert IndexReader(view.index_path(info)).match(keys).length == 6


def test_an_unregistered_segment_is_swept_when_opened(
    engine: GroupEngine, view: RegistryView, tmp_path: Path
) -> None:
    write(engine, some_keys(2))
    engine.close()
    root = tmp_path / "tiers" / "nfs_01"
    (real,) = [p for p in (root / "one").iterdir() if p.is_dir()]
    shutil.copytree(real, real.with_name(real.name[:-6] + "0000ff"))
    text = (real / "segment.json").read_text()
    made = real.with_name(real.name[:-6] + "0000ff")
    (made / "segment.json").write_text(text.replace(real.name, made.name))
    GroupEngine(tmp_path, view.group("default"), view.storages(), view.instances().values())
    assert real.exists()
    assert not made.exists()


def test_full_inbox_is_refused(registry: RegistryBody, groups) -> None:
    from kvcm_ray.actors import service

    registry.register_instance(instance("one"))
    with pytest.raises(Unavailable, match="waiting"):
        groups.services["default"].submit([None] * (service.INBOX_REQUESTS_MAX + 1))


def test_sessions_expire_within_a_tenth_of_a_second(registry: RegistryBody, groups) -> None:
    registry.register_instance(instance("one"))
    service = groups.services["default"]
    requests = [start_request("one", some_keys(1), 300) for _ in range(1_000)]
    assert len(service.submit(requests).result(10)) == 1_000
    time.sleep(0.4)
    assert service.usage().result(10)["sessions"] == 0


def test_failed_erasing_is_repeated(registry: RegistryBody, groups) -> None:
    registry.register_instance(instance("one"))
    service = groups.services["default"]
    keys = some_keys(10)
    (started,) = service.submit([start_request("one", keys)]).result(10)
    service.submit([finish_request("one", started)]).result(10)
    groups.erasing = False
    service.submit([RemoveBlocks(secrets.token_hex(8), "one", keys)]).result(10)
    time.sleep(0.1)
    assert service.usage().result(10)["pending_delete_bytes"] == 10 * 4096
    groups.erasing = True
    time.sleep(1.2)
    usage = service.usage().result(10)
    assert (usage["pending_delete_bytes"], usage["used_bytes"]) == (0, 0)
    assert usage["loop"]["erase_failures"] >= 1


def test_a_fenced_service_says_so_before_it_answers(
    registry: RegistryBody, view: RegistryView, groups, tmp_path: Path
) -> None:
    registry.register_instance(instance("one"))
    service = groups.services["default"]
    GroupEngine(tmp_path, view.group("default"), view.storages(), view.instances().values())
    answers = service.submit([start_request("one", some_keys(1))]).result(10)
    assert isinstance(answers[0], Fenced)
    assert groups.fenced


def test_locations_of_a_batch_never_overlap(engine: GroupEngine) -> None:
    answers = engine.submit_batch([start_request("one", some_keys(7)) for _ in range(20)])
    slots = np.concatenate([a.locations.slot for a in answers])
    assert len(np.unique(slots)) == 140
