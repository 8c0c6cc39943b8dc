"""The index equals a flat dictionary, whatever is done to it and whatever is asked."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcm_ray.core.model import Durability
from kvcm_ray.core.requests import U32, BlockLocations, Keys
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.index import IndexReader, IndexWriter, codec, runs


def sum_of(lists: tuple[list[int], list[int]]) -> list[int]:
    return lists[0] + lists[1]


#: Few keys, so that the same ones come back; both signs and both ends. In this order a chain.
CHAIN = [-(2**63), -5, -1, 0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 2**32, 2**63 - 1]
KEYS = st.sampled_from(CHAIN)
#: Stretches of the chain, so that look-ups run along runs and over their holes; or anything.
STRETCHES = st.tuples(st.integers(0, 15), st.integers(1, 16)).map(lambda s: CHAIN[s[0] :][: s[1]])
KEY_LISTS = STRETCHES | st.lists(KEYS, max_size=24) | st.tuples(STRETCHES, STRETCHES).map(sum_of)


def array(keys: list[int]) -> Keys:
    return np.array(keys, np.int64)


def rows_of(*columns: U32) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


class IndexMachine(RuleBasedStateMachine):
    """Small runs, so that full runs, holes and rewriting happen all the time."""

    RUN_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvcm-index-", dir="/dev/shm"))
        self.kept = codec.RUN_BLOCKS
        codec.RUN_BLOCKS = runs.RUN_BLOCKS = self.RUN_BLOCKS
        self.flat: dict[int, tuple[int, int, int, int]] = {}
        self.stamp = 0

    @initialize()
    def open(self) -> None:
        self.writer = IndexWriter(
            self.folder, instance_tag="i", durability=Durability.PROCESS, map_size=64 << 20
        )
        self.reader = IndexReader(self.folder)

    @rule(
        wanted=st.lists(KEYS, min_size=1, max_size=16, unique=True) | STRETCHES,
        chained=st.booleans(),
    )
    def add(self, wanted: list[int], chained: bool) -> None:
        """With the right parent (which may be absent or in the middle of a run), or any."""
        new = [key for key in wanted if key not in self.flat]
        before = CHAIN.index(new[0]) - 1 if new else -1
        parent = CHAIN[before] if before >= 0 and chained else (CHAIN[self.stamp % 16])
        self.stamp += 1
        rows = [(self.stamp % 3, i * 7 + self.stamp, self.stamp, self.stamp) for i in range(len(new))]
        columns = np.array(rows, np.uint32).reshape(len(new), 4).T
        with self.writer.begin() as batch:
            batch.add_blocks(array(new), BlockLocations(*columns[:3]), parent, self.stamp)
        self.flat.update(zip(new, rows, strict=True))

    @rule(keys=KEY_LISTS)
    def remove(self, keys: list[int]) -> None:
        with self.writer.begin() as batch:
            removed = batch.remove_blocks(array(keys))
        assert removed == len({key for key in keys if self.flat.pop(key, None)})

    @rule(keys=KEY_LISTS)
    def give_up(self, keys: list[int]) -> None:
        def dropped() -> None:
            with self.writer.begin() as batch:
                batch.remove_blocks(array(keys))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            dropped()

    @rule(key=KEYS)
    def add_again(self, key: int) -> None:
        if key in self.flat:
            with pytest.raises(InvalidArgument, match="already"), self.writer.begin() as batch:
                batch.add_blocks(array([key]), BlockLocations.empty(1), None, 0)

    @rule(key=KEYS)
    def add_twice(self, key: int) -> None:
        if key not in self.flat:
            with pytest.raises(InvalidArgument, match="twice"), self.writer.begin() as batch:
                batch.add_blocks(array([key, key]), BlockLocations.empty(2), None, 0)

    @rule()
    def reopen(self) -> None:
        self.reader.close()
        self.writer.close()
        self.open()

    @rule(keys=KEY_LISTS)
    def match(self, keys: list[int]) -> None:
        expected = []
        for key in keys:
            if key not in self.flat:
                break
            expected.append(self.flat[key][:3])
        found = self.reader.match(array(keys))
        assert found.length == len(expected) == self.reader.match_length(array(keys))
        at = found.locations
        assert rows_of(at.segment, at.slot, at.generation) == expected

    @rule(keys=KEY_LISTS)
    def lookup(self, keys: list[int]) -> None:
        expected = [self.flat.get(key, (0, 0, 0, 0)) for key in keys]
        for source in (self.reader, self.writer):
            if isinstance(source, IndexReader):
                hits, at = source.lookup(array(keys))
                written = source.written(array(keys))
            else:
                with source.begin() as batch:
                    hits, at = batch.lookup(array(keys))
                    written = batch.written(array(keys))
            assert hits.tolist() == [key in self.flat for key in keys]
            assert rows_of(at.segment, at.slot, at.generation, written) == expected

    @rule(begin=st.integers(0, 30), end=st.integers(0, 30))
    def select_written(self, begin: int, end: int) -> None:
        expected = {key for key, row in self.flat.items() if begin <= row[3] <= end}
        found = self.reader.select_written(begin, end).tolist()
        assert set(found) == expected
        assert len(found) == len(expected)

    @invariant()
    def nothing_contradicts(self) -> None:
        if hasattr(self, "reader"):
            assert self.reader.verify() == []
            assert self.reader.key_count() == len(self.flat)
            assert self.reader.corrupt_records == 0

    def teardown(self) -> None:
        codec.RUN_BLOCKS = runs.RUN_BLOCKS = self.kept
        if hasattr(self, "reader"):
            self.reader.close()
            self.writer.close()
        shutil.rmtree(self.folder)


IndexMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestIndexEqualsADictionary = IndexMachine.TestCase


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_columns_come_back(numbers: list[int]) -> None:
    column = np.array(numbers, np.uint32)
    for sample in (column, np.sort(column), np.arange(3, 3 + len(numbers), dtype=np.uint32)):
        packed = codec.unpack(codec.pack(codec.pack_u32(sample)))
        assert codec.unpack_u32(packed, len(sample)).tolist() == sample.tolist()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_decode_to_nothing(data: bytes) -> None:
    """Codec fuzz: whatever lies in a record, it is a miss and never an exception."""
    assert codec.decode_run(data, 1) is None
    assert codec.unseal(b"meta", b"key", data) is None


def test_a_long_chain_is_few_runs(writer: IndexWriter, reader: IndexReader) -> None:
    """Batches of one chain end up in full runs, and a branch starts a run of its own."""
    chain = np.arange(1, 2041, dtype=np.int64) * 1_000_003
    parent = None
    for start in range(0, len(chain), 60):
        part = chain[start : start + 60]
        with writer.begin() as batch:
            batch.add_blocks(part, BlockLocations.empty(len(part)), parent, 1)
        parent = int(part[-1])
    assert [len(run.keys) for run in reader.runs()] == [510] * 4
    with writer.begin() as batch:
        batch.add_blocks(array([-1, -2]), BlockLocations.empty(2), int(chain[99]), 1)
    assert [len(run.keys) for run in reader.runs()] == [510, 510, 510, 510, 2]
    assert reader.match_length(np.concatenate((chain[:100], array([-1, -2, -3])))) == 102
    with writer.begin() as batch:
        batch.add_blocks(array([-3]), BlockLocations.empty(1), -1, 1)
    assert [len(run.keys) for run in reader.runs()] == [510, 510, 510, 510, 2, 1]
    assert reader.match_length(array([-1, -3, -2])) == 3
    assert reader.match_length(chain) == 2040


def test_eviction_from_the_tail_shrinks_runs(writer: IndexWriter, reader: IndexReader) -> None:
    chain = np.arange(1, 301, dtype=np.int64)
    with writer.begin() as batch:
        batch.add_blocks(chain, BlockLocations.empty(300), None, 1)
    with writer.begin() as batch:
        assert batch.remove_blocks(chain[200:]) == 100
    (run,) = reader.runs()
    assert (len(run.keys), run.holes) == (200, None)
    with writer.begin() as batch:
        batch.remove_blocks(chain[::2])
    (run,) = reader.runs()
    assert run.alive.sum() == 100
    with writer.begin() as batch:
        batch.remove_blocks(chain[1:5])
    (run,) = reader.runs()
    assert (len(run.keys), run.holes) == (98, None), "more holes than blocks: written again"
    with writer.begin() as batch:
        batch.remove_blocks(chain)
    assert list(reader.runs()) == []
    assert reader.verify() == []
