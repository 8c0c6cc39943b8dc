"""fsck finds what is wrong, each kind of it, and nothing else; also beside a running writer."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray import fsck
from kvcm_ray.core.model import (
    InstanceInfo,
    LocationSpecInfo,
    NfsSpec,
    Segment,
    StorageConfig,
    segment_path,
)
from kvcm_ray.core.records import PinRecord, SessionKind, SessionRecord, TrashRecord
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.index import IndexReader, IndexWriter
from kvcm_ray.storage_adapters import SegmentOwner, StorageAdapter, header
from kvcm_ray.storage_adapters.file import FileStorage
from kvcm_ray.testing.storage_lab import block, flip

SPECS = (LocationSpecInfo("tp0", 4096), LocationSpecInfo("tp1", 8192))
INFO = InstanceInfo(
    instance_group_name="g", instance_id="i", block_size=16, location_spec_infos=SPECS,
    uid="0badcafe",
)  # fmt: skip
BLOCK = 4096 + 8192


class World:
    """One instance: an index and a file tier, with blocks in both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index_path = root / "groups" / "g" / f"i-{INFO.uid}"
        self.writer = IndexWriter(self.index_path, instance_tag=INFO.uid)
        self.storage: StorageAdapter = FileStorage("tier", str(root / "tier"))
        self.segment = self.new_segment(1)

    def new_segment(self, number: int, *, in_index: bool = True) -> Segment:
        path = segment_path("i", INFO.uid, number)
        segment = Segment(number, "tier", path, SPECS, 32)
        self.storage.create_segment(segment, SegmentOwner("g", "i", INFO.uid))
        if in_index:
            with self.writer.begin() as batch:
                batch.put_segment(segment)
        return segment

    def store(self, slots: list[int], generation: int = 1, keys: list[int] | None = None) -> BlockLocations:
        """Bytes of blocks, by default of those with the keys 1000 + slot."""
        where = np.array(slots, np.uint32)
        generations = np.full(len(slots), generation, np.uint32)
        named = where.astype(np.int64) + 1000 if keys is None else np.array(keys, np.int64)
        for spec in SPECS:
            data = [block(spec.size, slot) for slot in slots]
            self.storage.write(self.segment, spec.name, where, named, generations, data)
        return BlockLocations(np.ones(len(slots), np.uint32), where, generations)

    def add(self, slots: list[int], generation: int = 1) -> None:
        locations = self.store(slots, generation)
        with self.writer.begin() as batch:
            batch.add_blocks(locations.slot.astype(np.int64) + 1000, locations, None, 5)

    def file(self, suffix: str, spec: str = "tp0") -> Path:
        return self.root / "tier" / self.segment.path / f"{spec}{suffix}"

    def look(self, *, deep: bool = False) -> fsck.Findings:
        reader = IndexReader(self.index_path)
        try:
            return fsck.check_instance(reader, {"tier": self.storage}, INFO, deep=deep)
        finally:
            reader.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.add(list(range(10)))
    return made


def dangling(findings: fsck.Findings) -> list[int]:
    return sorted(found.slot for found in findings.dangling)


def test_all_is_well(world: World) -> None:
    found = world.look(deep=True)
    assert found.clean
    assert found.blocks == 10
    assert (found.notes, found.unverified) == ([], set())
    assert found.segments == {("tier", world.segment.path)}


def test_a_lost_segment_is_dangling(world: World) -> None:
    world.storage.drop_segment(world.segment)
    found = world.look()
    assert dangling(found) == list(range(10))
    assert found.notes


@pytest.mark.parametrize(("suffix", "unit"), [(".dat", 4096), (".hdr", 64)])
def test_a_short_file_is_dangling_from_there_on(world: World, suffix: str, unit: int) -> None:
    with world.file(suffix).open("r+b") as file:
        file.truncate(6 * unit + 1)
    assert dangling(world.look()) == [6, 7, 8, 9]


def test_another_header_is_dangling(world: World) -> None:
    """Another generation, another key, a broken one, one of two specs."""
    world.storage.delete(world.segment, np.array([1], np.uint32), np.array([1], np.uint32))
    world.store([1], generation=2)
    slot = np.array([2], np.uint32)
    world.storage.delete(world.segment, slot, np.array([1], np.uint32))
    for spec in SPECS:
        key, ones = np.array([77], np.int64), np.array([1], np.uint32)
        world.storage.write(world.segment, spec.name, slot, key, ones, [bytes(spec.size)])
    flip(world.file(".hdr", "tp1"), (3 * 64 + 9) * 8)
    found = world.look()
    assert dangling(found) == [1, 2, 3]
    assert not found.orphans


def test_erased_bytes_are_dangling(world: World) -> None:
    slots = np.array([4, 5], np.uint32)
    world.storage.delete(world.segment, slots, np.array([1, 1], np.uint32))
    assert dangling(world.look()) == [4, 5]


def test_a_payload_without_header_is_unverified(world: World) -> None:
    with world.file(".hdr").open("r+b") as file:
        file.seek(7 * 64)
        file.write(bytes(64))
        file.seek(8 * 64)  # erased long ago as another session's
        file.write(header.erased(np.array([77])).tobytes())
    found = world.look()
    assert found.clean
    assert sorted(block.slot for block in found.unverified) == [7, 8]


def test_rot_in_a_payload_is_found_by_the_deep_check(world: World) -> None:
    flip(world.file(".dat", "tp1"), 8192 * 8 * 8 + 3)
    assert world.look().clean
    assert dangling(world.look(deep=True)) == [8]


def test_bytes_without_a_reference_are_orphans(world: World) -> None:
    world.store([20, 21])
    with world.file(".dat").open("r+b") as file:  # of a plain client, after its session ended
        file.seek(25 * 4096)
        file.write(b"x")
    found = world.look()
    assert sum(found.orphans.values()) == 2 * BLOCK + 4096
    assert {suspect.slot for suspect in found.orphans} == {20, 21, 25}
    assert not found.dangling


def test_sessions_and_trash_are_references(world: World) -> None:
    writing, deleting = world.store([20, 21], 2), world.store([22], 3)
    record = SessionRecord(
        "s" * 32, "e", "i", 2, 10**12, 1000, "tier", None, np.zeros(2, np.bool_),
        writing.slot.astype(np.int64), writing, np.zeros(2, np.bool_),
    )  # fmt: skip
    with world.writer.begin() as batch:
        batch.put_session(record)
        batch.put_trash(TrashRecord(1, "i", 0, deleting))
    assert world.look().clean
    with world.writer.begin() as batch:
        batch.drop_session(record.session_id)
        batch.drop_trash(1)
    assert sum(world.look().orphans.values()) == 3 * BLOCK


def test_copies_are_references(world: World) -> None:
    keys = [1003, 1004]
    copies = world.store([20, 21], 2, keys)
    assert sum(world.look().orphans.values()) == 2 * BLOCK
    with world.writer.begin() as batch:
        batch.put_copies(np.array(keys), copies)
    found = world.look(deep=True)
    assert found.clean
    assert (found.blocks, found.copies) == (10, 2)


def test_a_lost_copy_is_dangling(world: World) -> None:
    keys = [1003, 1004, 1005]
    copies = world.store([20, 21, 22], 2, keys)
    with world.writer.begin() as batch:
        batch.put_copies(np.array(keys), copies)
    world.storage.delete(world.segment, copies.slot[:1], copies.generation[:1])
    flip(world.file(".dat", "tp1"), 8192 * 8 * 21 + 3)  # rot: only the deep check reads
    assert {(s.key, s.slot, s.copy) for s in world.look().dangling} == {(1003, 20, True)}
    deep = world.look(deep=True)
    assert {(s.key, s.slot, s.copy) for s in deep.dangling} == {(1003, 20, True), (1004, 21, True)}
    assert not deep.orphans


def test_a_move_refers_to_where_it_writes(world: World) -> None:
    """Its blocks are SERVING at their old place; the new one is not theirs yet, and no orphan."""
    keys = np.array([1003, 1004])
    target = world.store([20, 21], 2, keys.tolist())
    source = BlockLocations(np.ones(2, np.uint32), np.array([3, 4], np.uint32), np.ones(2, np.uint32))
    record = SessionRecord(
        "m" * 32, "", "i", 2, 10**12, 1000, "tier", None, np.zeros(2, np.bool_), keys, target,
        np.zeros(2, np.bool_), SessionKind.MOVE, source,
    )  # fmt: skip
    with world.writer.begin() as batch:
        batch.put_session(record)
    assert world.look(deep=True).clean
    old = BlockLocations(*(column.copy() for column in (source.segment, source.slot, source.generation)))
    with world.writer.begin() as batch:  # the end of a move, in one commit
        batch.drop_session(record.session_id)
        batch.move_blocks(keys, target)
        batch.put_trash(TrashRecord(1, "i", 0, old))
    assert world.look(deep=True).clean


def test_a_copy_in_the_blocks_own_slot_is_a_contradiction(world: World) -> None:
    own = BlockLocations(np.ones(1, np.uint32), np.array([3], np.uint32), np.ones(1, np.uint32))
    with world.writer.begin() as batch:
        batch.put_copies(np.array([1003]), own)
    assert "1 slots are named by two records" in world.look().counters


def test_pins_are_fine(world: World) -> None:
    """Also of keys that are not there."""
    with world.writer.begin() as batch:
        batch.put_pin(PinRecord("system prompt", "i", np.array([1003, 7, 8]), 0))
    assert world.look(deep=True).clean


def test_one_slot_for_two_records_is_a_contradiction(world: World) -> None:
    with world.writer.begin() as batch:
        batch.put_trash(TrashRecord(1, "i", 0, BlockLocations(*np.ones((3, 1), np.uint32))))
    found = world.look()
    assert found.counters == ["1 slots are named by two records"]


def test_a_storage_that_nobody_registered(world: World) -> None:
    reader = IndexReader(world.index_path)
    found = fsck.check_instance(reader, {}, INFO)
    reader.close()
    assert len(found.dangling) == 10
    assert found.notes == ["storage tier is not registered"]


def test_damaged_records_are_counted(world: World) -> None:
    """Garbage over one run, written behind the index's back."""
    from kvcm_ray.index import codec, environment

    with environment.acquire(world.index_path, environment.READ).env.begin(write=True) as txn:
        runs = world.writer._shared.tables.runs
        (key, record), *_ = list(txn.cursor(runs))
        txn.put(key, bytes(record[:-1]) + bytes([record[-1] ^ 1]), db=runs)
        assert codec.decode_run(txn.get(key, None, runs), 1) is None
    found = world.look()
    assert found.corrupt_records == 1
    assert found.counters  # ten keys, and no block of them is left
    assert sum(found.orphans.values()) == 10 * BLOCK


# ----------------------------------------------------------------------------- a data directory


@pytest.fixture
def data_dir(world: World) -> Path:
    from kvcm_ray.actors.paths import registry_dir
    from kvcm_ray.actors.registry_store import RegistryStore

    store = RegistryStore(registry_dir(world.root), write=True)
    store.write([StorageConfig("tier", nfs=NfsSpec(str(world.root / "tier"))), INFO])
    store.close()
    return world.root


def test_a_clean_data_directory(world: World, data_dir: Path) -> None:
    report = fsck.check(data_dir, settle_s=0, deep=True)
    assert report.to_dict() == {
        "orphan_bytes": 0, "dangling_locations": 0, "dangling_copies": 0, "corrupt_records": 0,
        "counters_ok": True, "unverified_locations": 0, "instances": 1, "blocks": 10, "copies": 0,
        "notes": [], "ok": True,
    }  # fmt: skip


def test_segments_that_no_index_knows_are_orphans(world: World, data_dir: Path) -> None:
    world.segment = world.new_segment(9, in_index=False)
    world.store([0, 1])
    report = fsck.check(data_dir, settle_s=0)
    assert report.orphan_bytes >= 2 * BLOCK
    assert not report.ok
    assert world.segment.path in report.notes[0]


def test_an_unreadable_index_does_not_make_its_bytes_orphans(world: World, data_dir: Path) -> None:
    world.writer.close()
    with (world.index_path / "data.mdb").open("r+b") as file:
        file.truncate(5000)
    report = fsck.check(data_dir, settle_s=0)
    assert (report.corrupt_records, report.orphan_bytes, report.ok) == (1, 0, False)
    assert report.notes


def test_no_data_directory(tmp_path: Path) -> None:
    from kvcm_ray.errors import Unavailable

    with pytest.raises(Unavailable):
        fsck.check(tmp_path / "nothing")


def test_a_busy_manager_is_not_accused(world: World, data_dir: Path) -> None:
    """Blocks come and go in the right order while the checks run."""
    stop = threading.Event()
    rounds = [0]

    def churn() -> None:
        trash_id = 0
        while not stop.is_set():
            rounds[0] += 1
            generation, slots = rounds[0] + 1, [10 + rounds[0] % 20]
            where = np.array(slots, np.uint32)
            generations = np.full(1, generation, np.uint32)
            locations = BlockLocations(np.ones(1, np.uint32), where, generations)
            trash_id += 1
            with world.writer.begin() as batch:  # stands for the session
                batch.put_trash(TrashRecord(trash_id, "i", 0, locations))
            world.store(slots, generation)
            with world.writer.begin() as batch:
                batch.drop_trash(trash_id)
                batch.add_blocks(where.astype(np.int64) + 1000, locations, None, 5)
            with world.writer.begin() as batch:
                batch.remove_blocks(where.astype(np.int64) + 1000)
                batch.put_trash(TrashRecord(trash_id, "i", 0, locations))
            world.storage.delete(world.segment, where, generations)
            with world.writer.begin() as batch:
                batch.drop_trash(trash_id)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        reports = [fsck.check(data_dir, settle_s=0.02) for _ in range(5)]
        while rounds[0] < 25 and len(reports) < 100:
            reports.append(fsck.check(data_dir, settle_s=0.02))
    finally:
        stop.set()
        thread.join()
    assert rounds[0] >= 25
    assert [report.to_dict() for report in reports if not report.ok] == []
