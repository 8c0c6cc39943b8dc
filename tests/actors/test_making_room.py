"""Draining, failing storages and waiting writes where room is scarce: nothing is lost without need,
and nobody waits for what is not to come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.events import COPIED, NOT_COPIED, UNREADABLE, MovedEvent, Want
from kvcm_ray.core.model import NfsSpec, ShmSpec, StorageConfig, ThreeFSSpec
from kvcm_ray.core.records import SessionRecord
from kvcm_ray.core.requests import LeaseBlocks, WriteStarted
from kvcm_ray.errors import QuotaExceeded
from kvcm_ray.testing import blocks
from kvcm_ray.testing.blocks import some_keys, start_request
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.reclaim_lab import ReclaimLab
from kvcm_ray.testing.small_groups import BLOCK, STORAGES, group_of, instance, tier_of, two_tiers

THREE = {
    "shm": StorageConfig("shm", shm=ShmSpec("/dev/shm/x")),
    "one": StorageConfig("one", nfs=NfsSpec("/one")),
    "two": StorageConfig("two", nfs=NfsSpec("/two")),
}


def without(*names: str, of: Mapping[str, StorageConfig] = THREE) -> dict[str, StorageConfig]:
    """The storages, some of them drained."""
    return {name: replace(config, is_draining=name in names) for name, config in of.items()}


def three_storages(blocks: int, shm: int, nfs: int) -> GroupDriver:
    """Two tiers, the slower one of two storages."""
    group = group_of(blocks, shm=shm, nfs=nfs, storages=tuple(THREE))
    return GroupDriver(group, THREE, [instance("i")])


def report_move(d: GroupDriver, record: SessionRecord, copied: list[int]) -> None:
    facts = d.index.lookup("i", record.keys)
    flags = np.array(copied, np.uint8)
    d.handle(MovedEvent("i", record.session_id, flags, *facts, d.now_ms))


def settle(d: GroupDriver, seconds: int = 2) -> None:
    for _ in range(seconds * 20):
        d.settle()
        d.tick(50)


def counted(d: GroupDriver, name: str) -> int:
    return int(d.state.capacity(d.now_ms, d.now_s)["reclaim"][name])


# ------------------------------------------------------------------------------------------ draining


def test_draining_and_promoting_do_not_wait_for_the_trigger_period() -> None:
    d = two_tiers(1_000, shm=500, period_s=60, step=10)
    for key in range(100):
        d.write("i", [key])
    settle(d, 1)
    d.configure(storages=without("shm", of=STORAGES))
    settle(d)
    assert set(tier_of(d).values()) == {"nfs"}
    d.configure(storages=STORAGES)
    settle(d, 1)
    d.touch("i", [0])
    settle(d, 1)
    assert tier_of(d)[0] == "shm"


def test_draining_a_slow_storage_of_a_full_group_costs_no_hot_blocks() -> None:
    d = three_storages(60, shm=10, nfs=20)
    d.configure(storages=without("shm", "two"))
    d.write("i", list(range(100, 118)))
    d.configure(storages=THREE)
    for key in range(9):
        d.write("i", [key])
    d.configure(storages=without("one"))
    settle(d)
    assert "one" not in tier_of(d).values()
    assert len(d.served("i")) == 27
    assert counted(d, "evicted_blocks") == 0


def test_a_block_that_cannot_be_read_does_not_hold_a_drained_storage_nor_cost_others() -> None:
    d = three_storages(200, shm=100, nfs=100)
    d.configure(storages=without("shm", "two"))
    d.write("i", [1])
    d.configure(storages=without("shm", "one"))
    for key in range(10, 40):
        d.write("i", [key])
    for _ in range(20):
        d.reclaim()
        for record in d.state.due_moves(16):
            report_move(d, record, [UNREADABLE if key == 1 else COPIED for key in record.keys.tolist()])
        d.collect()
        d.tick(50)
    assert d.served("i") == list(range(10, 40))


def test_a_drained_storage_waits_for_one_that_failed() -> None:
    d = three_storages(200, shm=100, nfs=100)
    d.configure(storages=without("shm", "two"))
    d.write("i", [1, 2, 3])
    d.configure(storages=without("shm", "one"))
    d.reclaim()
    for record in d.state.due_moves(16):
        report_move(d, record, [NOT_COPIED] * len(record.keys))
    settle(d, 1)
    assert d.served("i") == [1, 2, 3]
    assert set(tier_of(d).values()) == {"one"}
    settle(d, 6)
    assert set(tier_of(d).values()) == {"two"}


@pytest.mark.parametrize("how", ["drained", "removed"])
def test_a_copy_takes_the_place_of_a_block_whose_storage_goes(how: str) -> None:
    d, key = with_a_copy()
    gone = without("shm", of=STORAGES) if how == "drained" else {"nfs": STORAGES["nfs"]}
    d.configure(storages=gone)
    settle(d, 1)
    assert tier_of(d)[key] == "nfs"
    assert not any(d.state.ledger.copies.values())


def test_copies_follow_the_type_of_their_storage() -> None:
    d, _ = with_a_copy()
    d.configure(storages={**STORAGES, "nfs": StorageConfig("nfs", threefs=ThreeFSSpec("c", "/m", "r"))})


def with_a_copy() -> tuple[GroupDriver, int]:
    """Two tiers, and a key in the fast one that has a copy in the slow one."""
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
    d.settle()
    key = min(k for k, storage in tier_of(d).items() if storage == "nfs")
    d.touch("i", [key], chained=False)
    settle(d, 1)
    assert tier_of(d)[key] == "shm"
    assert any(d.state.ledger.copies.values())
    return d, key


# ------------------------------------------------------------------------------- tiers under pressure


def test_promoting_at_the_mark_evicts_nothing() -> None:
    d = two_tiers(40, shm=10, high=0.5, low=0.5)
    for key in range(20):
        d.write("i", [key])
        d.settle()
    settle(d, 1)
    assert len(d.served("i")) == 20
    slow = [key for key, storage in tier_of(d).items() if storage == "nfs"]
    d.touch("i", slow[-4:], chained=False)
    d.tick(100)
    d.reclaim()
    d.reclaim()  # while the blocks are in two places
    settle(d, 1)
    assert counted(d, "promoted_blocks") == 4
    assert len(d.served("i")) == 20


def test_blocks_that_cannot_be_read_are_dropped_instead_of_demoted() -> None:
    d = two_tiers(40, shm=10)
    d.write("i", [1, 2])
    for key in range(10, 14):
        d.write("i", [key])
    d.configure(group_of(40, shm=0, storages=("shm", "nfs")))
    moves = 0
    for _ in range(20):
        d.reclaim()
        for record in d.state.due_moves(16):
            moves += 1
            report_move(d, record, [UNREADABLE if key < 10 else COPIED for key in record.keys.tolist()])
        d.collect()
        d.tick(50)
    assert moves <= 3
    assert d.served("i") == list(range(10, 14))


def test_writes_go_on_in_the_upper_tier_while_the_lower_one_fails() -> None:
    d = two_tiers(100, shm=10, nfs=90, high=1.0, low=1.0)
    for key in range(10):
        d.write("i", [key])
    d.state.storage_failed("nfs", d.now_ms)
    with pytest.raises(QuotaExceeded) as caught:
        d.start("i", [50, 51], "5" * 32)
    assert caught.value.details["may_wait"]
    d.settle([Want("i", 2 * BLOCK, 2)])
    assert d.write("i", [50, 51]).storage == "shm"
    assert len(d.served("i")) == 10


def test_a_refusal_names_what_waits_before() -> None:
    d = two_tiers(10, shm=10)
    with pytest.raises(QuotaExceeded, match="90 asked for by writes that waited before") as caught:
        d.start("i", [1, 2], "1" * 32, ahead_bytes=90)
    assert caught.value.details["ahead"] == 90


# ------------------------------------------------------------------------------------ waiting writes


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[ReclaimLab]:
    """1 024 blocks, 900 of them leased for long."""
    made = ReclaimLab(tmp_path, ["file:4MiB"])
    made.registry.register_instance(blocks.instance("m"))
    keys = some_keys(900)
    made.put("m", keys)
    made.service.submit([LeaseBlocks("m", keys, 600_000)]).result(10)
    yield made
    made.close()


def waits(lab: ReclaimLab, count: int, wait_s: float) -> Future[Any]:
    before = lab.usage()["waiting"]["writes"]
    future = lab.waiting(start_request("m", some_keys(count)), wait_s)
    lab.wait_until(lambda: lab.usage()["waiting"]["writes"] == before + 1)
    return future


def test_a_write_is_tried_again_once_the_one_before_it_gave_up(lab: ReclaimLab) -> None:
    first = waits(lab, 200, 20.0)
    second = waits(lab, 10, 20.0)
    assert first.cancel()
    assert isinstance(second.result(2), WriteStarted)


def test_a_write_is_tried_again_once_the_time_of_the_one_before_it_is_over(lab: ReclaimLab) -> None:
    first = waits(lab, 200, 0.5)
    second = waits(lab, 10, 20.0)
    assert isinstance(second.result(2), WriteStarted)
    assert "leased by readers" in str(first.result(1))
