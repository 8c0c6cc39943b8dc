"""A two-tier group in a real manager: demotion, waiting writes, deaths and the pool's size."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from kvcm_ray import fsck
from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.names import NAMESPACE, reclaimer_name
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster import Manager
from kvcm_ray.core.model import InstanceGroupQuota, QuotaConfig, ReclaimerSettings, StorageType
from kvcm_ray.core.requests import WriteStarted
from kvcm_ray.errors import QuotaExceeded
from kvcm_ray.testing.blocks import Engine, finish_request, instance, some_keys, start_request

pytestmark = pytest.mark.ray

MIB = 1 << 20
BLOCK = 16 * 1024


@pytest.fixture
def small(registry: RegistryHandle, view: RegistryView) -> Iterator[Engine]:
    """An instance of a group of its own: 2 MiB of shared memory above 4 MiB of files."""
    name = f"g-{secrets.token_hex(4)}"
    base = registry.call_sync("get_group", "default")
    quotas = (QuotaConfig(StorageType.ST_TAIRMEMPOOL, 2 * MIB), QuotaConfig(StorageType.ST_NFS, 4 * MIB))
    cache = base.cache_config
    reclaim = dataclasses.replace(cache.reclaim_strategy, trigger_strategy=None, delay_before_delete_ms=0)
    group = dataclasses.replace(
        base, name=name, quota=InstanceGroupQuota(6 * MIB, quotas), version=1,
        cache_config=dataclasses.replace(cache, reclaim_strategy=reclaim),
    )  # fmt: skip
    registry.call_sync("create_group", group)
    registry.call_sync("register_instance", instance(f"i-{name}", name, BLOCK))
    yield Engine(view, f"i-{name}")
    registry.call_sync("set_reclaimer_settings", ReclaimerSettings())
    registry.call_sync("remove_group", name, True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def settled(group: GroupHandle) -> bool:
    usage = group.ask_sync("usage")
    return not usage["pending_delete_bytes"] and not usage["reserved_bytes"]


def pid_of(name: str) -> int:
    return int(ray.get(ray.get_actor(name, namespace=NAMESPACE).pid.remote(), timeout=10))


def test_blocks_go_down_a_tier_and_stay_readable(small: Engine) -> None:
    prompts = [some_keys(16) for _ in range(12)]  # 3 MiB
    for keys in prompts:
        small.put(keys)
        time.sleep(0.02)
    wait_until(lambda: small.handle.ask_sync("capacity")["reclaim"]["demoted_blocks"] > 0)
    wait_until(lambda: settled(small.handle))
    assert all(small.found(keys).all() for keys in prompts)


def test_writers_at_a_full_quota_with_deaths(
    small: Engine, running: Manager, registry: RegistryHandle
) -> None:
    """4 writers, 12 MiB into 6 MiB; a reclaimer and the group die, the pool grows and shrinks."""
    problems: list[BaseException] = []
    written: list[object] = []

    def write() -> None:
        engine = Engine(small.view, small.info.instance_id)
        try:
            for _ in range(12):
                keys = some_keys(16)
                assert engine.put(keys, 30).committed == 16
                written.append(keys)
        except BaseException as error:
            problems.append(error)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for thread in writers:
        thread.start()
    wait_until(lambda: len(written) >= 12)
    os.kill(pid_of(reclaimer_name(0, 2)), signal.SIGKILL)
    wait_until(lambda: len(written) >= 20)
    os.kill(small.handle.ask_sync("usage")["pid"], signal.SIGKILL)
    wait_until(lambda: len(written) >= 28)
    registry.call_sync("set_reclaimer_settings", ReclaimerSettings(3), timeout_s=30)
    wait_until(lambda: len(written) >= 36)
    registry.call_sync("set_reclaimer_settings", ReclaimerSettings(1), timeout_s=30)
    for thread in writers:
        thread.join()
    assert not problems, problems[0]
    names = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True)]
    assert [name for name in names if name.startswith("reclaimer:")] == [reclaimer_name(0, 1)]
    wait_until(lambda: settled(small.handle))
    usage, report = small.handle.ask_sync("usage"), small.handle.ask_sync("capacity")
    assert usage["used_bytes"] <= 6 * MIB
    assert report["used_bytes"] == usage["used_bytes"]
    assert report["reclaim"]["evicted_blocks"] > 0
    assert small.found(written[-1]).all()
    assert fsck.check(running.data_dir, deep=True).ok


def test_a_write_that_finds_no_room_learns_why_before_its_time_is_over(small: Engine) -> None:
    started = []
    for _ in range(6):  # sessions in progress hold all of it
        answer = small.handle.call_sync(start_request(small.info.instance_id, some_keys(64)))
        assert isinstance(answer, WriteStarted)
        started.append(answer)
    with pytest.raises(QuotaExceeded):
        small.handle.call_sync(start_request(small.info.instance_id, some_keys(64)), 1.0)
    for answer in started:
        small.handle.call_sync(finish_request(small.info.instance_id, answer))
    assert isinstance(
        small.handle.call_sync(start_request(small.info.instance_id, some_keys(64))), WriteStarted
    )
