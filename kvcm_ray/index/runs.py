"""Changing runs inside a write transaction: adding and removing blocks.

New blocks extend the run that ends with their parent, if it has room, and else start a run. A
removed block becomes a hole; holes at the end of a run are cut off, a run with more holes than
blocks is written again without them, an empty one is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.index import codec, walk
from kvcm_ray.index.codec import RUN_BLOCKS, U64, Columns, Counters, Run
from kvcm_ray.index.tables import Tables


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
            run = self._joined(tail, keys[start:end], columns[:, start:end])
            self._put_run(run)
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

    def _joined(self, tail: Run | None, keys: Keys, columns: Columns) -> Run:
        if tail is None:
            run_id = self._counters.next_run
            self._counters.next_run += 1
            return Run(run_id, keys, columns, None)
        holes = tail.holes
        if holes is not None:
            holes = np.concatenate((holes, np.zeros(len(keys), np.bool_)))
        return Run(
            tail.run_id,
            np.concatenate((tail.keys, keys)),
            np.concatenate((tail.columns, columns), axis=1),
            holes,
        )

    def _put_run(self, run: Run) -> None:
        self._txn.put(U64.pack(run.run_id), codec.encode_run(run), db=self._tables.runs)

    def _put_new_pointers(self, keys: Keys, pointers: bytes) -> None:
        raw = keys.tobytes()
        ends = range(0, len(raw), 8)
        items = [(raw[i : i + 8], pointers[i : i + 8]) for i in ends]
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

    def remove(self, keys: Keys) -> int:
        """Remove blocks; those that are not there are skipped. Returns how many were there."""
        found: dict[int, list[int]] = {}
        hits = np.zeros(len(keys), np.bool_)
        for span in walk.spans(self._txn, self._tables, keys, self._damage, prefix=False):
            offsets = found.setdefault(span.run.run_id, [])
            offsets.extend(range(span.offset, span.offset + span.blocks))
            hits[span.at : span.at + span.blocks] = True
        for key in _raw_keys(keys[hits]):
            self._txn.delete(key)
        removed = sum(self._punch(run_id, offsets) for run_id, offsets in found.items())
        self._counters.blocks -= removed
        return removed

    def _punch(self, run_id: int, offsets: list[int]) -> int:
        """Make holes in a run; returns how many blocks that were."""
        key = U64.pack(run_id)
        run = codec.decode_run(self._txn.get(key, None, self._tables.runs), run_id)
        if run is None:  # its locations are damaged; nobody can reach it any more
            self._damage.records += 1
            self._txn.delete(key, db=self._tables.runs)
            return len(set(offsets))
        alive = run.alive
        before = int(alive.sum())
        alive[offsets] = False
        living = np.flatnonzero(alive)
        if not len(living):
            self._txn.delete(key, db=self._tables.runs)
        elif 2 * len(living) < living[-1] + 1:
            self._rewrite(run, living)
        else:
            size = int(living[-1]) + 1
            holes = ~alive[:size]
            kept = holes if holes.any() else None
            self._put_run(Run(run_id, run.keys[:size], run.columns[:, :size], kept))
        return before - len(living)

    def _rewrite(self, run: Run, living: np.ndarray[Any, np.dtype[np.intp]]) -> None:
        keys = run.keys[living]
        self._put_run(Run(run.run_id, keys, run.columns[:, living], None))
        pointers = codec.pointers(run.run_id, 0, len(keys))
        self._txn.cursor().putmulti(
            [(key, pointers[8 * i : 8 * i + 8]) for i, key in enumerate(_raw_keys(keys))]
        )

    def repair(self, census: walk.Census, known_segments: set[int]) -> Keys:
        """Drop damaged runs, pointers that lead nowhere, blocks without a pointer and blocks in
        unknown segments. Returns the keys that are lost by that.
        """
        for run_id in census.damaged_runs:
            self._txn.delete(U64.pack(run_id), db=self._tables.runs)
        for key, _ in census.dangling:
            self._txn.delete(np.int64(key).tobytes())
        unreachable: dict[int, list[int]] = {}
        for _, word in census.unreachable:
            unreachable.setdefault(word >> 16, []).append(word & 0xFFFF)
        for run_id, offsets in unreachable.items():
            self._punch(run_id, offsets)
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


def _raw_keys(keys: Keys) -> Iterable[bytes]:
    raw = keys.tobytes()
    return (raw[i : i + 8] for i in range(0, len(raw), 8))
