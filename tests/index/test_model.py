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

from kvcm_ray.core.model import Durability, LocationSpecInfo, Segment
from kvcm_ray.core.records import PinRecord
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
DISTINCT = STRETCHES | st.lists(KEYS, min_size=1, max_size=16, unique=True)
KEY_LISTS = STRETCHES | st.lists(KEYS, max_size=24) | st.tuples(STRETCHES, STRETCHES).map(sum_of)


def array(keys: list[int]) -> Keys:
    return np.array(keys, np.int64)


def places(count: int, stamp: int) -> np.ndarray:
    """Locations that can be told from others, as rows."""
    rows = [(stamp % 3, i * 7 + stamp, stamp) for i in range(count)]
    return np.array(rows, np.uint32).reshape(count, 3)


def naive_parents(runs_found: list[codec.Run]) -> dict[int, int | None]:
    """The key before each living key, block by block."""
    living = {int(key): n for n, run in enumerate(runs_found) for key in run.keys[run.alive]}
    parents: dict[int, int | None] = {}
    for number, run in enumerate(runs_found):
        before = run.parent if run.parent in living else None
        seen, at = set(), number
        while at not in seen:  # up through runs; coming back to this one is a circle
            seen.add(at)
            up = runs_found[at].parent
            if up not in living:
                break
            at = living[up]
            if at == number:
                before = None
        for key in run.keys[run.alive].tolist():
            parents[key], before = before, key
    return parents


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
        self.second: dict[int, tuple[int, int, int]] = {}
        self.pinned: dict[str, tuple[list[int], int]] = {}
        self.stamp = 0

    @initialize()
    def open(self) -> None:
        self.writer = IndexWriter(
            self.folder, instance_tag="i", durability=Durability.PROCESS, map_size=64 << 20
        )
        self.reader = IndexReader(self.folder)
        with self.writer.begin() as batch:
            for number in range(3):
                batch.put_segment(Segment(number, "s", f"i/u-{number}", (LocationSpecInfo("kv", 8),), 999))

    @rule(wanted=DISTINCT, chained=st.booleans())
    def add(self, wanted: list[int], chained: bool) -> None:
        """With the right parent (which may be absent or in the middle of a run), or any."""
        new = [key for key in wanted if key not in self.flat]
        before = CHAIN.index(new[0]) - 1 if new else -1
        parent = CHAIN[before] if before >= 0 and chained else (CHAIN[self.stamp % 16])
        self.stamp += 1
        rows = places(len(new), self.stamp)
        with self.writer.begin() as batch:
            batch.add_blocks(array(new), BlockLocations(*rows.T), parent, self.stamp)
        self.flat.update((key, (*row, self.stamp)) for key, row in zip(new, rows.tolist(), strict=True))

    @rule(keys=KEY_LISTS, backwards=st.booleans())
    def remove(self, keys: list[int], backwards: bool) -> None:
        keys = keys[::-1] if backwards else keys
        with self.writer.begin() as batch:
            forgotten = batch.drop_copies(array(keys))
            removed = batch.remove_blocks(array(keys))
        assert forgotten == len({key for key in keys if self.second.pop(key, None)})
        assert removed == len({key for key in keys if self.flat.pop(key, None)})

    @rule(keys=DISTINCT, backwards=st.booleans())
    def move(self, keys: list[int], backwards: bool) -> None:
        there = [key for key in (keys[::-1] if backwards else keys) if key in self.flat]
        self.stamp += 1
        rows = places(len(there), self.stamp)
        with self.writer.begin() as batch:
            batch.move_blocks(array(there), BlockLocations(*rows.T))
        for key, row in zip(there, rows.tolist(), strict=True):
            self.flat[key] = (*row, self.flat[key][3])

    @rule(keys=DISTINCT)
    def copy(self, keys: list[int]) -> None:
        there = [key for key in keys if key in self.flat]
        self.stamp += 1
        rows = places(len(there), self.stamp)
        with self.writer.begin() as batch:
            batch.put_copies(array(there), BlockLocations(*rows.T))
        self.second.update(zip(there, map(tuple, rows.tolist()), strict=True))

    @rule(keys=KEY_LISTS)
    def drop_copies(self, keys: list[int]) -> None:
        with self.writer.begin() as batch:
            dropped = batch.drop_copies(array(keys))
        assert dropped == len({key for key in keys if self.second.pop(key, None)})

    @rule(keys=DISTINCT)
    def change_absent_blocks(self, keys: list[int]) -> None:
        absent = len(keys) - len(self.flat.keys() & keys)
        for change, words in (("move_blocks", "blocks to move"), ("put_copies", "to have copies")):
            if absent:
                with pytest.raises(InvalidArgument, match=words), self.writer.begin() as batch:
                    getattr(batch, change)(array(keys), BlockLocations.empty(len(keys)))

    @rule(name=st.sampled_from("abc"), keys=DISTINCT, until=st.integers(0, 99))
    def pin(self, name: str, keys: list[int], until: int) -> None:
        with self.writer.begin() as batch:
            batch.put_pin(PinRecord(name, "i", array(keys), until))
        self.pinned[name] = (keys, until)

    @rule(name=st.sampled_from("abc"))
    def unpin(self, name: str) -> None:
        with self.writer.begin() as batch:
            batch.drop_pin(name)
        self.pinned.pop(name, None)

    @rule(keys=KEY_LISTS)
    def give_up(self, keys: list[int]) -> None:
        def dropped() -> None:
            with self.writer.begin() as batch:
                batch.drop_copies(array(keys))
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

    @rule(keys=KEY_LISTS)
    def look_for_copies(self, keys: list[int]) -> None:
        with self.writer.begin() as batch:
            answers = (self.reader.copies(array(keys)), batch.copies(array(keys)))
        for hits, at in answers:
            assert hits.tolist() == [key in self.second for key in keys]
            expected = [self.second.get(key, (0, 0, 0)) for key in keys]
            assert rows_of(at.segment, at.slot, at.generation) == expected

    @rule()
    def recover(self) -> None:
        found = self.writer.recover()
        at = found.blocks.locations
        rows = rows_of(at.segment, at.slot, at.generation, found.blocks.written_s)
        keys = found.blocks.keys.tolist()
        assert len(keys) == len(found.blocks) == len(self.flat)
        assert dict(zip(keys, rows, strict=True)) == self.flat
        parents = [keys[place] if place >= 0 else None for place in found.blocks.parents.tolist()]
        assert dict(zip(keys, parents, strict=True)) == naive_parents(list(self.reader.runs()))
        at = found.copies
        copies = zip(found.copy_keys.tolist(), rows_of(at.segment, at.slot, at.generation), strict=True)
        assert dict(copies) == self.second
        assert {pin.name: (pin.keys.tolist(), pin.until_s) for pin in found.pins} == self.pinned

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
            assert {pin.name for pin in self.reader.pins()} == self.pinned.keys()
            keys, at = self.reader.all_copies()
            rows = rows_of(at.segment, at.slot, at.generation)
            assert dict(zip(keys.tolist(), rows, strict=True)) == self.second
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


def parents_of(writer: IndexWriter) -> dict[int, int | None]:
    found = writer.recover().blocks
    keys = found.keys.tolist()
    return {
        key: keys[place] if place >= 0 else None
        for key, place in zip(keys, found.parents.tolist(), strict=True)
    }


def add_chain(writer: IndexWriter, keys: list[int] | range, parent: int | None) -> None:
    with writer.begin() as batch:
        batch.put_segment(Segment(0, "s", "i/u-0", (LocationSpecInfo("kv", 8),), 999))
        batch.add_blocks(array(list(keys)), BlockLocations.empty(len(keys)), parent, 1)


def test_a_run_remembers_its_parent(writer: IndexWriter) -> None:
    """Through branches, full runs, holes, rewriting and moves; and over gaps."""
    add_chain(writer, range(1, 1001), None)  # two runs
    add_chain(writer, [-1, -2], 300)  # a branch
    add_chain(writer, [-3], -2)  # goes on in its run
    add_chain(writer, [-9, -10], 5_000)  # after a block that was dropped meanwhile
    expected: dict[int, int | None] = {key: key - 1 for key in range(2, 1001)}
    expected |= {1: None, -1: 300, -2: -1, -3: -2, -9: None, -10: -9}
    assert parents_of(writer) == expected
    with writer.begin() as batch:
        batch.move_blocks(array([511, 512, -1]), BlockLocations.empty(3))
    assert parents_of(writer) == expected
    gone = [*range(100, 900), -1]
    with writer.begin() as batch:
        batch.remove_blocks(array(gone))
    for key in gone:
        del expected[key]
    # The parents of the second run and of the branch are gone: that is where chains begin now.
    assert parents_of(writer) == expected | {900: None, -2: None}
    with writer.begin() as batch:
        batch.remove_blocks(array([50]))
    assert parents_of(writer)[51] == 49
    add_chain(writer, [510], 98)
    assert parents_of(writer)[900] == 510, "it is back, wherever it is now"


def test_parents_never_go_in_circles(writer: IndexWriter) -> None:
    """Made-up keys may be added again after what was after them."""
    add_chain(writer, [1], None)
    add_chain(writer, [2, 3], 99)
    add_chain(writer, [4], 2)
    with writer.begin() as batch:
        batch.remove_blocks(array([1]))
    add_chain(writer, [99, 1], 4)
    assert parents_of(writer) == {2: None, 3: 2, 4: None, 99: 4, 1: 99}
    add_chain(writer, [5], 3)
    add_chain(writer, [6], 2)  # leads to the circle, but is not on it
    add_chain(writer, [8], 9)
    add_chain(writer, [9], 8)  # in the run that names it as parent
    more = {5: 3, 6: 2, 8: None, 9: 8}
    assert parents_of(writer) == {2: None, 3: 2, 4: None, 99: 4, 1: 99} | more
    with writer.begin() as batch:
        batch.remove_blocks(array([99, 1]))
    assert parents_of(writer) == {2: None, 3: 2, 4: 2} | more


def test_a_full_run_fills_its_pages(writer: IndexWriter) -> None:
    add_chain(writer, range(1, 511), -7)
    with writer._shared.read() as (txn, tables):
        assert len(txn.cursor(tables.runs).get(codec.U64.pack(1))) + 16 == 3 * 4096
        assert txn.stat(tables.runs)["overflow_pages"] == 3


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
