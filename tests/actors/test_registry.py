"""The registry without Ray: what it refuses, keeps, and does when a call is repeated."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from kvcm_ray.actors.passwords import check_password, hash_password
from kvcm_ray.actors.paths import registry_dir
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.registry_store import RegistryStore
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import (
    AccountRole,
    InstanceGroup,
    InstanceInfo,
    LocationSpecGroup,
    LocationSpecInfo,
    ModelDeployment,
    MooncakeSpec,
    NfsSpec,
    ReclaimerSettings,
    ReclaimPolicy,
    StorageConfig,
    TairMemPoolSpec,
    TriggerStrategy,
)
from kvcm_ray.errors import (
    AlreadyExists,
    InstanceLimitReached,
    InstanceMismatch,
    InstanceNotFound,
    InUse,
    InvalidArgument,
    StorageIOError,
    StorageNotFound,
    Unavailable,
    Unsupported,
    UpgradeConflict,
    VersionConflict,
)
from kvcm_ray.testing.blocks import finish_request, instance, some_keys, start_request


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (StorageConfig("", nfs=NfsSpec("/tmp/x")), InvalidArgument),
        (StorageConfig("n" * 201, nfs=NfsSpec("/tmp/x")), InvalidArgument),
        (StorageConfig("a/b", nfs=NfsSpec("/tmp/x")), InvalidArgument),
        (StorageConfig("a\nb", nfs=NfsSpec("/tmp/x")), InvalidArgument),
        (StorageConfig("\ud800", nfs=NfsSpec("/tmp/x")), InvalidArgument),
        (StorageConfig("s", nfs=NfsSpec("")), InvalidArgument),
        (StorageConfig("s", nfs=NfsSpec("relative/path")), InvalidArgument),
        (StorageConfig("s"), InvalidArgument),
        (StorageConfig("s", mooncake=MooncakeSpec()), InvalidArgument),
        (StorageConfig("s", mooncake=MooncakeSpec("h", "m", "rdma", "", "e")), InvalidArgument),
        (StorageConfig("s", mooncake=MooncakeSpec("h", "m", "tcp", "", "e")), Unsupported),
        (StorageConfig("s", tair_mem_pool=TairMemPoolSpec("d")), Unsupported),
        (StorageConfig("s", nfs=NfsSpec("/proc/no/such")), StorageIOError),
    ],
)
def test_refused_storages_leave_nothing(
    registry: RegistryBody, view: RegistryView, config: StorageConfig, error: type
) -> None:
    before = dict(view.storages())
    with pytest.raises(error):
        registry.add_storage(config)
    assert view.storages() == before


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"storage_candidates": ()},
        {"storage_candidates": ("a", "a")},
        {"cache_config": None},
    ],
)
def test_refused_groups(registry: RegistryBody, change: dict[str, object]) -> None:
    good = registry.get_group("default")
    with pytest.raises(InvalidArgument):
        registry.create_group(dataclasses.replace(good, **{"name": "other", **change}))


def test_candidates_must_be_registered(registry: RegistryBody) -> None:
    """Only those that are new to the group: one removed by force does not block other changes."""
    group = registry.get_group("default")
    unknown = dataclasses.replace(group, version=group.version + 1, storage_candidates=("nope",))
    with pytest.raises(StorageNotFound):
        registry.create_group(dataclasses.replace(unknown, name="other"))
    with pytest.raises(StorageNotFound):
        registry.update_group(unknown, group.version)
    registry.remove_storage(group.storage_candidates[0], force=True)
    registry.update_group(dataclasses.replace(group, version=group.version + 1), group.version)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"low_water_percentage": 0.9, "trigger_strategy": TriggerStrategy(0, 0.8)}, "used_percentage 0.8"),
        ({"low_water_percentage": 0.9, "trigger_strategy": TriggerStrategy(0, 0.8)}, "set it to 0"),
        ({"low_water_percentage": 1.5}, "low_water_percentage 1.5"),
        ({"trigger_strategy": TriggerStrategy(0, 80.0)}, "used_percentage 80 is a fraction"),
        ({"trigger_strategy": TriggerStrategy(0, -0.1)}, "used_percentage"),
        ({"trigger_strategy": TriggerStrategy(-1, 0.5), "low_water_percentage": 0.0}, "used_size"),
        ({"trigger_period_seconds": -1}, "trigger_period_seconds"),
        ({"reclaim_step_size": -1}, "reclaim_step_size"),
        ({"reclaim_step_percentage": 101}, "reclaim_step_percentage"),
        ({"delay_before_delete_ms": -1}, "delay_before_delete_ms"),
        ({"reclaim_policy": 7}, "reclaim_policy 7"),
    ],
)
def test_refused_reclaim_strategies(registry: RegistryBody, change: dict[str, object], names: str) -> None:
    with pytest.raises(InvalidArgument, match=names):
        registry.update_group(with_reclaim(registry.get_group("default"), **change), 1)
    assert registry.get_group("default").version == 1


def with_reclaim(group: InstanceGroup, **change: object) -> InstanceGroup:
    """The next version of `group` with another reclaim strategy."""
    cache = group.cache_config
    assert cache is not None
    assert cache.reclaim_strategy is not None
    strategy = dataclasses.replace(cache.reclaim_strategy, **change)
    cache = dataclasses.replace(cache, reclaim_strategy=strategy)
    return dataclasses.replace(group, version=group.version + 1, cache_config=cache)


@pytest.mark.parametrize("policy", list(ReclaimPolicy))
def test_every_policy_and_the_edges_of_the_marks_are_accepted(
    registry: RegistryBody, policy: ReclaimPolicy
) -> None:
    changes = {"reclaim_policy": policy, "low_water_percentage": 1.0, "reclaim_step_percentage": 100}
    group = with_reclaim(registry.get_group("default"), trigger_strategy=TriggerStrategy(1, 1.0), **changes)
    registry.update_group(group, 1)
    unset = with_reclaim(group, trigger_strategy=None, ttl_seconds=60)
    registry.update_group(unset, 2)
    assert registry.get_group("default") == unset


def test_group_versions(registry: RegistryBody, view: RegistryView) -> None:
    group = registry.get_group("default")
    two = dataclasses.replace(group, version=2, user_data="two")
    registry.update_group(two, 1)
    assert view.group("default").user_data == "two"
    for version, current in ((3, 1), (2, 2), (1, 2)):
        with pytest.raises(VersionConflict):
            registry.update_group(dataclasses.replace(two, version=version), current)
    with pytest.raises(AlreadyExists):
        registry.create_group(two)


def test_instances(registry: RegistryBody) -> None:
    specs = (LocationSpecInfo("a", 64), LocationSpecInfo("b", 64))
    groups = (LocationSpecGroup("z", ("b", "a")), LocationSpecGroup("y", ("a",)))
    info = dataclasses.replace(instance("one"), location_spec_infos=specs, location_spec_groups=groups)
    stored = registry.register_instance(info)
    assert [g.name for g in stored.location_spec_groups] == ["y", "z"]
    assert stored.location_spec_groups[1].spec_names == ("a", "b")
    assert stored.quota_group_name == "default_quota_group"
    assert registry.register_instance(info) == stored
    elsewhere = dataclasses.replace(info, instance_group_name="nowhere")
    assert registry.register_instance(elsewhere) == stored
    with pytest.raises(InstanceMismatch):
        registry.register_instance(dataclasses.replace(info, block_size=8))
    noted = dataclasses.replace(info.model_deployment or ModelDeployment(), user_data="noted")
    changed = registry.register_instance(dataclasses.replace(info, model_deployment=noted))
    assert changed == dataclasses.replace(stored, model_deployment=noted)
    assert registry.get_instance("one") == changed
    registry.remove_instance("one")
    assert registry.register_instance(info).uid != stored.uid


def test_instance_limit(registry: RegistryBody) -> None:
    group = registry.get_group("default")
    registry.update_group(dataclasses.replace(group, version=2, max_instance_count=1), 1)
    registry.register_instance(instance("one"))
    with pytest.raises(InstanceLimitReached):
        registry.register_instance(instance("two"))
    assert [i.instance_id for i in registry.list_instances()] == ["one"]


# -------------------------------------------------------------------------------- model upgrades


def version(name: str, supersedes: str = "", handover_seconds: int = 0) -> InstanceInfo:
    return dataclasses.replace(
        instance(name), model_version=name, supersedes=supersedes, handover_seconds=handover_seconds
    )


def chain(registry: RegistryBody) -> dict[str, tuple[str, int]]:
    """What each instance supersedes, and the time that it takes to retire (0: it does not)."""
    found = {i.instance_id: (i.supersedes, i.retiring_seconds) for i in registry.list_instances()}
    for info in registry.list_instances():
        assert (info.retiring_since_s > 0) == (info.retiring_seconds > 0)
    return found


def test_a_successor_makes_its_predecessor_retire(registry: RegistryBody) -> None:
    one = registry.register_instance(version("one"))
    before_s = int(time.time())
    two = registry.register_instance(version("two", "one", 60))
    retired = registry.get_instance("one")
    assert (retired.retiring_seconds, before_s <= retired.retiring_since_s <= time.time()) == (60, True)
    assert dataclasses.replace(retired, retiring_seconds=0, retiring_since_s=0) == one
    assert registry.register_instance(version("two", "one", 60)) == two
    assert registry.register_instance(version("one")) == retired, "its engines start again meanwhile"
    assert registry.get_instance("one") == retired
    three = registry.register_instance(version("three", "two"))
    assert chain(registry) == {"one": ("", 60), "two": ("one", 3600), "three": ("two", 0)}
    assert three.retiring_seconds == 0


def test_an_instance_may_become_a_successor_later(registry: RegistryBody) -> None:
    registry.register_instance(version("one"))
    registry.register_instance(version("two"))
    registry.register_instance(version("two", "nobody"))
    assert chain(registry) == {"one": ("", 0), "two": ("", 0)}
    registry.register_instance(version("two", "one", 5))
    assert chain(registry) == {"one": ("", 5), "two": ("one", 0)}


def test_successors_that_are_refused(registry: RegistryBody) -> None:
    registry.create_group(dataclasses.replace(registry.get_group("default"), name="other"))
    registry.register_instance(version("one"))
    registry.register_instance(version("two", "one"))
    elsewhere = dataclasses.replace(version("x", "two"), instance_group_name="other")
    before = registry.list_instances()
    for info, error, text in (
        (version("x", "x"), InvalidArgument, "itself"),
        (version("x", "nobody"), InstanceNotFound, "'nobody' is not registered"),
        (version("x", "one"), UpgradeConflict, "superseded by 'two' already"),
        (elsewhere, InvalidArgument, "of one group"),
        (version("x", "two", -1), InvalidArgument, "handover_seconds"),
        (version("x" * 10, "a\nb"), InvalidArgument, "supersedes"),
        (dataclasses.replace(version("two"), model_version="other"), InstanceMismatch, "model_version"),
    ):
        with pytest.raises(error, match=text):
            registry.register_instance(info)
    assert registry.list_instances() == before
    plain = dataclasses.replace(version("two"), model_version="")
    assert registry.register_instance(plain).model_version == "two", "plain clients do not say it"


def test_a_roll_back_swaps_the_two_and_so_does_another(registry: RegistryBody) -> None:
    for name, supersedes in (("zero", ""), ("one", "zero"), ("two", "one")):
        registry.register_instance(version(name, supersedes, 60))
    registry.rollback_instance("two")
    assert chain(registry) == {"zero": ("", 60), "two": ("zero", 60), "one": ("two", 0)}
    registry.register_instance(version("two", "one", 60))
    registry.register_instance(version("one", "zero", 60))
    assert chain(registry) == {"zero": ("", 60), "two": ("zero", 60), "one": ("two", 0)}, "as they were told"
    registry.rollback_instance("one")
    assert chain(registry) == {"zero": ("", 60), "one": ("zero", 60), "two": ("one", 0)}


def test_roll_backs_that_are_refused(registry: RegistryBody) -> None:
    for name, supersedes in (("one", ""), ("two", "one"), ("three", "two")):
        registry.register_instance(version(name, supersedes))
    before = registry.list_instances()
    for name, error, text in (
        ("nobody", InstanceNotFound, "not registered"),
        ("one", UpgradeConflict, "supersedes none"),
        ("two", UpgradeConflict, "superseded by 'three'"),
    ):
        with pytest.raises(error, match=text):
            registry.rollback_instance(name)
    assert registry.list_instances() == before
    registry.remove_instance("two")
    with pytest.raises(InstanceNotFound, match="'two', which 'three' supersedes"):
        registry.rollback_instance("three")


def test_what_a_removal_does_to_an_upgrade(registry: RegistryBody) -> None:
    for name, supersedes in (("one", ""), ("two", "one"), ("three", "two")):
        registry.register_instance(version(name, supersedes, 60))
    registry.remove_instance("two")
    assert chain(registry) == {"one": ("", 60), "three": ("two", 0)}, (
        "a middle one: the old one still retires"
    )
    registry.register_instance(version("three", "two", 60))
    registry.remove_instance("three")
    registry.register_instance(version("four", "one", 60))
    registry.remove_instance("four")
    assert chain(registry) == {"one": ("", 0)}, "without a successor it serves on"


def test_a_repeated_roll_back_is_done_once(registry: RegistryBody) -> None:
    registry.register_instance(version("one"))
    registry.register_instance(version("two", "one"))
    registry.call("event-1", "rollback_instance", "two")
    registry.call("event-1", "rollback_instance", "two")
    assert chain(registry)["one"] == ("two", 0)


# --------------------------------------------------------------------------------------- draining


def test_draining_is_a_state_that_updates_keep(
    registry: RegistryBody, view: RegistryView, tmp_path: Path
) -> None:
    registry.call("event-1", "set_draining", "nfs_01", True)
    assert view.storages()["nfs_01"].is_draining
    registry.update_storage(StorageConfig("nfs_01", nfs=NfsSpec(str(tmp_path / "moved"))))
    assert view.storages()["nfs_01"].is_draining
    registry.disable_storage("nfs_01")
    registry.enable_storage("nfs_01")
    assert view.storages()["nfs_01"].is_draining
    registry.set_draining("nfs_01", False)
    assert not view.storages()["nfs_01"].is_draining
    with pytest.raises(StorageNotFound):
        registry.set_draining("nowhere", True)


def test_a_snapshot_keeps_the_reclaimers(registry: RegistryBody) -> None:
    settings = ReclaimerSettings(4, 1_000_000, True)
    registry.set_reclaimer_settings(settings)
    text = registry.save_snapshot()
    registry.set_reclaimer_settings(ReclaimerSettings())
    registry.load_snapshot(text)
    assert registry.reclaimer_settings() == settings


def test_what_is_in_use_is_not_removed_without_force(registry: RegistryBody, groups, tmp_path: Path) -> None:
    registry.register_instance(instance("one"))
    service = groups.services["default"]
    keys = some_keys(4)
    (started,) = service.submit([start_request("one", keys)]).result(10)
    service.submit([finish_request("one", started)]).result(10)
    with pytest.raises(InUse, match="candidate"):
        registry.remove_storage("nfs_01")
    moved = StorageConfig("nfs_01", nfs=NfsSpec(str(tmp_path / "moved")))
    with pytest.raises(InUse, match="holds blocks"):
        registry.update_storage(moved)
    with pytest.raises(InUse, match="instances"):
        registry.remove_group("default")
    registry.remove_group("default", True)
    assert registry.list_instances() == []
    assert not (tmp_path / "groups" / "default").exists() or not any(
        (tmp_path / "groups" / "default").iterdir()
    )
    registry.remove_storage("nfs_01")
    with pytest.raises(StorageNotFound):
        registry.enable_storage("nfs_01")


def test_a_repeated_call_is_done_once(registry: RegistryBody) -> None:
    args = ("ada", "secret", AccountRole.ROLE_USER)
    registry.call("event-1", "add_account", *args)
    assert registry.call("event-1", "add_account", *args) is None
    with pytest.raises(AlreadyExists):
        registry.call("event-2", "add_account", *args)
    registry.register_instance(instance("one"))
    registry.call("event-3", "remove_instance", "one")
    assert registry.call("event-3", "remove_instance", "one") is None
    with pytest.raises(AttributeError):
        registry.call("event-4", "_commit")


def test_events_are_remembered_within_a_bound(tmp_path: Path) -> None:
    from kvcm_ray.actors.registry_store import EVENTS_REMEMBERED_MAX

    store = RegistryStore(tmp_path / "r", write=True)
    for number in range(EVENTS_REMEMBERED_MAX + 5):
        store.write(event_id=f"e{number}")
    assert not store.done("e3")
    assert store.done("e6")
    store.close()


def test_snapshot_into_another_manager(registry: RegistryBody, groups, tmp_path: Path) -> None:
    registry.register_instance(instance("one"))
    registry.add_account("ada", "secret", AccountRole.ROLE_ADMIN)
    text = registry.save_snapshot()
    assert "scrypt" not in text
    other_dir = tmp_path / "other"
    other = RegistryBody(other_dir, type(groups)(other_dir))
    other.load_snapshot(text)
    assert other.save_snapshot() == text
    assert other.get_instance("one").uid != registry.get_instance("one").uid
    for broken in ("", "[]", '{"kvcm_snapshot": 2}', '{"kvcm_snapshot": 1, "groups": [{"name": 3}]}'):
        with pytest.raises(InvalidArgument):
            other.load_snapshot(broken)
    document = json.loads(text)
    document["instances"][0]["block_size"] = 99
    with pytest.raises(InstanceMismatch):
        other.load_snapshot(json.dumps(document))
    other._control.services["default"].stop()
    other.close()


def test_damaged_records_are_left_out(registry: RegistryBody, tmp_path: Path) -> None:
    path = registry_dir(tmp_path)
    env = registry._store._lmdb
    with env.begin(write=True) as txn:
        value = bytearray(txn.get(b"storage/nfs_01"))
        value[-1] ^= 1
        txn.put(b"storage/nfs_01", bytes(value))
        txn.put(b"group/copy", txn.get(b"group/default"))
    store = RegistryStore(path, write=False)
    contents = store.read()
    assert (list(contents.storages), list(contents.groups)) == ([], ["default"])
    assert store.corrupt_records == 2
    store.close()


def test_view_needs_a_registry(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no manager"):
        RegistryView(tmp_path / "nothing")


def test_view_follows_changes(registry: RegistryBody, view: RegistryView, tmp_path: Path) -> None:
    first = view.contents()
    assert view.contents() is first
    registry.add_storage(StorageConfig("more", nfs=NfsSpec(str(tmp_path / "more"))))
    assert "more" in view.storages()
    registry.disable_storage("more")
    assert not view.storages()["more"].is_available


def test_passwords() -> None:
    made = hash_password("secret")
    assert made != hash_password("secret")
    assert check_password(made, "secret")
    assert not check_password(made, "Secret")
    assert not check_password("", "")


def test_group_of_a_removed_one_is_swept(registry: RegistryBody, groups, tmp_path: Path) -> None:
    """The group actor died between unregistering and erasing; the next one erases."""
    registry.register_instance(instance("one"))
    service = groups.services.pop("default")
    (started,) = service.submit([start_request("one", some_keys(2))]).result(10)
    service.stop()
    info = registry.get_instance("one")
    registry._commit(drop=[(type(info), "one")])
    groups.refresh("default")
    assert not list((tmp_path / "groups" / "default").glob("one-*"))
    assert not list((tmp_path / "tiers").rglob("*.dat"))
    assert isinstance(registry.get_group("default"), InstanceGroup)
    assert started.storage == "nfs_01"
