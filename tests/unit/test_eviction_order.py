"""The order of eviction by example: literal orders, holds, leases, restarts, cost at a million blocks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kvcm_ray.core.eviction import EvictionOrder, make_policy


def run(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int64)


def chain(start: int, n: int) -> np.ndarray:
    return np.arange(start, start + n)


@pytest.fixture
def order() -> EvictionOrder:
    return EvictionOrder(make_policy("lru"))


def add(order: EvictionOrder, blocks: np.ndarray, now: int = 0, lane: int = 0, **options: int) -> None:
    order.add(lane, blocks, blocks * 7, now, **options)


def leave(order: EvictionOrder, blocks: np.ndarray) -> None:
    order.remove(blocks, blocks * 7, evicted=True)


def all_of(order: EvictionOrder, *lanes: int, now: int = 0, leaves_only: bool = True) -> list[int]:
    return order.victims(lanes or (0,), 1000, now, leaves_only=leaves_only).tolist()


def test_leaves_leave_first_and_the_oldest_chain_before_others(order: EvictionOrder) -> None:
    add(order, chain(0, 3))
    add(order, chain(3, 3))
    order.touch(run(0), run(0), 1)  # only the root of the first
    assert all_of(order) == [2, 1, 5, 4, 3, 0]
    assert order.victims([0], 4, 0).tolist() == [2, 1, 5, 4]
    assert all_of(order) == [2, 1, 5, 4, 3, 0], "asking changes nothing"


def test_a_root_older_than_its_leaves_still_leaves_last(order: EvictionOrder) -> None:
    for block in range(5):  # root first, one at a time: the worst order
        add(order, run(block), parent=block - 1)
    assert all_of(order) == [4, 3, 2, 1, 0]
    assert all_of(order) == [4, 3, 2, 1, 0]


def test_partial_last_block_goes_first_until_it_is_used_again(order: EvictionOrder) -> None:
    add(order, chain(0, 2))
    add(order, chain(2, 2), partial=True)
    assert all_of(order) == [3, 1, 0, 2]
    order.touch(chain(2, 2), chain(2, 2), 1)
    assert all_of(order) == [1, 0, 3, 2]


def test_branches_leave_before_the_shared_prefix(order: EvictionOrder) -> None:
    add(order, chain(0, 2))
    add(order, run(10, 11), parent=1)
    add(order, run(20), parent=1)
    assert all_of(order) == [11, 10, 20, 1, 0]
    leave(order, run(11, 10))
    assert all_of(order) == [20, 1, 0]


def test_held_blocks_and_what_leads_to_them_stay(order: EvictionOrder) -> None:
    add(order, chain(0, 3))
    order.hold(run(1))
    order.hold(run(1))
    assert all_of(order) == [2]
    assert all_of(order, leaves_only=False) == [2, 0]
    order.release(run(1))
    assert all_of(order) == [2]
    order.release(run(1))
    assert all_of(order) == [2, 1, 0]


def test_a_held_block_that_is_touched_stays_out(order: EvictionOrder) -> None:
    add(order, run(0))
    order.hold(run(0))
    order.touch(run(0), run(0), 9)
    assert all_of(order) == []
    assert order.touched_ms(run(0)).tolist() == [9]
    assert order.coldest_ms([0]) is None
    order.release(run(0))
    assert all_of(order) == [0]
    assert order.coldest_ms([0]) == 9


def test_leased_blocks_are_no_victims_until_then(order: EvictionOrder) -> None:
    add(order, run(0))
    add(order, run(1))
    order.lease(run(0), 50)
    order.lease(run(0), 20)
    assert order.leased_until(run(0, 1)).tolist() == [50, 0]
    assert all_of(order, now=49) == [1]
    assert sorted(all_of(order, now=50)) == [0, 1]


def test_a_lease_ends_with_the_block(order: EvictionOrder) -> None:
    add(order, run(0))
    order.lease(run(0), 50)
    leave(order, run(0))
    add(order, run(0))
    assert order.leased_until(run(0)).tolist() == [0]
    assert all_of(order) == [0]


def test_a_hold_ends_with_the_block(order: EvictionOrder) -> None:
    add(order, run(0))
    order.hold(run(0))
    leave(order, run(0))
    with pytest.raises(AssertionError):
        order.release(run(0))
    add(order, run(0))
    assert all_of(order) == [0]


def test_a_touch_that_was_counted_before_changes_recency_only() -> None:
    order = EvictionOrder(make_policy("lfu"))
    add(order, run(0))
    add(order, run(1))
    order.touch(run(0), run(0), 1, used=False)
    assert all_of(order) == [1, 0]
    order.touch(run(1), run(7), 1)
    assert all_of(order) == [0, 1]


def test_an_id_used_again_is_not_taken_for_the_old_parent(order: EvictionOrder) -> None:
    add(order, chain(0, 2))
    order.remove(run(0), run(0), evicted=False)  # block 1 has no parent now
    add(order, run(0), now=1)
    order.touch(run(1), run(7), 2)
    assert all_of(order) == [0, 1]
    order.touch(run(0, 1), run(0, 7), 3)  # they are seen together: a chain again
    order.touch(run(1), run(7), 4)
    assert all_of(order) == [1, 0]


def test_touching_in_a_circle_makes_none(order: EvictionOrder) -> None:
    for block in range(3):
        add(order, run(block))
    for a, b in ((0, 1), (1, 2), (2, 0), (1, 0)):
        order.touch(run(a, b), run(a, b) * 7, 1)
    assert sorted(all_of(order)) == [0, 1, 2]


def test_a_restored_circle_is_cut(order: EvictionOrder) -> None:
    order.restore(0, run(0, 1, 2), run(0, 1, 2), run(2, 0, 1), run(5, 5, 5))
    order.restore(0, run(3), run(3), run(2), run(5))
    found = all_of(order)
    assert sorted(found) == [0, 1, 2, 3]
    assert found.index(3) < found.index(2)


def test_move_takes_blocks_to_the_tail_of_another_lane(order: EvictionOrder) -> None:
    add(order, chain(0, 4), now=3)
    add(order, run(9), lane=1, now=4)
    order.move(run(2, 3), 1)
    assert (order.count([0]), order.count([1]), order.count([0, 1])) == (2, 3, 5)
    assert all_of(order, 1) == [9, 3, 2]
    assert all_of(order, 0) == [], "their children are in the other lane"
    assert all_of(order, 0, leaves_only=False) == [1, 0]
    assert order.touched_ms(run(2)).tolist() == [3]


def test_expired_stops_at_the_first_young_block(order: EvictionOrder) -> None:
    add(order, chain(0, 2), now=10)
    add(order, chain(2, 2), now=20, lane=1)
    add(order, chain(4, 2), now=30)
    assert order.expired([0, 1], 30, 100, 40).tolist() == [1, 0, 3, 2]
    assert order.expired([0, 1], 20, 100, 40).tolist() == [1, 0]
    assert order.expired([0, 1], 30, 3, 40).tolist() == [1, 0, 3]
    assert order.expired([0, 1], 10, 100, 40).tolist() == []
    assert order.coldest_ms([0, 1]) == 10


def test_restored_blocks_are_in_order_of_their_times_whatever_the_calls(order: EvictionOrder) -> None:
    order.restore(1, run(2, 1), run(2, 1), run(1, 0), run(10, 20))
    order.restore(0, run(0, 5), run(0, 5), run(-1, -1), run(20, 15))
    assert order.coldest_ms([0, 1]) == 10
    assert all_of(order, 0, 1) == [2, 5, 1, 0]


def test_links_to_a_parent_that_was_never_restored_end_when_its_id_is_used(order: EvictionOrder) -> None:
    order.restore(0, run(1), run(1), run(0), run(10))
    add(order, run(0), now=20)
    order.touch(run(1), run(1), 30)
    assert all_of(order) == [0, 1]
    leave(order, run(1))
    add(order, run(5), parent=0)
    assert all_of(order) == [5, 0], "the child of another was not counted as its own"


def test_an_id_that_is_restored_twice_is_another_block_the_second_time(order: EvictionOrder) -> None:
    order.restore(0, run(0, 1), run(0, 1), run(-1, 0), run(10, 20))
    order.remove(run(0), run(0), evicted=False)
    order.restore(0, run(0), run(0), run(-1), run(15))
    assert all_of(order) == [0, 1]
    leave(order, run(1))
    add(order, run(5), parent=0)
    assert all_of(order) == [5, 0]


def test_a_change_of_policy_keeps_recency(order: EvictionOrder) -> None:
    for block in (3, 1, 2):
        add(order, run(block))
    order.hold(run(1))
    for name in ("lfu", "adaptive", "ttl", "lru"):
        order.use(make_policy(name))
        assert all_of(order) == [3, 2]
    order.release(run(1))
    assert all_of(order) == [3, 2, 1]


def test_many_queues_are_merged_by_recency(order: EvictionOrder) -> None:
    lanes = np.random.default_rng(3).integers(0, 40, 3000).tolist()
    for block, lane in enumerate(lanes):
        add(order, run(block), lane=lane)
    assert order.victims(range(40), 3000, 0).tolist() == list(range(3000))
    assert order.victims(range(40), 100, 0).tolist() == list(range(100))
    expected = [block for block, lane in enumerate(lanes) if lane in (3, 17)]
    assert order.victims([17, 3], 3000, 0).tolist() == expected


def test_mistakes_are_refused(order: EvictionOrder) -> None:
    add(order, run(0))
    with pytest.raises(AssertionError):
        add(order, run(0))
    with pytest.raises(AssertionError):
        order.touch(run(0, 1), run(0, 7), 1)
    with pytest.raises(AssertionError):
        order.release(run(0))
    with pytest.raises(AssertionError):
        add(order, run(1 << 40))


def test_memory_is_bounded_by_what_is_resident(order: EvictionOrder) -> None:
    blocks = chain(0, 100)
    add(order, blocks)
    for now in range(2000):
        order.touch(blocks, blocks, now)
    rings = [ring for lane in order._rings.values() for ring in lane.values()]
    assert sum(len(ring.blocks) for ring in rings) <= 500


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_cost_at_a_million_blocks(policy: str) -> None:
    """At most a microsecond a victim on an idle machine; the bound here allows for a busy one."""
    order = EvictionOrder(make_policy(policy))
    blocks = np.arange(1_000_000)
    keys = np.random.default_rng(1).integers(-(2**62), 2**62, len(blocks))
    for start in range(0, len(blocks), 125):
        order.add(start // 125 % 2, blocks[start : start + 125], keys[start : start + 125], start)
    for start in np.random.default_rng(2).integers(0, 8000, 4000).tolist():
        part = slice(start * 125, start * 125 + 100)
        order.touch(blocks[part], keys[part], 1_000_000)
    costs = []
    for count in (64, 256, 4096):
        spent, found = 0.0, 0
        for _ in range(20):
            begin = time.thread_time()
            victims = order.victims([0, 1], count, 1_000_000)
            spent += time.thread_time() - begin
            found += len(victims)
            order.remove(victims, keys[victims], evicted=True)
        assert found == 20 * count
        costs.append(spent / found * 1e6)
    print(f"{policy}: us a victim, 64, 256, 4096 at once:", ", ".join(f"{cost:.2f}" for cost in costs))
    assert costs[0] < 10
    assert max(costs[1:]) < 5


def test_a_call_ends_soon_where_everything_is_leased(order: EvictionOrder) -> None:
    blocks = np.arange(200_000)
    for start in range(0, len(blocks), 100):
        add(order, blocks[start : start + 100])
    order.lease(blocks[:-100], 50)
    calls = 0
    while not len(victims := order.victims([0], 10, 49)):
        calls += 1
        assert calls < 10, "each call goes on where the last one stopped"
    assert calls > 0
    assert victims.tolist() == list(range(199_999, 199_989, -1))
