"""Moving bytes on real storages: grouping, deadlines, storages that hang or fail."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.client import transfer as transfer_module
from kvcm_ray.client.runtime import THREADS_PER_POOL, AsyncRuntime, SyncRuntime, drive
from kvcm_ray.client.transfer import Blocks, Transfer, group_by_segment, pieces
from kvcm_ray.core.model import LocationSpecInfo, NfsSpec, Segment, ShmSpec, StorageConfig
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.errors import Unavailable
from kvcm_ray.storage_adapters import SegmentOwner, open_storage
from kvcm_ray.traces import block_pattern

SIZE = 256
SPECS = (LocationSpecInfo("tp0", SIZE), LocationSpecInfo("tp1", SIZE))
OWNER = SegmentOwner("g", "i", "00000000")


def located(pairs: list[tuple[int, int]], segments: dict[int, Segment], storages: Any) -> Blocks:
    numbers = np.array(pairs, np.uint32).reshape(-1, 2)
    keys = np.arange(1, len(pairs) + 1, dtype=np.int64) * 1_000_003
    generations = np.full(len(pairs), 7, np.uint32)
    where = BlockLocations(numbers[:, 0].copy(), numbers[:, 1].copy(), generations)
    return Blocks(keys, where, segments, storages)


@pytest.fixture(params=["file", "shm"])
def blocks(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Eight blocks, interleaved over two segments of one storage."""
    root = tmp_path if request.param == "file" else Path("/dev/shm") / f"kvcm-test-{tmp_path.name}"
    root.mkdir(exist_ok=True)
    spec = NfsSpec(str(root)) if request.param == "file" else ShmSpec(str(root))
    key = "nfs" if request.param == "file" else "shm"
    config = StorageConfig("st", **{key: spec})
    segments = {n: Segment(n, "st", f"i/00000000-{n:06x}", SPECS, 16) for n in (1, 2)}
    adapter = open_storage(config)
    for segment in segments.values():
        adapter.create_segment(segment, OWNER)
    pairs = [(1, 0), (1, 1), (2, 5), (1, 2), (2, 6), (2, 9), (1, 15), (1, 4)]
    yield located(pairs, segments, {"st": config})
    for segment in segments.values():
        adapter.drop_segment(segment)
    if root != tmp_path:
        root.rmdir()


@pytest.fixture
def moving() -> Any:
    found = Transfer(SyncRuntime())
    yield found
    found.close()


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_groups_keep_order_and_leave_unknown_segments_out() -> None:
    segments = {n: Segment(n, "st", f"p{n}", SPECS, 16) for n in (3, 9)}
    blocks = located([(9, 0), (3, 1), (9, 2), (4, 0), (3, 3)], segments, {})
    groups = [(g.segment.segment_id, g.index.tolist()) for g in group_by_segment(blocks)]
    assert groups == [(9, [0, 2]), (3, [1, 4])]
    assert group_by_segment(blocks.take(slice(0, 0))) == []


def test_pieces_are_bounded() -> None:
    index = np.arange(10)
    assert [p.tolist() for p in pieces(index, transfer_module.PIECE_BYTES // 4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9],
    ]  # fmt: skip
    assert [len(p) for p in pieces(index[:3], transfer_module.PIECE_BYTES * 2)] == [1, 1, 1]


@pytest.mark.parametrize("as_list", [False, True])
def test_what_is_written_is_read(blocks: Blocks, moving: Transfer, as_list: bool) -> None:
    data = block_pattern(blocks.keys, SIZE)
    rows: Any = list(data) if as_list else data
    assert drive(moving.write("tp1", blocks, rows, soon())).flags.all()
    out = np.zeros_like(data)
    target: Any = list(out) if as_list else out
    moved = drive(moving.read("tp1", blocks, target, soon()))
    assert moved.flags.all()
    assert moved.error is None
    assert (out == data).all()
    assert not drive(moving.read("tp0", blocks, target, soon())).flags.any(), "never written"


def test_without_a_deadline_it_is_read_too(blocks: Blocks, moving: Transfer) -> None:
    data = block_pattern(blocks.keys, SIZE)
    drive(moving.write("tp0", blocks, data, soon()))
    out = np.zeros_like(data)
    assert drive(moving.read("tp0", blocks, out, None)).flags.all()
    assert (out == data).all()


def test_a_missing_segment_costs_its_blocks_only(blocks: Blocks, moving: Transfer) -> None:
    data = block_pattern(blocks.keys, SIZE)
    drive(moving.write("tp0", blocks, data, soon()))
    (config,) = blocks.storages.values()
    open_storage(config).drop_segment(blocks.segments[2])
    moving.close()  # as a process would that has it not mapped
    expected = blocks.locations.segment == 1
    out = np.zeros_like(data)
    moved = drive(moving.read("tp0", blocks, out, soon()))
    assert moved.flags.tolist() == expected.tolist()
    assert (out[expected] == data[expected]).all()
    written = drive(moving.write("tp0", blocks, data, soon()))
    assert written.flags.tolist() == expected.tolist()
    assert written.error is not None
    assert written.error.code == "KVCM-S003"


def test_an_unregistered_storage_is_a_miss(blocks: Blocks, moving: Transfer) -> None:
    lost = Blocks(blocks.keys, blocks.locations, blocks.segments, {})
    moved = drive(moving.read("tp0", lost, np.zeros((8, SIZE), np.uint8), soon()))
    assert not moved.flags.any()
    assert "st" in str(moved.error)


def test_an_unknown_spec_is_a_miss(blocks: Blocks, moving: Transfer) -> None:
    moved = drive(moving.read("other", blocks, np.zeros((8, SIZE), np.uint8), soon()))
    assert not moved.flags.any()


def test_nothing_is_written_after_the_lease(blocks: Blocks, moving: Transfer) -> None:
    data = block_pattern(blocks.keys, SIZE)
    moved = drive(moving.write("tp0", blocks, data, time.monotonic() + 0.05))
    assert not moved.flags.any()
    assert isinstance(moved.error, Unavailable)
    assert not drive(moving.read("tp0", blocks, np.zeros_like(data), soon())).flags.any()


def test_a_write_stops_in_the_middle_when_the_lease_ends(
    blocks: Blocks, moving: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "PIECE_BYTES", SIZE)  # a block a piece
    monkeypatch.setattr(transfer_module, "LEASE_MARGIN_S", 0.0)
    storage = moving._storage("st", blocks.storages)
    really_write = storage.adapter.write

    def slow_write(*args: Any) -> None:
        time.sleep(0.04)
        really_write(*args)

    monkeypatch.setattr(storage.adapter, "write", slow_write)
    deadline_s = time.monotonic() + 0.1
    moved = drive(moving.write("tp0", blocks, block_pattern(blocks.keys, SIZE), deadline_s))
    assert 0 < moved.flags.sum() < len(blocks)
    assert isinstance(moved.error, Unavailable)


class Hang:
    """Makes a storage's reads wait until it is released."""

    def __init__(self, moving: Transfer, blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        self.calls = 0
        adapter = moving._storage("st", blocks.storages).adapter
        really_read = adapter.read

        def read(*args: Any) -> Any:
            self.calls += 1
            self.release.wait(10)
            return really_read(*args)

        monkeypatch.setattr(adapter, "read", read)


@pytest.mark.parametrize("blocks", ["file"], indirect=True)
def test_a_hanging_storage_is_a_miss_in_time_and_recovers(
    blocks: Blocks, moving: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = block_pattern(blocks.keys, SIZE)
    drive(moving.write("tp0", blocks, data, soon()))
    hang = Hang(moving, blocks, monkeypatch)
    out = np.zeros_like(data)
    for _ in range(THREADS_PER_POOL):
        begin_s = time.monotonic()
        moved = drive(moving.read("tp0", blocks, out, soon(0.1)))
        assert time.monotonic() - begin_s < 1.0
        assert not moved.flags.any()
        assert isinstance(moved.error, Unavailable)
    calls = hang.calls
    begin_s = time.monotonic()
    assert not drive(moving.read("tp0", blocks, out, soon(5))).flags.any()
    assert time.monotonic() - begin_s < 1.0, "all threads are stuck: refused at once"
    assert hang.calls == calls
    hang.release.set()
    time.sleep(0.2)
    assert (out == 0).all(), "a read that was given up must not fill the caller's buffers"
    assert drive(moving.read("tp0", blocks, out, soon())).flags.all()
    assert (out == data).all()


@pytest.mark.parametrize("blocks", ["file"], indirect=True)
def test_a_cancelled_task_leaves_the_buffers_alone(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    moving = Transfer(AsyncRuntime())
    data = block_pattern(blocks.keys, SIZE)
    out = np.zeros_like(data)

    async def scene() -> None:
        assert (await moving.write("tp0", blocks, data, soon())).flags.all()
        hang = Hang(moving, blocks, monkeypatch)
        task = asyncio.create_task(moving.read("tp0", blocks, out, soon()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hang.release.set()
        await asyncio.sleep(0.1)
        assert (out == 0).all()
        assert (await moving.read("tp0", blocks, out, soon())).flags.all()

    asyncio.run(scene())
    moving.close()
    assert (out == data).all()
