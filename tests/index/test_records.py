"""Sessions, trash, segments, answers and counters come back as they were put."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core import limits
from kvcm_ray.core.model import Durability
from kvcm_ray.core.records import SessionRecord, TrashRecord
from kvcm_ray.index import IndexReader, IndexWriter, boot


def session_of(build: Any, name: str = "s" * 32, generation: int = 7) -> SessionRecord:
    keys = build.keys(5, -6, 5)
    return SessionRecord(
        session_id=name,
        event_id="event",
        instance_id="i-1",
        generation=generation,
        deadline_ms=123_456,
        lease_ms=30_000,
        storage="store",
        parent_key=-(2**63),
        exists=np.array([True, False, False, False]),
        keys=keys,
        locations=build.locations(keys, generation),
        removed=np.array([False, True, False]),
    )


def same(a: Any, b: Any) -> bool:
    left, right = asdict(a), asdict(b)
    return repr(left) == repr(right)


def test_round_trip(writer: IndexWriter, reader: IndexReader, build: Any) -> None:
    session, other = session_of(build), session_of(build, "t" * 32, 8)
    trash = TrashRecord(4, "i-1", 99, build.locations(build.keys(1, 2, 9)))
    segment = build.segment(3)
    keys = build.keys(10, 11, 12)
    with writer.begin() as batch:
        batch.put_segment(segment)
        batch.put_session(session)
        batch.put_session(other)
        batch.put_trash(trash)
        batch.remember("event-1", b"first")
        batch.remember("event-2", b"second")
        batch.add_blocks(keys, build.locations(keys, 5, segment=3), None, 1_700_000_000)
    with writer.begin() as batch:
        batch.drop_session("t" * 32)
    assert same(reader.session("s" * 32), session)
    assert reader.session("t" * 32) is None
    assert reader.session("") is None
    assert reader.segments() == {3: segment}
    assert reader.segment(3) == segment
    assert reader.segment(4) is None
    assert [same(record, trash) for record in reader.trash()] == [True]
    found = writer.recover()
    assert found.segments == [segment]
    assert [same(record, session) for record in found.sessions] == [True]
    assert [same(record, trash) for record in found.trash] == [True]
    assert found.answers == {"event-1": b"first", "event-2": b"second"}
    assert list(found.answers) == ["event-1", "event-2"]
    assert sorted(found.used.slot.tolist()) == [10, 11, 12]
    assert found.key_count == 3
    numbers = (found.next_generation, found.next_trash_id, found.next_segment_id)
    assert numbers == (9, 5, 4), "also beyond records that are gone"
    with writer.begin() as batch:
        batch.drop_trash(4)
        batch.drop_segment(3)
    found = writer.recover()
    assert (found.trash, found.segments, found.key_count) == ([], [], 0)
    assert reader.verify() == []


def test_a_new_index_is_empty(writer: IndexWriter, reader: IndexReader, build: Any) -> None:
    found = writer.recover()
    assert (found.key_count, found.sessions, found.answers) == (0, [], {})
    assert (found.next_generation, found.next_trash_id, found.next_segment_id) == (1, 1, 1)
    assert reader.match(build.keys()).length == 0
    assert reader.match(build.keys(1)).length == 0
    assert reader.lookup(build.keys())[0].tolist() == []
    assert writer.epoch == 1


def test_old_answers_are_forgotten(writer: IndexWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ANSWERS_REMEMBERED_MAX", 3)
    for number in range(5):
        with writer.begin() as batch:
            batch.remember(str(number), b"")
    assert list(writer.recover().answers) == ["2", "3", "4"]


def test_times_of_another_boot_become_zero(
    open_writer: Callable[..., IndexWriter], monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    """CLOCK_MONOTONIC starts again with each boot, so old deadlines mean nothing."""
    writer = open_writer(durability=Durability.COMMIT)
    session = session_of(build)
    with writer.begin() as batch:
        batch.put_session(session)
        batch.put_trash(TrashRecord(1, "i-1", 99, build.locations(build.keys(1))))
    writer.close()
    monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
    found = open_writer(durability=Durability.COMMIT).recover()
    assert same(found.sessions[0], replace(session, deadline_ms=0))
    assert found.trash[0].due_ms == 0


def test_damaged_records_are_dropped_on_recovery(
    writer: IndexWriter, reader: IndexReader, build: Any
) -> None:
    keys, more = build.keys(1, 2, 3), build.keys(4, 5, 6)
    with writer.begin() as batch:
        batch.put_segment(build.segment(0))
        batch.add_blocks(keys, build.locations(keys), None, 1)
        batch.add_blocks(more, build.locations(more), None, 1)
        batch.put_session(session_of(build))
    with writer._shared.env.begin(write=True) as txn:
        for table in (writer._shared.tables.runs, writer._shared.tables.sessions):
            cursor = txn.cursor(table)
            cursor.first()
            key, value = cursor.item()
            txn.put(key, value[:-1] + bytes([value[-1] ^ 1]), db=table)
    assert reader.match(keys).length == 0
    assert reader.corrupt_records > 0
    told = reader.verify()
    assert told[0] == "run 1 is damaged"
    assert told[1].startswith("the counters say 6 blocks, there are 3")
    assert told[2].endswith("of sessions is damaged")
    assert len(told) == 3, "what leads to a damaged record is not told again"
    found = writer.recover()
    assert (found.key_count, found.sessions) == (3, [])
    assert sorted(found.used.slot.tolist()) == [4, 5, 6]
    assert reader.verify() == []
    with writer.begin() as batch:
        batch.add_blocks(keys, build.locations(keys, 9), None, 1)
    assert reader.match(keys).locations.generation.tolist() == [9, 9, 9]
