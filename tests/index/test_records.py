"""Sessions, trash, segments, answers and counters come back as they were put."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core import limits
from kvcm_ray.core.model import Durability
from kvcm_ray.core.records import PinRecord, SessionKind, SessionRecord, TrashRecord
from kvcm_ray.errors import InvalidArgument
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
    source = build.locations(build.keys(77, 78, 77), 6)
    move = replace(session_of(build, "u" * 32, 8), kind=SessionKind.MOVE, source=source)
    pin, unpinned = (PinRecord(name, "i-1", build.keys(-1, 2**62), 5) for name in ("größte", "other"))
    trash = TrashRecord(4, "i-1", 99, build.locations(build.keys(1, 2, 9)))
    segment = build.segment(3)
    keys = build.keys(10, 11, 12)
    with writer.begin() as batch:
        batch.put_segment(segment)
        batch.put_session(session)
        batch.put_session(other)
        batch.put_session(move)
        batch.put_pin(pin)
        batch.put_pin(unpinned)
        batch.put_trash(trash)
        batch.remember("event-1", b"first")
        batch.remember("event-2", b"second")
        batch.add_blocks(keys, build.locations(keys, 5, segment=3), None, 1_700_000_000)
        batch.put_copies(keys[1:], build.locations(keys[1:], 4, segment=3))
    with writer.begin() as batch:
        batch.drop_session("t" * 32)
        batch.drop_pin("other")
        batch.drop_pin("never there")
    assert same(reader.session("s" * 32), session)
    assert reader.session("t" * 32) is None
    assert reader.session("") is None
    assert reader.segments() == {3: segment}
    assert reader.segment(3) == segment
    assert reader.segment(4) is None
    assert [same(record, trash) for record in reader.trash()] == [True]
    found = writer.recover()
    assert found.segments == [segment]
    assert [same(*both) for both in zip(found.sessions, (session, move), strict=True)] == [True, True]
    assert found.sessions[1].kind is SessionKind.MOVE
    assert [same(*both) for both in zip(found.pins, (pin,), strict=True)] == [True]
    assert [same(*both) for both in zip(reader.pins(), (pin,), strict=True)] == [True]
    assert found.copy_keys.tolist() == [11, 12]
    assert same(found.copies, build.locations(keys[1:], 4, segment=3))
    assert [same(record, trash) for record in found.trash] == [True]
    assert found.answers == {"event-1": b"first", "event-2": b"second"}
    assert list(found.answers) == ["event-1", "event-2"]
    assert sorted(found.blocks.locations.slot.tolist()) == [10, 11, 12]
    assert len(found.blocks) == 3
    numbers = (found.next_generation, found.next_trash_id, found.next_segment_id)
    assert numbers == (9, 5, 4), "also beyond records that are gone"
    with writer.begin() as batch:
        batch.drop_trash(4)
        batch.drop_segment(3)
    found = writer.recover()
    assert (found.trash, found.segments, len(found.blocks)) == ([], [], 0)
    assert len(found.copy_keys) == len(found.copies) == 0, "they were in that segment too"
    assert [pin.keys.tolist() for pin in found.pins] == [[-1, 2**62]], "of blocks that may come yet"
    assert reader.verify() == []


def test_a_new_index_is_empty(writer: IndexWriter, reader: IndexReader, build: Any) -> None:
    found = writer.recover()
    assert (len(found.blocks), found.sessions, found.answers) == (0, [], {})
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
        batch.put_copies(more, build.locations(more, 2))
        batch.put_pin(PinRecord("p", "i-1", keys, 0))
        batch.put_session(session_of(build))
    with writer._shared.env.begin(write=True) as txn:
        handles = writer._shared.tables
        for table in (handles.runs, handles.sessions, handles.pins, handles.copies):
            cursor = txn.cursor(table)
            cursor.first()
            key, value = cursor.item()
            txn.put(key, value[:-1] + bytes([value[-1] ^ 1]), db=table)
    assert reader.match(keys).length == 0
    assert reader.corrupt_records > 0
    told = reader.verify()
    assert told[0] == "run 1 is damaged"
    assert told[1].startswith("the counters say 6 blocks, there are 3")
    ends = [f"of {name} is damaged" for name in ("sessions", "pins", "copies")]
    assert [sentence.endswith(end) for sentence, end in zip(told[2:], ends, strict=True)] == [True] * 3
    found = writer.recover()
    assert (len(found.blocks), found.sessions, found.pins) == (3, [], [])
    assert found.copy_keys.tolist() == [5, 6]
    assert sorted(found.blocks.locations.slot.tolist()) == [4, 5, 6]
    assert reader.verify() == []
    with writer.begin() as batch:
        batch.add_blocks(keys, build.locations(keys, 9), None, 1)
    assert reader.match(keys).locations.generation.tolist() == [9, 9, 9]


def test_copies_that_lead_nowhere(writer: IndexWriter, reader: IndexReader, build: Any) -> None:
    keys = build.keys(1, 2, 3)
    with writer.begin() as batch:
        batch.put_segment(build.segment(0))
        batch.add_blocks(keys, build.locations(keys), None, 1)
        batch.put_copies(keys, build.locations(keys, 2))
        batch.remove_blocks(build.keys(2))
    assert reader.verify() == ["key 2 has a copy, but is not in the index"]
    assert writer.recover().copy_keys.tolist() == [1, 3]
    assert reader.verify() == []
    assert reader.copies(keys)[0].tolist() == [True, False, True]


def test_unequal_lengths(writer: IndexWriter, build: Any) -> None:
    keys, places = build.keys(1, 2), build.locations(build.keys(1))
    for change in (
        lambda batch: batch.add_blocks(keys, places, None, 1),
        lambda batch: batch.move_blocks(keys, places),
        lambda batch: batch.put_copies(keys, places),
    ):
        with pytest.raises(InvalidArgument, match="1 locations for 2 blocks"), writer.begin() as batch:
            change(batch)
