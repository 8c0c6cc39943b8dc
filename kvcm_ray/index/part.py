"""The runs that some keys are in, as one writable copy: what moving and removing work on.

In whatever order keys are named, each run is read once, and what concerns single blocks is done for
all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from kvcm_ray.core.requests import Flags, Keys
from kvcm_ray.index import codec
from kvcm_ray.index.codec import RUN_HEADER, Columns
from kvcm_ray.index.survey import Places, Words
from kvcm_ray.index.tables import Tables
from kvcm_ray.index.walk import Damage, OpenRun, open_run


@dataclass(slots=True)
class Part:
    """Living blocks of some runs, by run and offset, as parallel arrays.

    All parts of a run record are multiples of 8 bytes long, so the records lie in one array.
    """

    data: bytearray  #: the records
    runs: list[OpenRun]  #: over slices of `data`
    starts: Places  #: of each run: where its record begins
    run_of: Places  #: of each block: place of its run in `runs`
    offsets: Places  #: of each block in its run
    at: Places  #: of each block in the keys that were asked for

    def __len__(self) -> int:
        return len(self.offsets)

    def by_run(self) -> Iterator[tuple[OpenRun, slice]]:
        """Each run of which there are blocks, and where those are in the arrays."""
        bounds = np.searchsorted(self.run_of, np.arange(len(self.runs) + 1)).tolist()
        for run, (start, end) in zip(self.runs, pairwise(bounds), strict=True):
            if start < end:
                yield run, slice(start, end)

    def living(self, keys: Keys) -> Flags:
        """Where there is a living block of that key."""
        places = (self.starts[self.run_of] + RUN_HEADER.size) // 8 + self.offsets
        living: Flags = np.frombuffer(self.data, np.int64).take(places, mode="clip") == keys
        living &= self.offsets < self._blocks()[self.run_of]
        for run, mine in self.by_run():
            if run.header[1]:
                living[mine] &= ~run.holes.take(self.offsets[mine], mode="clip")
        return living

    def choose(self, blocks: Flags | Places) -> None:
        """Keep some of the blocks, or order them."""
        self.run_of, self.offsets, self.at = self.run_of[blocks], self.offsets[blocks], self.at[blocks]

    def add(self, more: list[tuple[int, int, int]]) -> None:
        """More blocks of the same runs: (run, offset, at) of each."""
        rows = np.array(more, np.intp).reshape(-1, 3).T
        self.run_of = np.concatenate((self.run_of, rows[0]))
        self.offsets = np.concatenate((self.offsets, rows[1]))
        self.at = np.concatenate((self.at, rows[2]))
        self.choose(np.lexsort((self.offsets, self.run_of)))

    def set_columns(self, columns: Columns) -> None:
        """Change the first columns of the blocks; `columns` are aligned with the keys asked for."""
        ends = [codec.match_end(run.header[0], run.header[1]) for run in self.runs]
        first, blocks = (self.starts + np.array(ends, np.intp)) // 4, self._blocks()
        data = np.frombuffer(self.data, np.uint32)
        for number, column in enumerate(columns):
            data[(first + number * blocks)[self.run_of] + self.offsets] = column[self.at]
        for run in self.runs:
            codec.reseal(run.view, run.run_id, run.header)

    def _blocks(self) -> Places:
        return np.array([run.header[0] for run in self.runs], np.intp)


def load(txn: Any, tables: Tables, keys: Keys, fetch: Callable[[bytes], Any], damage: Damage) -> Part:
    """The blocks that `keys` name; those that are not there are left out.

    `fetch` gets a pointer, or takes it out of its table; then a key named twice counts once. A block
    whose pointer is damaged is found if another block of its run is named too, because look-ups that
    come along the run find it as well.
    """
    fetched = [fetch(key) for key in codec.raw_keys(keys)]
    there = np.flatnonzero([word is not None for word in fetched])
    words = np.frombuffer(b"".join([word[:8] for word in fetched if word is not None]), np.uint64)
    order = np.argsort(words)
    part, led = _opened(txn, tables, words[order])
    part.at = there[order][led]
    right = part.living(keys[part.at])
    damage.records += len(words) - int(right.sum())
    part.choose(right)
    if len(part) < len(keys):
        part.add(_strays(part, keys))
    return part


def _strays(part: Part, keys: Keys) -> list[tuple[int, int, int]]:
    """Blocks of the runs of a part that keys name, but no pointer led to: (run, offset, at)."""
    named = {key: at for at, key in enumerate(keys.tolist())}
    for key in keys[part.at].tolist():
        named.pop(key, None)
    found: list[tuple[int, int, int]] = []
    for number, run in enumerate(part.runs if named else ()):
        held = codec.keys_of(run.view, run.header[0])
        for offset in np.flatnonzero(np.isin(held, list(named)) & ~run.holes).tolist():
            found.append((number, offset, named[int(held[offset])]))
    return found


def _opened(txn: Any, tables: Tables, words: Words) -> tuple[Part, Flags]:
    """Copies of the runs that ascending pointers lead to, and which of these lead to an intact one."""
    run_ids, run_of = np.unique(words >> np.uint64(16), return_inverse=True)
    opened = [open_run(txn, tables, run_id) for run_id in run_ids.tolist()]
    intact = np.array([run is not None for run in opened], np.bool_)
    runs = [run for run in opened if run is not None]
    data = bytearray().join([run.view for run in runs])
    bounds = list(accumulate((len(run.view) for run in runs), initial=0))
    view = memoryview(data)
    copies = [
        OpenRun(run.run_id, view[start:end], run.header)
        for run, (start, end) in zip(runs, pairwise(bounds), strict=True)
    ]
    led = intact[run_of]
    run_of = (np.cumsum(intact) - 1)[run_of][led]
    offsets = (words[led] & np.uint64(0xFFFF)).astype(np.intp)
    return Part(data, copies, np.array(bounds[:-1], np.intp), run_of, offsets, run_of), led
