"""Whatever is wrong with the file: a miss, or a typed error before LMDB maps it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.model import Durability
from kvcm_ray.core.records import PinRecord
from kvcm_ray.errors import Corrupt, InvalidArgument, NotFound, Unsupported
from kvcm_ray.index import IndexReader, IndexWriter
from kvcm_ray.index.preflight import DATA_FILE, check_file

CHILDREN = Path(__file__).with_name("children.py")


def flips(value: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(value)):
        changed = bytearray(value)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.fixture
def filled(writer: IndexWriter, build: Any) -> IndexWriter:
    """Two runs, the first with a hole, the second with a parent; copies of the second; a pin."""
    with writer.begin() as batch:
        batch.put_segment(build.segment(0))
        for parent, keys in ((None, build.keys(1, 2, 3, 4, 5)), (3, build.keys(100, 101))):
            batch.add_blocks(keys, build.locations(keys), parent, 77)
        batch.put_copies(keys, build.locations(keys, 3))
        batch.put_pin(PinRecord("pin", "i-1", keys, 9))
    with writer.begin() as batch:
        batch.remove_blocks(build.keys(3))
    return writer


def put(writer: IndexWriter, table: str, key: bytes, value: bytes) -> None:
    with writer._shared.env.begin(write=True) as txn:
        txn.put(key, value, db=getattr(writer._shared.tables, table))


def records(writer: IndexWriter, table: str) -> list[tuple[bytes, bytes]]:
    with writer._shared.read() as (txn, tables):
        return [(bytes(k), bytes(v)) for k, v in txn.cursor(getattr(tables, table))]


def check_answers(reader: IndexReader, build: Any) -> bool:
    """No wrong answer to any question; returns whether anything was missing."""
    present = build.keys(1, 2, 4, 5, 100, 101)
    asked = build.keys(1, 2, 3, 4, 5, 6, 100, 101, 102)
    hits, at = reader.lookup(asked)
    assert not set(asked[hits].tolist()) - set(present.tolist())
    assert (at.slot[hits] == asked[hits]).all()
    assert (reader.written(asked)[hits] == 77).all()
    found = reader.match(asked)
    assert found.length <= 2
    assert (found.locations.slot == asked[: found.length]).all()
    assert reader.match_length(asked) <= 2
    assert reader.match_length(build.keys(100, 101, 102)) <= 2
    return bool(hits.sum() < len(present))


@pytest.mark.parametrize("table", ["runs", "keys"])
def test_every_bit_flip_of_a_value(filled: IndexWriter, reader: IndexReader, build: Any, table: str) -> None:
    for key, value in records(filled, table):
        for changed in flips(value):
            put(filled, table, key, changed)
            assert check_answers(reader, build) or table == "keys", "the damage must show"
            assert reader.verify()
        put(filled, table, key, value)
    assert not check_answers(reader, build)
    assert reader.corrupt_records > 0


def test_every_bit_flip_of_a_key(filled: IndexWriter, reader: IndexReader, build: Any) -> None:
    """A record under another key than its own is a miss too."""
    for table in ("runs", "keys"):
        for key, value in records(filled, table):
            for changed in flips(key):
                with filled._shared.env.begin(write=True) as txn:
                    handle = getattr(filled._shared.tables, table)
                    if txn.get(changed, db=handle) is not None:
                        continue
                    txn.delete(key, db=handle)
                    txn.put(changed, value, db=handle)
                wrong = np.frombuffer(changed, np.int64)
                assert reader.match_length(wrong) == 0 or table == "runs"
                assert check_answers(reader, build) or table == "keys"
                assert reader.verify()
                with filled._shared.env.begin(write=True) as txn:
                    txn.delete(changed, db=handle)
                    txn.put(key, value, db=handle)


def test_every_bit_flip_of_other_records(filled: IndexWriter, reader: IndexReader) -> None:
    good = {name: records(filled, name) for name in ("segments", "meta", "log", "pins", "copies")}
    segment = reader.segment(0)
    for name, found in good.items():
        for key, value in found:
            for changed in flips(value):
                put(filled, name, key, changed)
                if name == "segments":
                    assert reader.segment(0) is None
                elif name == "pins":
                    assert reader.pins() == []
                elif name == "copies":
                    number = np.frombuffer(key, np.int64)
                    hits, at = reader.copies(number)
                    assert (hits.tolist(), at.slot.tolist()) == ([False], [0])
                    assert number not in reader.all_copies()[0]
                elif name == "meta" and key in (b"counters", b"epoch"):
                    with pytest.raises(Corrupt), filled.begin():
                        pass
                elif name == "log":
                    with pytest.raises(Corrupt):
                        list(reader.log(1))
                put(filled, name, key, value)
    assert reader.segment(0) == segment


def remove_for_a_try(writer: IndexWriter, keys: np.ndarray, before: np.ndarray) -> None:
    """The removed blocks are gone then, no other one is wrong; nothing of it is committed."""
    with writer.begin() as batch:
        batch.remove_blocks(keys[1:])
        left, at = batch.lookup(keys)
        assert not left[1:].any()
        assert not (left & ~before).any()
        assert (at.slot[left] == keys[left]).all()
        raise ZeroDivisionError


@pytest.mark.parametrize("table", ["runs", "keys"])
def test_changing_blocks_beside_damage(filled: IndexWriter, build: Any, table: str) -> None:
    """Neither moving nor removing makes a damaged record look intact."""
    everything = build.keys(1, 2, 4, 5, 100, 101)
    for key, value in records(filled, table):
        for changed in list(flips(value))[:: 7 if table == "runs" else 1]:
            put(filled, table, key, changed)
            with filled.begin() as batch:
                hits, _ = batch.lookup(everything)
            if table == "runs":  # with damaged pointers they are found all the same
                with pytest.raises(InvalidArgument, match="blocks to move"), filled.begin() as batch:
                    batch.move_blocks(everything, build.locations(everything, 2))
            with pytest.raises(ZeroDivisionError):
                remove_for_a_try(filled, everything, hits)
        put(filled, table, key, value)


def copies(path: Path, target: Path, lengths: list[int]) -> list[Path]:
    made = []
    for length in lengths:
        folder = target / f"cut-{length}"
        shutil.copytree(path, folder)
        with (folder / DATA_FILE).open("r+b") as file:
            file.truncate(length)
        made.append(folder)
    return made


def test_truncation_at_each_page(open_writer: Callable[..., IndexWriter], tmp_path: Path, build: Any) -> None:
    """Refused with a sentence, in another process, because it would die by SIGBUS otherwise."""
    writer = open_writer()
    keys = np.arange(1, 401, dtype=np.int64)
    for start in range(0, 400, 16):
        part = keys[start : start + 16]
        with writer.begin() as batch:
            batch.put_segment(build.segment(0))
            batch.add_blocks(part, build.locations(part), None, 1)
    pages = writer._shared.env.info()["last_pgno"] + 1
    writer.close()
    lengths = [4096 * page for page in range(pages)] + [1, 100, 5000, 4096 * pages - 1]
    folders = copies(writer.path, tmp_path, [*lengths, 4096 * pages])
    child = subprocess.run(
        [sys.executable, str(CHILDREN), "open_files", *map(str, folders)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert child.returncode == 0, (child.returncode, child.stderr)
    assert child.stdout.split() == ["Corrupt"] * len(lengths) + ["400"]
    with pytest.raises(Corrupt, match=r"cut-8192/data\.mdb has 8192 bytes .* move the folder away"):
        check_file(tmp_path / "cut-8192")


def test_foreign_files(open_writer: Callable[..., IndexWriter], tmp_path: Path) -> None:
    writer = open_writer()
    writer.close()
    file = writer.path / DATA_FILE
    good = file.read_bytes()
    for bad in (b"\0" * len(good), b"x" * 8192, good[:16] + b"\xff" * 8 + good[24:]):
        file.write_bytes(bad)
        with pytest.raises(Corrupt, match=r"data\.mdb"):
            open_writer()
        with pytest.raises(Corrupt):
            IndexReader(writer.path)
        assert file.read_bytes() == bad, "nothing is overwritten"
    file.write_bytes(good)
    with pytest.raises(Corrupt, match="not the index of 'other'"):
        open_writer(instance_tag="other")
    open_writer().close()
    file.unlink()
    with pytest.raises(Corrupt, match="is gone"):
        open_writer()
    with pytest.raises(NotFound):
        IndexReader(writer.path)


def test_newer_or_damaged_identity(open_writer: Callable[..., IndexWriter]) -> None:
    writer = open_writer()
    writer.close()
    identity = writer.path / "index.json"
    good = identity.read_text()
    identity.write_text(good.replace('"format": 2', '"format": 3'))
    for opened in (open_writer, lambda: IndexReader(writer.path)):
        with pytest.raises(Unsupported, match="format 3"):
            opened()
    identity.write_text(good[:-4])
    with pytest.raises(Corrupt, match=r"index\.json"):
        open_writer()


def test_death_at_birth(open_writer: Callable[..., IndexWriter], tmp_path: Path) -> None:
    """A file of a set-up that was never finished is made again."""
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / DATA_FILE).write_bytes(b"\0" * 5000)
    with pytest.raises(NotFound):
        IndexReader(tmp_path / "index")
    assert open_writer(durability=Durability.COMMIT).stats().key_count == 0
