"""From the small block ids of traces to 64-bit prefix keys.

A Mooncake id already stands for a block *and* its prefix, so a bijective mix of the id is its key.
A Qwen-Bailian id stands for a block alone, so keys are chained: each mixes in the key before it.
Both are deterministic, so that two replays of one trace meet the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_WORD = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words that scatters neighbours (the splitmix64 finaliser)."""
    z = words + np.uint64(_STEP)  # wraps around, as arithmetic on unsigned arrays does
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    return z ^ (z >> np.uint64(_SHIFTS[2]))


def _mix_one(word: int) -> int:
    """`mix64` of one Python integer; the chain below cannot be vectorised."""
    z = (word + _STEP) & _WORD
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        z = ((z ^ (z >> shift)) * multiplier) & _WORD
    return z ^ (z >> _SHIFTS[2])


def keys_of_prefix_ids(ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """Keys of ids that name whole prefixes; equal ids give equal keys, others differ."""
    return mix64(np.asarray(ids, np.int64).view(np.uint64)).view(np.int64)


def keys_of_block_ids(ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """Keys of ids that name single blocks: equal only if all ids up to there are equal."""
    chained = np.empty(len(ids), np.uint64)
    key = 0
    for position, block_id in enumerate(ids):
        key = _mix_one(key ^ _mix_one(block_id & _WORD))
        chained[position] = key
    return chained.view(np.int64)
