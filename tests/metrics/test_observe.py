"""Statistics, history, events, explanations and hot prefixes of a real group, over HTTP."""

from __future__ import annotations

import copy
import time
from typing import Any

from kvcm_ray.testing.http import Http

FULL = 4  #: blocks of 1 KiB in the group "small"


def small_group(http: Http) -> None:
    group = copy.deepcopy(http.ok("getInstanceGroup", name="default")["instance_group"])
    group |= {"name": "small", "quota": {"capacity": FULL * 1024}}
    group["cache_config"]["reclaim_strategy"] = {"storage_unique_name": "nfs_01"}
    group["cache_config"]["meta_indexer_config"] |= {
        "meta_storage_backend_config": {"storage_type": "local"},
        "meta_cache_policy_config": {"type": "LRU"},
    }
    http.ok("createInstanceGroup", instance_group=group)
    http.register("s", instance_group="small")


def statistics(http: Http, group: str = "small") -> dict[str, Any]:
    (found,) = http.ok("getStatistics", instance_group=group)["statistics"]
    return dict(found)


def events(http: Http, group: str = "small") -> list[dict[str, Any]]:
    return list(http.ok("getEvents", instance_group=group, limit=1000)["journal"]["events"])


def explained(http: Http, keys: list[int]) -> list[dict[str, Any]]:
    found = http.ok("explainCache", instance_id="s", block_keys=keys)["explanation"]
    return list(found["blocks"])


def test_what_was_asked_found_and_written_is_counted_in_blocks_tokens_and_bytes(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3])
    http.prefix("s", [1, 2, 9])
    http.prefix("s", [8])
    http.run(http.backend.flush_touches())
    found = statistics(http)
    counters = found["counters"]
    assert (counters["lookups"], counters["lookup_blocks"], counters["hit_blocks"]) == (2, 4, 2)
    assert (counters["lookup_tokens"], counters["hit_tokens"]) == (4 * 128, 2 * 128)
    assert (counters["finished_writes"], counters["written_blocks"], counters["written_bytes"]) == (
        1,
        3,
        3072,
    )
    assert found["tiers"]["ST_NFS"]["hit_tokens"] == 2 * 128
    assert found["gauges"]["used_bytes"] == found["instances"]["s"]["used_bytes"] == 3072
    assert found["instances"]["s"]["hit_blocks"] == 2
    calls = found["histograms"]["call_duration_seconds"]
    assert sum(calls["counts"]) >= 3
    assert len(calls["counts"]) == len(calls["le"]) + 1
    assert found["histograms"]["report_delay_seconds"]["sum"] > 0.04, "reports are sent every 50 ms"


def test_an_eviction_is_counted_told_and_explained(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2, 3, 4])
    http.write("s", [5, 6])
    found = statistics(http)
    assert found["counters"]["evicted_bytes_by_reason"]["quota"] >= 2048
    assert found["counters"]["evicted_blocks"] >= 2
    told = [event for event in events(http) if event["kind"] == "evicted"]
    assert sum(event["bytes"] for event in told) == found["counters"]["evicted_bytes"]
    gone = [block for block in explained(http, [1, 2, 3, 4]) if block["state"] == "absent"]
    assert gone
    for block in gone:
        assert block["why"] == "quota"
        assert 0 <= block["gone_ago_s"] < 30
        assert block["needed_bytes"] >= 1024
        assert block["more_bytes"] >= 1024
    there, unknown = explained(http, [5, 77])
    assert (there["state"], there["storage"], there["pinned"]) == ("serving", "nfs_01", False)
    assert there["touched_ago_s"] < 30
    assert unknown == {"state": "absent", "why": "unknown"}


def test_explanations_tell_what_is_written_removed_or_pinned(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2])
    http.ok("pinCache", instance_id="s", name="p", block_keys=[1])
    http.ok("removeCache", instance_id="s", block_keys=[2])
    http.ok("startWriteCache", instance_id="s", block_keys=[3])
    pinned, removed, writing = explained(http, [1, 2, 3])
    assert pinned["pinned"] is True
    assert (removed["why"], removed["more_bytes"]) == ("removed", 0)
    assert (writing["state"], writing["storage"]) == ("writing", "nfs_01")
    http.refused("explainCache", "INSTANCE_NOT_EXIST", instance_id="ghost", block_keys=[1])
    many = list(range(20_000))
    assert "in parts" in http.refused("explainCache", "INVALID_ARGUMENT", instance_id="s", block_keys=many)


def test_the_life_of_sessions_is_told(http: Http) -> None:
    small_group(http)
    http.write("s", [1])
    session = http.ok("startWriteCache", instance_id="s", block_keys=[2])["write_session_id"]
    http.ok("finishWriteCache", instance_id="s", write_session_id=session, success_blocks={"offset": 0})
    http.ok("startWriteCache", instance_id="s", block_keys=[3], write_timeout_seconds=1)
    http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s", block_keys=list(range(10, 20)))
    http.ok("trimCache", instance_id="s", strategy="TS_REMOVE_ALL_CACHE")
    time.sleep(1.2)
    told = events(http)
    kinds = [event["kind"] for event in told]
    assert kinds[:4] == ["incarnation", "write_started", "write_finished", "write_started"]
    assert kinds.count("write_aborted") == kinds.count("refused") == kinds.count("session_expired") == 1
    assert "trimmed" in kinds
    refused = next(event for event in told if event["kind"] == "refused")
    assert refused["reason"].startswith("KVCM-Q001: ")
    counters = statistics(http)["counters"]
    assert (counters["aborted_writes"], counters["expired_sessions"], counters["refused_writes"]) == (1, 1, 1)
    assert counters["refused_writes_by_code"] == {"KVCM-Q001": 1}


def test_a_write_that_waits_in_vain_is_a_refusal_once(http: Http) -> None:
    small_group(http)
    http.backend.wait_ms = 300
    http.ok("startWriteCache", instance_id="s", block_keys=[1, 2, 3, 4])
    http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s", block_keys=[5])
    assert statistics(http)["counters"]["refused_writes"] == 1


def test_history_is_there_after_a_second(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2])
    time.sleep(1.1)
    history = http.ok("getHistory", instance_group="small")["history"]
    assert history["step_s"] == 1
    assert sum(history["rows"]["written_blocks"]) == 2
    assert history["rows"]["quota_bytes"][-1] == FULL * 1024
    assert (
        http.ok("getHistory", instance_group="small", since_s=history["now_s"] + 5)["history"]["rows"][
            "time_s"
        ]
        == []
    )


def test_hot_prefixes_are_of_what_is_there(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1, 2, 3])
    for _ in range(3):
        http.prefix("i1", [1, 2, 3, 4])
    http.prefix("i1", [1, 2, 7])
    http.run(http.backend.flush_touches())
    deadline = time.monotonic() + 5
    while (found := http.ok("getHotPrefixes", instance_group="default")["prefixes"])["lookups"] < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (root,) = found["nodes"]
    assert (found["lookups"], root["instance_id"], root["hits"], root["blocks"]) == (4, "i1", 4, 2)
    assert (root["storage"], root["resident_blocks"], root["bytes"]) == ("nfs_01", 2, 2048)
    (child,) = root["children"]
    assert (child["hits"], child["blocks"], child["first_key"]) == (3, 1, "3")
    http.refused("getHotPrefixes", "INVALID_ARGUMENT", instance_group="default", depth=1000)


def test_statistics_of_all_groups_leave_out_none(http: Http) -> None:
    small_group(http)
    http.backend.groups_control.services.pop("small").stop()
    default, small = http.ok("getStatistics")["statistics"]
    assert (default["group"], small["group"]) == ("default", "small")
    assert "unavailable" in small
    assert "gauges" in default


def test_counters_stay_when_an_instance_goes(http: Http) -> None:
    small_group(http)
    http.write("s", [1, 2])
    http.prefix("s", [1, 2])
    http.run(http.backend.flush_touches())
    before = statistics(http)
    http.ok("removeInstance", instance_id="s")
    after = statistics(http)
    for name in ("lookup_blocks", "hit_tokens", "written_bytes"):
        assert after["counters"][name] == before["counters"][name] > 0
    assert after["tiers"]["ST_NFS"]["hit_blocks"] == 2
    assert after["instances"] == {}
