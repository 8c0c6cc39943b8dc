"""Changing runs inside a write transaction: adding, moving and removing blocks.

New blocks extend the run that ends with their parent, if it has room, and else start a run, which
remembers that parent. A removed block becomes a hole; holes at the end of a run are cut off, a run
with more holes than blocks is written again without them, an empty one is dropped. However many
blocks of a run are moved or removed at once, and in whatever order they are named, the run is read
and written once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.index import codec, walk
from kvcm_ray.index.codec import RUN_BLOCKS, U64, Columns, Counters, Run
from kvcm_ray.index.part import load
from kvcm_ray.index.survey import Census, Places
from kvcm_ray.index.tables import Tables
from kvcm_ray.index.walk import OpenRun


class RunTables:
    """`runs` and `keys` of one write transaction (begun with `keys` as its default table)."""

    def __init__(self, txn: Any, tables: Tables, counters: Counters, damage: walk.Damage) -> None:
        self._txn, self._tables, self._counters, self._damage = txn, tables, counters, damage

    def add(self, keys: Keys, columns: Columns, parent_key: int | None) -> None:
        """Add blocks that are not there yet.

        Raises:
            InvalidArgument: a key is there already or given twice. Abort the transaction then.
        """
        start, count = 0, len(keys)
        pointers: list[bytes] = []
        tail = self._run_ending_with(parent_key) if parent_key is not None and count else None
        while start < count:
            first = 0 if tail is None else len(tail.keys)
            end = min(count, start + RUN_BLOCKS - first)
            run = self._joined(tail, keys[start:end], columns[:, start:end], parent_key)
            parent_key = int(keys[end - 1])
            self._put_run(run.run_id, codec.encode_run(run))
            pointers.append(codec.pointers(run.run_id, first, end - start))
            start, tail = end, None
        self._put_new_pointers(keys, b"".join(pointers))
        self._counters.blocks += count

    def _run_ending_with(self, key: int) -> Run | None:
        """The run whose last block is `key`, if it has room for more."""
        pointer = self._txn.get(np.int64(key).tobytes())
        if pointer is None:
            return None
        word = int.from_bytes(pointer, "little")
        run_id, offset = word >> 16, word & 0xFFFF
        run = codec.decode_run(self._txn.get(U64.pack(run_id), None, self._tables.runs), run_id)
        if run is None or offset != len(run.keys) - 1 or run.keys[offset] != key:
            return None
        return run if len(run.keys) < RUN_BLOCKS else None

    def _joined(self, tail: Run | None, keys: Keys, columns: Columns, parent_key: int | None) -> Run:
        if tail is None:
            run_id = self._counters.next_run
            self._counters.next_run += 1
            return Run(run_id, keys, columns, None, parent_key)
        holes = tail.holes
        if holes is not None:
            holes = np.concatenate((holes, np.zeros(len(keys), np.bool_)))
        return Run(
            tail.run_id,
            np.concatenate((tail.keys, keys)),
            np.concatenate((tail.columns, columns), axis=1),
            holes,
            tail.parent,
        )

    def _put_new_pointers(self, keys: Keys, pointers: bytes) -> None:
        items = _with_pointers(keys, pointers)
        _, added = self._txn.cursor().putmulti(items, overwrite=False)
        if added != len(items):
            self._replace_dangling(keys, items)

    def _replace_dangling(self, keys: Keys, items: list[tuple[bytes, bytes]]) -> None:
        """Some keys had pointers before: left over from damaged runs, or the caller is wrong."""
        if len(np.unique(keys)) != len(keys):
            raise InvalidArgument("a block is added twice in one call")
        for key, pointer in items:
            present = self._txn.get(key)
            if present != pointer and self._points_at(int.from_bytes(present, "little"), key):
                number = int.from_bytes(key, "little", signed=True)
                raise InvalidArgument(f"block {number} is in the index already")
            self._txn.put(key, pointer)

    def _points_at(self, word: int, key: bytes) -> bool:
        run_id, offset = word >> 16, word & 0xFFFF
        run = codec.decode_run(self._txn.get(U64.pack(run_id), None, self._tables.runs), run_id)
        if run is None or offset >= len(run.keys) or not run.alive[offset]:
            return False
        return bool(run.keys[offset].tobytes() == key)

    def move(self, keys: Keys, columns: Columns) -> None:
        """Replace the first rows of the columns of blocks.

        Raises:
            InvalidArgument: a block is not there. Abort the transaction then.
        """
        part = load(self._txn, self._tables, keys, self._txn.get, self._damage)
        readable = all(run.columns() is not None for run in part.runs)
        if not readable or len(part) != len(keys):
            raise InvalidArgument(f"of {len(keys)} blocks to move, {len(part)} are in the index")
        part.set_columns(columns)
        records = [(U64.pack(run.run_id), run.view) for run in part.runs]
        self._txn.cursor(self._tables.runs).putmulti(records)

    def remove(self, keys: Keys) -> int:
        """Remove blocks; those that are not there are skipped. Returns how many were there."""
        in_order = np.sort(keys.view(np.uint64)).view(np.int64)
        part = load(self._txn, self._tables, in_order, self._txn.pop, self._damage)
        for run, mine in part.by_run():
            self._punch(run, part.offsets[mine])
        self._counters.blocks -= len(part)
        return len(part)

    def _punch(self, run: OpenRun, offsets: Places) -> None:
        """Make holes in a run at `offsets`, ascending, of some or all of its living blocks."""
        blocks, dead, _ = run.header
        if len(offsets) == blocks - dead:
            self._drop_run(run.run_id)
        elif run.columns() is None:  # nobody can read where the others are
            self._damage.records += 1
            self._drop_run(run.run_id)
        elif not dead and offsets[0] == blocks - len(offsets):  # its tail, as eviction takes blocks
            self._put_run(run.run_id, codec.cut_run(run.view, run.run_id, run.header, int(offsets[0])))
        else:
            self._put_holes(run, offsets)

    def _put_holes(self, run: OpenRun, offsets: Places) -> None:
        old = codec.decode_run(run.view, run.run_id)
        assert old is not None
        alive = old.alive
        alive[offsets] = False
        living = np.flatnonzero(alive)
        size = int(living[-1]) + 1
        if 2 * len(living) < size:
            kept = Run(run.run_id, old.keys[living], old.columns[:, living], None, old.parent)
            pointers = codec.pointers(run.run_id, 0, len(living))
            self._txn.cursor().putmulti(_with_pointers(kept.keys, pointers))
        else:
            holes = ~alive[:size] if len(living) < size else None
            kept = Run(run.run_id, old.keys[:size], old.columns[:, :size], holes, old.parent)
        self._put_run(run.run_id, codec.encode_run(kept))

    def _put_run(self, run_id: int, record: bytes) -> None:
        self._txn.put(U64.pack(run_id), record, db=self._tables.runs)

    def _drop_run(self, run_id: int) -> None:
        self._txn.delete(U64.pack(run_id), db=self._tables.runs)

    def repair(self, census: Census, known_segments: set[int]) -> Keys:
        """Drop damaged runs, pointers that lead nowhere, blocks without a pointer and blocks in
        unknown segments. Returns the keys that are lost by that.
        """
        for run_id in census.damaged_runs:
            self._drop_run(run_id)
        for key, _ in census.dangling:
            self._txn.delete(np.int64(key).tobytes())
        unreachable: dict[int, list[int]] = {}
        for _, word in census.unreachable:
            unreachable.setdefault(word >> 16, []).append(word & 0xFFFF)
        for run_id, offsets in unreachable.items():
            run = walk.open_run(self._txn, self._tables, run_id)
            if run is not None:  # always: the census has just read it
                self._punch(run, np.array(sorted(offsets), np.intp))
        self._counters.blocks = census.living - len(census.unreachable)
        lost = [key for key, _ in census.dangling | census.unreachable]
        homeless = np.zeros(0, np.int64)
        if census.segments - known_segments:
            homeless = self._remove_homeless(known_segments)
        return np.unique(np.concatenate((np.array(lost, np.int64), homeless)))

    def _remove_homeless(self, known_segments: set[int]) -> Keys:
        known = np.array(sorted(known_segments), np.uint32)
        found = [np.zeros(0, np.int64)]
        for _, run in walk.all_runs(self._txn, self._tables):
            if run is not None:
                found.append(run.keys[run.alive & ~np.isin(run.columns[0], known)])
        keys = np.concatenate(found)
        self.remove(keys)
        return keys


def _with_pointers(keys: Keys, pointers: bytes) -> list[tuple[bytes, bytes]]:
    """Each key with its pointer record."""
    return [(key, pointers[8 * i : 8 * i + 8]) for i, key in enumerate(codec.raw_keys(keys))]
