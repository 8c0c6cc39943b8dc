"""Scenarios from files, from live groups, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvcm_ray
from kvcm_ray.core.model import CachePreferStrategy, InstanceGroup, InstanceInfo, ReclaimPolicy, StorageConfig
from kvcm_ray.errors import InvalidArgument, NoStorageAvailable, Unsupported
from kvcm_ray.optimizer import of_requests
from kvcm_ray.optimizer.scenario import (
    Group,
    Instance,
    Scenario,
    Storage,
    Tier,
    WriteDelay,
    live_scenario,
    scenario_of,
)
from kvcm_ray.serve_app.protojson import to_json
from kvcm_ray.testing.small_groups import BLOCK, STORAGES, group_of, instance

EXAMPLE = Path(kvcm_ray.__file__).parents[1] / "examples" / "scenario.yaml"

FULL = """
storages:
  - {name: dram, kind: shm, capacity_bytes: 1GiB, read_bytes_per_s: 20GB/s, latency_s: 1e-5}
  - {name: disk, write_bytes_per_s: 5e8, price_gib_month: 0.1}
groups:
  - name: chat
    tiers: [{storage: dram, capacity_blocks: 100}, disk]
    instances: [{name: a, block_bytes: 64KiB}, {name: b, block_bytes: 65536}]
    quota_blocks: 500
    policy: adaptive
    ttl_s: 60
  - {name: rest, tiers: [disk], block_bytes: 1MB}
write_delay: {seconds: 0.5}
partial_first: true
"""


def wanted() -> Scenario:
    return Scenario(
        storages=(
            Storage(name="dram", kind="shm", capacity_bytes=1 << 30, read_bytes_per_s=20e9, latency_s=1e-5),
            Storage(name="disk", write_bytes_per_s=5e8, price_gib_month=0.1),
        ),
        groups=(
            Group(
                name="chat",
                tiers=(Tier(storage="dram", capacity_bytes=100 << 16), Tier(storage="disk")),
                instances=(Instance(name="a", block_bytes=1 << 16), Instance(name="b", block_bytes=1 << 16)),
                quota_bytes=500 << 16,
                policy="adaptive",
                ttl_s=60,
            ),
            Group(name="rest", tiers=(Tier(storage="disk"),), instances=(Instance(block_bytes=10**6),)),
        ),
        write_delay=WriteDelay(seconds=0.5),
        partial_first=True,
    )


def plain() -> dict[str, Any]:
    return {
        "storages": [{"name": "s"}],
        "groups": [{"name": "g", "tiers": ["s"], "block_bytes": 10}],
    }


# ------------------------------------------------------------------------------------------- files


def test_a_file_with_all_there_is(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(FULL)
    assert Scenario.from_file(file) == wanted()


def test_the_same_in_json(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    file = tmp_path / "scenario.json"
    file.write_text(json.dumps(yaml.safe_load(FULL)))
    assert Scenario.from_file(file) == wanted()


def test_the_example_is_one() -> None:
    scenario = Scenario.from_file(EXAMPLE)
    assert [storage.name for storage in scenario.storages] == ["dram", "nvme"]
    assert scenario.groups[0].tiers[0].capacity_bytes == 256 << 30


def test_the_shortest_file() -> None:
    scenario = scenario_of(plain())
    assert scenario.groups == (
        Group(name="g", tiers=(Tier(storage="s"),), instances=(Instance(block_bytes=10),)),
    )
    assert not scenario.write_delay


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": []}, r"^storage: no such key; did you mean 'storages'\?"),
        ({"groups": []}, "^groups must have at least one"),
        ({"groups": {}}, "^groups must be a list, not dict"),
        ({"storages": [{"kind": "shm"}]}, r"^storages\[0\].name is missing"),
        ({"storages": [{"name": 3}]}, r"^storages\[0\].name must be a text, not 3"),
        ({"storages": [{"name": "s"}, {"name": "s"}]}, "^storages: 's' is there twice"),
        (
            {"storages": [{"name": "s", "capacity_bytes": "10 apples"}]},
            r"^storages\[0\].capacity_bytes: '10 apples' is not a number",
        ),
        ({"storages": [{"name": "s", "latency_s": -1}]}, "^storage 's': latency_s must be .* at least 0"),
        ({"storages": [{"name": "s", "capacity_bytes": 0}]}, "^storage 's': capacity_bytes .* at least 1"),
        ({"storages": [{"name": "s", "capacity_bytes": 9}]}, "a block of 10 bytes does not fit storage 's'"),
        ({"partial_first": "yes"}, "^partial_first must be true or false"),
        ({"write_delay": {"seconds": True}}, "^write_delay.seconds: True is not a number"),
        ({"write_delay": {"minutes": 1}}, "^write_delay.minutes: no such key"),
    ],
)
def test_refused_with_the_key_that_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        scenario_of(plain() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quota": 5}, r"^groups\[0\].quota: no such key; did you mean 'quota_bytes'\?"),
        ({"tiers": []}, "^group 'g': tiers must have at least one"),
        ({"tiers": ["s", "s"]}, "^group 'g': tiers: 's' is there twice"),
        ({"tiers": ["disk"]}, "^group 'g': no storage 'disk'; there are s"),
        ({"tiers": [5]}, r"^groups\[0\].tiers\[0\] must be a mapping, not int"),
        ({"policy": "mru"}, "^group 'g': no policy 'mru'; there are lru"),
        ({"quota_bytes": 9}, "a block of 10 bytes does not fit"),
        ({"quota_bytes": 90, "quota_blocks": 9}, "give quota_bytes or quota_blocks, not both"),
        ({"block_bytes": 0}, "block_bytes must be a number of at least 1"),
        ({"ttl_s": -1}, "^group 'g': ttl_s"),
        (
            {"quota_blocks": 9, "block_bytes": None, "instances": [
                {"name": "a", "block_bytes": 1}, {"name": "b", "block_bytes": 2}]},
            r"^groups\[0\].quota_blocks: the blocks of the group must have one size",
        ),
    ],
)  # fmt: skip
def test_groups_that_are_refused(change: dict[str, Any], message: str) -> None:
    group = {name: value for name, value in (plain()["groups"][0] | change).items() if value is not None}
    with pytest.raises(InvalidArgument, match=message):
        scenario_of(plain() | {"groups": [group]})


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    with pytest.raises(InvalidArgument, match="cannot read the scenario"):
        Scenario.from_file(file)
    for text, message in (
        ("storages: [", "s.yaml: not YAML"),
        ("- 1", "s.yaml: a scenario must be a mapping"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidArgument, match=message):
            Scenario.from_file(file)
    file = tmp_path / "s.json"
    file.write_text("{")
    with pytest.raises(InvalidArgument, match=r"s\.json is not JSON"):
        Scenario.from_file(file)


def test_without_yaml_one_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(Unsupported) as caught:
        Scenario.from_file(EXAMPLE)
    assert "pip install pyyaml" in caught.value.remedy
    file = tmp_path / "s.json"
    file.write_text(json.dumps(plain()))
    assert Scenario.from_file(file) == scenario_of(plain())


# --------------------------------------------------------------------------------------- instances


def test_which_instance_is_in_which_group() -> None:
    accesses = replace(
        of_requests([[1], [2], [3]]), instances=np.array([0, 1, 2], np.int32), instance_names=("b", "", "a")
    )
    groups, sizes = wanted().number(accesses)
    assert (groups.tolist(), sizes.tolist()) == ([0, 1, 0], [1 << 16, 10**6, 1 << 16])
    with pytest.raises(InvalidArgument, match="no group has instance '' of the trace"):
        replace(wanted(), groups=wanted().groups[:1]).number(accesses)


def test_an_instance_is_in_one_group_only() -> None:
    rest = replace(wanted().groups[1], instances=(Instance(name="a", block_bytes=1),))
    with pytest.raises(InvalidArgument, match="instances of all groups: 'a' is there twice"):
        replace(wanted(), groups=(wanted().groups[0], rest))


# ------------------------------------------------------------------------------------- live groups


def live(
    group: InstanceGroup, *instances: InstanceInfo, storages: dict[str, StorageConfig] = STORAGES, **more: Any
) -> Scenario:
    """Through the JSON that the HTTP API answers."""
    return live_scenario(
        [to_json(group)], [to_json(s) for s in storages.values()], [to_json(i) for i in instances], **more
    )


def test_a_live_group() -> None:
    group = group_of(100, shm=30, storages=("shm", "nfs"), policy=ReclaimPolicy.POLICY_ADAPTIVE, ttl_s=60)
    scenario = live(group, instance("i"), instance("j"))
    assert scenario == Scenario(
        storages=(Storage(name="shm", kind="tairmempool"), Storage(name="nfs", kind="nfs")),
        groups=(
            Group(
                name="g",
                tiers=(Tier(storage="shm", capacity_bytes=30 * BLOCK), Tier(storage="nfs")),
                instances=(Instance(block_bytes=BLOCK),),
                quota_bytes=100 * BLOCK,
                policy="adaptive",
                ttl_s=60,
            ),
        ),
    )


def test_defaults_are_those_of_a_live_group() -> None:
    bare = InstanceGroup(name="g", storage_candidates=("nfs",), quota=group_of(9).quota)
    assert live(bare, instance("i")).groups[0].policy == "lru"
    assert live(group_of(9, policy=ReclaimPolicy.POLICY_TTL), instance("i")).groups[0].ttl_s == 3600


def test_storages_of_one_type_are_one_tier_in_the_order_of_preference() -> None:
    storages = STORAGES | {"nfs2": replace(STORAGES["nfs"], global_unique_name="nfs2")}
    group = group_of(9, storages=("nfs2", "nfs", "shm"), prefer=CachePreferStrategy.CPS_PREFER_TAIR_MEMPOOL)
    tiers = live(group, instance("i"), storages=storages).groups[0].tiers
    assert [tier.storage for tier in tiers] == ["shm", "nfs2"]


def test_what_the_hardware_can_do_is_given() -> None:
    disk = Storage(name="nfs", read_bytes_per_s=1e9)
    assert live(group_of(9), instance("i"), devices={"nfs": disk}).storages == (disk,)


def test_live_groups_that_cannot_be_simulated() -> None:
    with pytest.raises(InvalidArgument, match="has no instances"):
        live(group_of(9))
    with pytest.raises(NoStorageAvailable):
        live(group_of(9, storages=("gone",)), instance("i"))
