"""Fencing, waiting with a deadline, full map, full disk, durability."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.model import Durability
from kvcm_ray.core.records import PinRecord
from kvcm_ray.errors import Fenced, StorageFull, StorageIOError, Unavailable
from kvcm_ray.index import IndexReader, IndexWriter

CHILDREN = Path(__file__).with_name("children.py")


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHILDREN), *arguments], capture_output=True, text=True, timeout=100
    )


def test_the_older_writer_is_fenced(open_writer: Callable[..., IndexWriter], build: Any) -> None:
    old = open_writer()
    keys = build.keys(1, 2, 3)
    with old.begin() as batch:
        batch.add_blocks(keys, build.locations(keys), None, 1)
    new = open_writer()
    assert (old.epoch, new.epoch) == (1, 2)
    before = build.dump(new)
    with pytest.raises(Fenced, match="epoch 2 owns"), old.begin() as batch:
        batch.remove_blocks(keys)
    with pytest.raises(Fenced):
        old.recover()
    assert build.dump(new) == before
    with new.begin() as batch:
        assert batch.remove_blocks(keys) == 3


def test_a_stopped_lock_holder(open_writer: Callable[..., IndexWriter], tmp_path: Path) -> None:
    """The wait ends in a sentence that names it; after its death everything goes on."""
    path = tmp_path / "index"
    writer = open_writer(path)
    holder = subprocess.Popen([sys.executable, str(CHILDREN), "stop_inside", str(path)])
    try:
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
        start = time.monotonic()
        with pytest.raises(Unavailable, match=rf"process {holder.pid} \(state T, stopped: cont"):
            open_writer(path, lock_timeout_s=0.3)
        writer._timeout_s = 0.3
        with pytest.raises(Unavailable), writer.begin():
            pass
        assert time.monotonic() - start < 5
        assert IndexReader(path).commit_seq() == 2, "readers do not wait"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with open_writer(path).begin() as batch:
        batch.remember("x", b"")


def test_a_writer_in_the_same_thread_does_not_hang(
    open_writer: Callable[..., IndexWriter],
) -> None:
    writer = open_writer()
    other = open_writer(lock_timeout_s=0.05)
    with other.begin(), pytest.raises(Unavailable):
        open_writer(lock_timeout_s=0.05)
    with pytest.raises(Fenced), writer.begin():
        pass


def test_writers_take_turns(open_writer: Callable[..., IndexWriter], build: Any) -> None:
    """Two threads with one writer object each: none but the owner changes anything."""
    old, new = open_writer(), open_writer()
    fenced = []

    def hammer() -> None:
        for number in range(50):
            try:
                with old.begin() as batch:
                    batch.remove_blocks(build.keys(number))
            except Fenced:
                fenced.append(number)

    thread = threading.Thread(target=hammer)
    thread.start()
    for number in range(50):
        keys = build.keys(number)
        with new.begin() as batch:
            batch.add_blocks(keys, build.locations(keys), number - 1, 1)
    thread.join()
    assert len(fenced) == 50
    assert new.stats().key_count == 50


def test_a_full_map(open_writer: Callable[..., IndexWriter], build: Any) -> None:
    """Refused with a type; reads and removals work, and after them writing does again."""
    writer = open_writer(map_size=1 << 20)
    added = 0

    def add(number: int) -> None:
        keys = np.arange(number * 32, number * 32 + 32, dtype=np.int64) * 7_919 + 1
        with writer.begin() as batch:
            batch.add_blocks(keys, build.locations(keys), None, 1)

    def fill() -> None:
        nonlocal added
        for added in range(10_000):
            add(added)

    with pytest.raises(StorageFull, match=r"index.* has used its map of 1048576 bytes"):
        fill()
    assert added > 100
    before = writer.stats()
    assert before.key_count == added * 32
    with pytest.raises(StorageFull):
        add(added)
    assert writer.stats() == before, "a refusal changes nothing"
    reader = IndexReader(writer.path)
    assert reader.verify() == []
    with writer.begin() as batch:
        keys = batch.select_written(0, 9)
    with writer.begin() as batch:
        batch.move_blocks(keys[:50], build.locations(keys[:50], 2))
    for grow in (
        lambda batch: batch.put_copies(keys[:1], build.locations(keys[:1])),
        lambda batch: batch.put_pin(PinRecord("pin", "i-1", keys, 0)),
    ):
        with pytest.raises(StorageFull), writer.begin() as batch:
            grow(batch)
    for start in range(0, len(keys), 1000):
        with writer.begin() as batch:
            batch.remove_blocks(keys[start : start + 1000])
    assert writer.stats().key_count == 0
    for number in range(added // 2):
        add(number)
    assert reader.verify() == []
    reader.close()


def test_a_full_disk(tmp_path: Path) -> None:
    """By a file size limit, in another process."""
    done = child("disk_full", str(tmp_path / "index"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageIOError, match="cannot make"):
        IndexWriter(tmp_path / "file" / "index", instance_tag="i")


@pytest.mark.parametrize("durability", list(Durability))
def test_syncs(durability: Durability, open_writer: Callable[..., IndexWriter]) -> None:
    """With `commit` LMDB syncs data and meta page of every commit, with `process` it does not."""
    writer = open_writer(durability=durability)
    flags = writer._shared.env.flags()
    assert flags["sync"] is (durability is Durability.COMMIT)
    assert (flags["metasync"], flags["writemap"], flags["map_async"]) == (True, False, False)


def test_a_stricter_writer_makes_the_environment_stricter(
    open_writer: Callable[..., IndexWriter], build: Any
) -> None:
    loose = open_writer(durability=Durability.PROCESS)
    reader = IndexReader(loose.path)
    keys = build.keys(1, 2)
    with loose.begin() as batch:
        batch.add_blocks(keys, build.locations(keys), None, 1)
    strict = open_writer(durability=Durability.COMMIT)
    assert strict._shared.env.flags()["sync"] is True
    assert reader.match_length(keys) == 2
    with strict.begin() as batch:
        batch.remove_blocks(keys)
    assert reader.match_length(keys) == 0
    reader.close()


def kill_loop(tmp_path: Path, rounds: int, durability: Durability) -> int:
    """kill -9 a writer at random times: all it acknowledged is there. Returns the commits."""
    path, acks = tmp_path / "index", tmp_path / "acks"
    acks.touch()
    chance = np.random.default_rng(rounds)
    for _ in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, str(CHILDREN), "write", str(path), durability.value, str(acks)]
        )
        told = acks.stat().st_size
        while acks.stat().st_size == told and writer.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        assert writer.poll() is None, "it ended by itself"
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        acknowledged = len(acks.read_bytes().split())
        reader = IndexReader(path)
        assert reader.key_count() in (acknowledged * 8, acknowledged * 8 + 8)
        keys = np.arange(1, acknowledged * 8 + 1, dtype=np.int64)
        found = reader.match(keys)
        assert found.length == len(keys), "acknowledged, but lost"
        assert (found.locations.slot == keys).all()
        reader.close()
        # A commit may be done but not acknowledged; the next round would count from it.
        fix_acks(acks, path)
    reader = IndexReader(path)
    assert reader.verify() == []
    reader.close()
    return len(acks.read_bytes().split())


def fix_acks(acks: Path, path: Path) -> None:
    reader = IndexReader(path)
    commits = reader.key_count() // 8
    reader.close()
    acks.write_text("".join(f"{number}\n" for number in range(commits)))


def test_kill_9_ten_times(tmp_path: Path) -> None:
    assert kill_loop(tmp_path, 10, Durability.PROCESS) > 100


@pytest.mark.crash
@pytest.mark.parametrize("durability", list(Durability))
def test_kill_9_fifty_times(tmp_path: Path, durability: Durability) -> None:
    assert kill_loop(tmp_path, 50, durability) > 500
