"""Tenants do not see one another."""

from __future__ import annotations

from typing import Any

import pytest

from kvcm_ray.testing.access import Guarded
from kvcm_ray.testing.http import registration


def names(answer: Any, field: str, key: str) -> set[str]:
    return {entry[key] for entry in answer.json()[field]}


def test_lists_hold_what_is_ones_own(guarded: Guarded) -> None:
    groups = {
        who: names(guarded.as_(who, "listInstanceGroup"), "instance_group", "name")
        for who in ("user", "stranger", "scopeless", "all_groups", "admin")
    }
    assert groups["user"] == {"mine"}
    assert groups["stranger"] == {"theirs"}
    assert groups["scopeless"] == set()
    assert groups["all_groups"] == groups["admin"] == {"mine", "theirs", "default"}
    found = guarded.as_("user", "listInstanceInfo", instance_group_name="")
    assert names(found, "instance_info", "instance_id") == {"mine/i1"}


def test_metrics_hold_what_is_ones_own(guarded: Guarded) -> None:
    text = guarded.as_("user", "getMetrics").text
    assert "mine/i1" in text
    assert "theirs" not in text
    assert "AddAccount" not in text
    assert "theirs" in guarded.as_("admin", "getMetrics").text
    assert guarded.as_("scopeless", "getMetrics").json()["metrics"] == []


def test_storages_that_only_others_use_are_hidden(guarded: Guarded) -> None:
    guarded.as_(
        "admin", "addStorage",
        storage={"global_unique_name": "private", "nfs": {"root_path": str(guarded.data_dir / "private")}},
    )  # fmt: skip
    assert names(guarded.as_("admin", "listStorage"), "storage", "global_unique_name") == {
        "nfs_01",
        "private",
    }
    assert names(guarded.as_("user", "listStorage"), "storage", "global_unique_name") == {"nfs_01"}
    assert guarded.as_("scopeless", "listStorage").json()["storage"] == []


def test_a_user_works_within_its_scope(guarded: Guarded) -> None:
    request = registration("mine/i2") | {"instance_group": "mine"}
    assert guarded.as_("user", "registerInstance", **request).json()["header"]["status"]["code"] == "OK"
    started = guarded.as_(
        "user", "startWriteCache", instance_id="mine/i2", block_keys=[7], write_timeout_seconds=30
    ).json()
    finished = guarded.as_(
        "user", "finishWriteCache", instance_id="mine/i2",
        write_session_id=started["write_session_id"], success_blocks={"offset": 1},
    )  # fmt: skip
    assert finished.json()["header"]["status"]["code"] == "OK"
    found = guarded.as_(
        "user", "getCacheLocation", instance_id="mine/i2", block_keys=[7], query_type="QT_PREFIX_MATCH"
    )
    assert len(found.json()["locations"]) == 1
    assert guarded.as_("user", "getCapacity", instance_group="mine").json()["capacity"]
    assert (
        guarded.as_("user", "removeInstance", instance_id="mine/i2").json()["header"]["status"]["code"]
        == "OK"
    )


def test_anothers_blocks_are_out_of_reach(guarded: Guarded) -> None:
    for call, more in (
        ("getCacheLocation", {"query_type": "QT_PREFIX_MATCH"}),
        ("removeCache", {}),
        ("trimCache", {"strategy": "TS_REMOVE_ALL_CACHE"}),
        ("removeInstance", {}),
    ):
        answer = guarded.as_("user", call, instance_id="theirs/i1", block_keys=[1, 2, 3], **more)
        assert answer.json()["header"]["status"]["code"] in ("INSTANCE_NOT_EXIST", "INTERNAL_ERROR")
        assert "is not registered" in answer.text
    found = guarded.as_(
        "stranger", "getCacheLocation", instance_id="theirs/i1", block_keys=[1, 2, 3],
        query_type="QT_PREFIX_MATCH",
    )  # fmt: skip
    assert len(found.json()["locations"]) == 3


def refusal(guarded: Guarded, instance_id: str, group: str = "mine", **more: Any) -> str:
    request = registration(instance_id) | {"instance_group": group} | more
    return str(guarded.as_("user", "registerInstance", **request).json()["header"]["status"]["message"])


def test_registering_does_not_tell_whether_an_id_is_taken(guarded: Guarded) -> None:
    guarded.as_("admin", "registerInstance", **registration("llama") | {"instance_group": "theirs"})
    taken, free = refusal(guarded, "llama"), refusal(guarded, "qwen")
    assert taken.replace("llama", "X") == free.replace("qwen", "X")
    assert "does not begin with 'mine/'" in taken
    taken, free = refusal(guarded, "theirs/i1"), refusal(guarded, "theirs/i9")
    assert taken.replace("i1", "X") == free.replace("i9", "X")
    assert refusal(guarded, "theirs/i1", "theirs") == refusal(guarded, "theirs/i1", "never").replace(
        "never", "theirs"
    )
    assert "mine/i1" in guarded.as_("user", "listInstanceInfo", instance_group_name="mine").text


def test_superseding_does_not_tell_either(guarded: Guarded) -> None:
    taken = refusal(guarded, "mine/new", supersedes="theirs/i1")
    free = refusal(guarded, "mine/new", supersedes="never/i1")
    assert taken.replace("theirs", "X") == free.replace("never", "X")
    again = [refusal(guarded, "mine/i1", supersedes=other) for other in ("theirs/i1", "never/i1", "")]
    assert set(again) == {"Instance registered successfully"}


def test_an_instance_that_an_admin_named_may_be_registered_again(guarded: Guarded) -> None:
    """Engines with ids that they do not choose: an admin registers them once."""
    request = registration("engine-7") | {"instance_group": "mine"}
    guarded.as_("admin", "registerInstance", **request)
    assert refusal(guarded, "engine-7") == "Instance registered successfully"


@pytest.mark.parametrize("change", [{"instance_groups": ["theirs"]}, {"role": "ROLE_ADMIN"}])
def test_a_changed_scope_counts_at_once(guarded: Guarded, change: dict[str, Any]) -> None:
    assert "not registered" in guarded.as_("user", "getInstanceInfo", instance_id="theirs/i1").text
    changed = guarded.as_("admin", "updateAccount", user_name="user", **change)
    assert changed.json()["header"]["status"]["code"] == "OK"
    assert "not registered" not in guarded.as_("user", "getInstanceInfo", instance_id="theirs/i1").text


def test_a_user_cannot_change_the_registry(guarded: Guarded) -> None:
    """The wall behind the table: a handler that forgot its row could not reach further."""
    from kvcm_ray.actors.registry_body import CHANGES, READS
    from kvcm_ray.errors import Forbidden
    from kvcm_ray.serve_app.access.scope import ScopedBackend

    scoped = ScopedBackend(guarded.backend, frozenset({"mine"}))
    open_to_users = {"register_instance", "remove_instance", "rollback_instance", "describe"}
    for method in (CHANGES | READS) - open_to_users:
        with pytest.raises(Forbidden):
            guarded.run(scoped.registry(method))
