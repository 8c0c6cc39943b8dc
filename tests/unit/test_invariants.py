"""`invariants.check` finds what is wrong, and replaying events gives the same effects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvcm_ray.core.blocks import Ids
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
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import BLOCK, two_tiers

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
    return "\n".join(check(d.state, d.index.held()))


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


# ------------------------------------------------------------------------- of blocks and what holds them


def tiered_driver() -> GroupDriver:
    """Blocks in two tiers, some with a copy, one pinned, some being moved."""
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
    d.settle()
    d.touch("i", [0, 1])
    d.settle()
    d.pin("i", "p", [8])
    for key in (20, 21):
        d.write("i", [key])
    d.reclaim()
    assert d.index.instances["i"].copies
    assert d.state.ledger.moves.by_id
    return d


def ids(d: GroupDriver, key: int) -> Ids:
    table = d.state.ledger.table
    return np.flatnonzero((table.keys == key) & (table.instance >= 0))


def elsewhere(d: GroupDriver) -> None:
    d.state.ledger.table.places.slot[ids(d, 8)] += 1


def unmapped(d: GroupDriver) -> None:
    (at, *_) = d.state.ledger.table._at.values()
    at[np.flatnonzero(at >= 0)[0]] = -1


def mapped_twice(d: GroupDriver) -> None:
    at = next(at for at in d.state.ledger.table._at.values() if (at < 0).any())
    at[np.flatnonzero(at < 0)[0]] = 3


def other_type(d: GroupDriver) -> None:
    d.state.ledger.table.kind[ids(d, 8)] = NFS


def other_size(d: GroupDriver) -> None:
    d.state.ledger.table.nbytes[ids(d, 8)] += 1


def forgotten_copy(d: GroupDriver) -> None:
    key = next(iter(d.index.instances["i"].copies))
    d.state.ledger.table.copied[ids(d, key)] = False


def unqueued_copy(d: GroupDriver) -> None:
    d.state.ledger.copies[NFS].popitem()


def lost_pin(d: GroupDriver) -> None:
    d.index.instances["i"].pins.clear()


def unmarked_pin(d: GroupDriver) -> None:
    d.state.ledger.table.pinned[ids(d, 8)] = False


def pin_count(d: GroupDriver) -> None:
    d.state.ledger.instances["i"].pinned[8] += 1


def not_held(d: GroupDriver) -> None:
    d.state.ledger.order.release(ids(d, 8))


def wrong_lane(d: GroupDriver) -> None:
    d.state.ledger.order.move(ids(d, 8), d.state.ledger.instances["i"].lane(NFS))


def unmoved(d: GroupDriver) -> None:
    d.state.ledger.table.moving[:] = False


def lost_move(d: GroupDriver) -> None:
    d.state.ledger.moves.by_id.popitem()


def serving_bytes(d: GroupDriver) -> None:
    d.state.ledger.instances["i"].serving_bytes += BLOCK


def test_all_is_well_in_two_tiers() -> None:
    assert wrong(tiered_driver()) == ""


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (elsewhere, "blocks differ: 8:"),
        (unmapped, "not found by their places"),
        (mapped_twice, "are mapped wrongly"),
        (other_type, "bytes or types of blocks are not those of their slots"),
        (other_size, "bytes or types of blocks are not those of their slots"),
        (forgotten_copy, "copies differ"),
        (unqueued_copy, "queues of copies are"),
        (lost_pin, "pins are"),
        (unmarked_pin, "are marked as pinned"),
        (pin_count, "pinned keys are"),
        (not_held, "are held [0] times"),
        (wrong_lane, "other blocks or lanes than the table"),
        (unmoved, "are marked as moving"),
        (lost_move, "moves are"),
        (serving_bytes, "the blocks make"),
    ],
)
def test_damage_of_tables_is_found(damage: Callable[[GroupDriver], None], sentence: str) -> None:
    d = tiered_driver()
    damage(d)
    assert sentence in wrong(d)
