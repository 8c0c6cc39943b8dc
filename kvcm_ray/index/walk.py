"""Looking keys up in runs: the one algorithm behind match and look-up.

For a key, get its pointer, then the run it points into, then compare the run's keys from there on
with the keys asked for, in one operation; go on at the first difference, or at the run's end. Each
key is in at most one living place, so an equal key in a run *is* that key's place, and the result
is that of a flat dictionary whatever keys are asked for, chained or not.

A damaged or contradicting record is a miss, and is counted in `Damage`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import lmdb
import numpy as np

from kvcm_ray.core.requests import Flags, Keys
from kvcm_ray.index import codec
from kvcm_ray.index.codec import COLUMNS, RUN_HEADER, Columns
from kvcm_ray.index.tables import Tables


@dataclass(slots=True)
class Damage:
    """Counts records that read as a miss because they are damaged."""

    records: int = 0


class OpenRun:
    """A run record whose keys are verified; valid until the transaction ends or writes.

    What else is asked of it is verified once and kept, as a walk may come back to it many times.
    """

    __slots__ = ("_columns", "_holes", "header", "run_id", "view")

    def __init__(self, run_id: int, view: Any, header: tuple[int, int, int]) -> None:
        self.run_id, self.view, self.header = run_id, view, header
        self._columns: Columns | None = None
        self._holes: Flags | None = None

    def columns(self) -> Columns | None:
        """A view of the locations; None if they are damaged."""
        if self._columns is None:
            self._columns = codec.columns_of(self.view, self.run_id, self.header)
        return self._columns

    @property
    def holes(self) -> Flags:
        """True = removed."""
        if self._holes is None:
            blocks, dead, _ = self.header
            self._holes = codec.holes_of(self.view, blocks) if dead else np.zeros(blocks, np.bool_)
        return self._holes

    def common(self, offset: int, keys: Keys, raw: bytes, at: int) -> int:
        """How many living blocks from `offset` on equal the keys from `at` on."""
        blocks, dead, _ = self.header
        view, start, here = self.view, RUN_HEADER.size + 8 * offset, 8 * at
        count = min(blocks - offset, len(keys) - at)
        if count > 1 and bytes(view[start + 8 : start + 16]) != raw[here + 8 : here + 16]:
            count = 1  # keys in no order of ours: spare the long comparison
        if not dead and bytes(view[start : start + 8 * count]) == raw[here : here + 8 * count]:
            return count
        wrong = np.frombuffer(view, np.int64, count, start) != keys[at : at + count]
        if dead:
            wrong |= self.holes[offset : offset + count]
        first = int(wrong.argmax())
        return first if wrong[first] else count


class Span(NamedTuple):
    """`blocks` keys from `at` on are the blocks from `offset` on of a run."""

    at: int
    blocks: int
    offset: int
    run: OpenRun


def spans(txn: Any, tables: Tables, keys: Keys, damage: Damage, *, prefix: bool) -> Iterator[Span]:
    """Hits among `keys` (contiguous) in order; stops at the first miss if only the prefix matters.

    `txn` must have been begun with ``db=tables.keys, buffers=True``.
    """
    get, number = txn.get, int.from_bytes
    raw, at, total = keys.tobytes(), 0, len(keys)
    opened: dict[int, OpenRun | None] = {}
    while at < total:
        count = 0
        try:
            pointer = get(raw[8 * at : 8 * at + 8])
            if pointer is not None:
                word = number(pointer[:8], "little")
                run_id, offset = word >> 16, word & 0xFFFF
                if run_id not in opened:
                    opened[run_id] = open_run(txn, tables, run_id)
                run = opened[run_id]
                if run is not None and offset < run.header[0]:
                    count = run.common(offset, keys, raw, at)
                if count:
                    yield Span(at, count, offset, run)  # type: ignore[arg-type]
                else:
                    damage.records += 1
        except lmdb.Error:  # a damaged page
            damage.records += 1
        if not count and prefix:
            return
        at += count or 1


def open_run(txn: Any, tables: Tables, run_id: int) -> OpenRun | None:
    """None if it is not there or its keys are damaged."""
    view = txn.get(codec.U64.pack(run_id), None, tables.runs)
    header = codec.read_header(view, run_id)
    return None if header is None else OpenRun(run_id, view, header)


def match_length(txn: Any, tables: Tables, keys: Keys, damage: Damage) -> int:
    """Length of the longest prefix of `keys` that is all there."""
    length = 0
    for span in spans(txn, tables, keys, damage, prefix=True):
        length = span.at + span.blocks
    return length


def match(txn: Any, tables: Tables, keys: Keys, damage: Damage) -> tuple[int, Columns]:
    """Length of the prefix, and its columns in an array of shape (COLUMNS, len(keys))."""
    out = np.empty((COLUMNS, len(keys)), np.uint32)
    length = 0
    for at, count, offset, run in spans(txn, tables, keys, damage, prefix=True):
        columns = run.columns()
        if columns is None:
            damage.records += 1
            break
        length = at + count
        out[:, at:length] = columns[:, offset : offset + count]
    return length, out


def lookup(txn: Any, tables: Tables, keys: Keys, damage: Damage) -> tuple[Flags, Columns]:
    """Which keys are there, and their columns; those of misses are zeros."""
    hits = np.zeros(len(keys), np.bool_)
    out = np.zeros((COLUMNS, len(keys)), np.uint32)
    for at, count, offset, run in spans(txn, tables, keys, damage, prefix=False):
        columns = run.columns()
        if columns is None:
            damage.records += 1
            continue
        hits[at : at + count] = True
        out[:, at : at + count] = columns[:, offset : offset + count]
    return hits, out


def all_runs(txn: Any, tables: Tables) -> Iterator[tuple[int, codec.Run | None]]:
    """(run id, run) of every run in the order of their making; None for a damaged one."""
    for key, view in txn.cursor(tables.runs):
        run_id = int.from_bytes(key, "little")
        yield run_id, codec.decode_run(view, run_id)


def written_between(txn: Any, tables: Tables, begin_s: int, end_s: int, damage: Damage) -> Keys:
    """Keys of living blocks written within ``[begin_s, end_s]``; reads every run."""
    found = [np.zeros(0, np.int64)]
    for _, run in all_runs(txn, tables):
        if run is None:
            damage.records += 1
            continue
        written = run.columns[3]
        found.append(run.keys[run.alive & (written >= begin_s) & (written <= end_s)])
    return np.concatenate(found)
