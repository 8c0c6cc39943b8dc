"""Faults that the debug API injects, shared by all replicas of one manager.

The table is a small file below the data directory that every replica maps. A call reads one number of
it; only while a fault is set does it take the file's lock to count itself, so "at call N" counts the
calls of all replicas, and a fault that fires once does so once.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InjectedFault, InvalidArgument

ROWS = 256  #: more than there are APIs
_NAME_BYTES = 64
_ROW = np.dtype([("name", f"S{_NAME_BYTES}"), ("once", "i8"), ("at", "i8"), ("calls", "i8")])
FILE = "faults"  #: below the data directory


def forget(data_dir: Path) -> None:
    """No faults at the start of a manager."""
    (data_dir / FILE).unlink(missing_ok=True)


class Faults:
    """The table of one manager, in this process.

    Args:
        apis: names that a fault may be set for.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, data_dir: Path, apis: frozenset[str]) -> None:
        self._apis = apis
        path = data_dir / FILE
        self._file = path.open("ab")
        with self._locked():
            if path.stat().st_size < ROWS * _ROW.itemsize:
                self._file.truncate(ROWS * _ROW.itemsize)
        rows = np.memmap(path, _ROW, "r+", shape=(ROWS,))
        self._rows: npt.NDArray[np.void] = np.asarray(rows).view(np.ndarray)
        #: Names are packed from the first row on: an empty first row means that no fault is set.
        self._first = memoryview(self._rows[:1].view(np.uint8))

    def inject(self, api: str, *, once: bool, at_call: int) -> None:
        """Make calls of `api` fail: all of them, or once, at the call of this number from now on.

        Args:
            at_call: 1 is the next call, as is 0.

        Raises:
            InvalidArgument: no API has this name.
        """
        if api not in self._apis:
            raise InvalidArgument(f"no API is named {api[:100]!r}; names are like GetCacheLocation")
        name = api.encode()
        with self._locked():
            names = self._rows["name"].tolist()
            row = names.index(name if name in names else b"")
            self._rows[row] = (name, once, max(at_call, 1), 0)

    def remove(self, api: str) -> bool:
        """Whether one was set."""
        with self._locked():
            kept = self._rows[self._rows["name"] != api.encode()].copy()
            removed = len(kept) < ROWS
            self._rows[: len(kept)] = kept
            self._rows[len(kept) :] = np.zeros(ROWS - len(kept), _ROW)
        return removed

    def clear(self) -> None:
        with self._locked():
            self._rows[:] = np.zeros(ROWS, _ROW)

    def meet(self, api: str) -> None:
        """Count a call of `api`. Raises InjectedFault if a fault is due."""
        if not self._first[0]:
            return
        with self._locked():
            due = self._due(api.encode())
        if due:
            raise InjectedFault(f"{api} fail due to fault injection")

    def _due(self, name: bytes) -> bool:
        for row in self._rows:
            if row["name"] == name:
                row["calls"] += 1
                return not row["once"] or bool(row["calls"] == row["at"])
        return False

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
