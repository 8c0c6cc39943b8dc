"""Making room: demotion, promotion, eviction, waiting writes, pausing, draining. Real bytes, no Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray import fsck
from kvcm_ray.core.model import InstanceGroupQuota, ReclaimerSettings
from kvcm_ray.core.requests import LeaseBlocks, PinBlocks, RemoveBlocks, Touch, UnpinBlocks, WriteStarted
from kvcm_ray.errors import InvalidArgument, QuotaExceeded, StorageIOError, Unavailable
from kvcm_ray.testing.blocks import instance, some_keys, start_request
from kvcm_ray.testing.reclaim_lab import ReclaimLab

MIB = 1 << 20
BLOCK = 16 * 1024

MakeLab = Callable[..., ReclaimLab]


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[MakeLab]:
    made: list[ReclaimLab] = []

    def make(*tiers: str, **marks: float) -> ReclaimLab:
        lab = ReclaimLab(tmp_path, tiers, **marks)
        made.append(lab)
        lab.registry.register_instance(instance("one", size=BLOCK))
        return lab

    yield make
    for lab in made:
        lab.close()


def sound(lab: ReclaimLab) -> None:
    """Nothing is lost or left, counted by the index and by the storages."""
    lab.wait_until(lab.settled)
    report = fsck.check(lab.data_dir, deep=True)
    assert report.ok, report


def test_cold_blocks_go_down_and_come_up_again(make_lab: MakeLab) -> None:
    lab = make_lab("shm:2MiB", "file:8MiB", high=0.6, low=0.3)
    prompts = [some_keys(32) for _ in range(8)]  # 4 MiB
    for keys in prompts:
        lab.put("one", keys)
        lab.wait_until(lab.settled)
    places = [set(lab.where("one", keys)) for keys in prompts]
    assert places[0] == {"nfs_01"}
    assert places[-1] == {"shm_01"}
    assert all(lab.readable("one", keys).all() for keys in prompts)
    assert lab.reclaimed("demoted_blocks") >= 128
    lab.service.submit([Touch("one", prompts[0], 32)]).result(10)
    lab.wait_until(lambda: set(lab.where("one", prompts[0])) == {"shm_01"})
    assert lab.readable("one", prompts[0]).all()
    assert all(lab.readable("one", keys).all() for keys in prompts)
    assert lab.reclaimed("promoted_blocks") == 32
    sound(lab)


@pytest.mark.parametrize("marks", [{}, {"high": 0.8, "low": 0.7}])
def test_eight_writers_stay_within_the_quota(make_lab: MakeLab, marks: dict[str, float]) -> None:
    lab = make_lab("shm:4MiB", **marks)
    capacity, over, stop = 4 * MIB, list[int](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            usage = lab.usage()
            if usage["used_bytes"] + usage["reserved_bytes"] > capacity:
                over.append(usage["used_bytes"])

    problems: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(25):
                lab.put("one", some_keys(16))
        except BaseException as error:
            problems.append(error)

    watcher = threading.Thread(target=watch)
    writers = [threading.Thread(target=write) for _ in range(8)]
    for thread in [watcher, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    watcher.join()
    assert not problems, problems[0]
    assert not over
    assert lab.reclaimed("evicted_blocks") >= 8 * 25 * 16 - capacity // BLOCK
    sound(lab)


def test_a_waiting_write_gets_the_refusal_at_its_deadline(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB")
    lab.put("one", some_keys(48))
    lab.pool.dead = True
    began = time.monotonic()
    answer = lab.waiting(start_request("one", some_keys(32)), 0.3).result(5)
    assert isinstance(answer, QuotaExceeded)
    assert 0.25 < time.monotonic() - began < 2
    assert answer.details["reclaimable"] > 0
    assert lab.usage()["waiting"] == {"writes": 0, "bytes": 0}
    assert isinstance(lab.start("one", some_keys(8)), WriteStarted)  # others have all the room again


def test_nobody_overtakes_a_waiting_write(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB")
    lab.put("one", some_keys(48))  # of 64
    lab.pool.dead = True
    big = lab.waiting(start_request("one", some_keys(32)), 1.0)
    small = lab.waiting(start_request("one", some_keys(4)), 0.5)
    lab.wait_until(lambda: lab.usage()["waiting"] == {"writes": 2, "bytes": 36 * BLOCK})
    (now,) = lab.service.submit([start_request("one", some_keys(4))]).result(10)
    assert isinstance(now, QuotaExceeded)
    assert isinstance(small.result(5), QuotaExceeded)
    assert isinstance(big.result(5), QuotaExceeded)
    (after,) = lab.service.submit([start_request("one", some_keys(4))]).result(10)
    assert isinstance(after, WriteStarted)


def test_waiting_writes_are_served_in_order(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB")
    lab.put("one", some_keys(64))
    lab.pool.dead = True
    waiting = [lab.waiting(start_request("one", some_keys(16))) for _ in range(3)]
    lab.wait_until(lambda: lab.usage()["waiting"]["bytes"] == 48 * BLOCK)
    order: list[int] = []
    for number, future in enumerate(waiting):
        future.add_done_callback(lambda _, number=number: order.append(number))
    lab.pool.dead = False
    assert all(isinstance(future.result(10), WriteStarted) for future in waiting)
    assert order == [0, 1, 2]


def test_a_waiting_write_whose_caller_is_gone_takes_nothing(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB")
    lab.put("one", some_keys(64))
    lab.pool.dead = True
    gone = lab.waiting(start_request("one", some_keys(32)))
    lab.wait_until(lambda: lab.usage()["waiting"]["bytes"] == 32 * BLOCK)
    assert gone.cancel()
    lab.pool.dead = False
    assert isinstance(lab.start("one", some_keys(32)), WriteStarted)
    assert lab.usage()["sessions"] == 1


def test_too_many_waiting_writes_are_refused(make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcm_ray.actors.waiting.WRITES_MAX", 3)
    lab = make_lab("file:1MiB")
    lab.put("one", some_keys(64))
    lab.pool.dead = True
    waiting = [lab.waiting(start_request("one", some_keys(8)), 0.5) for _ in range(4)]
    assert isinstance(waiting[3].result(5), Unavailable)
    assert [type(future.result(5)) for future in waiting[:3]] == [QuotaExceeded] * 3


def test_pins_and_leases_outlast_pressure(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB")
    pinned, leased = some_keys(16), some_keys(8)
    lab.put("one", pinned)
    lab.put("one", leased)
    pin = PinBlocks("p", "one", "system", pinned)
    answers = lab.service.submit([pin, LeaseBlocks("one", leased, 60_000)]).result(10)
    assert [answers[0].blocks, answers[1].blocks] == [16, 8]
    lab.restart()
    lab.service.submit([LeaseBlocks("one", leased, 60_000)]).result(10)  # leases do not outlast us
    for _ in range(12):
        lab.put("one", some_keys(16))
    assert lab.readable("one", pinned).all()
    assert lab.readable("one", leased).all()
    report = lab.service.capacity().result(10)
    assert (report["pinned_bytes"], report["leased_bytes"]) == (16 * BLOCK, 8 * BLOCK)
    (gone,) = lab.service.submit([UnpinBlocks("u", "one", "system")]).result(10)
    assert gone.keys == 0
    for _ in range(4):
        lab.put("one", some_keys(16))
    assert not lab.readable("one", pinned).any()
    sound(lab)


def test_paused_reclaimers_do_nothing(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB", high=0.5)
    lab.registry.set_reclaimer_settings(ReclaimerSettings(paused=True))
    keys = some_keys(64)
    lab.put("one", keys)
    lab.service.submit([RemoveBlocks("r", "one", keys[:8])]).result(10)
    assert isinstance(lab.start("one", some_keys(16)), QuotaExceeded)
    time.sleep(0.2)
    assert lab.readable("one", keys[8:]).all()
    assert lab.usage()["pending_delete_bytes"] == 8 * BLOCK
    lab.registry.set_reclaimer_settings(ReclaimerSettings(paused=False))
    lab.wait_until(lambda: lab.usage()["used_bytes"] <= MIB // 2)
    assert isinstance(lab.start("one", some_keys(16)), WriteStarted)


def test_the_rate_is_kept_and_can_be_changed(make_lab: MakeLab) -> None:
    lab = make_lab("shm:16MiB", "file:64MiB")
    lab.registry.set_reclaimer_settings(ReclaimerSettings(1, 2 * MIB))
    for _ in range(32):
        lab.put("one", some_keys(64))  # 32 MiB: 16 MiB and more must go down
    lab.registry.set_reclaimer_settings(ReclaimerSettings(1, 4 * MIB))
    time.sleep(0.1)
    before = lab.reclaimed("demoted_blocks")
    began = time.monotonic()
    time.sleep(1.5)
    moved = (lab.reclaimed("demoted_blocks") - before) * BLOCK
    assert moved / (time.monotonic() - began) < 8 * MIB
    lab.registry.set_reclaimer_settings(ReclaimerSettings(4))
    assert lab.pool.sizes[-1] == 4
    sound(lab)


def test_impossible_pools_are_refused(make_lab: MakeLab) -> None:
    lab = make_lab("file:1MiB")
    for wrong in (ReclaimerSettings(0), ReclaimerSettings(65), ReclaimerSettings(2, -1)):
        with pytest.raises(InvalidArgument):
            lab.registry.set_reclaimer_settings(wrong)
    assert lab.registry.reclaimer_settings() == ReclaimerSettings()
    lab.registry.set_reclaimer_settings(ReclaimerSettings(3, 5, True))
    assert lab.view.reclaimer_settings() == ReclaimerSettings(3, 5, True)


def test_a_drained_storage_becomes_empty(make_lab: MakeLab) -> None:
    lab = make_lab("shm:2MiB", "file:8MiB")
    prompts = [some_keys(32) for _ in range(8)]
    for keys in prompts:
        lab.put("one", keys)
    lab.wait_until(lab.settled)
    storages = lab.view.storages()
    shm = dataclasses.replace(storages["shm_01"], is_draining=True)
    lab.registry._commit(put=[shm])
    lab.pool.refresh("default")
    lab.wait_until(lambda: all(set(lab.where("one", keys)) == {"nfs_01"} for keys in prompts))
    assert all(lab.readable("one", keys).all() for keys in prompts)
    sound(lab)
    (draining,) = lab.service.capacity().result(10)["draining"]
    assert (draining["storage"], draining["empty"]) == ("shm_01", True)
    assert list(Path(shm.root_path).glob("*/*/segment.json")) == []


def test_a_smaller_quota_acts_at_once(make_lab: MakeLab) -> None:
    lab = make_lab("file:4MiB")
    lab.update(lambda g: dataclasses.replace(g, quota=InstanceGroupQuota(4 * MIB)))
    for _ in range(8):
        lab.put("one", some_keys(32))
    assert lab.usage()["used_bytes"] == 4 * MIB
    lab.update(lambda g: dataclasses.replace(g, quota=InstanceGroupQuota(MIB)))
    lab.wait_until(lambda: lab.usage()["used_bytes"] <= MIB)
    sound(lab)


def test_a_full_lower_tier_costs_blocks_and_nothing_else(make_lab: MakeLab, tmp_path: Path) -> None:
    """Its directory cannot be made; what would have gone down is dropped."""
    lab = make_lab("shm:2MiB", "file:8MiB", high=0.6, low=0.3)
    root = tmp_path / "tiers" / "nfs_01"
    root.rmdir()
    root.write_text("in the way")
    written = 0
    for _ in range(40):
        with contextlib.suppress(StorageIOError):  # there was room below only
            written += len(lab.put("one", some_keys(16)).locations)
        time.sleep(0.02)
    assert written >= 256
    lab.wait_until(lambda: lab.reclaimed("evicted_blocks") >= written - 128)
    root.unlink()
    root.mkdir()
    sound(lab)


@pytest.mark.parametrize("died", ["reclaimer", "group", "both"])
def test_a_move_survives_deaths(make_lab: MakeLab, died: str) -> None:
    lab = make_lab("shm:2MiB", "file:8MiB")
    lab.registry.set_reclaimer_settings(ReclaimerSettings(paused=True))
    prompts = [some_keys(32) for _ in range(4)]
    for keys in prompts:
        lab.put("one", keys)
    lab.pool.dead = died != "group"
    lab.registry.set_reclaimer_settings(ReclaimerSettings())
    lab.wait_until(lambda: lab.usage()["sessions"] > 0 or lab.reclaimed("demoted_blocks") > 0)
    if died != "reclaimer":
        lab.restart()
    lab.pool.dead = False
    assert all(lab.readable("one", keys).all() for keys in prompts)
    lab.put("one", some_keys(32))
    lab.wait_until(lambda: "nfs_01" in lab.where("one", prompts[0]))
    assert all(lab.readable("one", keys)[lab.where("one", keys) != np.str_("")].all() for keys in prompts)
    sound(lab)


def test_an_unreadable_block_is_not_moved(make_lab: MakeLab) -> None:
    """Its bytes rot in the upper tier: it must not get a fresh checksum below."""
    lab = make_lab("shm:2MiB", "file:8MiB", high=0.5, low=0.25)
    lab.registry.set_reclaimer_settings(ReclaimerSettings(paused=True))
    keys = some_keys(32)
    started = lab.put("one", keys)
    (segment,) = started.segments.values()
    path = Path(lab.view.storages()["shm_01"].root_path) / segment.path / "tp0.dat"
    with path.open("r+b") as file:
        file.seek(int(started.locations.slot[3]) * BLOCK)
        file.write(b"rotten")
    assert lab.readable("one", keys).sum() == 31
    for _ in range(3):
        lab.put("one", some_keys(32))
    lab.registry.set_reclaimer_settings(ReclaimerSettings())
    lab.wait_until(lambda: lab.reclaimed("failed_moves") >= 1)
    assert not lab.readable("one", keys)[3]
    assert lab.where("one", keys)[3] != "nfs_01"
    assert lab.where("one", keys)[31] == "nfs_01"
    lab.wait_until(lab.settled)


def test_a_move_into_an_ended_session_writes_nothing(make_lab: MakeLab) -> None:
    from kvcm_ray.actors.reclaimer import ReclaimerBody

    lab = make_lab("shm:2MiB", "file:8MiB")
    lab.pool.dead = True
    for _ in range(4):
        lab.put("one", some_keys(32))
    lab.wait_until(lambda: lab.usage()["sessions"] > 0)
    lab.service.stop()
    engine = lab.service.engine
    index_path = str(engine.data_dir / "groups" / "default" / f"one-{lab.view.instance('one').uid}")
    body = ReclaimerBody(lab.view)
    reader = body._reader(index_path)
    assert reader is not None
    session = reader.sessions()[0]
    late = dataclasses.replace(session, deadline_ms=time.monotonic_ns() // 1_000_000)
    assert not body._copier.copy(reader, late).any()
    other = dataclasses.replace(session, session_id="x" * 32)
    assert not body._copier.copy(reader, other).any()
    assert body.move(index_path, ["y" * 32]) == {}
    assert body._copier.copy(reader, session).all()
    assert body._copier.copy(reader, session).all()
