"""Slot arithmetic: which slots lie side by side, and in what pieces to copy them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.requests import Flags

Slots = npt.NDArray[np.int64]

#: One copy or system call: large enough for streaming stores, small enough to be hashed in cache
#: and to be shared out evenly between threads.
PIECE_BYTES_MAX = 1 << 20
#: Headers this near to each other are read in one call with what lies between them.
HEADER_GAP = 64


class Piece(NamedTuple):
    """Blocks ``begin:end`` of a call; block ``begin`` is in `slot`."""

    begin: int
    end: int
    slot: int
    span: int  #: slots covered


def runs(where: Slots, wanted: Flags | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of blocks whose slots are consecutive (and that are all wanted)."""
    if len(where) == 0:
        return
    breaks = np.diff(where) != 1
    if wanted is not None:
        breaks |= ~(wanted[1:] & wanted[:-1])
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(where)]
    for begin, end in itertools.pairwise(edges):
        if wanted is None or wanted[begin]:
            yield begin, end


def pieces(
    where: Slots, size: int, wanted: Flags | None = None, bytes_max: int = PIECE_BYTES_MAX
) -> list[Piece]:
    """Runs cut into pieces of at most `bytes_max` and `PIECE_BYTES_MAX`, but at least a block."""
    step = max(1, min(PIECE_BYTES_MAX, bytes_max) // size)
    return [
        Piece(at, min(at + step, end), int(where[at]), min(at + step, end) - at)
        for begin, end in runs(where, wanted)
        for at in range(begin, end, step)
    ]


def header_pieces(where: Slots) -> list[Piece]:
    """Ranges of blocks with ascending slots near each other; `span` slots cover each of them."""
    steps = np.diff(where)
    edges = [0, *(np.flatnonzero((steps <= 0) | (steps > HEADER_GAP)) + 1).tolist(), len(where)]
    return [
        Piece(begin, end, int(where[begin]), int(where[end - 1] - where[begin]) + 1)
        for begin, end in itertools.pairwise(edges)
        if begin < end
    ]
