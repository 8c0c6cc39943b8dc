"""Blocks with two places: a promoted block whose fast place is lost is read from its slow one.

A real manager in this process, without Ray: written by HTTP, promoted by its group, read by a client
that looks into the index itself.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.client import Client, Instance, connect
from kvcm_ray.client.aio import AsyncClient
from kvcm_ray.client.connect import open_backend
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import SyncRuntime, drive
from kvcm_ray.index import IndexReader
from kvcm_ray.testing.served import Served, served
from kvcm_ray.traces import block_pattern

SIZE = 4096
KEYS = np.arange(1, 7, dtype=np.int64) * 0x9E3779B97F4A7C1
BYTES = block_pattern(KEYS, SIZE)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "data") as found:
        yield found


@pytest.fixture
def by_url(manager: Served) -> Iterator[Instance]:
    """An instance in a group whose fast tier has no room at first."""
    post = HttpBackend(manager.url, blocking=True)

    def call(name: str, **fields: Any) -> dict[str, Any]:
        return drive(post.post(name, fields, 30))

    body = call("listInstanceGroup")["instance_group"][0] | {"name": "tiers", "version": 1}
    body["cache_config"]["meta_indexer_config"] = {
        "meta_storage_backend_config": {"storage_type": "local"},
        "meta_cache_policy_config": {"type": "lru"},
    }
    body["quota"] = {"capacity": 64 * SIZE, "quota_config": [_quota(1)]}
    call("createInstanceGroup", instance_group=body)
    with connect(manager.url) as client:
        cache = client.register("two", "tiers", block_size=4, specs={"tp0": SIZE})
        assert cache.put(KEYS, BYTES) == 6
        body |= {"version": 2, "quota": {"capacity": 64 * SIZE, "quota_config": [_quota(32)]}}
        call("updateInstanceGroup", instance_group=body, current_version=1)
        yield cache
    drive(post.close())


def _quota(blocks: int) -> dict[str, Any]:
    return {"storage_type": "ST_TAIRMEMPOOL", "capacity": blocks * SIZE}


@pytest.fixture
def direct(manager: Served) -> Iterator[Client]:
    backend = open_backend(manager.data_dir, blocking=True, ray=False)
    with Client(AsyncClient(backend, SyncRuntime())) as client:
        yield client


def promote(manager: Served, by_url: Instance) -> None:
    """Hit the blocks until all of them have a fast place and a copy."""
    view = RegistryView(manager.data_dir)
    reader = IndexReader(view.index_path(view.instance("two")))
    deadline_s = time.monotonic() + 20
    while not reader.copies(KEYS)[0].all():
        assert time.monotonic() < deadline_s, "the blocks were not promoted"
        by_url.match(KEYS)
        time.sleep(0.05)
    reader.close()
    view.close()


def storages_of(found: Any) -> set[str]:
    return {segment.storage for segment in found.blocks.segments.values()}


def lose(manager: Served, found: Any) -> None:
    """Remove the files of the segments that the blocks are in."""
    for segment in found.blocks.segments.values():
        root = found.blocks.storages[segment.storage].root_path
        shutil.rmtree(Path(root) / segment.path)


def read(cache: Instance, found: Any) -> Any:
    out = np.zeros_like(BYTES)
    got = cache.read(found.blocks, out)
    assert (out[got.flags] == BYTES[got.flags]).all()
    return got


def test_a_lost_fast_place_is_made_good_by_the_copy(
    manager: Served, by_url: Instance, direct: Client
) -> None:
    cache = direct.instance("two")
    assert storages_of(cache.match(KEYS)) == {"files"}
    promote(manager, by_url)
    found = cache.match(KEYS)
    assert storages_of(found) == {"memory"}
    assert read(cache, found) == 6
    lose(manager, found)
    again = read(cache, found)
    assert (again, again.error) == (6, None)
    assert cache.get(KEYS, np.zeros_like(BYTES)) == 6
    assert by_url.get(KEYS, np.zeros_like(BYTES)) == 0, "the wire has one place a block"


def test_without_a_copy_a_lost_block_is_a_miss(manager: Served, by_url: Instance, direct: Client) -> None:
    cache = direct.instance("two")
    found = cache.match(KEYS)
    lose(manager, found)
    assert read(cache, found) == 0


def test_a_disabled_storage_hides_what_has_no_copy(manager: Served, by_url: Instance, direct: Client) -> None:
    cache = direct.instance("two")
    promote(manager, by_url)
    admin = HttpBackend(manager.url, blocking=True)
    drive(admin.post("disableStorage", {"storage_unique_name": "memory"}, 30))
    found = cache.match(KEYS)
    assert storages_of(found) == {"files"}
    assert (found.length, cache.match_length(KEYS), read(cache, found)) == (6, 6, 6)
    assert cache.lookup(KEYS).flags.all()
    drive(admin.post("disableStorage", {"storage_unique_name": "files"}, 30))
    assert (cache.match(KEYS).length, cache.match_length(KEYS)) == (0, 0)
    assert not cache.lookup(KEYS).flags.any()
    drive(admin.post("enableStorage", {"storage_unique_name": "memory"}, 30))
    assert storages_of(cache.match(KEYS)) == {"memory"}
    drive(admin.close())
