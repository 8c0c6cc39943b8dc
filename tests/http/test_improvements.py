"""Where we are deliberately better than the protocol's own server; see docs/compatibility.md."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray import errors
from kvcm_ray.testing.http import Http, registration

BATCH, WINDOW = "QT_BATCH_GET", "QT_REVERSE_ROLL_SW_MATCH"


def group(name: str, **changes: Any) -> dict[str, Any]:
    indexer = {
        "max_key_count": 1000,
        "mutex_shard_num": 16,
        "meta_storage_backend_config": {"storage_type": "local"},
        "meta_cache_policy_config": {"type": "LRU"},
    }
    cache = {"data_storage_strategy": "CPS_PREFER_3FS", "meta_indexer_config": indexer}
    base = {
        "name": name,
        "storage_candidates": ["nfs_01"],
        "global_quota_group_name": "q",
        "quota": {"capacity": 1 << 30},
        "cache_config": cache,
        "version": 1,
    }
    return base | changes


def reasons(message: str) -> list[str]:
    return list(json.loads(message.split(" : ", 1)[1])["error_msg"])


# ---------------------------------------------------------------------------------------- reads


@pytest.mark.parametrize("size", [0, -1, 4, 2**31 - 1])
def test_a_window_that_does_not_fit_is_refused_at_once(http: Http, size: int) -> None:
    http.register("i1")
    http.write("i1", [1, 2, 3])
    began = time.monotonic()
    message = http.refused(
        "getCacheLocation", "INVALID_ARGUMENT",
        instance_id="i1", block_keys=[1, 2, 3], query_type=WINDOW, sw_size=size,
    )  # fmt: skip
    assert time.monotonic() - began < 0.5
    assert reasons(message)[0] == "QT_REVERSE_ROLL_SW_MATCH bad args"


def test_placeholders_have_one_shape(http: Http) -> None:
    http.register("i1", ("tp0", "tp1"))
    http.write("i1", [1])
    query = {"instance_id": "i1", "block_keys": [7, 1, 8], "query_type": BATCH}
    locations = http.ok("getCacheLocation", **query)["locations"]
    empty = [{"name": "tp0", "uri": ""}, {"name": "tp1", "uri": ""}]
    placeholder = {"type": "ST_UNSPECIFIED", "spec_size": 2, "location_specs": empty}
    assert locations[0] == locations[2] == placeholder
    assert locations[1]["type"] == "ST_NFS"
    filtered = http.ok("getCacheLocation", location_spec_names=["tp1"], **query)["locations"]
    assert filtered[0] == placeholder | {"location_specs": empty[1:]}
    assert [s["name"] for s in filtered[1]["location_specs"]] == ["tp1"]
    assert filtered[1]["spec_size"] == 2


def test_an_unknown_query_type_is_an_invalid_argument(http: Http) -> None:
    http.register("i1")
    for query_type in ("QT_UNSPECIFIED", 9, "BOGUS", None):
        message = http.refused(
            "getCacheLocation", "INVALID_ARGUMENT",
            instance_id="i1", block_keys=[1], query_type=query_type,
        )  # fmt: skip
        assert "query_type" in message


def test_an_unknown_instance_is_said_plainly(http: Http) -> None:
    for name in ("getCacheLocation", "startWriteCache", "finishWriteCache", "getCacheMeta",
                 "removeCache", "trimCache", "getInstanceInfo"):  # fmt: skip
        message = http.refused(name, "INSTANCE_NOT_EXIST", instance_id="nobody", block_keys=[1])
        assert message == "instance 'nobody' is not registered"


def test_blocks_of_a_disabled_storage_are_misses_until_it_is_enabled(http: Http) -> None:
    http.register("i1")
    written = http.write("i1", [1, 2])
    http.ok("disableStorage", storage_unique_name="nfs_01")
    assert http.prefix("i1", [1, 2]) == []
    found = http.ok("getCacheLocation", instance_id="i1", block_keys=[1, 2], query_type=BATCH)
    assert {loc["type"] for loc in found["locations"]} == {"ST_UNSPECIFIED"}
    http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="i1", block_keys=[3])
    http.ok("enableStorage", storage_unique_name="nfs_01")
    assert http.prefix("i1", [1, 2]) == written


def test_get_cache_meta_has_no_id_for_a_missing_block(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1])
    http.ok("startWriteCache", instance_id="i1", block_keys=[2], write_timeout_seconds=30)
    answer = http.ok("getCacheMeta", instance_id="i1", block_keys=[9, 1, 9, 2])
    metas = [json.loads(text) for text in answer["metas"]]
    assert [m["status"] for m in metas] == [
        "CLS_NOT_FOUND", "CLS_SERVING", "CLS_NOT_FOUND", "CLS_WRITING",
    ]  # fmt: skip
    assert ["id" in m for m in metas] == [False, True, False, True]
    again = http.ok("getCacheMeta", instance_id="i1", block_keys=[1])["metas"]
    assert json.loads(again[0])["id"] == metas[1]["id"]


# --------------------------------------------------------------------------------------- writes


def test_a_session_expires_within_100_ms_of_its_deadline(http: Http) -> None:
    http.register("i1")
    began = time.monotonic()
    http.ok("startWriteCache", instance_id="i1", block_keys=[1], write_timeout_seconds=1)
    while time.monotonic() - began < 0.95:
        time.sleep(0.02)
    locations = http.ok("startWriteCache", instance_id="i1", block_keys=[1])["locations"]
    assert locations == [], "still being written shortly before the deadline"
    while time.monotonic() - began < 1.1:
        time.sleep(0.01)
    again = http.ok("startWriteCache", instance_id="i1", block_keys=[1])
    assert len(again["locations"]) == 1


def test_a_mask_of_the_wrong_length_leaves_the_session_usable(http: Http) -> None:
    http.register("i1")
    started = http.ok("startWriteCache", instance_id="i1", block_keys=[1, 2])
    session = {"instance_id": "i1", "write_session_id": started["write_session_id"]}
    for mask in ({"offset": 3}, {"offset": -1}, {}, {"bool_masks": {"values": [True]}}):
        http.refused("finishWriteCache", "INVALID_ARGUMENT", success_blocks=mask, **session)
    http.ok("finishWriteCache", success_blocks={"offset": 2}, **session)
    assert len(http.prefix("i1", [1, 2])) == 2


def test_a_finish_for_another_instance_is_refused_and_harmless(http: Http) -> None:
    http.register("i1")
    http.register("i2")
    started = http.ok("startWriteCache", instance_id="i1", block_keys=[1])
    session = {"write_session_id": started["write_session_id"], "success_blocks": {"offset": 1}}
    http.refused("finishWriteCache", "INTERNAL_ERROR", instance_id="i2", **session)
    http.ok("finishWriteCache", instance_id="i1", **session)
    assert len(http.prefix("i1", [1])) == 1


def test_write_timeout_zero_is_the_default_of_30_s(http: Http) -> None:
    http.register("i1")
    started = http.ok("startWriteCache", instance_id="i1", block_keys=[1], write_timeout_seconds=0)
    time.sleep(0.1)
    http.ok(
        "finishWriteCache", instance_id="i1", write_session_id=started["write_session_id"],
        success_blocks={"offset": 1},
    )  # fmt: skip


def test_a_key_given_twice_is_stored_once(http: Http) -> None:
    http.register("i1")
    locations = http.write("i1", [5, 6, 5])
    assert locations[0] == locations[2] != locations[1]
    assert http.run(http.backend.ask("default", "usage"))["blocks"] == 2


def test_quota_errors_name_the_quota_and_the_amounts(http: Http) -> None:
    http.ok("createInstanceGroup", instance_group=group("small", quota={"capacity": 4096}))
    http.register("s1", instance_group="small")
    http.write("s1", [1, 2, 3])
    http.ok("pinCache", instance_id="s1", name="p", block_keys=[1, 2, 3])
    message = http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s1", block_keys=[10, 11])
    assert "4096" in message
    assert "2048" in message
    assert "3072" in message
    http.ok(
        "createInstanceGroup",
        instance_group=group(
            "typed",
            quota={
                "capacity": 1 << 20,
                "quota_config": [{"storage_type": "ST_NFS", "capacity": 1024}],
            },
        ),
    )
    http.register("s2", instance_group="typed")
    message = http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="s2", block_keys=[1, 2])
    assert "ST_NFS" in message
    assert "1024" in message


def test_removed_blocks_are_gone_at_once_and_can_be_written_again(http: Http) -> None:
    http.register("i1")
    old = http.write("i1", [1, 2])
    http.ok("removeCache", instance_id="i1", block_keys=[2])
    assert len(http.prefix("i1", [1, 2])) == 1
    meta = http.ok("getCacheMeta", instance_id="i1", block_keys=[2])["metas"][0]
    assert json.loads(meta) == {"status": "CLS_NOT_FOUND"}
    new = http.write("i1", [2])
    assert len(new) == 1
    assert new[0] != old[1], "another generation"


def test_remove_cache_honours_the_mask(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1, 2, 3])
    http.ok("removeCache", instance_id="i1", block_keys=[1, 2, 3], block_mask={"offset": 2})
    assert len(http.prefix("i1", [1, 2, 3])) == 2
    mask = {"bool_masks": {"values": [True, False]}}
    http.ok("removeCache", instance_id="i1", block_keys=[1, 2], block_mask=mask)
    assert len(http.prefix("i1", [1, 2, 3])) == 1
    http.ok("removeCache", instance_id="i1", block_keys=[1], block_mask={"offset": -1})
    assert len(http.prefix("i1", [1])) == 1, "everything masked"


def test_trim_by_time(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1])
    now = int(time.time())
    trim = {"instance_id": "i1", "strategy": "TS_TIMESTAMP"}
    http.ok("trimCache", begin_timestamp=now + 100, **trim)
    http.ok("trimCache", end_timestamp=now - 100, **trim)
    assert len(http.prefix("i1", [1])) == 1
    http.ok("trimCache", begin_timestamp=now - 100, end_timestamp=now + 100, **trim)
    assert http.prefix("i1", [1]) == []
    for begin, end in ((0, 0), (-1, 0), (9, 3)):
        http.refused("trimCache", "INVALID_ARGUMENT", begin_timestamp=begin, end_timestamp=end, **trim)


def test_trim_all_cache_and_all_meta(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1])
    started = http.ok("startWriteCache", instance_id="i1", block_keys=[2], write_timeout_seconds=30)
    finish = {
        "instance_id": "i1",
        "write_session_id": started["write_session_id"],
        "success_blocks": {"offset": 1},
    }
    http.ok("trimCache", instance_id="i1", strategy="TS_REMOVE_ALL_CACHE")
    assert http.prefix("i1", [1]) == []
    http.ok("finishWriteCache", **finish)
    assert len(http.prefix("i1", [2])) == 1
    started = http.ok("startWriteCache", instance_id="i1", block_keys=[3], write_timeout_seconds=30)
    finish["write_session_id"] = started["write_session_id"]
    http.ok("trimCache", instance_id="i1", strategy="TS_REMOVE_ALL_META")
    assert http.prefix("i1", [2]) == []
    http.refused("finishWriteCache", "INTERNAL_ERROR", **finish)
    http.refused("trimCache", "INVALID_ARGUMENT", instance_id="i1")
    http.refused("trimCache", "UNSUPPORTED", instance_id="i1", strategy=9)


# ------------------------------------------------------------------------------------ the registry


def test_storage_candidates_must_exist(http: Http) -> None:
    message = http.refused(
        "createInstanceGroup", "INTERNAL_ERROR",
        instance_group=group("g", storage_candidates=["nfs_01", "ghost"]),
    )  # fmt: skip
    assert message.startswith("Failed to create instance group : ")
    assert "ghost" in message
    assert "g" not in http.backend.groups()


def test_max_instance_count_is_enforced(http: Http) -> None:
    http.ok("createInstanceGroup", instance_group=group("one", max_instance_count=1))
    http.register("o1", instance_group="one")
    message = http.refused(
        "registerInstance", "INTERNAL_ERROR", **(registration("o2") | {"instance_group": "one"})
    )
    assert "max_instance_count" in message
    http.register("o1", instance_group="one")  # the same again is no new instance


def test_what_is_in_use_is_removed_only_by_force(http: Http) -> None:
    message = http.refused("removeStorage", "INTERNAL_ERROR", storage_unique_name="nfs_01")
    assert message.startswith("Failed to remove storage : ")
    assert "default" in message
    http.register("i1")
    http.write("i1", [1])
    http.refused("removeInstanceGroup", "INTERNAL_ERROR", name="default")
    assert len(http.prefix("i1", [1])) == 1
    http.ok("removeStorage", storage_unique_name="nfs_01", force=True)
    assert http.prefix("i1", [1]) == [], "locations on a storage that is gone are misses"
    http.ok("removeInstanceGroup", name="default", force=True)
    http.refused("getCacheLocation", "INSTANCE_NOT_EXIST", instance_id="i1", block_keys=[1])


def test_a_group_as_returned_can_be_sent_back(http: Http) -> None:
    shown = http.ok("getInstanceGroup", name="default")["instance_group"]
    changed = shown | {"user_data": "new", "version": int(shown["version"]) + 1}
    http.ok("updateInstanceGroup", instance_group=changed, current_version=shown["version"])
    assert http.ok("getInstanceGroup", name="default")["instance_group"]["user_data"] == "new"
    message = http.refused("updateInstanceGroup", "INTERNAL_ERROR", instance_group=changed, current_version=1)
    assert "version" in message


def test_groups_and_all_instances_can_be_listed(http: Http) -> None:
    http.ok("createInstanceGroup", instance_group=group("other"))
    listed = http.ok("listInstanceGroup")["instance_group"]
    assert [g["name"] for g in listed] == ["default", "other"]
    http.register("i1")
    http.register("i2", instance_group="other")
    for name, ids in (("", ["i1", "i2"]), ("other", ["i2"]), ("ghost", [])):
        infos = http.ok("listInstanceInfo", instance_group_name=name)["instance_info"]
        assert [i["instance_id"] for i in infos] == ids


def test_registering_again_with_spec_groups_in_another_order(http: Http) -> None:
    groups = [{"name": "b", "spec_names": ["tp1"]}, {"name": "a", "spec_names": ["tp1", "tp0"]}]
    http.register("i1", ("tp0", "tp1"), location_spec_groups=groups)
    http.register("i1", ("tp0", "tp1"), location_spec_groups=groups[::-1])
    info = http.ok("getInstanceInfo", instance_id="i1")["instance_info"]
    assert info["location_spec_groups"] == [
        {"name": "a", "spec_names": ["tp0", "tp1"]}, {"name": "b", "spec_names": ["tp1"]},
    ]  # fmt: skip


def test_config_snapshots_move_a_configuration(http: Http, tmp_path: Path) -> None:
    http.ok("createInstanceGroup", instance_group=group("moved"))
    http.register("i1", instance_group="moved")
    text = http.ok("genConfigSnapshot")["config_snapshot"]
    assert json.loads(text)
    other = Http(tmp_path / "second")
    try:
        other.ok("loadConfigSnapshot", config_snapshot=text)
        assert [s["global_unique_name"] for s in other.ok("listStorage")["storage"]] == ["nfs_01"]
        assert set(other.backend.groups()) == {"default", "moved"}
        assert other.ok("getInstanceInfo", instance_id="i1")["instance_group"] == "moved"
        other.refused("loadConfigSnapshot", "INVALID_ARGUMENT", config_snapshot="{nonsense")
        other.refused("loadConfigSnapshot", "INVALID_ARGUMENT")
    finally:
        other.close()


def test_disabled_storages_are_shown_as_such(http: Http) -> None:
    http.ok("disableStorage", storage_unique_name="nfs_01")
    configs = json.loads(http.ok("registerInstance", **registration("i1"))["storage_configs"])
    assert [c["is_available"] for c in configs] == [False]


def test_passwords_are_never_shown(http: Http) -> None:
    http.ok("addAccount", user_name="alice", password="secret", role=7)
    answer = http.ok("listAccount")
    assert answer["accounts"] == [{"user_name": "alice", "role": "ROLE_USER"}]
    assert "secret" not in http.ok("genConfigSnapshot")["config_snapshot"]
    http.refused("addAccount", "INTERNAL_ERROR", user_name="alice", password="x")
    http.ok("deleteAccount", user_name="alice")
    http.refused("deleteAccount", "INTERNAL_ERROR", user_name="alice")


def test_admin_failures_say_why_after_the_fixed_sentence(http: Http) -> None:
    message = http.refused("enableStorage", "INTERNAL_ERROR", storage_unique_name="ghost")
    assert message.startswith("Failed to enable storage : ")
    assert "ghost" in message


def test_enum_numbers_without_a_name_are_not_stored(http: Http) -> None:
    wrong = group("g", quota={"capacity": 1, "quota_config": [{"storage_type": 77}]})
    message = http.refused("createInstanceGroup", "INVALID_ARGUMENT", instance_group=wrong)
    assert "storage_type 77" in message


# --------------------------------------------------------------------------- what failures tell


def test_failures_end_with_a_stable_code(http: Http) -> None:
    message = http.refused("removeStorage", "INTERNAL_ERROR", storage_unique_name="nfs_01")
    assert message.endswith("storage 'nfs_01' is a candidate of group default (KVCM-C004)")
    small = group("small", quota={"capacity": 100})
    http.ok("createInstanceGroup", instance_group=small)
    http.register("i1", instance_group="small")
    message = http.refused("startWriteCache", "INTERNAL_ERROR", instance_id="i1", block_keys=[1])
    assert reasons(message)[-1].endswith("(KVCM-Q001)")
    message = http.refused(
        "finishWriteCache", "INTERNAL_ERROR", instance_id="i1", write_session_id="gone",
        success_blocks={"offset": 0},
    )  # fmt: skip
    assert reasons(message)[0] == "write_session_id has been deleted"
    assert reasons(message)[1].endswith("(KVCM-N004)")


def test_failures_do_not_repeat_a_megabyte(http: Http) -> None:
    http.register("i1")
    mask = {"success_blocks": {"offset": 0}}
    for fields in (
        {"instance_id": "x" * 1_000_000},
        {"instance_id": "i1", "write_session_id": "y" * 1_000_000},
    ):
        answer = http.post("finishWriteCache", **({"write_session_id": "s"} | fields | mask))
        assert len(answer["header"]["status"]["message"]) < 2000


@pytest.mark.parametrize("path", ["/tmp/a?b=1", "/tmp/a@b", "/tmp/a\x00b", "/tmp/a\nb"])
def test_paths_that_uris_cannot_carry_are_refused(http: Http, path: str) -> None:
    storage = {"global_unique_name": "odd", "nfs": {"root_path": path}}
    message = http.refused("addStorage", "INVALID_ARGUMENT", storage=storage)
    assert "cannot carry" in message


def test_storages_do_not_share_a_directory(http: Http, tmp_path: Path) -> None:
    """fsck, and a rebuilt index, would take the blocks of one for leftovers of the other."""

    def storage(name: str, path: str) -> dict[str, Any]:
        return {"global_unique_name": name, "nfs": {"root_path": path}}

    http.ok("addStorage", storage=storage("one", f"{tmp_path}/one"))
    for path in ("one", "one/", "one/../one", "one/sub", "."):
        message = http.refused("addStorage", "INVALID_ARGUMENT", storage=storage("two", f"{tmp_path}/{path}"))
        assert "overlaps" in message
    http.ok("addStorage", storage=storage("two", f"{tmp_path}/one-more"))
    http.refused("updateStorage", "INVALID_ARGUMENT", storage=storage("two", f"{tmp_path}/one"))
    http.ok("updateStorage", storage=storage("one", f"{tmp_path}/one"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block_size": 64}, "block_size 128, not 64"),
        ({"location_spec_infos": [{"name": "tp0", "size": 2}]}, "location_spec_infos"),
        ({"model_deployment": {"model_name": "m", "dtype": "BF16", "tp_size": 1}}, "dtype 'FP8', not 'BF16'"),
    ],
)
def test_another_shape_is_named(http: Http, change: dict[str, Any], told: str) -> None:
    http.register("i1")
    message = http.refused("registerInstance", "DUPLICATE_ENTITY", **(registration("i1") | change))
    assert reasons(message)[-1] == f"instance 'i1' is registered with another shape: {told}"


def test_the_documentation_lists_every_code() -> None:
    """Each code that a message can end with: its meaning and the remedy, as `errors` says them."""
    documented = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for cls in vars(errors).values():
        if not (isinstance(cls, type) and issubclass(cls, errors.KvcmError)):
            continue
        if cls.wire == "INTERNAL_ERROR" and not cls.code.endswith("00"):
            assert f"| {cls.code} | {cls.__doc__} | {cls.hint} |" in documented
