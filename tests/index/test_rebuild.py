"""After a power loss an unsynced index is not trusted, but made again from block headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.model import Durability, InstanceInfo, LocationSpecInfo, Segment, segment_path
from kvcm_ray.index import IndexReader, IndexWriter, boot
from kvcm_ray.index.rebuild import rebuild
from kvcm_ray.storage_adapters.base import SegmentOwner
from kvcm_ray.storage_adapters.file import FileStorage

SPECS = (LocationSpecInfo("k", 64), LocationSpecInfo("v", 32))
INFO = InstanceInfo(instance_id="i-1", uid="0a0b0c0d", location_spec_infos=SPECS)


@pytest.fixture
def storage(tmp_path: Path) -> FileStorage:
    return FileStorage("disk", str(tmp_path / "tier"))


def make_segment(storage: FileStorage, number: int, uid: str = INFO.uid) -> Segment:
    segment = Segment(number, storage.name, segment_path("i-1", uid, number), SPECS, 32)
    storage.create_segment(segment, SegmentOwner("group", "i-1", uid))
    return segment


def write(
    storage: FileStorage, segment: Segment, slots: list[int], keys: list[int], generation: int,
    specs: tuple[LocationSpecInfo, ...] = SPECS,
) -> None:  # fmt: skip
    at = np.array(slots, np.uint32)
    storage.prepare(segment, min(slots), max(slots) - min(slots) + 1)
    for spec in specs:
        buffers = [bytes([key % 251]) * spec.size for key in keys]
        generations = np.full(len(slots), generation, np.uint32)
        storage.write(segment, spec.name, at, np.array(keys, np.int64), generations, buffers)


def boot_again(monkeypatch: pytest.MonkeyPatch, name: str = "another boot") -> None:
    monkeypatch.setattr(boot, "boot_id", lambda: name)


def test_rebuild_from_headers(
    open_writer: Callable[..., IndexWriter],
    storage: FileStorage,
    monkeypatch: pytest.MonkeyPatch,
    build: Any,
) -> None:
    first, second = make_segment(storage, 1), make_segment(storage, 2)
    other = make_segment(storage, 3, uid="ffffffff")
    write(storage, first, [0, 1, 2, 3], [10, 11, 12, 13], 5)
    write(storage, second, [4, 5], [14, 15], 6)
    write(storage, second, [9], [11], 7)  # key 11 again, newer
    write(storage, second, [11], [99], 8, specs=SPECS[:1])  # half a block
    write(storage, second, [13], [98], 8, specs=SPECS[:1])  # one block in one file,
    write(storage, second, [13], [97], 8, specs=SPECS[1:])  # another one in the other
    write(storage, other, [0], [77], 3)  # another instance
    keys = build.keys(10, 11, 12, 13, 14, 15)
    writer = open_writer(durability=Durability.PROCESS)
    with writer.begin() as batch:
        batch.add_blocks(keys, build.locations(keys), None, 1)
    writer.close()

    boot_again(monkeypatch)
    writer = open_writer(durability=Durability.PROCESS)
    assert writer.needs_rebuild
    assert writer.stats().key_count == 0
    result = rebuild(writer, {"disk": storage}, INFO, 1_700_000_000)
    assert (result.segments, result.blocks, result.discarded) == (2, 6, 3)
    assert not writer.needs_rebuild

    reader = IndexReader(writer.path)
    found = reader.match(keys)
    assert found.length == 6
    assert found.locations.segment.tolist() == [1, 2, 1, 1, 2, 2]
    assert found.locations.slot.tolist() == [0, 9, 2, 3, 4, 5]
    assert found.locations.generation.tolist() == [5, 7, 5, 5, 6, 6]
    assert set(reader.written(keys).tolist()) == {1_700_000_000}
    assert reader.lookup(build.keys(77, 97, 98, 99))[0].tolist() == [False] * 4
    (trash,) = reader.trash()
    assert trash.due_ms == 0
    at = trash.locations
    places = zip(at.segment.tolist(), at.slot.tolist(), at.generation.tolist(), strict=True)
    assert list(places) == [(1, 1, 5), (2, 11, 8), (2, 13, 8)]
    assert reader.verify() == []
    recovered = writer.recover()
    assert recovered.segments == [first, second]
    assert recovered.next_generation > 8
    assert recovered.next_segment_id == 3
    reader.close()

    writer.close()
    again = open_writer(durability=Durability.PROCESS)
    assert not again.needs_rebuild
    assert again.stats().key_count == 6


def test_a_block_in_two_places_comes_back_once(
    open_writer: Callable[..., IndexWriter],
    storage: FileStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Any,
) -> None:
    """Copies, and moves that were under way: the newest whole one is kept, the others are erased."""
    slow = FileStorage("slow", str(tmp_path / "slow"))
    near, far = make_segment(storage, 1), make_segment(slow, 2)
    write(slow, far, [0, 1], [10, 11], 3)
    write(storage, near, [0, 1], [10, 11], 5)  # promoted, and the slow place was kept
    write(storage, near, [2, 3, 4], [12, 13, 14], 4)
    write(slow, far, [7], [12], 6)  # demoted, but the fast place was not erased yet
    write(slow, far, [8], [13], 6, specs=SPECS[:1])  # being demoted: half of it is there
    open_writer().close()
    boot_again(monkeypatch)
    writer = open_writer()
    result = rebuild(writer, {"disk": storage, "slow": slow}, INFO, 1)
    assert (result.segments, result.blocks, result.discarded) == (2, 5, 4)
    recovered = writer.recover()
    at = recovered.blocks.locations
    rows = zip(at.segment.tolist(), at.slot.tolist(), at.generation.tolist(), strict=True)
    assert dict(zip(recovered.blocks.keys.tolist(), rows, strict=True)) == {
        10: (1, 0, 5), 11: (1, 1, 5), 12: (2, 7, 6), 13: (1, 3, 4), 14: (1, 4, 4),
    }  # fmt: skip
    assert len(recovered.copy_keys) == 0
    (trash,) = recovered.trash
    at = trash.locations
    places = zip(at.segment.tolist(), at.slot.tolist(), at.generation.tolist(), strict=True)
    assert list(places) == [(1, 2, 4), (2, 0, 3), (2, 1, 3), (2, 8, 6)]


def test_killed_in_the_middle_of_a_rebuild(
    open_writer: Callable[..., IndexWriter],
    storage: FileStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An incomplete index is rebuilt again, in the same boot too, with the same result."""
    segment = make_segment(storage, 1)
    write(storage, segment, [0, 1], [1, 2], 5)
    open_writer().close()
    boot_again(monkeypatch)
    writer = open_writer()
    monkeypatch.setattr(IndexWriter, "rebuilt", lambda self: None)
    rebuild(writer, {"disk": storage}, INFO, 1)
    writer.close()
    monkeypatch.undo()
    boot_again(monkeypatch)
    writer = open_writer()
    assert writer.needs_rebuild
    assert rebuild(writer, {"disk": storage}, INFO, 1).blocks == 2
    assert writer.stats().key_count == 2
    assert not (writer.path / boot.ASIDE_FOLDER).exists()


@pytest.mark.parametrize("moved", [[], ["data.mdb"], ["data.mdb", "lock.mdb", "index.json"]])
def test_killed_while_setting_aside(
    open_writer: Callable[..., IndexWriter],
    monkeypatch: pytest.MonkeyPatch,
    moved: list[str],
) -> None:
    writer = open_writer()
    writer.close()
    aside = writer.path / boot.ASIDE_FOLDER
    aside.mkdir()
    for name in moved:
        (writer.path / name).replace(aside / name)
    boot_again(monkeypatch)
    assert open_writer().needs_rebuild


def test_a_synced_index_is_trusted_in_any_boot(
    open_writer: Callable[..., IndexWriter], monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    writer = open_writer(durability=Durability.COMMIT)
    with writer.begin() as batch:
        batch.add_blocks(build.keys(1), build.locations(build.keys(1)), None, 1)
    writer.close()
    boot_again(monkeypatch)
    writer = open_writer(durability=Durability.COMMIT)
    assert not writer.needs_rebuild
    assert writer.stats().key_count == 1
    writer.close()
    boot_again(monkeypatch, "third boot")
    assert not open_writer(durability=Durability.PROCESS).needs_rebuild
    boot_again(monkeypatch, "fourth boot")
    assert open_writer(durability=Durability.PROCESS).needs_rebuild
