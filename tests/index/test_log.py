"""The log makes an equal index elsewhere, in order, without gaps, by one owner."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.records import PinRecord, SessionKind, SessionRecord, TrashRecord
from kvcm_ray.errors import Fenced
from kvcm_ray.index import IndexReader, IndexReplica, IndexWriter, LogGap, batch


@pytest.fixture
def open_replica(tmp_path: Path) -> Iterator[Callable[..., IndexReplica]]:
    opened = []

    def opener(path: Path | None = None, **options: Any) -> IndexReplica:
        replica = IndexReplica(path or tmp_path / "replica", instance_tag="i-1", **options)
        opened.append(replica)
        return replica

    yield opener
    for replica in opened:
        replica.close()


def random_commits(writer: IndexWriter, build: Any, seed: int, count: int) -> None:
    """Everything that can be in a log, in random order."""
    chance = np.random.default_rng(seed)
    there: list[int] = writer_keys(writer)
    for number in range(count):
        with writer.begin() as changes:
            new = np.setdiff1d(chance.integers(-50, 200, 20), there)
            parent = int(chance.choice(there)) if there else None
            changes.add_blocks(new, build.locations(new, number + 1), parent, number)
            there.extend(new.tolist())
            moved = chance.choice(there, 6, replace=False)
            changes.move_blocks(moved, build.locations(moved, number + 2))
            copied = chance.choice(there, 4, replace=False)
            changes.put_copies(copied, build.locations(copied, number + 3))
            changes.put_pin(PinRecord(f"pin-{number % 4}", "i-1", moved, number))
            changes.drop_pin(f"pin-{(number + 2) % 4}")
            gone = chance.choice(there, 12, replace=False)
            changes.drop_copies(gone)
            changes.remove_blocks(gone)
            there = [key for key in there if key not in set(gone.tolist())]
            changes.put_segment(build.segment(number % 4))
            changes.remember(f"event-{number}", b"answer")
            changes.put_trash(TrashRecord(number, "i-1", number, build.locations(gone)))
            changes.drop_trash(max(number - 3, 0))
            changes.put_session(session(f"{number % 5:032}", number + 1, gone, build))
            changes.drop_session(f"{(number + 2) % 5:032}")
            if number % 7 == 0:
                changes.drop_segment(2)


def session(name: str, generation: int, keys: np.ndarray, build: Any) -> SessionRecord:
    flags = np.zeros(len(keys), np.bool_)
    at = build.locations(keys, generation)
    record = SessionRecord(name, "event", "i-1", generation, 5, 6, "store", None, flags, keys, at, flags)
    if generation % 2:
        record.kind, record.source = SessionKind.MOVE, build.locations(keys, 99)
    return record


def writer_keys(writer: IndexWriter) -> list[int]:
    with writer.begin() as changes:
        found: list[int] = changes.select_written(0, 2**32 - 1).tolist()
    return found


def test_replay_makes_an_equal_index(
    open_writer: Callable[..., IndexWriter], open_replica: Callable[..., IndexReplica], build: Any
) -> None:
    writer = open_writer()
    random_commits(writer, build, seed=1, count=60)
    writer.close()
    writer = open_writer()  # the claim of the next epoch is in the log too
    random_commits(writer, build, seed=2, count=10)
    replica = open_replica()
    entries = list(writer.log(1))
    assert [entry.seq for entry in entries] == list(range(1, writer.stats().commit_seq + 1))
    assert all(replica.apply(entry) for entry in entries)
    tables = build.dump(replica)
    assert tables["copies"]
    assert tables["pins"]
    assert tables == build.dump(writer)
    assert not any(replica.apply(entry) for entry in entries[-3:]), "applied once"
    assert build.dump(replica) == build.dump(writer)


def test_a_repair_is_in_the_log(
    writer: IndexWriter, open_replica: Callable[..., IndexReplica], build: Any
) -> None:
    keys = build.keys(1, 2, 3, 4)
    with writer.begin() as changes:
        changes.put_segment(build.segment(0))
        changes.add_blocks(keys, build.locations(keys), None, 1)
        changes.put_copies(keys, build.locations(keys, 2))
        changes.put_copies(keys[:1], build.locations(keys[:1], 2, segment=9))
        changes.remove_blocks(keys[1:2])
    found = writer.recover()
    assert found.copy_keys.tolist() == [3, 4], "neither in an unknown segment nor of an absent block"
    replica = open_replica()
    for entry in writer.log(1):
        replica.apply(entry)
    assert build.dump(replica) == build.dump(writer)


def test_a_replica_takes_over(
    open_writer: Callable[..., IndexWriter], open_replica: Callable[..., IndexReplica], build: Any
) -> None:
    writer = open_writer()
    keys = build.keys(1, 2, 3)
    with writer.begin() as changes:
        changes.put_segment(build.segment(0))
        changes.add_blocks(keys, build.locations(keys), None, 1)
    replica = open_replica()
    for entry in writer.log(1):
        replica.apply(entry)
    replica.close()
    heir = open_writer(replica.path)
    assert heir.epoch == writer.epoch + 1
    assert len(heir.recover().blocks) == 3
    with writer.begin() as changes:
        changes.remember("too late", b"")
    (late,) = writer.log(heir.stats().commit_seq)
    heir.close()
    with pytest.raises(Fenced, match="of epoch 1, which has been replaced"):
        open_replica(replica.path).apply(type(late)(late.seq + 1, late.payload))


def test_a_gap_asks_for_a_snapshot(
    writer: IndexWriter,
    open_replica: Callable[..., IndexReplica],
    open_writer: Callable[..., IndexWriter],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    build: Any,
) -> None:
    """The log is bounded in bytes; a snapshot and the entries after it make an equal index."""
    monkeypatch.setattr(batch, "LOG_BYTES_MAX", 20_000)
    random_commits(writer, build, seed=3, count=40)
    stats = writer.stats()
    assert stats.log_first > 1
    assert stats.log_bytes <= 20_000
    assert len(build.dump(writer)["log"]) == stats.commit_seq - stats.log_first + 1
    with pytest.raises(LogGap, match=r"log entry 1 is not kept; the log holds \d+\.\.\d+"):
        list(writer.log(1))
    with pytest.raises(LogGap):
        list(writer.log(stats.commit_seq + 2))
    assert list(writer.log(stats.commit_seq + 1)) == []
    (last,) = writer.log(stats.commit_seq)
    replica = open_replica()
    with pytest.raises(LogGap, match="does not follow 0"):
        replica.apply(last)

    writer.snapshot(tmp_path / "snapshot")
    random_commits(writer, build, seed=4, count=10)
    shutil.move(tmp_path / "snapshot", tmp_path / "elsewhere")
    replica = open_replica(tmp_path / "elsewhere")
    for entry in writer.log(replica.stats().commit_seq + 1):
        replica.apply(entry)
    assert build.dump(replica) == build.dump(writer)
    reader = IndexReader(replica.path)
    assert reader.verify() == []
    assert list(reader.log(stats.commit_seq)) == list(writer.log(stats.commit_seq))
    reader.close()


def test_an_aborted_batch_is_not_logged(writer: IndexWriter, build: Any) -> None:
    before = writer.stats().commit_seq
    with pytest.raises(ZeroDivisionError), writer.begin() as changes:
        changes.remember("x", b"") or 1 // 0
    with writer.begin():
        pass
    assert writer.stats().commit_seq == before
