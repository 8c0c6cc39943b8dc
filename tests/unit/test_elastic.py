"""Storages that are drained, and instances that a successor replaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvcm_ray.core.events import Want
from kvcm_ray.core.model import StorageConfig
from kvcm_ray.errors import NoStorageAvailable, QuotaExceeded
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import BLOCK, STORAGES, driver, instance, tier_of, two_tiers


def report(d: GroupDriver) -> dict[str, Any]:
    return d.state.capacity(d.now_ms, d.now_s)


def draining(*names: str) -> dict[str, StorageConfig]:
    return {name: replace(config, is_draining=name in names) for name, config in STORAGES.items()}


# ------------------------------------------------------------------------------------------ draining


def test_a_drained_storage_gives_its_blocks_away_and_is_empty_then() -> None:
    d = two_tiers(40, shm=10)
    d.write("i", [1, 2, 3])
    d.configure(storages=draining("shm"))
    assert report(d)["draining"] == [{"storage": "shm", "blocks": 3, "used_bytes": 3 * BLOCK, "empty": False}]
    assert d.write("i", [4]).storage == "nfs", "and takes none"
    d.settle()
    assert tier_of(d) == dict.fromkeys([1, 2, 3, 4], "nfs")
    assert report(d)["draining"] == [{"storage": "shm", "blocks": 0, "used_bytes": 0, "empty": True}]
    assert report(d)["reclaim"]["drained_blocks"] == 3
    assert [s.storage for s in d.index.instances["i"].segments.values()] == ["nfs"]


def test_a_slow_storage_is_drained_into_the_fast_one_if_there_is_room() -> None:
    d = two_tiers(40, shm=20)
    d.configure(storages=draining("shm"))
    d.write("i", [1, 2])
    assert set(tier_of(d).values()) == {"nfs"}
    d.configure(storages=draining("nfs"))
    d.settle()
    assert set(tier_of(d).values()) == {"shm"}


def test_without_another_storage_draining_drops_blocks() -> None:
    d = driver(20)
    d.write("i", [1, 2, 3])
    d.configure(storages=draining("nfs"))
    with pytest.raises(NoStorageAvailable, match="drained"):
        d.start("i", [9], "9" * 32)
    d.settle()
    assert d.served("i") == []
    assert report(d)["draining"][0]["empty"]


def test_blocks_being_written_to_a_drained_storage_move_when_they_are_there() -> None:
    from kvcm_ray.core.mask import BlockMask

    d = two_tiers(40, shm=10)
    d.start("i", [1, 2], "1" * 32)
    d.configure(storages=draining("shm"))
    d.settle()
    d.finish("i", "1" * 32, BlockMask(offset=2))
    assert tier_of(d) == {1: "shm", 2: "shm"}
    d.settle()
    assert tier_of(d) == {1: "nfs", 2: "nfs"}
    assert report(d)["draining"][0]["empty"]


def test_copies_on_a_drained_storage_are_dropped() -> None:
    d = two_tiers(40, shm=10, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
    d.settle()
    d.touch("i", [0, 1])
    d.settle()
    assert sorted(d.index.instances["i"].copies) == [0, 1]
    d.configure(storages=draining("nfs"))
    d.settle()
    assert d.index.instances["i"].copies == {}
    assert {0, 1} <= set(d.served("i"))
    assert "nfs" not in tier_of(d).values()


def test_draining_can_be_taken_back() -> None:
    d = two_tiers(40, shm=10)
    d.write("i", [1])
    d.configure(storages=draining("shm"))
    d.configure(storages=STORAGES)
    d.settle()
    assert tier_of(d) == {1: "shm"}
    assert report(d)["draining"] == []


def test_draining_goes_on_after_a_restart() -> None:
    d = two_tiers(40, shm=10)
    d.write("i", range(8))
    d.configure(storages=draining("shm"))
    d.reclaim()
    d.restart()
    d.settle()
    assert set(tier_of(d).values()) == {"nfs"}


@pytest.mark.parametrize("hold", ["pin", "lease"])
def test_held_blocks_of_a_drained_storage_move_but_are_not_dropped(hold: str) -> None:
    d = two_tiers(40, shm=10)
    d.write("i", [1, 2])
    if hold == "pin":
        d.pin("i", "p", [1, 2])
    else:
        d.lease("i", [1, 2], 5_000)
    d.configure(storages=draining("shm"))
    d.settle()
    d.now_ms += 5_000
    d.settle()
    assert tier_of(d) == {1: "nfs", 2: "nfs"}


# ---------------------------------------------------------------------------------- model upgrades


def handover(d: GroupDriver, seconds: int = 100) -> None:
    """``j`` replaces ``i`` from now on."""
    d.set_instance(instance("i", retiring_since_s=d.now_s, retiring_seconds=seconds))
    d.set_instance(instance("j", supersedes="i", model_version="2"))


def test_a_replaced_instance_serves_on_with_a_share_that_shrinks() -> None:
    d = driver(20, "i", "j")
    d.write("i", range(10))
    handover(d)
    d.settle()
    assert len(d.served("i")) == 10, "there is no hurry while nothing else is asked for"
    d.now_ms += 60_000
    d.settle()
    assert len(d.served("i")) == 8, "40 % of 20"
    row = next(r for r in report(d)["instances"] if r["instance_id"] == "i")
    assert row["retiring"] == {
        "share": 0.4, "allowed_bytes": 8 * BLOCK, "seconds_left": 40, "empty": False,
    }  # fmt: skip
    d.now_ms += 41_000
    d.settle()
    assert d.served("i") == []
    row = next(r for r in report(d)["instances"] if r["instance_id"] == "i")
    assert row["retiring"]["empty"]
    assert d.usage()["used_bytes"] == 0


def test_blocks_of_a_replaced_instance_go_first() -> None:
    d = driver(10, "i", "j")
    d.write("j", [1, 2, 3])
    d.now_ms += 1_000
    d.write("i", [1, 2, 3])
    handover(d)
    d.touch("i", [1, 2, 3])  # however recent
    d.settle([Want("j", 6 * BLOCK, 6)])
    assert (d.served("i"), d.served("j")) == ([1], [1, 2, 3])


def test_a_replaced_instance_cannot_grow_beyond_its_share() -> None:
    d = driver(20, "i", "j")
    d.write("i", range(6))
    handover(d)
    d.now_ms += 60_000
    d.write("i", [6, 7])
    with pytest.raises(QuotaExceeded, match="retires"):
        d.start("i", [8], "8" * 32)


def test_pinned_blocks_of_a_replaced_instance_stay_until_they_are_unpinned() -> None:
    d = driver(20, "i", "j")
    d.write("i", [1, 2])
    d.pin("i", "p", [1])
    handover(d)
    d.now_ms += 200_000
    d.settle()
    assert d.served("i") == [1]
    d.unpin("i", "p")
    d.now_ms += 2_000
    d.settle()
    assert d.served("i") == []


def test_a_replacement_can_be_taken_back() -> None:
    d = driver(20, "i", "j")
    d.write("i", range(10))
    handover(d)
    d.now_ms += 90_000
    d.settle()
    assert len(d.served("i")) == 2
    d.write("j", range(4))
    d.set_instance(instance("i"))
    d.set_instance(instance("j", retiring_since_s=d.now_s, retiring_seconds=100))
    d.write("i", range(20, 26))
    d.now_ms += 101_000
    d.settle()
    assert (len(d.served("i")), d.served("j")) == (8, [])


def test_a_replacement_goes_on_after_a_restart() -> None:
    d = driver(20, "i", "j")
    d.write("i", range(10))
    handover(d)
    d.restart()
    d.now_ms += 101_000
    d.settle()
    assert d.served("i") == []


def test_versions_share_no_blocks() -> None:
    d = driver(20, "i", "j")
    d.write("i", [1, 2])
    handover(d)
    assert d.start("j", [1, 2], "1" * 32).exists.tolist() == [False, False]


# ------------------------------------------------------------------------------------ the report


def test_the_report_names_what_holds_a_tier() -> None:
    d = two_tiers(40, shm=10, nfs=30, high=0.8, low=0.5)
    for key in range(9):
        d.write("i", [key])
        d.now_ms += 1_000
    d.settle()
    d.start("i", [20], "2" * 32)
    fast, slow = report(d)["tiers"]
    assert (fast["storage_type"], fast["storages"], fast["quota_bytes"]) == (
        "ST_TAIRMEMPOOL", ["shm"], 10 * BLOCK,
    )  # fmt: skip
    assert (fast["used_bytes"], fast["reserved_bytes"], fast["blocks"]) == (5 * BLOCK, BLOCK, 5)
    assert (fast["high_bytes"], fast["low_bytes"]) == (8 * BLOCK, 5 * BLOCK)
    assert (slow["used_bytes"], slow["blocks"], slow["coldest_age_s"]) == (4 * BLOCK, 4, 9.0)
    whole = report(d)
    assert (whole["quota_bytes"], whole["used_bytes"], whole["blocks"]) == (40 * BLOCK, 9 * BLOCK, 9)


def test_the_report_tells_how_fast_a_group_fills() -> None:
    d = driver(100)
    for key in range(10):
        d.write("i", [key])
        d.now_ms += 1_000
    told = report(d)
    assert told["fill_bytes_per_s"] == pytest.approx(BLOCK, rel=0.3)
    assert told["seconds_to_full"] == pytest.approx(90, rel=0.3)
    assert report(driver(10))["seconds_to_full"] is None


def test_an_empty_group_reports() -> None:
    told = report(driver(10))
    assert (told["used_bytes"], told["tiers"][0]["coldest_age_s"], told["pins"]) == (0, None, [])
