"""touchCache: what is reported arrives as it was, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from kvcm_ray.core.limits import KEYS_PER_CALL_MAX, LOOK_UPS_PER_TOUCH_MAX
from kvcm_ray.testing.http import Http


@pytest.fixture
def instance(http: Http) -> str:
    http.register("i1")
    http.write("i1", [1, 2, 3])
    return "i1"


def usage(http: Http) -> dict[str, Any]:
    found: dict[str, Any] = http.run(http.backend.ask("default", "usage"))
    return found


def test_every_kind_of_look_up(http: Http, instance: str) -> None:
    http.ok("touchCache", instance_id=instance, look_ups=[
        {"block_keys": [1, 2], "missed_keys": ["7", "8"], "held_keys": [5], "time_us": 1_000_000},
        {"query_type": "QT_BATCH_GET", "block_keys": [3], "asked_blocks": 4},
        {"query_type": 3, "blockKeys": [2, 3], "askedBlocks": 2},
        {"missed_keys": [9]},
    ])  # fmt: skip
    prompt, single, window, miss = http.backend.touched
    assert prompt.held is not None
    assert prompt.missed is not None
    assert [part.tolist() for part in (prompt.held, prompt.keys, prompt.missed)] == [[5], [1, 2], [7, 8]]
    assert (prompt.lookups, prompt.chained, prompt.time_s) == (4, True, 1.0)
    assert (single.keys.tolist(), single.lookups, single.chained, single.missed) == ([3], 4, False, None)
    assert (window.keys.tolist(), window.lookups, window.chained, window.missed) == ([2, 3], 2, True, None)
    assert (miss.keys.tolist(), miss.lookups, miss.held, miss.time_s) == ([], 1, None, 0.0)
    counted = usage(http)
    assert (counted["lookup_blocks"], counted["hit_blocks"]) == (4 + 4 + 2 + 1, 2 + 1 + 2)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({}, "missing or invalid fields: {TouchCache: {look_ups}}"),
        ({"look_ups": []}, "missing or invalid fields: {TouchCache: {look_ups}}"),
        ({"look_ups": [{}] * (LOOK_UPS_PER_TOUCH_MAX + 1)}, f"at most {LOOK_UPS_PER_TOUCH_MAX}"),
        ({"look_ups": [{"block_keys": [1], "query_type": 9}]}, "query_type 9"),
        ({"look_ups": [{"block_keys": [1, 2], "query_type": 1, "asked_blocks": 1}]}, "less than the 2"),
        ({"look_ups": [{"query_type": 1, "asked_blocks": KEYS_PER_CALL_MAX + 1}]}, "at most 65536"),
        ({"look_ups": [{"query_type": 1, "asked_blocks": -1}]}, "asked_blocks -1"),
        ({"look_ups": [{"held_keys": [1] * 40_000}, {"missed_keys": [1] * 30_000}]}, "70000 blocks"),
    ],
)
def test_what_is_refused(http: Http, instance: str, request_: dict[str, Any], told: str) -> None:
    before = usage(http)["lookup_blocks"]
    assert told in http.refused("touchCache", "INVALID_ARGUMENT", instance_id=instance, **request_)
    assert (usage(http)["lookup_blocks"], http.backend.touched) == (before, [])


def test_an_unknown_instance_and_a_group_that_is_away(http: Http, instance: str) -> None:
    look_ups = [{"block_keys": [1]}]
    http.refused("touchCache", "INSTANCE_NOT_EXIST", instance_id="ghost", look_ups=look_ups)
    http.backend.failing = True
    http.refused("touchCache", "SERVICE_NOT_READY", instance_id=instance, look_ups=look_ups)


def test_a_reported_hit_keeps_a_block_from_being_evicted(http: Http) -> None:
    """Of two blocks, the one that was written first stays if somebody reports to have read it."""
    (group,) = http.ok("listInstanceGroup")["instance_group"]
    strategy = {
        "reclaim_policy": "POLICY_LRU", "trigger_strategy": {"used_percentage": 1.0},
        "low_water_percentage": 1.0, "delay_before_delete_ms": 0,
    }  # fmt: skip
    group |= {"name": "two", "version": 1, "quota": {"capacity": 2 * 1024, "quota_config": []}}
    group["cache_config"]["reclaim_strategy"] = strategy
    group["cache_config"]["meta_indexer_config"] = {
        "meta_storage_backend_config": {"storage_type": "local"}, "meta_cache_policy_config": {"type": "lru"},
    }  # fmt: skip
    http.ok("createInstanceGroup", instance_group=group)
    http.register("i", instance_group="two")
    for key in (1, 2):
        http.write("i", [key])
    http.ok("touchCache", instance_id="i", look_ups=[{"block_keys": [1]}])
    http.write("i", [3])
    assert [len(http.prefix("i", [key])) for key in (1, 2, 3)] == [1, 0, 1]
