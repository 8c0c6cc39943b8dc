"""Reading a whole index at once: what is there, and do runs and pointers agree.

Done when an index is opened and by ``verify``, over a million blocks and more, so it works on arrays
of all blocks; per run there are a few slices only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.requests import Flags, Keys
from kvcm_ray.index import codec
from kvcm_ray.index.codec import COLUMNS, RUN_HEADER, Columns
from kvcm_ray.index.tables import Tables

Words = npt.NDArray[np.uint64]  #: run id << 16 | offset
Places = npt.NDArray[np.intp]


@dataclass
class Survey:
    """All living blocks of intact runs, run by run, as parallel arrays."""

    keys: Keys
    columns: Columns
    words: Words
    run_of: Places  #: place of each block's run in the arrays of runs
    firsts: Places  #: of each run: place of its first living block
    parent_keys: Keys  #: of each run
    has_parent: Flags  #: of each run
    damaged_runs: list[int]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def order(self) -> Places:
        """Places in the order in which LMDB keeps the keys."""
        return np.argsort(self.keys.view(np.uint64), kind="stable")

    def places(self, keys: Keys) -> Places:
        """Place of each key; -1 for those that are not there."""
        if not len(self):
            return np.full(len(keys), -1, np.intp)
        ordered = self.keys[self.order].view(np.uint64)
        wanted = np.ascontiguousarray(keys, np.int64).view(np.uint64)
        at = np.minimum(np.searchsorted(ordered, wanted), len(self) - 1)
        return np.where(ordered[at] == wanted, self.order[at], -1)

    def parents(self) -> Keys:
        """Place of the block before each one in its chain, -1 if that is not known or not there.

        Following parents always ends. Chains of hashes have no circles, but keys that a client makes
        up can: a block removed and added again after its own descendant.
        """
        parents = np.arange(-1, len(self) - 1, dtype=np.int64)
        before = np.where(self.has_parent, self.places(self.parent_keys), -1)
        before[_on_circles(np.where(before >= 0, self.run_of[before], -1))] = -1
        parents[self.firsts] = before
        return parents


def _on_circles(up: Places) -> Places:
    """Nodes from which `up` (-1 = nowhere) leads back to them."""
    ahead = np.append(up, -1)  # so that nowhere leads nowhere: index -1 is the last element
    for _ in range(len(up).bit_length()):
        ahead = ahead[ahead]
    # More steps than there are nodes have been made: who still is somewhere is on a circle, and
    # every node of a circle is where another one of it has come to.
    return np.unique(ahead[ahead >= 0])


@dataclass(slots=True)
class _Columns:
    """Bytes of all runs; not lists of views, which would take 20 times as much."""

    run_ids: list[int]
    blocks: list[int]
    parents: list[int | None]
    holes: list[tuple[int, Flags]]  #: of runs that have some, by place in the lists above
    keys: bytearray
    columns: tuple[bytearray, ...]
    damaged: list[int]


def _collect(txn: Any, tables: Tables) -> _Columns:
    found = _Columns([], [], [], [], bytearray(), tuple(bytearray() for _ in range(COLUMNS)), [])
    for key, view in txn.cursor(tables.runs):
        run_id = int.from_bytes(key, "little")
        header = codec.read_header(view, run_id)
        if header is None or codec.columns_of(view, run_id, header) is None:
            found.damaged.append(run_id)
            continue
        blocks, dead, _ = header
        if dead:
            found.holes.append((len(found.blocks), codec.holes_of(view, blocks)))
        found.run_ids.append(run_id)
        found.blocks.append(blocks)
        found.parents.append(codec.parent_of(view))
        found.keys += view[RUN_HEADER.size : RUN_HEADER.size + 8 * blocks]
        start = codec.match_end(blocks, dead)
        for column in found.columns:
            column += view[start : start + 4 * blocks]
            start += 4 * blocks
    return found


def survey(txn: Any, tables: Tables) -> Survey:
    """Read all runs."""
    found = _collect(txn, tables)
    blocks = np.array(found.blocks, np.intp)
    starts = np.cumsum(blocks) - blocks
    total = int(blocks.sum())
    run_of = np.repeat(np.arange(len(blocks)), blocks)
    alive = np.ones(total, np.bool_)
    for run, holes in found.holes:
        alive[starts[run] : starts[run] + len(holes)] = ~holes
    offsets = (np.arange(total) - starts[run_of]).astype(np.uint64)
    words = np.array(found.run_ids, np.uint64)[run_of] << np.uint64(16) | offsets
    run_of = run_of[alive]
    return Survey(
        np.frombuffer(found.keys, np.int64)[alive],
        np.stack([np.frombuffer(column, np.uint32)[alive] for column in found.columns]),
        words[alive],
        run_of,
        np.flatnonzero(np.diff(run_of, prepend=-1)),  # the last block of a run is always alive
        np.array([parent or 0 for parent in found.parents], np.int64),
        np.array([parent is not None for parent in found.parents], np.bool_),
        found.damaged,
    )


@dataclass(slots=True)
class Census:
    """What runs and pointers say about each other; blocks are (key, run id << 16 | offset)."""

    damaged_runs: list[int]
    living: int  #: blocks in intact runs
    dangling: set[tuple[int, int]]  #: pointers without such a block
    unreachable: set[tuple[int, int]]  #: blocks without such a pointer
    segments: set[int]  #: that living blocks are in

    def is_sound(self, counted: int, known_segments: set[int]) -> bool:
        """Whether there is nothing to repair, given the counter of blocks and the segments."""
        contradictions = self.damaged_runs or self.dangling or self.unreachable
        return not contradictions and counted == self.living and self.segments <= known_segments


def census(txn: Any, found: Survey) -> Census:
    """Compare all runs with all pointers; `keys` is the default table of the transaction."""
    segments = set(np.unique(found.columns[0]).tolist())
    result = Census(found.damaged_runs, len(found), set(), set(), segments)
    keys, words = all_pointers(txn)
    same = np.array_equal(found.keys[found.order], keys) and np.array_equal(found.words[found.order], words)
    if not same:
        blocks = set(zip(found.keys.tolist(), found.words.tolist(), strict=True))
        pointers = set(zip(keys.tolist(), words.tolist(), strict=True))
        result.dangling, result.unreachable = pointers - blocks, blocks - pointers
    return result


def all_pointers(txn: Any) -> tuple[Keys, Words]:
    """Every key that has a pointer, and the pointers, in LMDB's order."""
    keys, words = bytearray(), bytearray()
    for key, word in txn.cursor():
        keys += key
        words += word[:8]
    return np.frombuffer(keys, np.int64), np.frombuffer(words, np.uint64)
