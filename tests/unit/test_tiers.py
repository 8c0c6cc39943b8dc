"""Two tiers: down instead of out, up on a hit, and copies in between."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcm_ray.core import effects as fx
from kvcm_ray.core import limits
from kvcm_ray.core.events import Want
from kvcm_ray.core.model import CachePreferStrategy, StorageConfig
from kvcm_ray.core.moves import FULL_STORAGE_MS
from kvcm_ray.core.records import SessionKind, SessionRecord
from kvcm_ray.core.session import LATE_WRITER_MS
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import BLOCK, SHM, STORAGES, driver, group_of, tier_of, two_tiers


def fill(d: GroupDriver, keys: range) -> None:
    for key in keys:
        d.write("i", [key])


def where(d: GroupDriver, storage: str) -> list[int]:
    return [key for key, at in tier_of(d).items() if at == storage]


def copies(d: GroupDriver) -> dict[int, str]:
    kept = d.index.instances["i"]
    return {key: kept.segments[place[0]].storage for key, place in sorted(kept.copies.items())}


def begun(d: GroupDriver) -> list[SessionRecord]:
    """Moves that wait for a reclaimer, after the steps that begin them."""
    while (due := d.state.next_reclaim_ms(d.now_ms)) is not None and due <= d.now_ms:
        if not d.reclaim():
            break
    return d.state.due_moves(1_000)


def on_both(d: GroupDriver, *keys: int) -> None:
    """Have blocks demoted and promoted, so that their slow place stays as a copy."""
    d.touch("i", list(keys))
    d.settle()
    assert set(copies(d)) >= set(keys)


# ------------------------------------------------------------------------------------------- down


def test_new_blocks_go_to_the_preferred_tier_that_has_room() -> None:
    d = two_tiers(30, shm=4)
    assert d.write("i", [1, 2, 3]).storage == "shm"
    assert d.write("i", [4, 5]).storage == "nfs"
    assert d.write("i", [6]).storage == "shm"


def test_above_its_mark_a_tier_gives_its_coldest_blocks_to_the_next() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(8))
    d.settle()
    assert where(d, "nfs") == []
    d.write("i", [8])
    d.settle()
    assert (where(d, "nfs"), where(d, "shm")) == ([0, 1, 2, 3], [4, 5, 6, 7, 8])
    assert d.served("i") == list(range(9)), "nothing is dropped"
    assert d.state.usage()["reclaim"]["demoted_blocks"] == 4
    usage = d.usage()
    assert usage["by_type"]["ST_TAIRMEMPOOL"]["used_bytes"] == 5 * BLOCK
    assert usage["by_type"]["ST_NFS"]["used_bytes"] == 4 * BLOCK


def test_an_upper_tier_has_marks_though_the_group_sets_none() -> None:
    d = two_tiers(400, shm=100)
    fill(d, range(96))
    d.settle()
    assert len(where(d, "shm")) == 90


def test_a_block_is_served_from_its_old_place_until_it_was_copied() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5, delay_ms=500)
    fill(d, range(9))
    before = dict(d.index.served()["i"])
    (record,) = begun(d)
    assert (record.kind, record.storage) == (SessionKind.MOVE, "nfs")
    assert d.index.served()["i"] == before
    usage = d.usage()
    assert (usage["reserved_bytes"], usage["used_bytes"]) == (4 * BLOCK, 9 * BLOCK)
    assert d.state.due_moves(10) == [], "each is handed out once"
    assert begun(d) == [], "what is being moved is as good as gone"
    d.moved(record)
    assert [type(e) for e in d.effects] == [fx.DropSession, fx.MoveBlocks, fx.PutTrash]
    assert where(d, "nfs") == [0, 1, 2, 3]
    assert d.collect() == [], "readers may be at the old place"
    d.now_ms += 500
    assert len(d.collect()) == 1


def test_chains_may_span_tiers_and_go_whole_in_the_end() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    d.write("i", list(range(9)))
    d.settle()
    assert where(d, "nfs") == [5, 6, 7, 8], "the end of the chain is the coldest"
    d.settle([Want("i", 39 * BLOCK, 39)])
    assert d.served("i") == [0]


def test_if_the_next_tier_is_full_its_coldest_blocks_are_dropped_for_it() -> None:
    d = two_tiers(20, shm=10, nfs=6, high=1.0, low=0.8)
    fill(d, range(10))
    d.configure(group_of(20, shm=10, nfs=6, storages=("shm", "nfs"), high=0.5, low=0.4))
    d.settle()
    assert len(where(d, "shm")) == 4
    assert where(d, "shm") == [6, 7, 8, 9]
    assert set(where(d, "nfs")) <= {3, 4, 5}, "the coldest ones went for the less cold ones"
    assert len(where(d, "nfs")) <= 3


def test_without_room_below_blocks_are_dropped() -> None:
    d = two_tiers(20, shm=10, nfs=0, high=0.8, low=0.5)
    fill(d, range(9))
    d.settle()
    assert (where(d, "shm"), where(d, "nfs")) == ([4, 5, 6, 7, 8], [])


def test_a_full_storage_is_not_asked_again_at_once() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(9))
    (record,) = begun(d)
    d.moved(record, [False] * 4)
    assert d.state.usage()["reclaim"]["failed_moves"] == 4
    assert where(d, "nfs") == []
    assert d.collect() == [], "the reclaimer may still be at it"
    d.now_ms += LATE_WRITER_MS
    assert len(d.collect()) == 1
    d.now_ms += FULL_STORAGE_MS
    d.settle()
    assert len(d.served("i")) in (5, 9)


def test_what_could_not_be_copied_stays_where_it_is() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(9))
    (record,) = begun(d)
    d.moved(record, [True, False, True, False])
    moved = [k for k, c in zip(record.keys.tolist(), [1, 0, 1, 0], strict=True) if c]
    assert where(d, "nfs") == sorted(moved)
    assert len(d.served("i")) == 9


def test_a_move_nobody_reports_expires() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(9))
    (record,) = begun(d)
    d.tick(limits.MOVE_LEASE_MS)
    assert d.usage()["reserved_bytes"] == 0
    d.moved(record)  # too late
    assert d.effects == []
    assert where(d, "nfs") == []
    d.now_ms += LATE_WRITER_MS
    d.settle()
    assert len(where(d, "nfs")) == 4


def test_a_block_removed_while_it_is_moved_stays_away() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(9))
    (record,) = begun(d)
    gone, again = record.keys.tolist()[:2]
    d.remove("i", [gone, again])
    d.write("i", [again])  # the same key, another block
    d.moved(record)
    assert gone not in d.served("i")
    assert tier_of(d)[again] == "shm"
    d.now_ms += LATE_WRITER_MS
    d.settle()
    assert d.usage()["used_bytes"] == 8 * BLOCK


def test_moves_survive_a_restart() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(9))
    (record,) = begun(d)
    d.restart()
    (again,) = d.state.due_moves(10)
    assert again.session_id == record.session_id
    d.moved(again)
    assert where(d, "nfs") == [0, 1, 2, 3]


def test_moves_are_of_a_bounded_size_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOVE_BLOCKS_MAX", 3)
    monkeypatch.setattr(limits, "MOVES_IN_FLIGHT_MAX", 4)
    d = two_tiers(200, shm=50, high=0.8, low=0.2)
    fill(d, range(41))
    records = begun(d)
    assert [len(r.keys) for r in records] == [3, 3, 3, 3]
    for record in records:
        d.moved(record)
    d.settle()
    assert len(where(d, "shm")) == 10


def test_blocks_of_several_sizes_move_in_sessions_of_their_own() -> None:
    from kvcm_ray.core.model import LocationSpecGroup
    from kvcm_ray.testing.small_groups import instance

    info = replace(instance("i"), location_spec_groups=(LocationSpecGroup("a", ("a",)),))
    d = GroupDriver(group_of(40, shm=10, storages=("shm", "nfs"), high=0.8, low=0.1), STORAGES, [info])
    d.start("i", [1, 2, 3, 4], "1" * 32, groups=["", "a", "", "a"])
    from kvcm_ray.core.mask import BlockMask

    d.finish("i", "1" * 32, BlockMask(offset=4))
    d.write("i", [5, 6, 7, 8, 9])
    d.write("i", [10])
    d.settle()
    assert set(where(d, "nfs")) >= {3, 4}


def test_a_tier_that_is_excluded_gets_no_demotions() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5, prefer=CachePreferStrategy.CPS_ALWAYS_TAIR_MEMPOOL)
    fill(d, range(9))
    d.settle()
    assert (where(d, "shm"), where(d, "nfs")) == ([4, 5, 6, 7, 8], [])


def test_a_preferred_tier_comes_first_whatever_the_order_of_candidates() -> None:
    d = driver(
        40,
        shm=10,
        storages=("nfs", "shm"),
        high=0.8,
        low=0.5,
        prefer=CachePreferStrategy.CPS_PREFER_TAIR_MEMPOOL,
    )
    fill(d, range(9))
    d.settle()
    assert (len(where(d, "shm")), len(where(d, "nfs"))) == (5, 4)


# ---------------------------------------------------------------------------------------------- up


def demoted() -> GroupDriver:
    """Blocks 0..3 are in the slow tier, 4..8 in the fast one."""
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    fill(d, range(9))
    d.settle()
    assert where(d, "nfs") == [0, 1, 2, 3]
    return d


def test_a_hit_in_a_slow_tier_promotes() -> None:
    d = demoted()
    d.touch("i", [0, 1])
    (record,) = begun(d)
    assert (record.kind, record.storage, sorted(record.keys.tolist())) == (
        SessionKind.PROMOTE, "shm", [0, 1],
    )  # fmt: skip
    d.moved(record)
    assert where(d, "nfs") == [2, 3]
    assert copies(d) == {0: "nfs", 1: "nfs"}, "the slow place stays while there is room"
    assert d.state.usage()["reclaim"]["promoted_blocks"] == 2
    assert d.usage()["used_bytes"] == 11 * BLOCK
    d.restart()
    assert copies(d) == {0: "nfs", 1: "nfs"}


def test_a_hit_in_the_fast_tier_promotes_nothing() -> None:
    d = demoted()
    d.touch("i", [4, 5])
    assert begun(d) == []


def test_promotions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcm_ray.core.group.PROMOTIONS_WAITING_MAX", 2)
    d = demoted()
    d.touch("i", [0, 1, 2, 3])
    assert len(d.state.ledger.plan.promotions) <= 2
    d.settle()
    assert len(copies(d)) <= 2


def test_steps_are_bounded_for_promotions_too() -> None:
    d = demoted()
    d.configure(group_of(40, shm=10, storages=("shm", "nfs"), high=0.8, low=0.5, step=2))
    d.touch("i", [0, 1, 2])
    d.reclaim()
    assert [len(record.keys) for record in d.state.due_moves()] == [2]


def test_a_demoted_block_with_a_copy_moves_for_free() -> None:
    d = demoted()
    on_both(d, 0, 1)
    for key in (4, 5, 6, 7, 8):
        d.touch("i", [key])
    fill(d, range(20, 22))  # 9 blocks in shm
    while due_step(d):
        assert not [e for e in d.effects if isinstance(e, fx.PutSession) and 0 in e.record.keys]
    d.settle()
    assert {0, 1} <= set(where(d, "nfs"))
    assert copies(d) == {}


def due_step(d: GroupDriver) -> bool:
    due = d.state.next_reclaim_ms(d.now_ms)
    return due is not None and due <= d.now_ms and bool(d.reclaim())


def test_under_pressure_copies_go_before_blocks() -> None:
    d = two_tiers(40, shm=10, nfs=10, high=0.8, low=0.5)
    fill(d, range(9))
    d.settle()
    on_both(d, 0, 1)
    served = d.served("i")
    d.settle([Want("i", 7 * BLOCK, 7)])  # one more than nfs has room for
    assert copies(d) == {1: "nfs"}
    d.settle([Want("i", 8 * BLOCK, 8)])
    assert copies(d) == {}
    assert d.served("i") == served


def test_no_copy_is_kept_where_there_is_no_room() -> None:
    d = two_tiers(20, shm=10, nfs=4, high=0.8, low=0.5)
    fill(d, range(9))
    d.settle()
    slow = where(d, "nfs")
    d.touch("i", slow[-1:])
    d.settle()
    assert slow[-1] in where(d, "shm")
    assert copies(d) == {} or len(where(d, "nfs")) + len(copies(d)) <= 2


def test_removing_a_block_removes_its_copy() -> None:
    d = demoted()
    on_both(d, 0, 1)
    d.remove("i", [0, 4])
    assert [type(e) for e in d.effects][:2] == [fx.DropCopies, fx.DropBlocks]
    d.settle()
    assert (copies(d), d.usage()["used_bytes"]) == ({1: "nfs"}, 8 * BLOCK)


def test_evicting_a_block_removes_its_copy() -> None:
    d = demoted()
    on_both(d, 0, 1)
    d.settle([Want("i", 40 * BLOCK, 40)])
    assert (d.served("i"), copies(d), d.usage()["used_bytes"]) == ([], {}, 0)


def test_a_promotion_that_expires_changes_nothing() -> None:
    d = demoted()
    d.touch("i", [0])
    (record,) = begun(d)
    d.tick(limits.MOVE_LEASE_MS)
    d.moved(record)
    assert tier_of(d)[0] == "nfs"
    d.now_ms += LATE_WRITER_MS
    d.collect()
    assert d.usage()["used_bytes"] == 9 * BLOCK


def test_the_quota_holds_while_blocks_are_in_two_places() -> None:
    d = two_tiers(12, shm=6, nfs=6)
    for key in range(40):
        if d.state.ledger.quota.refusal(SHM, BLOCK) is not None:
            d.settle([Want("i", BLOCK, 1)])
        d.touch("i", d.served("i")[:3])
        d.reclaim()
        d.write("i", [key]) if d.state.ledger.quota.refusal(SHM, BLOCK) is None else None
        for kind, limit in ((None, 12), (SHM, 6)):
            account = d.state.ledger.quota.total() if kind is None else d.state.ledger.quota.account(kind)
            assert account.held <= limit * BLOCK
        d.run_moves()
        d.collect()
    assert len(d.served("i")) >= 6


def test_disabled_fast_tier_does_not_promote() -> None:
    d = demoted()
    off: dict[str, StorageConfig] = {**STORAGES, "shm": replace(STORAGES["shm"], is_available=False)}
    d.configure(storages=off)
    d.touch("i", [0])
    d.settle()
    assert tier_of(d)[0] == "nfs"
