"""Runs of different length in one array: run ``r`` is ``offsets[r] : offsets[r + 1]``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def offsets_of(counts: I64) -> I64:
    """(n + 1,) where each run of `counts` begins, and the end of the last."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def places(offsets: I64) -> I32:
    """(m,) index of each element within its run."""
    counts = np.diff(offsets)
    return (np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)).astype(np.int32)


def elements_of(offsets: I64, runs: I64) -> I64:
    """Where the elements of these runs are, run by run; a run may come twice."""
    counts = np.diff(offsets)[runs]
    return np.repeat(offsets[:-1][runs], counts) + places(offsets_of(counts))
