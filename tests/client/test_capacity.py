"""What the client does where room is short: leases, pins, writes into a full group, blocks that moved.

By URL and by actor handles, on real managers; groups of their own, so that quotas do not meet others.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvcm_ray.client import Client, Instance
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.errors import InvalidArgument, QuotaExceeded, Unavailable
from kvcm_ray.traces import block_pattern

SIZE = 512
_names = (f"r{os.getpid()}-{n}" for n in itertools.count())


class Admin:
    """Configures the manager that `client` is connected to, by HTTP."""

    def __init__(self, api: HttpBackend) -> None:
        self.backend = api

    def call(self, name: str, /, **fields: Any) -> dict[str, Any]:
        return drive(self.backend.post(name, fields, 30))

    def group(self, blocks: int, storages: list[str] | None = None) -> str:
        """Name of a new group of so many blocks, which erases at once and only when it must."""
        (body, *_) = self.call("listInstanceGroup")["instance_group"]
        name = next(_names)
        body |= {"name": name, "version": 1}
        body["quota"] = {"capacity": blocks * SIZE, "quota_config": []}
        if storages:
            body["storage_candidates"] = storages
        body["cache_config"]["reclaim_strategy"] = {
            "reclaim_policy": "POLICY_LRU",
            "trigger_strategy": {"used_percentage": 1.0},
            "low_water_percentage": 1.0,
            "delay_before_delete_ms": 0,
        }
        body["cache_config"]["meta_indexer_config"] = {
            "meta_storage_backend_config": {"storage_type": "local"},
            "meta_cache_policy_config": {"type": "lru"},
        }
        self.call("createInstanceGroup", instance_group=body)
        return name

    def storages(self) -> list[str]:
        return [storage["global_unique_name"] for storage in self.call("listStorage")["storage"]]


@pytest.fixture(scope="module")
def admin(api: HttpBackend) -> Admin:
    return Admin(api)


@pytest.fixture
def small(client: Client, admin: Admin) -> Instance:
    """An instance of a group of 8 blocks."""
    return client.register(next(_names), admin.group(8), block_size=4, specs={"tp0": SIZE})


def keys_from(start: int, count: int) -> Any:
    return np.arange(start, start + count, dtype=np.int64) * 0x9E3779B97F4A7C1


def put(cache: Instance, keys: Any, **options: Any) -> Any:
    return cache.put(keys, block_pattern(keys, SIZE), **options)


def read(cache: Instance, keys: Any) -> Any:
    out = np.zeros((len(keys), SIZE), np.uint8)
    got = cache.get(keys, out)
    assert (out[got.flags] == block_pattern(keys, SIZE)[got.flags]).all()
    return got


def test_a_write_into_a_full_group_makes_room(small: Instance) -> None:
    first, second = keys_from(1, 6), keys_from(100, 6)
    assert put(small, first) == 6
    stored = put(small, second)
    assert (stored, stored.error) == (6, None)
    assert small.match_length(first) == 2, "leaves first, and only what was needed"
    assert read(small, second) == 6


def test_what_never_fits_is_not_stored_and_says_so_at_once(small: Instance) -> None:
    keys = keys_from(1, 9)
    begin_s = time.monotonic()
    stored = put(small, keys)
    assert time.monotonic() - begin_s < 2
    assert (stored, isinstance(stored.error, QuotaExceeded)) == (0, True)
    assert not stored.flags.any()
    with pytest.raises(QuotaExceeded):
        small.start_write(keys)


def test_leased_blocks_stay_and_the_lease_ends(small: Instance) -> None:
    first, second = keys_from(1, 6), keys_from(100, 6)
    put(small, first)
    found = small.match(first, lease_s=1.0)
    leased_until_s = time.monotonic() + 1.1
    assert (found.length, found.leased_s) == (6, 1.0)
    assert small.match(first).leased_s == 0
    refused = put(small, keys_from(200, 6), timeout_s=0.3)
    assert refused == 0
    assert isinstance(refused.error, QuotaExceeded | Unavailable)
    assert small.match_length(first) == 6
    time.sleep(max(0.0, leased_until_s - time.monotonic()))
    stored = put(small, second)  # by URL the write that gave up may have got room; it expires
    assert (stored, stored.error) == (6, None), "the lease is over"


def test_lease_of_known_keys(small: Instance) -> None:
    keys = keys_from(1, 4)
    put(small, keys)
    assert small.lease(keys_from(1, 6), 5) == 4
    assert small.lease(keys_from(50, 2), 5) == 0
    assert small.lease([], 5) == 0
    assert small.match(keys_from(50, 2), lease_s=1).leased_s == 0, "nothing found, nothing leased"
    for seconds in (0, -1, 1e9, float("nan")):
        with pytest.raises(InvalidArgument, match="lease"):
            small.lease(keys, seconds)
    with pytest.raises(InvalidArgument, match="lease"):
        small.match(keys, lease_s=-1)


def test_pinned_blocks_stay_until_they_are_unpinned(small: Instance) -> None:
    first, second = keys_from(1, 6), keys_from(100, 6)
    put(small, first)
    pinned = small.pin("system", first)
    assert (pinned.keys, pinned.blocks) == (6, 6)
    begin_s = time.monotonic()
    refused = put(small, second, timeout_s=20)
    assert time.monotonic() - begin_s < 5, "no use in waiting for what is pinned"
    assert (refused, isinstance(refused.error, QuotaExceeded)) == (0, True)
    assert read(small, first) == 6
    assert small.unpin("system").keys == 0
    assert put(small, second) == 6


def test_the_partial_tail_goes_first(small: Instance) -> None:
    whole, partial = keys_from(1, 3), keys_from(100, 3)
    put(small, whole)
    put(small, partial, partial_tail=True)  # newer than the others
    small.match(whole)
    assert put(small, keys_from(200, 3)) == 3
    assert small.match_length(partial) == 2
    assert small.match_length(whole) == 3


def test_a_block_that_moved_after_the_look_up_is_read(client: Client, admin: Admin) -> None:
    storages = admin.storages()
    group = admin.group(64, storages)
    cache = client.register(next(_names), group, block_size=4, specs={"tp0": SIZE})
    keys = keys_from(1, 6)
    assert put(cache, keys) == 6
    before = cache.match(keys)
    (storage,) = {segment.storage for segment in before.blocks.segments.values()}
    admin.call("drainStorage", storage_unique_name=storage, draining=True)
    try:
        deadline_s = time.monotonic() + 20
        while _storages_of(cache, keys) == {storage} or _erasing(admin, group):
            assert time.monotonic() < deadline_s, "the blocks did not move"
            time.sleep(0.05)
        out = np.zeros((6, SIZE), np.uint8)
        got = cache.read(before.blocks, out)
        assert (got, got.error) == (6, None)
        assert (out == block_pattern(keys, SIZE)).all()
    finally:
        admin.call("drainStorage", storage_unique_name=storage, draining=False)


def _storages_of(cache: Instance, keys: Any) -> set[str]:
    return {segment.storage for segment in cache.match(keys).blocks.segments.values()}


def _erasing(admin: Admin, group: str) -> bool:
    report = admin.call("getCapacity", instance_group=group)["capacity"]
    return bool(report["pending_delete_bytes"] or report["reserved_bytes"])


def test_blocks_of_a_disabled_storage_are_misses_until_it_is_enabled(client: Client, admin: Admin) -> None:
    cache = client.register(next(_names), admin.group(64), block_size=4, specs={"tp0": SIZE})
    keys = keys_from(1, 6)
    assert put(cache, keys) == 6
    (storage,) = _storages_of(cache, keys)
    admin.call("disableStorage", storage_unique_name=storage)
    try:
        assert (cache.match(keys).length, cache.match_length(keys)) == (0, 0)
        assert not cache.lookup(keys).flags.any()
        assert put(cache, keys_from(100, 6)) == 6, "on the other storage"
        assert read(cache, keys_from(100, 6)) == 6
    finally:
        admin.call("enableStorage", storage_unique_name=storage)
    assert read(cache, keys) == 6


def test_versions_and_successors(client: Client, admin: Admin) -> None:
    group = admin.group(64)
    old, new = next(_names), next(_names)
    first = client.register(old, group, block_size=4, specs={"tp0": SIZE}, model_version="1")
    keys = keys_from(1, 4)
    put(first, keys)
    second = client.register(
        new, group, block_size=4, specs={"tp0": SIZE}, model_version="2", supersedes=old, handover_s=60
    )
    assert second.match_length(keys) == 0, "blocks of versions never mix"
    assert put(second, keys) == 4
    assert read(first, keys) == 4, "the old one is served on"
    report = admin.call("getCapacity", instance_group=group)["capacity"]
    states = {entry["instance_id"]: entry["retiring"] for entry in report["instances"]}
    assert states[old]
    assert states[new] is None


def test_flush_touches_is_harmless_without_any(client: Client) -> None:
    client.flush_touches()


def test_a_flush_has_told_the_manager(
    client: Client, admin: Admin, usage_of: Callable[[str], dict[str, int]]
) -> None:
    if client.address.startswith("http"):
        pytest.skip("by URL the manager's replicas report the reads")
    group = admin.group(8)
    cache = client.register(next(_names), group, block_size=4, specs={"tp0": SIZE})
    put(cache, keys_from(1, 4))
    for round_number in range(1, 6):
        cache.match(keys_from(1, 6))
        cache.lookup(keys_from(3, 4))
        client.flush_touches()
        usage = usage_of(group)
        assert usage["lookup_blocks"] == 10 * round_number
        assert usage["hit_blocks"] == 6 * round_number
