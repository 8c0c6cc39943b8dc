"""GroupState, one behaviour a test: given events, these replies and these effects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core import effects as fx
from kvcm_ray.core import limits
from kvcm_ray.core.events import DeletesConfirmed, StartWriteEvent, TouchEvent
from kvcm_ray.core.group import TRASH_RETRY_MS, GroupState
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import (
    CacheConfig,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecGroup,
    LocationSpecInfo,
    MetaIndexerConfig,
    NfsSpec,
    QuotaConfig,
    ShmSpec,
    StorageConfig,
    StorageType,
)
from kvcm_ray.core.records import TRASH_BLOCKS_MAX, RecoveredInstance, pack_answer, unpack_answer
from kvcm_ray.core.requests import BlockLocations, Removed, StartWrite, WriteFinished
from kvcm_ray.core.session import EMPTY_SESSION_MS, LATE_WRITER_MS
from kvcm_ray.errors import (
    AlreadyExists,
    Corrupt,
    InstanceNotFound,
    InvalidArgument,
    KeyLimitReached,
    KvcmError,
    LimitReached,
    NoStorageAvailable,
    QuotaExceeded,
    SessionNotFound,
)
from kvcm_ray.testing.group_driver import GroupDriver

STORAGES = {
    "nfs": StorageConfig("nfs", nfs=NfsSpec("/n")),
    "shm": StorageConfig("shm", shm=ShmSpec("/dev/shm/x")),
}
INFO = InstanceInfo(
    instance_group_name="g",
    instance_id="i",
    block_size=16,
    location_spec_infos=(LocationSpecInfo("a", 100), LocationSpecInfo("b", 60)),
    location_spec_groups=(
        LocationSpecGroup("only_a", ("a",)),
        LocationSpecGroup("nothing", ()),
        LocationSpecGroup("both", ("b", "a")),
    ),
    uid="0123abcd",
)
OTHER = replace(INFO, instance_id="j", uid="ffff0000")
BLOCK = 160
MISS = (np.array([False]), BlockLocations.empty(1))  #: the index's answer about one unknown key


def sid(number: int) -> str:
    return f"{number:032d}"


def group_of(blocks: int = 100, max_keys: int = 0, delay_ms: int = 0, **type_blocks: int) -> InstanceGroup:
    """A group whose quotas are so many whole blocks."""
    entries = tuple(QuotaConfig(StorageType[f"ST_{k}"], n * BLOCK) for k, n in type_blocks.items())
    return InstanceGroup(
        name="g",
        storage_candidates=("shm", "nfs"),
        quota=InstanceGroupQuota(blocks * BLOCK, entries),
        cache_config=CacheConfig(
            reclaim_strategy=CacheReclaimStrategy(delay_before_delete_ms=delay_ms),
            meta_indexer_config=MetaIndexerConfig(max_key_count=max_keys),
        ),
    )


def driver(group: InstanceGroup | None = None) -> GroupDriver:
    return GroupDriver(group or group_of(), STORAGES, [INFO, OTHER])


def written(d: GroupDriver, keys: list[int], number: int = 90) -> None:
    d.start("i", keys, sid(number))
    d.finish("i", sid(number), BlockMask(offset=len(keys)))


def kinds(d: GroupDriver) -> list[type]:
    return [type(effect) for effect in d.effects]


def rows(locations: BlockLocations) -> list[tuple[int, int, int]]:
    columns = (locations.segment, locations.slot, locations.generation)
    return list(zip(*(c.tolist() for c in columns), strict=True))


# --------------------------------------------------------------------------------- the straight way


def test_start_finish_remove_delete() -> None:
    d = driver()
    reply = d.start("i", [7, 8, 9], sid(1))
    assert kinds(d) == [fx.CreateSegment, fx.PutSession]
    assert reply.exists.tolist() == [False] * 3
    assert rows(reply.locations) == [(1, 0, 1), (1, 1, 1), (1, 2, 1)]
    assert reply.segments[1].path == "i/0123abcd-000001"
    assert (reply.storage, reply.lease_ms) == ("shm", limits.SESSION_TIMEOUT_DEFAULT_MS)
    assert d.usage()["reserved_bytes"] == 3 * BLOCK

    assert d.finish("i", sid(1), BlockMask(offset=3), event_id="f") == WriteFinished(3, 0)
    assert kinds(d) == [fx.DropSession, fx.AddBlocks, fx.RememberAnswer]
    added = d.effects[1]
    assert (added.keys.tolist(), added.parent_key, added.written_s) == ([7, 8, 9], None, 1)
    assert d.usage()["used_bytes"] == 3 * BLOCK

    assert d.remove("i", [8, 5, 8], event_id="r") == Removed(1)
    assert kinds(d) == [fx.DropBlocks, fx.PutTrash, fx.RememberAnswer]
    assert d.usage()["pending_delete_bytes"] == BLOCK
    assert d.usage()["used_bytes"] == 3 * BLOCK

    (record,) = d.collect()
    assert rows(record.locations) == [(1, 1, 1)]
    assert d.usage()["used_bytes"] == 2 * BLOCK


def test_known_keys_are_not_written_again() -> None:
    d = driver()
    written(d, [1, 2])
    d.start("i", [3], sid(2))
    reply = d.start("i", [1, 2, 3, 4], sid(3))
    assert reply.exists.tolist() == [True, True, True, False]
    assert len(reply.locations) == 1
    d.finish("i", sid(3), BlockMask(offset=1))
    assert d.effects[1].parent_key == 3


def test_the_parent_of_a_partial_success_is_the_key_before_it() -> None:
    d = driver()
    d.start("i", [1, 2, 3], sid(1))
    assert d.finish("i", sid(1), BlockMask(values=(False, True, True))) == WriteFinished(2, 1)
    added = next(e for e in d.effects if isinstance(e, fx.AddBlocks))
    assert (added.keys.tolist(), added.parent_key) == ([2, 3], 1)


def test_failed_blocks_go_to_the_trash_at_once() -> None:
    d = driver()
    d.start("i", [1, 2], sid(1))
    assert d.finish("i", sid(1), BlockMask(offset=0)) == WriteFinished(0, 2)
    assert kinds(d) == [fx.DropSession, fx.PutTrash]
    assert len(d.collect()) == 1
    assert d.usage()["used_bytes"] == 0


def test_a_key_given_twice_is_one_block() -> None:
    d = driver()
    reply = d.start("i", [5, 6, 5], sid(1))
    places = rows(reply.locations)
    assert places[0] == places[2] != places[1]
    assert d.usage()["reserved_bytes"] == 2 * BLOCK
    with pytest.raises(InvalidArgument, match="2 values for 3 new blocks"):
        d.finish("i", sid(1), BlockMask(values=(True, True)))
    assert d.finish("i", sid(1), BlockMask(values=(True, True, False))) == WriteFinished(1, 1)
    assert list(d.index.served()["i"]) == [6]


def test_generations_are_those_of_sessions() -> None:
    d = driver()
    one = d.start("i", [1], sid(1))
    two = d.start("i", [2], sid(2))
    elsewhere = d.start("j", [1], sid(3))
    assert [r.locations.generation.tolist() for r in (one, two, elsewhere)] == [[1], [2], [1]]


def test_the_last_generation_is_followed_by_the_first() -> None:
    d = driver()
    d.state.open_instance(INFO, RecoveredInstance(next_generation=2**32 - 1))
    assert d.start("i", [1], sid(1)).locations.generation.tolist() == [2**32 - 1]
    assert d.start("i", [2], sid(2)).locations.generation.tolist() == [1]


# -------------------------------------------------------------------------------------- spec groups


def test_spec_groups_get_segments_of_their_own() -> None:
    d = driver()
    reply = d.start("i", [1, 2, 3, 4], sid(1), groups=["only_a", "", "only_a", "both"])
    specs = [[s.name for s in reply.segments[segment].specs] for segment, _, _ in rows(reply.locations)]
    assert specs == [["a"], ["a", "b"], ["a"], ["a", "b"]]
    assert d.usage()["reserved_bytes"] == 2 * 100 + 2 * BLOCK


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["only_a"], "1 location_spec_group_names for 2 keys"),
        (["only_a", "what"], "no location spec group 'what'"),
        (["both", "nothing"], "would have no specs"),
    ],
)
def test_bad_spec_groups(groups: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        driver().start("i", [1, 2], sid(1), groups=groups)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("session_id", ["", "a" * 31, "a" * 33, "A" * 32, "ä" * 32, "a" * 32 + "\n"])
def test_session_ids_have_a_form(session_id: str) -> None:
    with pytest.raises(InvalidArgument, match="session id"):
        driver().start("i", [1], session_id)


def test_a_session_id_is_used_once_at_a_time() -> None:
    d = driver()
    d.start("i", [1], sid(1))
    with pytest.raises(AlreadyExists):
        d.start("j", [1], sid(1))
    d.finish("i", sid(1), BlockMask(offset=1))
    d.start("j", [1], sid(1))


def test_keys_are_int64_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    d = driver()
    request = StartWrite("", "i", np.array([1], np.int32), sid(1), 0)
    with pytest.raises(InvalidArgument, match="int64"):
        d.handle(StartWriteEvent(request, np.zeros(1, np.bool_), BlockLocations.empty(1), 0, 0))
    monkeypatch.setattr(limits, "KEYS_PER_CALL_MAX", 2)
    with pytest.raises(InvalidArgument, match="more than 2"):
        d.start("i", [1, 2, 3], sid(1))


def test_unknown_instances() -> None:
    d = driver()
    calls: list[Any] = [
        lambda: (
            d.state.handle(StartWriteEvent(StartWrite("", "x", np.array([1]), sid(1), 0), *MISS, 0, 0)).reply
        ),
        lambda: d.state.handle(DeletesConfirmed("x", (1,), 0)).reply,
        lambda: d.state.handle(TouchEvent("x", np.array([1]), 1, *MISS, 0)).reply,
    ]
    assert [type(call()) for call in calls] == [InstanceNotFound] * 3
    with pytest.raises(InstanceNotFound):
        d.finish("x", sid(1), BlockMask(offset=0))
    with pytest.raises(InstanceNotFound):
        d.state.close_instance("x")


def test_the_quota_counts_reserved_used_and_pending() -> None:
    d = driver(group_of(blocks=4))
    written(d, [1, 2])
    d.start("i", [3], sid(1))
    d.remove("i", [1])
    with pytest.raises(QuotaExceeded) as caught:
        d.start("j", [8, 9], sid(2))
    assert caught.value.details == {
        "quota": "total",
        "capacity": 4 * BLOCK,
        "used": 2 * BLOCK,
        "reserved": BLOCK,
        "pending_delete": BLOCK,
        "asked": 2 * BLOCK,
        "asked_bytes": 2 * BLOCK,
        "asked_blocks": 2,
        "pinned": 0,
        "leased": 0,
        "reclaimable": 2 * BLOCK,
        "may_wait": True,
    }
    d.collect()
    d.start("j", [8, 9], sid(2))


def test_a_full_type_falls_through_to_the_next_candidate() -> None:
    d = driver(group_of(TAIRMEMPOOL=2))
    assert d.start("i", [1, 2], sid(1)).storage == "shm"
    assert d.start("i", [3], sid(2)).storage == "nfs"
    assert d.usage()["by_type"]["ST_NFS"]["quota_bytes"] is None


def test_the_key_limit_is_per_instance_and_counts_blocks_being_written() -> None:
    d = driver(group_of(max_keys=3))
    written(d, [1, 2])
    d.start("i", [3, 3, 1], sid(1))
    with pytest.raises(KeyLimitReached, match="holds 3 blocks; 1 more"):
        d.start("i", [4], sid(2))
    d.start("j", [4], sid(2))


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SESSIONS_PER_GROUP_MAX", 2)
    d = driver()
    d.start("i", [1], sid(1))
    d.start("j", [1], sid(2))
    with pytest.raises(LimitReached, match="2 write sessions"):
        d.start("i", [2], sid(3))


def test_disabled_storages_get_no_new_blocks() -> None:
    d = driver()
    d.start("i", [1], sid(1))
    off = {name: replace(config, is_available=False) for name, config in STORAGES.items()}
    d.configure(d.group, {**STORAGES, "shm": off["shm"]})
    assert d.start("i", [2], sid(2)).storage == "nfs"
    d.configure(d.group, off)
    with pytest.raises(NoStorageAvailable, match="shm is disabled"):
        d.start("i", [3], sid(3))
    assert d.finish("i", sid(1), BlockMask(offset=1)) == WriteFinished(1, 0)


def test_blocks_of_a_forgotten_storage_still_count() -> None:
    d = driver()
    written(d, [1, 2])
    d.configure(d.group, {})
    assert d.usage()["by_type"]["ST_UNSPECIFIED"]["used_bytes"] == 2 * BLOCK
    d.restart()
    d.remove("i", [1, 2])
    d.collect()
    assert d.usage()["used_bytes"] == 0


# ------------------------------------------------------------------------------------ nothing to do


@pytest.mark.parametrize("keys", [[], [1, 2]])
def test_a_session_with_nothing_to_write(keys: list[int]) -> None:
    d = driver()
    written(d, [1, 2])
    reply = d.start("i", keys, sid(1), event_id="s")
    assert d.effects == []
    assert (len(reply.locations), reply.storage, reply.lease_ms) == (0, "", EMPTY_SESSION_MS)
    assert d.start("i", keys, sid(1), event_id="s") is reply
    with pytest.raises(AlreadyExists):
        d.start("i", [9], sid(1))
    with pytest.raises(InvalidArgument):
        d.finish("i", sid(1), BlockMask(offset=1))
    with pytest.raises(SessionNotFound):
        d.finish("j", sid(1), BlockMask(offset=0))
    assert d.finish("i", sid(1), BlockMask(offset=0), event_id="f") == WriteFinished(0, 0)
    assert d.finish("i", sid(1), BlockMask(offset=0), event_id="f") == WriteFinished(0, 0)
    with pytest.raises(SessionNotFound):
        d.finish("i", sid(1), BlockMask(offset=0))


def test_empty_sessions_expire_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    d = driver()
    d.start("i", [], sid(1))
    d.tick(EMPTY_SESSION_MS)
    with pytest.raises(SessionNotFound):
        d.finish("i", sid(1), BlockMask(offset=0))
    monkeypatch.setattr("kvcm_ray.core.session.EMPTY_SESSIONS_MAX", 2)
    for number in (2, 3, 4):
        d.start("i", [], sid(number))
    with pytest.raises(SessionNotFound):
        d.finish("i", sid(2), BlockMask(offset=0))
    assert d.finish("i", sid(4), BlockMask()) == WriteFinished(0, 0)


# ------------------------------------------------------------------------------------------- expiry


@pytest.mark.parametrize(
    ("timeout_ms", "lease_ms"),
    [
        (0, limits.SESSION_TIMEOUT_DEFAULT_MS),
        (-5, limits.SESSION_TIMEOUT_DEFAULT_MS),
        (7, 7),
        (10**12, limits.SESSION_TIMEOUT_MAX_MS),
    ],
)
def test_expiry(timeout_ms: int, lease_ms: int) -> None:
    d = driver()
    assert d.start("i", [1], sid(1), timeout_ms=timeout_ms).lease_ms == lease_ms
    assert d.state.next_deadline_ms() == d.now_ms + lease_ms
    d.tick(lease_ms - 1)
    assert d.effects == []
    d.tick(1)
    assert kinds(d) == [fx.DropSession, fx.PutTrash]
    with pytest.raises(SessionNotFound, match="expired"):
        d.finish("i", sid(1), BlockMask(offset=1))
    assert d.state.next_deadline_ms() == d.now_ms + LATE_WRITER_MS
    assert d.collect() == []
    d.now_ms += LATE_WRITER_MS
    assert len(d.collect()) == 1
    assert d.state.next_deadline_ms() is None


def test_all_due_sessions_expire_at_once() -> None:
    d = driver()
    for number, timeout in enumerate([30, 10, 20, 40]):
        d.start("ij"[number % 2], [number], sid(number), timeout_ms=timeout)
    d.tick(30)
    expired = [e.session_id for e in d.effects if isinstance(e, fx.DropSession)]
    assert expired == [sid(1), sid(2), sid(0)]
    assert d.state.next_session_ms() == d.now_ms + 10


def test_finished_sessions_do_not_pile_up() -> None:
    d = driver()
    d.start("i", [1001], sid(1001), timeout_ms=30)
    d.start("i", [1002], sid(1002), timeout_ms=10)
    d.start("i", [1003], sid(1003), timeout_ms=20)
    for number in range(300):
        d.start("i", [number], sid(number), event_id=str(number))
        d.finish("i", sid(number), BlockMask(offset=0))
        d.collect()
    sessions = d.state.ledger.sessions
    assert len(sessions._deadlines) <= 71
    assert sessions._by_event == {}
    d.tick(30)
    expired = [e.session_id for e in d.effects if isinstance(e, fx.DropSession)]
    assert expired == [sid(1002), sid(1003), sid(1001)], "in order, although the heap was remade"


# -------------------------------------------------------------------------------------- idempotency


def test_the_same_start_again_gets_the_same_answer() -> None:
    d = driver()
    first = d.start("i", [1, 2, 1], sid(1), event_id="s")
    assert_same_start(d.start("i", [1, 2, 1], sid(1), event_id="s"), first)
    assert d.effects == []
    d.restart()
    assert_same_start(d.start("i", [1, 2, 1], sid(1), event_id="s"), first)
    d.finish("i", sid(1), BlockMask(offset=3))
    assert_same_start(d.start("i", [1, 2, 1], sid(1), event_id="s"), first)
    assert d.usage()["sessions"] == 0


def assert_same_start(one: Any, two: Any) -> None:
    assert one.session_id == two.session_id
    assert one.exists.tolist() == two.exists.tolist()
    assert rows(one.locations) == rows(two.locations)
    assert (one.segments, one.storage, one.lease_ms) == (two.segments, two.storage, two.lease_ms)


def test_the_same_finish_and_remove_again_get_the_same_answers() -> None:
    d = driver()
    d.start("i", [1, 2], sid(1))
    for restart in (False, True):
        if restart:
            d.restart()
        assert d.finish("i", sid(1), BlockMask(offset=1), event_id="f") == WriteFinished(1, 1)
    assert d.effects == []
    for restart in (False, True):
        if restart:
            d.restart()
            written(d, [1])
        assert d.remove("i", [1], event_id="r") == Removed(1)
    assert list(d.index.served()["i"]) == [1]


def test_an_event_id_belongs_to_one_kind_of_request() -> None:
    d = driver()
    d.remove("i", [1], event_id="e")
    with pytest.raises(InvalidArgument, match="event_id 'e' was used before"):
        d.start("i", [1], sid(1), event_id="e")
    d.remove("j", [1], event_id="f")
    d.start("i", [1], sid(1), event_id="f")  # another instance, another event


def test_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcm_ray.core.answers.ANSWERS_REMEMBERED_MAX", 3)
    d = driver()
    for number in range(5):
        d.remove("i", [1], event_id=str(number))
    assert [name for _, name in d.state.ledger.answers._answers] == ["2", "3", "4"]
    monkeypatch.setattr("kvcm_ray.core.answers.ANSWERS_REMEMBERED_MAX", 100)
    monkeypatch.setattr("kvcm_ray.core.answers.ANSWER_BLOCKS_MAX", 10)
    d.start("i", range(8), sid(1), event_id="s")
    d.finish("i", sid(1), BlockMask(offset=0), event_id="f")
    assert len(d.state.ledger.answers) == 5
    d.start("i", range(8), sid(2), event_id="t")
    d.finish("i", sid(2), BlockMask(offset=0), event_id="u")
    assert [name for _, name in d.state.ledger.answers._answers] == ["f", "t", "u"]


@pytest.mark.parametrize("answer", [WriteFinished(2**40, 7), Removed(3)])
def test_answers_are_packed(answer: WriteFinished | Removed) -> None:
    assert unpack_answer(pack_answer(answer)) == answer


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x03" + bytes(16), bytes(18)])
def test_bad_packed_answers(data: bytes) -> None:
    with pytest.raises(Corrupt):
        unpack_answer(data)


# ------------------------------------------------------------------------------------------- remove


def test_finishing_drops_blocks_that_were_removed_meanwhile() -> None:
    d = driver()
    d.start("i", [1, 2, 3], sid(1))
    assert d.remove("i", [2, 9]) == Removed(1)
    assert kinds(d) == [fx.PutSession]
    d.restart()
    again = d.start("i", [2], sid(2))  # the key is free at once, the slot is not
    assert d.finish("i", sid(1), BlockMask(offset=3)) == WriteFinished(2, 1)
    assert d.finish("i", sid(2), BlockMask(offset=1)) == WriteFinished(1, 0)
    assert d.index.served()["i"][2] == rows(again.locations)[0]


def test_removed_blocks_are_erased_after_the_groups_delay() -> None:
    d = driver(group_of(delay_ms=500))
    written(d, [1])
    d.remove("i", [1])
    assert d.state.next_trash_ms() == d.now_ms + 500
    assert d.collect() == []
    d.now_ms += 500
    assert len(d.collect()) == 1


def test_dropping_sessions() -> None:
    d = driver()
    written(d, [1])
    d.start("i", [2, 3], sid(1))
    d.start("i", [], sid(2))
    d.start("j", [2], sid(3))
    assert d.remove("i", [1], drop_sessions=True) == Removed(3)
    for number in (1, 2):
        with pytest.raises(SessionNotFound):
            d.finish("i", sid(number), BlockMask(offset=0))
    assert d.finish("j", sid(3), BlockMask(offset=1)) == WriteFinished(1, 0)
    assert d.usage()["pending_delete_bytes"] == 3 * BLOCK


def test_large_removals_make_several_trash_records() -> None:
    d = driver(group_of(blocks=TRASH_BLOCKS_MAX + 10))
    count = TRASH_BLOCKS_MAX + 1
    written(d, list(range(count)))
    assert d.remove("i", range(count)) == Removed(count)
    sizes = [len(e.record.locations) for e in d.effects if isinstance(e, fx.PutTrash)]
    assert sizes == [TRASH_BLOCKS_MAX, 1]


# -------------------------------------------------------------------------------------------- trash


def test_trash_is_handed_out_once_until_it_fails() -> None:
    d = driver()
    written(d, [1, 2])
    d.remove("i", [1])
    d.remove("i", [2])
    assert [r.trash_id for r in d.state.due_trash(d.now_ms, 1)] == [1]
    assert [r.trash_id for r in d.state.due_trash(d.now_ms)] == [2]
    assert d.state.due_trash(d.now_ms) == []
    d.state.trash_failed("i", (1, 77), d.now_ms)
    assert d.state.due_trash(d.now_ms) == []
    assert d.state.next_trash_ms() == d.now_ms + TRASH_RETRY_MS
    assert [r.trash_id for r in d.state.due_trash(d.now_ms + TRASH_RETRY_MS)] == [1]
    d.restart()
    assert [r.trash_id for r in d.state.due_trash(d.now_ms)] == [1, 2]


def test_confirming_twice_is_confirming_once() -> None:
    d = driver()
    written(d, [1, 2])
    d.remove("i", [1])
    d.collect()
    used = d.usage()
    d.handle(DeletesConfirmed("i", (1, 2, 3), d.now_ms))
    assert d.effects == []
    assert d.usage() == used


def test_empty_segments_are_dropped_but_the_newest() -> None:
    d = driver(group_of(blocks=16))  # a quarter of it is a segment
    for number in range(3):
        written(d, list(range(4 * number, 4 * number + 4)), number)
    assert d.usage()["instances"]["i"]["segments"] == 3
    d.remove("i", range(12))
    d.collect()
    assert [e.segment_id for e in d.effects if isinstance(e, fx.DropSegment)] == [1, 2]
    assert d.usage()["instances"]["i"] == {
        "blocks": 0,
        "writing_blocks": 0,
        "segments": 1,
        "slots": 4,
        "free_slots": 4,
        "retiring": False,
    }
    assert rows(d.start("i", range(5), sid(9)).locations)[4][0] == 4, "ids are not reused"


@pytest.mark.parametrize(
    ("blocks", "needed", "slots"), [(100, 1, 25), (100, 40, 40), (3, 1, 1), (10**9, 5, 419_430)]
)
def test_segment_sizes(blocks: int, needed: int, slots: int) -> None:
    d = driver(group_of(blocks=blocks))
    reply = d.start("i", range(needed), sid(1))
    assert [s.slots for s in reply.segments.values()] == [slots]


def test_large_blocks_get_a_segment_each() -> None:
    info = replace(INFO, location_spec_infos=(LocationSpecInfo("a", limits.SEGMENT_BYTES_TARGET),))
    d = GroupDriver(InstanceGroup("g", ("nfs",), quota=InstanceGroupQuota(1 << 40)), STORAGES, [info])
    reply = d.start("i", [1, 2], sid(1))
    assert [s.slots for s in reply.segments.values()] == [1, 1]


# --------------------------------------------------------------------------------- reads and counts


def test_meta() -> None:
    d = driver()
    written(d, [1])
    writing = d.start("i", [2, 3], sid(1))
    d.remove("i", [3])
    meta = d.meta("i", [1, 2, 3, 4])
    assert meta.states.tolist() == [3, 2, 0, 0]
    assert rows(meta.locations)[1] == rows(writing.locations)[0]
    assert rows(meta.locations)[2:] == [(0, 0, 0)] * 2
    assert list(meta.segments) == [1]


def test_touches_are_counted() -> None:
    d = driver()
    d.touch("i", [1, 2], lookups=5)
    usage = d.state.usage()
    assert (usage["hit_blocks"], usage["lookup_blocks"]) == (2, 5)


# --------------------------------------------------------------------------------- open and close


def test_closing_an_instance_frees_all_it_held() -> None:
    d = driver()
    written(d, [1])
    d.start("i", [2], sid(1), event_id="s")
    d.start("i", [], sid(2))
    d.remove("i", [1])
    d.start("j", [1], sid(3))
    d.state.close_instance("i")
    usage = d.usage()
    assert usage["used_bytes"] == usage["pending_delete_bytes"] == usage["trash_records"] == 0
    assert usage["reserved_bytes"] == BLOCK
    assert list(usage["instances"]) == ["j"]
    assert d.state.due_trash(d.now_ms) == []


def test_opening_again_starts_from_what_is_recovered() -> None:
    d = driver()
    written(d, [1])
    d.start("i", [2], sid(1))
    before = d.usage()
    d.state.open_instance(INFO, d.index.recover("i"))
    d.check()
    assert d.usage() == before


def test_contradicting_records_are_refused_and_change_nothing() -> None:
    d = driver()
    written(d, [1, 2])
    before = d.usage()
    for damage in ("double", "range", "segment"):
        recovered = d.index.recover("i")
        if damage == "double":
            recovered.blocks.locations.slot[:] = 0
        elif damage == "range":
            recovered.blocks.locations.slot[0] = 10**6
        else:
            recovered.segments = []
        with pytest.raises(Corrupt):
            d.state.open_instance(INFO, recovered)
        assert d.usage() == before


def test_a_recovered_session_id_in_use_elsewhere_is_refused() -> None:
    d = driver()
    d.start("i", [1], sid(1))
    record = replace(d.index.recover("i").sessions[0], instance_id="j")
    recovered = RecoveredInstance(
        segments=d.index.recover("i").segments, sessions=[record], next_segment_id=2
    )
    with pytest.raises(AlreadyExists):
        d.state.open_instance(OTHER, recovered)


def test_refusals_are_values() -> None:
    state = GroupState(group_of(), STORAGES)
    outcome = state.handle(TouchEvent("i", np.array([1]), 1, *MISS, 0))
    assert isinstance(outcome.reply, KvcmError)
    assert outcome.effects == []
