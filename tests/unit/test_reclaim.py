"""Making room in one tier: who waits, who goes, how far, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvcm_ray.core import effects as fx
from kvcm_ray.core.events import Want
from kvcm_ray.core.limits import RECLAIM_STEP_BLOCKS
from kvcm_ray.core.model import ReclaimPolicy, StorageConfig
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.errors import KeyLimitReached, KvcmError, QuotaExceeded
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import BLOCK, STORAGES, driver, group_of


def refused(d: GroupDriver, keys: Sequence[int], instance_id: str = "i", **how: int) -> KvcmError:
    """The refusal of a write."""
    with pytest.raises((QuotaExceeded, KeyLimitReached)) as caught:
        d.start(instance_id, keys, "r" * 32, **how)
    return caught.value


def want(d: GroupDriver, keys: Sequence[int], instance_id: str = "i") -> Want:
    """What a refused write waits for."""
    found = want_of(instance_id, refused(d, keys, instance_id))
    assert found is not None
    return found


def dropped(d: GroupDriver) -> list[int]:
    """Keys that the last event dropped, in order."""
    return [k for e in d.effects if isinstance(e, fx.DropBlocks) for k in e.keys.tolist()]


def due_now(d: GroupDriver) -> bool:
    due = d.state.next_reclaim_ms(d.now_ms)
    return due is not None and due <= d.now_ms


def idle(d: GroupDriver) -> bool:
    """A step finds nothing to do, and knows that another one would not either."""
    return d.reclaim() == [] and not due_now(d)


# ---------------------------------------------------------------------------- writes that do not fit


def test_a_write_that_does_not_fit_is_told_what_holds_the_quota() -> None:
    d = driver(4)
    d.write("i", [1, 2, 3])
    d.pin("i", "p", [1])
    d.lease("i", [1, 2], 1_000)
    error = refused(d, [7, 8])
    told = {name: error.details[name] for name in ("quota", "asked", "asked_blocks", "pinned", "leased")}
    assert told == {
        "quota": "total", "asked": 2 * BLOCK, "asked_blocks": 2, "pinned": BLOCK, "leased": BLOCK,
    }  # fmt: skip
    assert error.details["reclaimable"] == BLOCK


def test_a_start_evicts_nothing() -> None:
    d = driver(2)
    d.write("i", [1, 2])
    refused(d, [3])
    assert d.served("i") == [1, 2]
    assert idle(d), "on demand only"
    assert d.served("i") == [1, 2]


def test_room_is_made_for_a_waiting_write() -> None:
    d = driver(4)
    d.write("i", [1, 2, 3, 4])
    asked = want(d, [7, 8])
    assert (asked.instance_id, asked.nbytes, asked.blocks) == ("i", 2 * BLOCK, 2)
    d.reclaim([asked])
    assert dropped(d) == [4, 3], "leaves first, and no more than asked"
    refused(d, [7, 8])  # their bytes are still there
    d.collect()
    assert d.write("i", [7, 8]).storage == "nfs"
    assert d.served("i") == [1, 2, 7, 8]


def test_a_step_that_waits_for_the_erasers_does_nothing_more() -> None:
    d = driver(4)
    d.write("i", [1, 2, 3, 4])
    asked = want(d, [7, 8])
    d.reclaim([asked])
    assert d.reclaim([asked]) == []


def test_waiting_writes_get_room_together() -> None:
    d = driver(6, "i", "j")
    d.write("i", [1, 2, 3])
    d.write("j", [1, 2, 3])
    d.touch("j", [1, 2, 3])
    wants = [want(d, [7]), want(d, [8, 9], "j")]
    d.settle(wants)
    assert (d.served("i"), d.served("j")) == ([], [1, 2, 3])
    d.start("i", [7], "1" * 32)
    d.start("j", [8, 9], "2" * 32)


def test_nobody_overtakes_a_waiting_write() -> None:
    d = driver(4)
    d.write("i", [1, 2])
    asked = want(d, [5, 6, 7])
    refused(d, [8], ahead_bytes=asked.nbytes)
    d.start("i", [8], "8" * 32)


def test_what_is_larger_than_the_quota_need_not_wait() -> None:
    d = driver(4)
    d.write("i", [1, 2])
    assert want_of("i", refused(d, [3, 4, 5, 6, 7])) is None
    assert want_of("i", refused(d, [1, 2, 3, 4, 5])) is None, "it would take what it has itself"
    assert want_of("i", refused(d, [1, 3, 4, 5])) is not None


@pytest.mark.parametrize("hold", ["pin", "lease"])
def test_waiting_for_what_is_held_is_in_vain(hold: str) -> None:
    d = driver(2)
    d.write("i", [1, 2])
    if hold == "pin":
        d.pin("i", "p", [1, 2])
        error = refused(d, [3])
        assert (error.details["reclaimable"], error.details["pinned"]) == (0, 2 * BLOCK)
        assert want_of("i", error) is None
    else:
        d.lease("i", [1, 2], 1_000)
        assert refused(d, [3]).details["leased"] == 2 * BLOCK
    assert d.reclaim([Want("i", BLOCK, 1)]) == []
    assert d.served("i") == [1, 2]


def test_refusals_of_other_kinds_are_not_waited_for() -> None:
    d = driver(2)
    with pytest.raises(KvcmError) as caught:
        d.start("i", [1], "not a session id")
    assert want_of("i", caught.value) is None


# ------------------------------------------------------------------------------------ who goes first


def test_the_coldest_go_first_and_prefixes_stay_whole() -> None:
    d = driver(6)
    d.write("i", [1, 2, 3])
    d.write("i", [1, 2, 4, 5])  # two chains that share a beginning
    d.touch("i", [1, 2, 3])
    gone = []
    for blocks in (1, 2, 3, 4, 5):
        d.settle([want(d, range(100, 101 + blocks))])
        gone.append(d.served("i"))
    assert gone == [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1], []]


def test_a_partial_last_block_goes_before_colder_ones() -> None:
    d = driver(4)
    d.write("i", [1, 2])
    d.write("i", [7, 8], partial_tail=True)
    d.settle([want(d, [9])])
    assert d.served("i") == [1, 2, 7]


def test_a_partial_last_block_that_was_hit_is_like_any_other() -> None:
    d = driver(4)
    d.write("i", [7, 8], partial_tail=True)
    d.write("i", [1, 2])
    d.touch("i", [7, 8])
    d.settle([want(d, [9])])
    assert d.served("i") == [1, 7, 8]


def test_the_end_of_a_write_that_another_one_follows_is_no_leaf() -> None:
    d = driver(4)
    d.write("i", [1, 2])
    d.write("i", [1, 2, 3])  # 3 hangs on 2
    d.write("i", [9])
    d.settle([want(d, [10])])
    assert d.served("i") == [1, 2, 9]


def test_lfu_keeps_what_is_used_often() -> None:
    d = driver(4, policy=ReclaimPolicy.POLICY_LFU)
    d.write("i", [1, 2])
    for _ in range(5):
        d.touch("i", [1, 2])
    d.write("i", [3, 4])
    d.settle([want(d, [9])])
    assert d.served("i") == [1, 2, 3]


@pytest.mark.parametrize("policy", list(ReclaimPolicy))
def test_every_policy_makes_room_and_survives_a_restart(policy: ReclaimPolicy) -> None:
    d = driver(8, policy=policy)
    d.write("i", [1, 2, 3, 4])
    d.write("i", [1, 2, 5, 6])
    d.touch("i", [1, 2, 3])
    d.restart()
    d.settle([want(d, range(10, 15))])
    assert len(d.served("i")) == 3
    assert d.served("i")[:2] == [1, 2]


# ------------------------------------------------------------------------------------------ water marks


def fill(d: GroupDriver, blocks: int) -> None:
    """One block a write, so that any of them may go."""
    for key in range(blocks):
        d.write("i", [key])


@pytest.mark.parametrize(
    ("marks", "left"),
    [
        ({"high": 0.8, "low": 0.5}, 10),
        ({"high": 0.8}, 15),  # 0.05 below
        ({"used_bytes": 12 * BLOCK, "high": 1.0, "low": 0.5}, 6),  # the low mark in proportion
        ({"max_keys": 20, "high": 0.8, "low": 0.3}, 6),
    ],
    ids=["bytes", "no low mark", "used_size", "keys"],
)
def test_above_the_high_mark_reclaiming_goes_down_to_the_low_one(marks: dict[str, float], left: int) -> None:
    d = driver(20, **marks)
    high = 12 if "used_bytes" in marks else 16
    fill(d, high)
    assert idle(d), "not above it"
    d.write("i", [high])
    assert due_now(d)
    d.settle()
    assert d.served("i") == list(range(high + 1 - left, high + 1))
    assert idle(d)


def test_a_type_has_marks_of_its_own() -> None:
    d = driver(100, nfs=10, high=0.8, low=0.5)
    fill(d, 9)
    d.settle()
    assert d.served("i") == [4, 5, 6, 7, 8]


def test_keys_are_counted_for_each_instance() -> None:
    d = driver(100, "i", "j", max_keys=10, high=0.8, low=0.5)
    fill(d, 9)
    d.write("j", range(8))
    d.settle()
    assert (len(d.served("i")), len(d.served("j"))) == (5, 8)


def test_a_write_waits_for_keys_too() -> None:
    d = driver(100, max_keys=3)
    d.write("i", [1, 2, 3])
    asked = want(d, [4, 5])
    assert asked.blocks == 2
    assert want_of("i", refused(d, [1, 2, 3, 4])) is None, "it would take what it has itself"
    d.reclaim([asked])
    d.start("i", [4, 5], "4" * 32)  # keys are free before their bytes are
    assert d.served("i") == [1]


def test_what_waits_for_deletion_is_not_reclaimed_twice() -> None:
    d = driver(20, high=0.8, low=0.5, delay_ms=60_000)
    fill(d, 17)
    while due_now(d):
        d.reclaim()
    assert len(d.served("i")) == 10
    assert d.usage()["used_bytes"] == 17 * BLOCK
    d.now_ms += 60_000
    d.collect()
    assert d.usage()["used_bytes"] == 10 * BLOCK


# ------------------------------------------------------------------------------------- steps and times


@pytest.mark.parametrize(
    ("how", "most"), [({"step": 3}, 3), ({"step_percent": 10}, 4), ({"step": 50, "step_percent": 5}, 2)]
)
def test_steps_are_bounded(how: dict[str, int], most: int) -> None:
    d = driver(40, high=0.9, low=0.5, **how)
    fill(d, 40)
    sizes = []
    while due_now(d):
        d.reclaim()
        sizes.append(len(dropped(d)))
    assert max(sizes) == most
    assert sum(sizes) == 20


def test_a_large_reclaim_is_many_commits() -> None:
    blocks = 3 * RECLAIM_STEP_BLOCKS
    d = driver(blocks)
    d.write("i", range(blocks))
    asked = want(d, range(blocks, 2 * blocks))
    sizes = []
    while d.reclaim([asked]):
        sizes.append(len(dropped(d)))
    assert sizes == [RECLAIM_STEP_BLOCKS] * 3


def test_marks_are_looked_at_once_a_period() -> None:
    d = driver(20, high=0.8, low=0.5, period_s=10)
    fill(d, 17)
    d.settle()
    assert len(d.served("i")) == 10
    for key in range(20, 28):
        d.write("i", [key])
    due = d.state.next_reclaim_ms(d.now_ms)
    assert due == d.now_ms + 10_000
    d.now_ms += 9_900
    assert idle(d)
    d.now_ms += 100
    d.settle()
    assert len(d.served("i")) == 10


def test_a_waiting_write_does_not_wait_for_the_period() -> None:
    d = driver(20, high=1.0, low=0.5, period_s=1_000)
    fill(d, 10)
    d.settle()
    for key in range(20, 30):
        d.write("i", [key])
    d.reclaim([want(d, [99])])
    assert dropped(d)


def test_paused_nothing_is_evicted_or_erased() -> None:
    d = driver(20, high=0.8, low=0.5)
    fill(d, 18)
    d.remove("i", [0])
    d.state.paused = True
    assert d.state.next_reclaim_ms(d.now_ms) is None
    assert d.reclaim() == []
    assert d.collect() == []
    d.state.paused = False
    d.settle()
    assert len(d.served("i")) == 10
    assert d.usage()["used_bytes"] == 10 * BLOCK


def test_evicted_blocks_are_erased_after_the_readers_delay() -> None:
    d = driver(2, delay_ms=500)
    d.write("i", [1, 2])
    d.reclaim([want(d, [3])])
    assert d.collect() == []
    d.now_ms += 500
    assert len(d.collect()) == 1
    d.start("i", [3], "3" * 32)


# ---------------------------------------------------------------------------------------- time to live


@pytest.mark.parametrize("policy", [ReclaimPolicy.POLICY_TTL, ReclaimPolicy.POLICY_LRU])
def test_blocks_expire_unless_they_are_touched(policy: ReclaimPolicy) -> None:
    d = driver(20, policy=policy, ttl_s=10)
    d.write("i", [1, 2])
    d.write("i", [3, 4])
    d.now_ms += 6_000
    d.touch("i", [1, 2])
    d.now_ms += 3_999
    assert idle(d)
    assert d.served("i") == [1, 2, 3, 4]
    d.now_ms += 1
    assert due_now(d)
    d.settle()
    assert d.served("i") == [1, 2]
    d.now_ms += 6_000
    d.settle()
    assert d.served("i") == []
    assert idle(d)


def test_the_ttl_policy_has_a_default_of_an_hour() -> None:
    d = driver(20, policy=ReclaimPolicy.POLICY_TTL)
    d.write("i", [1])
    assert idle(d)
    assert d.state.next_reclaim_ms(d.now_ms) == d.now_ms + 3_600_000


# ------------------------------------------------------------------------------------ changes act at once


def test_a_smaller_quota_drains_to_the_new_mark() -> None:
    d = driver(20)
    fill(d, 20)
    d.configure(group_of(10, high=0.9, low=0.5))
    assert due_now(d)
    d.settle()
    assert d.served("i") == list(range(15, 20))


def test_a_smaller_quota_without_marks_drains_to_itself() -> None:
    d = driver(20)
    fill(d, 20)
    d.configure(group_of(10))
    d.settle()
    assert d.served("i") == list(range(10, 20))


def test_new_marks_act_at_once() -> None:
    d = driver(20, period_s=1_000)
    fill(d, 20)
    d.settle()
    d.configure(group_of(20, high=0.5, low=0.4, period_s=1_000))
    d.settle()
    assert len(d.served("i")) == 8


def test_a_new_policy_acts_at_once() -> None:
    d = driver(4)
    d.write("i", [1, 2])
    for _ in range(5):
        d.touch("i", [1, 2])
    d.write("i", [3, 4])
    d.touch("i", [3, 4])
    d.configure(group_of(4, policy=ReclaimPolicy.POLICY_LFU))
    d.touch("i", [1, 2])
    d.touch("i", [1, 2])
    d.settle([want(d, [9])])
    assert d.served("i") == [1, 2, 3]


def test_a_ttl_set_later_counts_from_the_last_touch() -> None:
    d = driver(20)
    d.write("i", [1])
    d.now_ms += 20_000
    d.write("i", [2])
    d.configure(group_of(20, ttl_s=10))
    assert due_now(d)
    d.settle()
    assert d.served("i") == [2]


def test_blocks_of_a_storage_that_is_registered_no_more_leave() -> None:
    d = driver(20, storages=("nfs", "shm"))
    d.write("i", [1, 2])
    d.configure(storages={"shm": STORAGES["shm"]})
    d.settle()
    assert d.served("i") == []
    assert d.usage()["used_bytes"] == 0


def test_disabled_storages_keep_their_blocks() -> None:
    d = driver(20)
    d.write("i", [1, 2])
    off: dict[str, StorageConfig] = {"nfs": replace(STORAGES["nfs"], is_available=False)}
    d.configure(storages=off)
    d.settle()
    assert d.served("i") == [1, 2]


# ------------------------------------------------------------------------------------------- restarts


def test_recency_over_a_restart_is_when_blocks_were_written() -> None:
    d = driver(6)
    d.write("i", [5, 6])
    d.now_ms += 5_000
    d.write("i", [1, 2])
    d.now_ms += 5_000
    d.write("i", [3, 4])
    d.restart()
    order = []
    for blocks in (1, 3, 5):
        d.settle([want(d, range(100, 100 + blocks))])
        order.append(d.served("i"))
    assert order == [[1, 2, 3, 4, 5], [1, 3, 4], [3]]


def test_what_happened_is_counted() -> None:
    d = driver(20, high=0.8, low=0.5, ttl_s=100)
    fill(d, 17)
    d.settle()
    assert d.state.usage()["reclaim"]["evicted_blocks"] == 7
    d.now_ms += 100_000
    d.settle()
    assert d.state.usage()["reclaim"]["expired_blocks"] == 10
