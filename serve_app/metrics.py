"""Counters of the HTTP interface, shared by all replicas of one manager.

Each replica owns one small memory-mapped file below ``<data_dir>/serve-metrics`` (held by a file
lock, so a file outlives its process and its successor counts on). Any replica answers for all of
them by adding the files up; nothing is sent anywhere and counting is a few array operations.

One row is one API, or one API of one instance: ``[calls, errors, last latency, total latency]`` in
microseconds, and its name. Rows are bounded; what no longer fits is counted in the row of its API.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

ROWS_MAX = 2048
FILES_MAX = 64
_NAME_BYTES = 448
_ROW = np.dtype(
    [("name", f"S{_NAME_BYTES}"), ("numbers", "i8", (5,))]  # calls, errors, last, total, when
)


class Series(NamedTuple):
    """One API (of one instance, if these are not empty)."""

    api: str
    group: str = ""
    instance: str = ""


@dataclass(slots=True)
class Counts:
    calls: int = 0
    errors: int = 0
    last_us: int = 0
    total_us: int = 0
    when_us: int = 0  #: when `last_us` was measured


class Metrics:
    """Counters of this replica, and the sum over all replicas.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file, path = _claim(folder)
        self._rows: npt.NDArray[np.void] = np.memmap(path, _ROW, "r+", shape=(ROWS_MAX,))
        #: A plain array on the same memory; the memmap class costs microseconds on every access.
        self._numbers: npt.NDArray[np.int64] = np.asarray(self._rows["numbers"]).view(np.ndarray)
        self._known: dict[Series, int] = {}
        self._index = {name: i for i, name in enumerate(self._rows["name"].tolist()) if name}

    def count(self, series: Series, seconds: float, failed: bool) -> None:
        index = self._known.get(series)
        if index is None:
            index = self._row(series)
            if len(self._known) < ROWS_MAX:
                self._known[series] = index
        row = self._numbers[index]
        elapsed_us = int(seconds * 1e6)
        row[0] += 1
        row[1] += failed
        row[2] = elapsed_us
        row[3] += elapsed_us
        row[4] = time.time_ns() // 1000

    def totals(self) -> dict[Series, Counts]:
        """Over all replicas that ever ran on this data directory."""
        result: dict[Series, Counts] = {}
        for row in self._all_rows():
            counts = result.setdefault(_series(bytes(row["name"])), Counts())
            calls, errors, last_us, total_us, when_us = row["numbers"].tolist()
            counts.calls += calls
            counts.errors += errors
            counts.total_us += total_us
            if when_us >= counts.when_us:
                counts.when_us, counts.last_us = when_us, last_us
        return result

    def close(self) -> None:
        self._file.close()

    def _all_rows(self) -> Iterator[npt.NDArray[np.void]]:
        for path in sorted(self._folder.glob("*.counters")):
            if path.stat().st_size == ROWS_MAX * _ROW.itemsize:
                rows = np.memmap(path, _ROW, "r", shape=(ROWS_MAX,))
                yield from rows[rows["name"] != b""]

    def _row(self, series: Series) -> int:
        name = "\t".join((series.api, series.group, series.instance)).encode()
        index = self._index.get(name)
        if index is not None:
            return index
        if len(name) > _NAME_BYTES or len(self._index) >= ROWS_MAX - (256 if series.instance else 1):
            return self._row(Series(series.api))
        index = self._index[name] = len(self._index)
        self._rows[index]["name"] = name
        return index


def _series(name: bytes) -> Series:
    api, group, instance = name.decode(errors="replace").split("\t", 2)
    return Series(api, group, instance)


def _claim(folder: Path) -> tuple[IO[bytes], Path]:
    """The first counter file that no living replica holds; locked until it is closed."""
    for number in range(FILES_MAX):
        path = folder / f"{number:02d}.counters"
        file = open(path, "ab")  # noqa: SIM115 - held open as long as we count
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        if os.fstat(file.fileno()).st_size != ROWS_MAX * _ROW.itemsize:
            os.ftruncate(file.fileno(), 0)
            os.ftruncate(file.fileno(), ROWS_MAX * _ROW.itemsize)
        return file, path
    raise OSError(f"{FILES_MAX} replicas hold all counter files in {folder}")
