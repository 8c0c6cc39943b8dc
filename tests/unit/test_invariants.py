"""`invariants.check` finds what is wrong, and replaying events gives the same effects."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcm_ray.core.invariants import check
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import (
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecInfo,
    NfsSpec,
    StorageConfig,
    StorageType,
)
from kvcm_ray.testing.memory_index import GroupDriver

NFS = StorageType.ST_NFS


def busy_driver() -> tuple[GroupDriver, list[str]]:
    """A group with blocks in every state, and all effects that led there, as text."""
    info = InstanceInfo(instance_id="i", location_spec_infos=(LocationSpecInfo("a", 10),))
    group = InstanceGroup("g", ("nfs",), quota=InstanceGroupQuota(400))
    d = GroupDriver(group, {"nfs": StorageConfig("nfs", nfs=NfsSpec("/n"))}, [info])
    effects = []
    for act in (
        lambda: d.start("i", [1, 2, 3, 4, 1], "1" * 32, event_id="s"),
        lambda: d.finish("i", "1" * 32, BlockMask(offset=4), event_id="f"),
        lambda: d.remove("i", [2], event_id="r"),
        lambda: d.start("i", [5, 6, 2], "2" * 32),
        lambda: d.remove("i", [6]),
        lambda: d.start("i", [7], "3" * 32, timeout_ms=5),
        lambda: d.tick(5),
    ):
        act()
        effects.append(repr(d.effects))
    return d, effects


def wrong(d: GroupDriver) -> str:
    return "\n".join(check(d.state, d.index.served()))


def test_replaying_gives_the_same_effects() -> None:
    assert busy_driver()[1] == busy_driver()[1]


def test_all_is_well() -> None:
    assert wrong(busy_driver()[0]) == ""


def used(d: GroupDriver) -> None:
    d.state.ledger.quota.account(NFS).used += 1


def reserved(d: GroupDriver) -> None:
    d.state.ledger.quota.account(NFS).reserved -= 10


def pending(d: GroupDriver) -> None:
    d.state.ledger.quota.account(NFS).pending = 0


def key_count(d: GroupDriver) -> None:
    d.state.ledger.instances["i"].key_count += 1


def lost_key(d: GroupDriver) -> None:
    del d.state.ledger.instances["i"].writing[5]


def strange_key(d: GroupDriver) -> None:
    writing = d.state.ledger.instances["i"].writing
    writing[6] = writing[5]


def leaked_slot(d: GroupDriver) -> None:
    (allocator,) = d.state.ledger.instances["i"].segments.allocators()
    allocator.allocate(1)


def shared_slot(d: GroupDriver) -> None:
    served = d.index.instances["i"].served
    served[3] = served[4]


def lost_trash(d: GroupDriver) -> None:
    d.state.ledger.trash.records.popitem()


def serving_and_writing(d: GroupDriver) -> None:
    served = d.index.instances["i"].served
    served[5] = served.pop(3)


def no_such_slot(d: GroupDriver) -> None:
    d.index.instances["i"].served[3] = (1, 10**6, 1)


def miscounted(d: GroupDriver) -> None:
    (allocator,) = d.state.ledger.instances["i"].segments.allocators()
    allocator.free_total -= 1


def orphans(d: GroupDriver) -> None:
    d.state.ledger.instances.clear()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (used, "quota says"),
        (reserved, "quota says"),
        (pending, "quota says"),
        (key_count, "key_count 3, 2 are SERVING"),
        (lost_key, "writing is"),
        (strange_key, "writing is"),
        (leaked_slot, "is lost"),
        (shared_slot, "has 2 owners"),
        (lost_trash, "is lost"),
        (serving_and_writing, "key 5 is WRITING and SERVING"),
        (no_such_slot, "does not exist"),
        (miscounted, "free_total is"),
        (orphans, "is not open but has sessions or trash"),
    ],
)
def test_damage_is_found(damage: Callable[[GroupDriver], None], sentence: str) -> None:
    d, _ = busy_driver()
    damage(d)
    assert sentence in wrong(d)
