"""Our own calls: leases, pins, drains, the capacity report, model upgrades, the reclaimers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.serve_app.endpoints import ENDPOINTS
from kvcm_ray.testing.http import Http

Json = dict[str, Any]

FULL = 4  #: blocks of 1 KiB in the group "small"


def small_group(http: Http, **strategy: Any) -> None:
    """A group "small" for FULL blocks, with an instance "s"."""
    group = copy.deepcopy(http.ok("getInstanceGroup", name="default")["instance_group"])
    group |= {"name": "small", "quota": {"capacity": FULL * 1024}}
    group["cache_config"]["reclaim_strategy"] = {"storage_unique_name": "nfs_01", **strategy}
    group["cache_config"]["meta_indexer_config"] |= {
        "meta_storage_backend_config": {"storage_type": "local"},
        "meta_cache_policy_config": {"type": "LRU"},
    }
    http.ok("createInstanceGroup", instance_group=group)
    http.register("s", instance_group="small")


def capacity(http: Http, group: str = "small") -> Json:
    return dict(http.ok("getCapacity", instance_group=group)["capacity"])


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


# -------------------------------------------------------------------------- what others see of it


def test_fields_of_ours_are_shown_only_when_they_say_something(http: Http) -> None:
    http.register("plain")
    http.register("ours", model_version="v2", supersedes="plain", handover_seconds=9)
    shown = {i["instance_id"]: i for i in http.ok("listInstanceInfo")["instance_info"]}
    assert shown["plain"].keys() & {"model_version", "supersedes", "handover_seconds"} == set()
    assert shown["ours"]["model_version"] == "v2"
    assert (shown["ours"]["supersedes"], shown["ours"]["handover_seconds"]) == ("plain", 9)
    small_group(http, low_water_percentage=0.5, ttl_seconds=60)
    strategy = http.ok("getInstanceGroup", name="small")["instance_group"]["cache_config"]["reclaim_strategy"]
    assert (strategy["low_water_percentage"], strategy["ttl_seconds"]) == (0.5, 60)
    default = http.ok("getInstanceGroup", name="default")["instance_group"]
    assert "reclaim_strategy" not in default["cache_config"]
    assert "storage_state" not in http.ok("listStorage")


@pytest.mark.parametrize("policy", ["POLICY_ADAPTIVE", 100])
def test_the_adaptive_policy_goes_by_name_and_by_number(http: Http, policy: Any) -> None:
    small_group(http, reclaim_policy=policy)
    group = http.ok("getInstanceGroup", name="small")["instance_group"]
    assert group["cache_config"]["reclaim_strategy"]["reclaim_policy"] == "POLICY_ADAPTIVE"
    assert capacity(http)["policy"] == "adaptive"
    http.ok("updateInstanceGroup", instance_group=group | {"version": 2}, current_version=1)


def test_refused_strategies_name_the_field(http: Http) -> None:
    small_group(http)
    group = http.ok("getInstanceGroup", name="small")["instance_group"] | {"version": 2}
    for change, told in (
        ({"reclaim_policy": 9}, "reclaim_policy 9"),
        ({"ttl_seconds": -1}, "ttl_seconds is negative"),
        ({"trigger_strategy": {"used_percentage": 95}}, "used_percentage 95 is a fraction"),
        ({"trigger_strategy": {"used_percentage": 0.5}, "low_water_percentage": 0.6}, "low_water_percentage"),
    ):
        changed = copy.deepcopy(group)
        changed["cache_config"]["reclaim_strategy"] |= change
        message = http.refused(
            "updateInstanceGroup", "INVALID_ARGUMENT", instance_group=changed, current_version=1
        )
        assert told in message


def test_every_call_of_ours_has_a_place_in_the_documentation() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    ours = [e for e in ENDPOINTS if e.handle.__module__.endswith(("handlers_capacity", "handlers_traces"))]
    assert len(ours) == 12
    for endpoint in ours:
        assert endpoint.path.removeprefix("/api/") in documented, endpoint.rpc


# --------------------------------------------------------------------------------------- capacity


def test_a_capacity_report(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3])
    report = capacity(http)
    assert (report["group"], report["quota_bytes"], report["used_bytes"]) == ("small", 4096, 3072)
    assert (report["blocks"], report["reclaimable_bytes"], report["pinned_bytes"]) == (3, 3072, 0)
    (tier,) = report["tiers"]
    assert (tier["storage_type"], tier["storages"], tier["used_bytes"]) == ("ST_NFS", ["nfs_01"], 3072)
    assert 0 <= tier["coldest_age_s"] < 60
    (instance,) = report["instances"]
    assert (instance["instance_id"], instance["blocks"], instance["retiring"]) == ("s", 3, None)
    assert http.refused("getCapacity", "INTERNAL_ERROR", instance_group="ghost").endswith("(KVCM-N002)")
    http.refused("getCapacity", "INVALID_ARGUMENT")


def test_a_full_group_makes_room_and_counts_it(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3, 4])
    http.prefix("s", [1, 2])
    http.run(http.backend.flush_touches())
    assert len(http.write("s", [5, 6])) == 2
    assert (len(http.prefix("s", [1, 2])), len(http.prefix("s", [5, 6]))) == (2, 2)
    assert capacity(http)["used_bytes"] <= 4096
    counted = {
        m["metric_name"]: m["metric_value"]
        for m in http.ok("getMetrics")["metrics"]
        if {"tag_key": "instance_group", "tag_value": "small"} in m["metric_tags"]
    }
    assert int(counted["cache_reclaimer.evicted_blocks"]["int_value"]) >= 2
    for name in ("expired_blocks", "demoted_blocks", "promoted_blocks", "drained_blocks", "failed_moves"):
        assert counted[f"cache_reclaimer.{name}"] == {"int_value": "0"}
    assert counted["cache_reclaimer.paused"] == {"float_value": 0}


def test_a_write_that_waits_in_vain_is_told_what_holds_the_quota(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3, 4])
    http.ok("pinCache", instance_id="s", name="all", block_keys=[1, 2, 3, 4])
    began = time.monotonic()
    message = http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s", block_keys=[5])
    assert time.monotonic() - began < 2, "waiting would not help"
    assert "KVCM-Q001" in message
    assert "4096" in message
    assert "pinned" in message


# ------------------------------------------------------------------------------- leases and pins


def test_leased_blocks_stay_until_the_lease_ends(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3, 4])
    leased = http.ok("leaseCache", instance_id="s", block_keys=[1, 2, 9], lease_ms=800)
    assert (leased["blocks"], leased["lease_ms"]) == (2, 800)
    assert capacity(http)["leased_bytes"] == 2048
    http.write("s", [5, 6])
    assert len(http.prefix("s", [1, 2])) == 2
    until(lambda: capacity(http)["leased_bytes"] == 0, 2)
    for request in ({}, {"block_keys": [1], "lease_ms": 0}, {"block_keys": [1], "lease_ms": 10**9}):
        http.refused("leaseCache", "INVALID_ARGUMENT", instance_id="s", **request)
    http.refused("leaseCache", "INSTANCE_NOT_EXIST", instance_id="nobody", block_keys=[1], lease_ms=1)


def test_pins_are_kept_listed_and_removed(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2])
    pinned = http.ok("pinCache", instance_id="s", name="prompt", block_keys=[1, 2, 3])
    assert (pinned["keys"], pinned["blocks"]) == (3, 2)
    http.write("s", [1, 2, 3])
    for key in range(10, 20):
        http.write("s", [key])
    assert len(http.prefix("s", [1, 2, 3])) == 3
    (pin,) = capacity(http)["pins"]
    assert (pin["name"], pin["keys"], pin["blocks"], pin["bytes"], pin["until_s"]) == (
        "prompt",
        3,
        3,
        3072,
        0,
    )
    gone = http.ok("unpinCache", instance_id="s", name="prompt")
    assert gone["keys"] == 0
    assert capacity(http)["pins"] == []
    for key in range(20, 30):
        http.write("s", [key])
    assert http.prefix("s", [1, 2, 3]) == []


def test_pins_by_tokens_and_pins_that_are_refused(http: Http) -> None:
    small_group(http)
    tokens = list(range(300))  # the block size is 128
    assert http.ok("pinCache", instance_id="s", name="p", token_ids=tokens)["keys"] == 2
    message = http.refused("pinCache", "INVALID_ARGUMENT", instance_id="s", name="p", token_ids=[1, 2])
    assert "no whole block" in message
    http.refused("pinCache", "INVALID_ARGUMENT", instance_id="s", block_keys=[1])
    http.refused("pinCache", "INVALID_ARGUMENT", instance_id="s", name="p")
    http.refused("pinCache", "INVALID_ARGUMENT", instance_id="s", name="n" * 300, block_keys=[1])
    http.refused("unpinCache", "INVALID_ARGUMENT", instance_id="s")
    for until_s in (-1, 3600):  # 3600 is meant as "an hour from now"
        message = http.refused(
            "pinCache", "INVALID_ARGUMENT", instance_id="s", name="late", block_keys=[1], until_s=until_s
        )
        assert "not in the future" in message
    assert [pin["name"] for pin in capacity(http)["pins"]] == ["p"]


def test_a_pin_ends_by_itself(http: Http) -> None:
    small_group(http)
    http.write("s", [1])
    http.ok("pinCache", instance_id="s", name="p", block_keys=[1], until_s=int(time.time()) + 2)
    assert capacity(http)["pinned_bytes"] == 1024
    until(lambda: capacity(http)["pins"] == [], 5)


# --------------------------------------------------------------------------------------- drains


def test_a_drained_storage_gets_empty_and_can_be_removed(http: Http, tmp_path: Path) -> None:
    second = {"global_unique_name": "nfs_02", "nfs": {"root_path": f"{tmp_path}/second"}}
    http.ok("addStorage", storage=second)
    small_group(http)
    group = http.ok("getInstanceGroup", name="small")["instance_group"]
    group |= {"storage_candidates": ["nfs_01", "nfs_02"], "version": 2}
    http.ok("updateInstanceGroup", instance_group=group, current_version=1)
    where = [loc["location_specs"][0]["uri"] for loc in http.write("s", [1, 2, 3])]
    assert all(uri.startswith("file://nfs_01") for uri in where)
    http.ok("drainStorage", storage_unique_name="nfs_01", draining=True)
    states = http.ok("listStorage")["storage_state"]
    assert states == [{"global_unique_name": "nfs_01", "is_available": True, "is_draining": True}]
    until(lambda: [d["empty"] for d in capacity(http)["draining"]] == [True], 10)
    moved = [loc["location_specs"][0]["uri"] for loc in http.prefix("s", [1, 2, 3])]
    assert all(uri.startswith("file://nfs_02") for uri in moved)
    new = http.write("s", [4])[0]["location_specs"][0]["uri"]
    assert new.startswith("file://nfs_02")
    http.ok("updateInstanceGroup", current_version=2, instance_group=group | {
        "storage_candidates": ["nfs_02"], "version": 3,
    })  # fmt: skip
    default = http.ok("getInstanceGroup", name="default")["instance_group"]
    default |= {"storage_candidates": ["nfs_02"], "version": 2}
    http.ok("updateInstanceGroup", instance_group=default, current_version=1)
    http.ok("removeStorage", storage_unique_name="nfs_01")


def test_the_only_storage_of_a_group_may_drain(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3])
    http.ok("drainStorage", storage_unique_name="nfs_01", draining=True)
    until(lambda: [d["empty"] for d in capacity(http)["draining"]] == [True], 10)
    message = http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s", block_keys=[9])
    assert "KVCM-Q004" in message
    assert "drain" in message
    http.ok("drainStorage", storage_unique_name="nfs_01", draining=False)
    assert len(http.write("s", [9])) == 1
    http.refused("drainStorage", "INVALID_ARGUMENT")
    http.refused("drainStorage", "INTERNAL_ERROR", storage_unique_name="ghost", draining=True)


# --------------------------------------------------------------------------------- model upgrades


def test_an_upgrade_and_its_roll_back(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3])
    http.register("s2", instance_group="small", model_version="v2", supersedes="s", handover_seconds=1000)
    assert http.prefix("s2", [1, 2, 3]) == [], "blocks of another version are not served"
    assert len(http.prefix("s", [1, 2, 3])) == 3, "the old one is served as before"
    states = {i["instance_id"]: i for i in capacity(http)["instances"]}
    assert states["s2"]["retiring"] is None
    retiring = states["s"]["retiring"]
    assert 0.9 < retiring["share"] <= 1
    assert retiring["empty"] is False
    http.ok("rollbackInstance", instance_id="s2")
    states = {i["instance_id"]: i for i in capacity(http)["instances"]}
    assert states["s"]["retiring"] is None
    assert states["s2"]["retiring"] is not None
    message = http.refused("rollbackInstance", "INTERNAL_ERROR", instance_id="s2")
    assert message.endswith("(KVCM-C005)")
    http.refused("rollbackInstance", "INTERNAL_ERROR", instance_id="ghost")
    http.refused("rollbackInstance", "INVALID_ARGUMENT")


def test_a_retired_instance_ends_empty(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3])
    http.register("s2", instance_group="small", supersedes="s", handover_seconds=1)
    until(lambda: next(i["retiring"] for i in capacity(http)["instances"] if i["retiring"])["empty"], 10)
    assert http.prefix("s", [1, 2, 3]) == []


# ------------------------------------------------------------------------------------ reclaimers


def test_the_reclaimers_are_changed_at_run_time(http: Http) -> None:
    names = ("reclaimers", "max_bytes_per_second", "paused")

    def settings(answer: Json) -> tuple[Any, ...]:
        return tuple(answer[name] for name in names)

    assert settings(http.ok("getReclaimer")) == (2, "0", False)
    assert settings(http.ok("updateReclaimer", reclaimers=3)) == (3, "0", False)
    changed = http.ok("updateReclaimer", max_bytes_per_second=10**9, paused=True)
    assert settings(changed) == settings(http.ok("getReclaimer")) == (3, "1000000000", True)
    assert settings(http.ok("updateReclaimer")) == (3, "1000000000", True)
    for change in ({"reclaimers": 0}, {"reclaimers": 65}, {"max_bytes_per_second": -1}):
        http.refused("updateReclaimer", "INVALID_ARGUMENT", **change)
    small_group(http)
    http.backend.wait_ms = 300
    http.write("s", [1, 2, 3, 4])
    http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s", block_keys=[5])
    http.ok("updateReclaimer", paused=False, max_bytes_per_second=0)
    http.backend.wait_ms = 5_000
    assert len(http.write("s", [5])) == 1
