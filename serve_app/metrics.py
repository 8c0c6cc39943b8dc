"""Counters of the interface, shared by all replicas of one manager.

Each replica owns one small memory-mapped file below ``<data_dir>/serve-metrics`` (held by a file
lock, so a file outlives its process and its successor counts on). Any replica answers for all of
them by adding the files up; nothing is sent anywhere and counting is a few additions.

One row is one API, or one API of one instance: calls, errors, latencies in microseconds, calls by code
and by latency. Rows are bounded; what no longer fits is counted in the row of its API. Other things that
replicas count have rows as well (`add`, `extras`).
"""

from __future__ import annotations

import fcntl
import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcm_ray.serve_app.messages import ErrorCode

ROWS_MAX = 2048
FILES_MAX = 64
#: Upper ends of the buckets of latencies.
LATENCIES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
CODES = tuple(code for code in ErrorCode if code.name not in ("UNSPECIFIED", "ERROR_MAX"))

_NAME_BYTES = 448
_CALLS, _ERRORS, _LAST, _TOTAL, _WHEN = range(5)
_BY_CODE = 5
_BY_LATENCY = _BY_CODE + len(CODES)
_NUMBERS = _BY_LATENCY + len(LATENCIES_S) + 1
_ROW = np.dtype([("name", f"S{_NAME_BYTES}"), ("numbers", "i8", (_NUMBERS,))])
_ROW_WORDS, _NAME_WORDS = _ROW.itemsize // 8, _NAME_BYTES // 8
_CODE_AT = {code: _BY_CODE + i for i, code in enumerate(CODES)}
_OTHER_CODE = _CODE_AT[ErrorCode.UNKNOWN_ERROR]
_EXTRA = "#"  #: first character of the names of rows that are no API


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
    by_code: list[int] = field(default_factory=lambda: [0] * len(CODES))
    by_latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCIES_S) + 1))

    def add(self, other: Counts) -> None:
        self.calls += other.calls
        self.errors += other.errors
        self.total_us += other.total_us
        if other.when_us >= self.when_us:
            self.when_us, self.last_us = other.when_us, other.last_us
        self.by_code = [a + b for a, b in zip(self.by_code, other.by_code, strict=True)]
        self.by_latency = [a + b for a, b in zip(self.by_latency, other.by_latency, strict=True)]


class Metrics:
    """Counters of this replica, and the sum over all replicas.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file, path = _claim(folder)
        words = np.memmap(path, np.int64, "r+", shape=(ROWS_MAX * _ROW_WORDS,)).view(np.ndarray)
        self._rows: npt.NDArray[np.void] = words.view(_ROW)
        #: The same memory; adding to an item costs a third of what it costs in an array.
        self._words = words.data
        self._known: dict[Series, int] = {}
        self._index = {name: i for i, name in enumerate(self._rows["name"].tolist()) if name}

    def count(self, series: Series, seconds: float, code: ErrorCode = ErrorCode.OK) -> None:
        """One call that ended with `code` after `seconds`."""
        at = self._known.get(series)
        if at is None:
            at = self._row(series) * _ROW_WORDS + _NAME_WORDS
            if len(self._known) < ROWS_MAX:
                self._known[series] = at
        words, elapsed_us = self._words, int(seconds * 1e6)
        words[at] += 1
        if code is not ErrorCode.OK:
            words[at + _ERRORS] += 1
        words[at + _LAST] = elapsed_us
        words[at + _TOTAL] += elapsed_us
        words[at + _WHEN] = time.time_ns() // 1000
        words[at + _CODE_AT.get(code, _OTHER_CODE)] += 1
        words[at + _BY_LATENCY + bisect_left(LATENCIES_S, seconds)] += 1

    def add(self, what: str, group: str, count: int) -> None:
        """Count something that is no call."""
        self._words[self._row(Series(_EXTRA + what, group)) * _ROW_WORDS + _NAME_WORDS] += count

    def totals(self) -> dict[Series, Counts]:
        """Calls over all replicas that ever ran on this data directory."""
        result: dict[Series, Counts] = {}
        for series, numbers in self._all():
            if not series.api.startswith(_EXTRA):
                result.setdefault(series, Counts()).add(_counts(numbers))
        return result

    def by_api(self) -> dict[str, Counts]:
        """`totals` by API, whatever the instance."""
        result: dict[str, Counts] = {}
        for series, counts in self.totals().items():
            result.setdefault(series.api, Counts()).add(counts)
        return result

    def extras(self) -> dict[tuple[str, str], int]:
        """What was counted by `add`, by name and group."""
        result: dict[tuple[str, str], int] = {}
        for series, numbers in self._all():
            if series.api.startswith(_EXTRA):
                name = series.api.removeprefix(_EXTRA), series.group
                result[name] = result.get(name, 0) + numbers[_CALLS]
        return result

    def close(self) -> None:
        self._file.close()

    def _all(self) -> Iterator[tuple[Series, list[int]]]:
        for path in sorted(self._folder.glob("*.counters")):
            if path.stat().st_size == ROWS_MAX * _ROW.itemsize:
                rows = np.memmap(path, _ROW, "r", shape=(ROWS_MAX,))
                for row in rows[rows["name"] != b""]:
                    yield _series(bytes(row["name"])), row["numbers"].tolist()

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


def _counts(numbers: list[int]) -> Counts:
    calls, errors, last_us, total_us, when_us = numbers[:_BY_CODE]
    by_code, by_latency = numbers[_BY_CODE:_BY_LATENCY], numbers[_BY_LATENCY:]
    return Counts(calls, errors, last_us, total_us, when_us, by_code, by_latency)


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
