"""What the protocol's own integration tests assert, and what its clients rely on."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time

import httpx
import pytest
import uvicorn

from kvcm_ray.testing.http import Http, registration

GROUP = {
    "name": "g", "storage_candidates": ["nfs_01"], "global_quota_group_name": "q",
    "max_instance_count": 10, "quota": {"capacity": 1 << 30},
    "cache_config": {
        "reclaim_strategy": {"storage_unique_name": "nfs_01", "reclaim_policy": 1,
                             "trigger_strategy": {"used_percentage": 0.8}},
        "data_storage_strategy": 2,
        "meta_indexer_config": {
            "max_key_count": 16, "mutex_shard_num": 16,
            "meta_storage_backend_config": {"storage_type": "local"},
            "meta_cache_policy_config": {"capacity": 1, "type": "LRU"},
        },
    },
    "user_data": "before", "version": 1,
}  # fmt: skip


def test_smoke(http: Http) -> None:
    http.register("i1")
    started = http.ok("startWriteCache", instance_id="i1", block_keys=[123])
    http.ok(
        "finishWriteCache", instance_id="i1", write_session_id=started["write_session_id"],
        success_blocks={"bool_masks": {"values": [True]}},
    )  # fmt: skip
    assert http.prefix("i1", [123]) == started["locations"]


def test_storage_configs_are_always_present_and_useful(http: Http) -> None:
    configs = json.loads(http.ok("registerInstance", **registration("i1"))["storage_configs"])
    assert [(c["global_unique_name"], c["type"]) for c in configs] == [("nfs_01", "file")]
    failed = http.post("registerInstance", **(registration("i2") | {"instance_group": "ghost"}))
    assert failed["storage_configs"] == ""


def test_get_instance_info(http: Http) -> None:
    assert "instance_info" not in http.post("getInstanceInfo", instance_id="ghost")
    http.register("i1")
    answer = http.ok("getInstanceInfo", instance_id="i1")
    assert answer["header"]["status"]["message"] == ""
    assert answer["instance_group"] == "default"
    info = answer["instance_info"]
    assert info["quota_group_name"] == "default_quota_group"
    assert info["location_spec_infos"] == [{"name": "tp0", "size": "1024"}]
    assert info["model_deployment"]["model_name"] == "m"


def test_get_location_edge_cases(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1, 2])
    assert http.prefix("i1", [9]) == []
    assert http.prefix("i1", [1, 2], block_mask={"bool_masks": {"values": [True, True]}}) == []
    assert http.prefix("i1", [1, 2], block_mask={"offset": 99}) == []
    assert http.prefix("i1", [1, 2], block_mask={"offset": -1}) == []
    assert len(http.prefix("i1", [1, 2], block_mask={"offset": 1})) == 1
    assert len(http.prefix("i1", [9, 2], block_mask={"bool_masks": {"values": [True]}})) == 1
    batch = {"instance_id": "i1", "block_keys": [1, 2], "block_mask": {"offset": 1}}
    assert len(http.ok("getCacheLocation", query_type=1, **batch)["locations"]) == 2


def test_token_ids_are_hashed_as_the_protocol_says(http: Http) -> None:
    http.register("i1", block_size=2)
    started = http.ok("startWriteCache", instance_id="i1", token_ids=[1, 2, 3, 4, 5])
    assert len(started["locations"]) == 2
    http.ok(
        "finishWriteCache", instance_id="i1", write_session_id=started["write_session_id"],
        success_blocks={"offset": 2},
    )  # fmt: skip
    keys = [-8366447769517741626, 455111481605203084]
    assert http.prefix("i1", keys) == started["locations"]
    assert len(http.prefix("i1", [], token_ids=[1, 2, 3, 4])) == 2
    assert http.prefix("i1", [], token_ids=[1]) == []
    none = http.ok("startWriteCache", instance_id="i1", token_ids=[1])
    assert none["block_mask"] == {"offset": 0}
    assert none["locations"] == []


def test_masks_of_start_write(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1, 2])
    start = {"instance_id": "i1", "write_timeout_seconds": 30}
    assert http.ok("startWriteCache", block_keys=[1, 2, 3], **start)["block_mask"] == {"offset": 2}
    assert http.ok("startWriteCache", block_keys=[4, 1, 5], **start)["block_mask"] == {
        "bool_masks": {"values": [False, True, False]}
    }
    full = http.ok("startWriteCache", block_keys=[1, 2], **start)
    assert full["block_mask"] == {"offset": 2}
    assert len(full["write_session_id"]) == 32
    for mask in ({"bool_masks": {"offset": 0}}, {"bool_masks": {"values": []}}, {}, {"offset": 0}):
        session = http.ok("startWriteCache", block_keys=[1, 2], **start)["write_session_id"]
        http.ok("finishWriteCache", instance_id="i1", write_session_id=session, success_blocks=mask)


def test_spec_groups(http: Http) -> None:
    groups = [
        {"name": "first", "spec_names": ["tp0"]},
        {"name": "both", "spec_names": ["tp0", "tp1"]},
    ]
    http.register("i1", ("tp0", "tp1"), location_spec_groups=groups)
    started = http.ok(
        "startWriteCache", instance_id="i1", block_keys=[1, 2],
        location_spec_group_names=["first", "both"],
    )  # fmt: skip
    assert [loc["spec_size"] for loc in started["locations"]] == [1, 2]
    http.ok(
        "finishWriteCache", instance_id="i1", write_session_id=started["write_session_id"],
        success_blocks={"offset": 2},
    )  # fmt: skip
    assert http.prefix("i1", [1, 2]) == started["locations"]
    for names in (["first"], ["first", "ghost"]):
        answer = http.post(
            "startWriteCache", instance_id="i1", block_keys=[8, 9], location_spec_group_names=names
        )
        assert answer["header"]["status"]["code"] in ("INVALID_ARGUMENT", "INTERNAL_ERROR")
        assert answer["locations"] == []
        assert answer["write_session_id"] == ""


def test_instances_groups_and_accounts(http: Http) -> None:
    http.ok("createInstanceGroup", instance_group=GROUP)
    update = GROUP | {"user_data": "after", "version": 2}
    http.ok("updateInstanceGroup", instance_group=update, current_version=1)
    assert http.ok("getInstanceGroup", name="g")["instance_group"]["user_data"] == "after"
    http.register("i1", instance_group="g")
    listed = http.ok("listInstanceInfo", instance_group_name="g")["instance_info"]
    assert [i["instance_id"] for i in listed] == ["i1"]
    assert http.ok("listInstanceInfo", instance_group_name="ghost")["instance_info"] == []
    http.ok("removeInstance", instance_id="i1", instance_group="whatever")
    http.ok("removeInstanceGroup", name="g")
    http.ok("addAccount", user_name="u", password="p", role="ROLE_ADMIN")
    assert {"user_name": "u", "role": "ROLE_ADMIN"} in http.ok("listAccount")["accounts"]
    http.ok("deleteAccount", user_name="u")


def test_a_full_instance_makes_room(http: Http) -> None:
    """Theirs refuses the 17th block until used_percentage is lowered; ours evicts the coldest one."""
    http.ok("createInstanceGroup", instance_group=GROUP)
    http.register("i1", instance_group="g")
    http.write("i1", list(range(16)))
    assert len(http.write("i1", [99])) == 1
    assert len(http.prefix("i1", [99])) == 1
    assert http.run(http.backend.ask("g", "usage"))["blocks"] <= 16
    assert len(http.prefix("i1", list(range(15)))) < 15, "leaves go before what leads to them"


def test_the_key_limit_and_making_room(http: Http) -> None:
    """A full instance refuses only if nothing in it may go; then room is made by the operator."""
    http.ok("createInstanceGroup", instance_group=GROUP)
    http.register("i1", instance_group="g")
    http.write("i1", list(range(12)))
    http.ok("pinCache", instance_id="i1", name="all", block_keys=list(range(16)))
    http.write("i1", list(range(16)))
    message = http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="i1", block_keys=[99])
    assert "max_key_count" in message
    http.ok("removeCache", instance_id="i1", block_keys=[15])
    assert len(http.write("i1", [99])) == 1
    shown = http.ok("getInstanceGroup", name="g")["instance_group"]
    shown["cache_config"]["meta_indexer_config"]["max_key_count"] = 32
    http.ok("updateInstanceGroup", instance_group=shown | {"version": 2}, current_version=1)
    assert len(http.write("i1", [100, 101])) == 2, "the new limit acts at once"


def test_a_lowered_mark_acts_at_once(http: Http) -> None:
    """The protocol's own test: used_percentage 0.1 makes room within two seconds."""
    http.ok("createInstanceGroup", instance_group=GROUP)
    http.register("i1", instance_group="g")
    http.write("i1", list(range(16)))
    shown = http.ok("getInstanceGroup", name="g")["instance_group"]
    shown["cache_config"]["reclaim_strategy"]["trigger_strategy"]["used_percentage"] = 0.1
    http.ok("updateInstanceGroup", instance_group=shown | {"version": 2}, current_version=1)
    until = time.monotonic() + 2
    while http.run(http.backend.ask("g", "usage"))["blocks"] > 1 and time.monotonic() < until:
        time.sleep(0.02)
    assert http.run(http.backend.ask("g", "usage"))["blocks"] <= 1


def test_metrics_count(http: Http) -> None:
    http.ok("listStorage")
    http.ok("listStorage")
    http.register("i1")
    http.refused("startWriteCache", "INVALID_ARGUMENT", instance_id="i1")
    metrics = http.ok("getMetrics")["metrics"]
    series = {
        (m["metric_name"], *(t["tag_value"] for t in m["metric_tags"])): m["metric_value"] for m in metrics
    }
    assert int(series["service.query_counter", "ListStorage"]["int_value"]) == 2
    assert series["service.query_rt_us", "ListStorage"]["float_value"] > 1
    assert series["service.error_counter", "ListStorage"] == {"int_value": "0"}
    wrong = series["service.error_counter", "StartWriteCache", "default", "i1"]
    assert wrong == {"int_value": "1"}
    assert series["cache_manager_group.quota_bytes", "default"] == {"float_value": 1 << 30}


def test_leader_calls(http: Http) -> None:
    health = http.ok("checkHealth")
    assert health["is_leader"] is True
    assert health["is_health"] is True
    assert int(health["elector_last_loop_time_ms"]) > 0
    info = http.ok("getManagerClusterInfo")
    assert info["self_node_id"] == info["leader_node_id"]
    assert http.ok("getLeaderElectorConfig")["campaign_delay_time_ms"] == "0"
    http.ok("updateLeaderElectorConfig", campaign_delay_time_ms=0)
    http.refused("updateLeaderElectorConfig", "UNSUPPORTED", campaign_delay_time_ms=5000)
    http.refused("leaderDemote", "UNSUPPORTED")
    http.ok("updateLogger", log_level="debug")
    http.ok("updateLogger", log_level="INFO")
    assert http.refused("updateLogger", "INVALID_ARGUMENT", log_level="loud").startswith(
        "Invalid log level string"
    )


def test_keys_are_exact_over_the_whole_range(http: Http) -> None:
    http.register("i1")
    keys = [-(2**63), -(2**53) - 1, 2**53 + 1, 2**63 - 1]
    http.write("i1", keys)
    assert len(http.prefix("i1", keys)) == 4
    text = json.dumps({
        "instance_id": "i1", "query_type": "QT_PREFIX_MATCH", "block_keys": [str(k) for k in keys],
    })  # fmt: skip
    assert len(http.raw("/api/getCacheLocation", text.encode()).json()["locations"]) == 4
    assert http.prefix("i1", [-(2**53)]) == []


def test_the_tracer_answers_when_asked(http: Http) -> None:
    http.register("i1")
    request = {"instance_id": "i1", "block_keys": [1], "query_type": 2}
    trace = "abc__kvcm_need_span_tracer"
    header = http.post("getCacheLocation", **(request | {"trace_id": trace}))["header"]
    assert header["request_id"].startswith(trace + "_")
    assert json.loads(header["tracer_result"])["span_time_us"] >= 0


@pytest.fixture
def url(http: Http) -> str:
    """The application on a socket, for clients that bring their own connections."""
    server = uvicorn.Server(
        uvicorn.Config(http.app, port=0, log_level="warning", lifespan="off", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_concurrent_identical_registrations(url: str) -> None:
    def register(_: int) -> tuple[str, str]:
        answer = httpx.post(f"{url}/api/registerInstance", json=registration("same")).json()
        return answer["header"]["status"]["code"], answer["storage_configs"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(register, range(16)))
    assert len(answers) == 1
    assert answers.pop()[0] == "OK"


def test_concurrent_writers_share_the_work(url: str) -> None:
    httpx.post(f"{url}/api/registerInstance", json=registration("i1"))

    def start(_: int) -> int:
        request = {"instance_id": "i1", "block_keys": list(range(50)), "write_timeout_seconds": 30}
        return len(httpx.post(f"{url}/api/startWriteCache", json=request).json()["locations"])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(start, range(16))) == [0] * 15 + [50]
