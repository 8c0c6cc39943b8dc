"""Leases of readers and pins of operators: what keeps blocks, for how long, and how it is counted."""

from __future__ import annotations

from typing import Any

import pytest

from kvcm_ray.core import effects as fx
from kvcm_ray.core import limits
from kvcm_ray.core.events import Want
from kvcm_ray.core.requests import Leased, Pinned
from kvcm_ray.errors import InstanceNotFound, InvalidArgument, LimitReached, NotFound
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import BLOCK, driver, tier_of, two_tiers

ALL = [Want("i", 1_000 * BLOCK, 1_000)]


def all_goes(d: GroupDriver) -> list[int]:
    """What is left after making as much room as can be made."""
    d.settle(ALL)
    return d.served("i")


def report(d: GroupDriver) -> dict[str, Any]:
    return d.state.capacity(d.now_ms, d.now_s)


# ------------------------------------------------------------------------------------------- leases


def test_leased_blocks_stay_until_the_lease_ends() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3])
    d.write("i", [7])
    assert d.lease("i", [1, 2, 99], 1_000) == Leased(2, 1_000)
    assert all_goes(d) == [1, 2]
    d.now_ms += 999
    assert all_goes(d) == [1, 2]
    d.now_ms += 1
    assert all_goes(d) == []


def test_a_lease_of_the_last_block_keeps_the_blocks_before_it() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3, 4])
    d.lease("i", [3], 1_000)
    assert all_goes(d) == [1, 2, 3]


def test_a_longer_lease_stays() -> None:
    d = driver(20)
    d.write("i", [1])
    d.lease("i", [1], 5_000)
    d.lease("i", [1], 1_000)
    d.now_ms += 4_999
    assert all_goes(d) == [1]
    d.now_ms += 1
    assert all_goes(d) == []


def test_a_lease_ends_with_a_restart_of_the_group() -> None:
    d = driver(20)
    d.write("i", [1])
    d.lease("i", [1], 5_000)
    d.restart()
    assert all_goes(d) == []


@pytest.mark.parametrize("lease_ms", [0, -1, limits.LEASE_MAX_MS + 1])
def test_leases_are_bounded(lease_ms: int) -> None:
    d = driver(20)
    d.write("i", [1])
    with pytest.raises(InvalidArgument, match="lease_ms"):
        d.lease("i", [1], lease_ms)


def test_leases_are_counted_until_they_end() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3])
    d.lease("i", [1, 2], 1_000)
    assert (report(d)["leased_bytes"], report(d)["reclaimable_bytes"]) == (2 * BLOCK, BLOCK)
    d.now_ms += 1_000
    assert (report(d)["leased_bytes"], report(d)["reclaimable_bytes"]) == (0, 3 * BLOCK)


def test_a_leased_block_that_is_removed_is_erased_after_the_lease() -> None:
    d = driver(20)
    d.write("i", [1, 2])
    d.lease("i", [1], 5_000)
    d.remove("i", [1, 2])
    assert d.served("i") == []
    assert d.collect() == []
    d.now_ms += 5_000
    assert len(d.collect()) == 1


def test_a_leased_block_may_be_demoted_but_its_old_place_stays_as_long() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
        d.lease("i", [key], 5_000)
    d.settle()
    moved = [key for key, at in tier_of(d).items() if at == "nfs"]
    if moved:  # whether they are moved meanwhile is the core's choice
        assert d.usage()["pending_delete_bytes"] == len(moved) * BLOCK
    d.now_ms += 5_000
    d.settle()
    assert sorted(tier_of(d).values()).count("shm") == 5
    assert d.usage()["pending_delete_bytes"] == 0


def test_leased_blocks_do_not_expire() -> None:
    d = driver(20, ttl_s=10)
    d.write("i", [1])
    d.lease("i", [1], 15_000)
    d.now_ms += 14_999
    d.settle()
    assert d.served("i") == [1]
    d.now_ms += 10_000
    d.settle()
    assert d.served("i") == []


# --------------------------------------------------------------------------------------------- pins


def test_pinned_blocks_are_never_reclaimed() -> None:
    d = driver(20, ttl_s=10)
    d.write("i", [1, 2, 3])
    assert d.pin("i", "prompt", [1, 2, 50]) == Pinned(3, 2)
    (effect,) = d.effects
    assert isinstance(effect, fx.PutPin)
    assert all_goes(d) == [1, 2]
    d.now_ms += 1_000_000
    assert all_goes(d) == [1, 2]


def test_a_pin_of_the_last_block_keeps_the_blocks_before_it() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3, 4])
    d.pin("i", "p", [3])
    assert all_goes(d) == [1, 2, 3]


def test_a_pin_may_come_before_its_blocks() -> None:
    d = driver(20)
    assert d.pin("i", "p", [1, 2]) == Pinned(2, 0)
    d.write("i", [1, 2, 3])
    assert all_goes(d) == [1, 2]
    d.remove("i", [2])
    d.write("i", [1, 2, 3])
    assert all_goes(d) == [1, 2], "and stays for what comes after them"


def test_pins_survive_a_restart() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3])
    d.pin("i", "p", [1, 9])
    d.restart()
    d.write("i", [9])
    assert all_goes(d) == [1, 9]


def test_unpinned_blocks_go_like_others() -> None:
    d = driver(20)
    d.write("i", [1, 2])
    d.pin("i", "p", [1, 2])
    assert d.unpin("i", "p") == Pinned(0, 0)
    assert all_goes(d) == []
    with pytest.raises(NotFound, match="no pin 'p'"):
        d.unpin("i", "p")


def test_a_block_with_two_pins_is_free_after_both_are_gone() -> None:
    d = driver(20)
    d.write("i", [1, 2])
    d.pin("i", "p", [1, 2])
    d.pin("i", "q", [1])
    d.unpin("i", "p")
    assert all_goes(d) == [1]
    d.unpin("i", "q")
    assert all_goes(d) == []


def test_pinning_again_replaces_what_was_pinned() -> None:
    d = driver(20)
    d.write("i", [1])
    d.write("i", [2])
    d.pin("i", "p", [1])
    d.pin("i", "p", [2, 2])
    assert all_goes(d) == [2]
    d.restart()
    assert all_goes(d) == [2]


def test_pins_end_when_they_say_so() -> None:
    d = driver(20)
    d.write("i", [1])
    d.pin("i", "p", [1], until_s=d.now_s + 10)
    d.settle()
    d.now_ms += 9_000
    d.settle()
    assert d.served("i") == [1]
    d.now_ms += 2_000
    due = d.state.next_reclaim_ms(d.now_ms)
    assert due is not None, "somebody has to look at the clock"
    assert due <= d.now_ms
    d.settle()
    assert report(d)["pins"] == []
    assert all_goes(d) == []


@pytest.mark.parametrize(
    ("name", "keys"), [("", [1]), ("ä" * 101, [1]), ("p", []), ("p", range(limits.PINNED_KEYS_MAX + 1))]
)
def test_pins_have_names_and_some_keys(name: str, keys: list[int]) -> None:
    d = driver(20)
    with pytest.raises(InvalidArgument):
        d.pin("i", name, keys)


def test_pins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PINS_PER_INSTANCE_MAX", 2)
    d = driver(20)
    d.pin("i", "p", [1])
    d.pin("i", "q", [1])
    with pytest.raises(LimitReached):
        d.pin("i", "r", [1])
    d.pin("i", "q", [2])


def test_pins_are_of_one_instance() -> None:
    d = driver(20, "i", "j")
    d.write("i", [1])
    d.write("j", [1])
    d.pin("i", "p", [1])
    d.settle(ALL)
    assert (d.served("i"), d.served("j")) == ([1], [])
    with pytest.raises(InstanceNotFound):
        d.state.pinned_keys("x", "p")


def test_pins_are_reported() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3])
    d.pin("i", "p", [1, 2, 9], until_s=10**6)
    assert report(d)["pinned_bytes"] == 2 * BLOCK
    assert report(d)["pins"] == [
        {"instance_id": "i", "name": "p", "keys": 3, "blocks": 2, "bytes": 2 * BLOCK, "until_s": 10**6}
    ]


def test_a_block_that_is_pinned_and_leased_is_counted_once_as_not_reclaimable() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3])
    d.pin("i", "p", [1])
    d.lease("i", [1, 2], 1_000)
    assert report(d)["reclaimable_bytes"] == BLOCK
    assert d.settle([Want("i", 18 * BLOCK, 18)]) > 0
    assert d.served("i") == [1, 2]


def test_a_pinned_block_can_be_removed() -> None:
    d = driver(20)
    d.write("i", [1, 2])
    d.pin("i", "p", [1, 2])
    d.remove("i", [2])
    d.settle()
    assert d.served("i") == [1]
    assert report(d)["pinned_bytes"] == BLOCK


def test_pinned_blocks_stay_in_their_tier() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
    d.pin("i", "p", [0, 1])
    d.settle()
    at = tier_of(d)
    assert (at[0], at[1]) == ("shm", "shm")
    assert sorted(at.values()).count("nfs") == 4


def test_pinning_a_block_that_is_being_moved_and_unpinning_it_meanwhile() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
    d.reclaim()
    (record,) = d.state.due_moves()
    d.pin("i", "p", record.keys.tolist()[:2])
    d.moved(record)
    d.unpin("i", "p")
    assert all_goes(d) == []
