"""A real manager: actors, handles, deaths by kill -9, expiry.

Method: each test uses instances of its own in the shared manager, and looks at the index and the
storages as an engine does. The last test checks what all of them left behind.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import signal
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import ray

from kvcm_ray import fsck
from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.names import NAMESPACE, reclaimer_name
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster import Manager
from kvcm_ray.core.model import AccountRole, NfsSpec, StorageConfig
from kvcm_ray.core.requests import RemoveBlocks, StartWrite, WriteStarted
from kvcm_ray.errors import (
    AlreadyExists,
    GroupNotFound,
    InstanceMismatch,
    InUse,
    SessionNotFound,
    Unavailable,
    VersionConflict,
)
from kvcm_ray.index import IndexReader
from kvcm_ray.testing.blocks import Engine, finish_request, instance, some_keys, start_request

pytestmark = pytest.mark.ray


@pytest.fixture
def engine(registry: RegistryHandle, view: RegistryView) -> Engine:
    name = f"i-{secrets.token_hex(4)}"
    registry.call_sync("register_instance", instance(name))
    return Engine(view, name)


def used_bytes(group: GroupHandle, instance_id: str) -> int:
    usage = group.ask_sync("usage")["instances"][instance_id]
    return int(usage["slots"] - usage["free_slots"])


def wait_until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------- everyday


def test_up_tells_where_it_is(running: Manager) -> None:
    with urllib.request.urlopen(running.url + "/healthz", timeout=5) as answer:
        assert answer.status == 200
    mode = (Path(running.data_dir) / "manager.json").stat().st_mode
    assert mode & 0o777 == 0o600


def test_blocks_are_there_once_acknowledged(engine: Engine) -> None:
    keys = some_keys(64)
    finished = engine.put(keys)
    assert (finished.committed, finished.dropped) == (64, 0)
    assert engine.found(keys).all()
    again = engine.put(keys)
    assert (again.committed, again.dropped) == (0, 0)


def test_removed_blocks_are_gone_and_their_slots_come_back(engine: Engine, group: GroupHandle) -> None:
    keys = some_keys(32)
    engine.put(keys)
    name = engine.info.instance_id
    removed = group.call_sync(RemoveBlocks(secrets.token_hex(8), name, keys))
    assert removed.blocks == 32
    assert not engine.found(keys).any()
    assert used_bytes(group, name) == 32  # until the reclaimer confirmed
    wait_until(lambda: used_bytes(group, name) == 0)


def test_the_same_event_twice_is_done_once(engine: Engine, group: GroupHandle) -> None:
    name = engine.info.instance_id
    request = start_request(name, some_keys(4))
    first, second = group.call_sync(request), group.call_sync(request)
    assert (first.locations.slot == second.locations.slot).all()
    engine.write(request.keys, first.locations, first.segments)
    assert used_bytes(group, name) == 4
    finish = finish_request(name, first)
    assert group.call_sync(finish) == group.call_sync(finish)
    with pytest.raises(SessionNotFound):
        group.call_sync(finish_request(name, first))


def test_concurrent_calls_ride_together(engine: Engine) -> None:
    name = engine.info.instance_id
    handle = GroupHandle("default")

    async def many() -> list[WriteStarted]:
        calls = (handle.call(start_request(name, some_keys(2))) for _ in range(200))
        return await asyncio.gather(*calls)

    before = handle.ask_sync("usage")["loop"]
    started = asyncio.run(many())
    after = handle.ask_sync("usage")["loop"]
    assert len({s.session_id for s in started}) == 200
    assert after["requests"] - before["requests"] == 200
    assert after["batches"] - before["batches"] <= 20


def test_registry_changes_and_refusals(registry: RegistryHandle, view: RegistryView, tmp_path: Path) -> None:
    storage = StorageConfig("extra", nfs=NfsSpec(str(tmp_path / "extra")))
    registry.call_sync("add_storage", storage)
    with pytest.raises(AlreadyExists):
        registry.call_sync("add_storage", storage)
    group = view.group("default")
    mine = dataclasses.replace(group, name="mine", storage_candidates=("extra",), version=1)
    registry.call_sync("create_group", mine)
    with pytest.raises(VersionConflict):
        registry.call_sync("update_group", dataclasses.replace(mine, version=3), 2)
    with pytest.raises(InUse):
        registry.call_sync("remove_storage", "extra", False)
    registry.call_sync("register_instance", instance("of-mine", "mine"))
    with pytest.raises(InstanceMismatch):
        registry.call_sync("register_instance", instance("of-mine", "mine", size=8192))
    Engine(view, "of-mine").put(some_keys(8))
    assert any((tmp_path / "extra").iterdir())
    registry.call_sync("remove_group", "mine", True)
    assert "of-mine" not in view.instances()
    assert not list((tmp_path / "extra").rglob("*.dat"))
    registry.call_sync("remove_storage", "extra", False)
    with pytest.raises(GroupNotFound):
        GroupHandle("mine").ask_sync("usage")


def test_accounts_and_snapshot(registry: RegistryHandle) -> None:
    registry.call_sync("add_account", "ada", "secret", AccountRole.ROLE_ADMIN)
    accounts = registry.call_sync("list_accounts")
    assert [(a.user_name, a.password_hash) for a in accounts] == [("ada", "")]
    text = registry.call_sync("save_snapshot")
    registry.call_sync("load_snapshot", text)
    assert registry.call_sync("save_snapshot") == text
    registry.call_sync("delete_account", "ada")


def test_removing_an_instance_frees_its_bytes(
    registry: RegistryHandle, engine: Engine, group: GroupHandle, view: RegistryView
) -> None:
    engine.put(some_keys(50))
    before = group.ask_sync("usage")["used_bytes"]
    path = view.index_path(engine.info)
    registry.call_sync("remove_instance", engine.info.instance_id)
    assert group.ask_sync("usage")["used_bytes"] == before - 50 * 4096
    assert not path.exists()
    with pytest.raises(Exception, match="not open"):
        engine.put(some_keys(1))


# -------------------------------------------------------------------------------------- expiry


def test_a_thousand_sessions_expire_on_time(engine: Engine, group: GroupHandle) -> None:
    """At most 100 ms late, read from the index as any process can."""
    name = engine.info.instance_id
    futures = [group.start(start_request(name, some_keys(1), 2_000)) for _ in range(1_000)]
    for future in futures:
        group.wait(future)
    reader = IndexReader(engine.view.index_path(engine.info))
    deadlines = [s.deadline_ms for s in reader.sessions()]
    assert len(deadlines) == 1_000
    for at_ms in (min(deadlines), max(deadlines)):
        time.sleep(max(at_ms + 100 - time.monotonic_ns() // 1_000_000, 0) / 1000)
        now_ms = time.monotonic_ns() // 1_000_000
        late = [s for s in reader.sessions() if s.deadline_ms <= now_ms - 100]
        assert not late
    assert not reader.sessions()
    reader.close()


# -------------------------------------------------------------------------------------- deaths


def test_group_actor_killed_clients_carry_on(engine: Engine, group: GroupHandle) -> None:
    keys = some_keys(64)
    engine.put(keys)
    name = engine.info.instance_id
    request = start_request(name, some_keys(5))
    pending = group.call_sync(request)
    engine.write(request.keys, pending.locations, pending.segments)
    os.kill(group.ask_sync("usage")["pid"], signal.SIGKILL)
    more = some_keys(64)
    assert engine.put(more).committed == 64
    assert engine.found(np.concatenate([keys, more])).all()
    assert group.call_sync(finish_request(name, pending)).committed == 5


def test_registry_killed_writes_go_on_and_changes_wait(registry: RegistryHandle, engine: Engine) -> None:
    os.kill(registry.call_sync("describe")["pid"], signal.SIGKILL)
    assert engine.put(some_keys(8)).committed == 8
    name = f"i-{secrets.token_hex(4)}"
    assert registry.call_sync("register_instance", instance(name)).instance_id == name
    assert Engine(engine.view, name).put(some_keys(3)).committed == 3


def test_reclaimer_killed_trash_is_erased_by_the_next(engine: Engine, group: GroupHandle) -> None:
    keys = some_keys(200)
    engine.put(keys)
    name = engine.info.instance_id
    group.call_sync(RemoveBlocks(secrets.token_hex(8), name, keys))
    for number in (0, 1):
        ray.kill(ray.get_actor(reclaimer_name(number, 2), namespace=NAMESPACE), no_restart=False)
    wait_until(lambda: used_bytes(group, name) == 0, 20)


def test_nobody_answers_within_the_deadline(engine: Engine, group: GroupHandle) -> None:
    """A stopped actor costs its callers their deadline and no more."""
    pid = group.ask_sync("usage")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            GroupHandle("default").call_sync(
                StartWrite("e", engine.info.instance_id, some_keys(1), "s" * 32, 0), 1.0
            )
        assert time.monotonic() - began < 2.0
    finally:
        os.kill(pid, signal.SIGCONT)
    assert engine.put(some_keys(2)).committed == 2


def test_nothing_is_left_over(running: Manager, group: GroupHandle) -> None:
    """Last in this file: after all of the above, index and storages agree."""
    wait_until(lambda: group.ask_sync("usage")["pending_delete_bytes"] == 0, 20)
    report = fsck.check(running.data_dir, deep=True)
    assert report.ok, report.notes
