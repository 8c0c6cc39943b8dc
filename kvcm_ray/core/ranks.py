"""For each number of a row, how many larger ones come before it: without a loop over the numbers.

The row is sorted by one bit after the other, from the highest on. Numbers that differ first in a bit are
neighbours when that bit's turn comes, so a running sum counts them. When neighbours are few, all pairs are
compared at once. Together that takes about 0.1 us a number.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

T = TypeVar("T", bound=np.generic)

_PAIR_BITS = 5
_PAIRS = 1 << _PAIR_BITS  #: numbers of a group of which all pairs are compared
_EARLIER = np.triu(np.ones((_PAIRS, _PAIRS), np.bool_), 1)


def larger_before(values: I64) -> I32:
    """(n,) how many larger values come before each; all are different, and not much larger than n."""
    rank = _ranks(values)
    row, found = rank, np.zeros(len(values), np.int32)
    for bit in range(_bits(len(values)) - 1, _PAIR_BITS - 1, -1):
        zero, before, target = _turn(row, bit)
        found += before * zero
        row, found = _moved(row, target), _moved(found, target)
    found += _by_pairs(row)
    result = np.empty_like(found)
    result[row] = found
    return result[rank]


def weight_of_larger_before(values: I64, weights: F64) -> F64:
    """(n,) what the larger values before each weigh together."""
    rank = _ranks(values)
    row, found, weight = rank, np.zeros(len(values)), weights
    for bit in range(_bits(len(values)) - 1, -1, -1):
        zero, _, target = _turn(row, bit)
        ones = weight * ~zero
        before = np.cumsum(ones) - ones
        found += (before - before[_start(row, bit)]) * zero
        row, found, weight = _moved(row, target), _moved(found, target), _moved(weight, target)
    result = np.empty_like(found)
    result[row] = found
    return result[rank]


def _ranks(values: I64) -> I32:
    if not len(values):
        return np.zeros(0, np.int32)
    least = values.min()
    there = np.zeros(int(values.max() - least) + 1, np.bool_)
    there[values - least] = True
    smaller = np.cumsum(there, dtype=np.int32) - 1
    rank: I32 = smaller[values - least]
    return rank


def _bits(n: int) -> int:
    return max(n - 1, 0).bit_length()


def _start(row: I32, bit: int) -> I32:
    """Where those begin that agree with each in all bits above: where sorting would put the first."""
    start: I32 = row & np.int32(-2 << bit)
    return start


def _turn(row: I32, bit: int) -> tuple[npt.NDArray[np.bool_], I32, I32]:
    """Of each: whether its bit is 0, how many of its neighbours before it have a 1, where it goes."""
    ones = (row >> bit) & 1
    start = _start(row, bit)
    sums = np.cumsum(ones, dtype=np.int32)
    sums -= ones
    before = sums - sums[start]
    zero = ones == 0
    behind = start + before
    target = np.where(zero, np.arange(len(row), dtype=np.int32) - before, behind + np.int32(1 << bit))
    return zero, before, target


def _moved(array: npt.NDArray[T], target: I32) -> npt.NDArray[T]:
    moved = np.empty_like(array)
    moved[target] = array
    return moved


def _by_pairs(row: I32) -> I32:
    """The same count among neighbours, where numbers are apart in the last bits only."""
    padded = np.full((len(row) + _PAIRS - 1) // _PAIRS * _PAIRS, _PAIRS, np.uint8)
    padded[: len(row)] = row & (_PAIRS - 1)
    groups = padded.reshape(-1, _PAIRS)
    larger = (groups[:, :, None] > groups[:, None, :]) & _EARLIER
    counts = np.add.reduce(larger.view(np.uint8), axis=1, dtype=np.uint8)
    found: I32 = counts.reshape(-1)[: len(row)].astype(np.int32)
    return found
