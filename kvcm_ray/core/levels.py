"""Which blocks are in a sample of 1 / 2**k of them: those of level k or more.

So the sample at k + 1 is a part of the sample at k. The level is a property of the block: it follows
from the keys of its prompt up to there, whichever request names it.

Behind the first block a prompt is cut into rows of 2, 4, 8 blocks and so on. A block has passed level j if
it is in that half of its row of 2**(j + 1) which a hash of the row's first key chooses: one of each two in
a row, then one of each four. Neighbours come and go together, so that taking them by chance would only add
noise. Rows end at `ROW` blocks; from there on a row passes or does not, by chance. Longer ones would make
all prompts that begin alike choose the same place, behind all that they share.

The first block of a prompt is in every sample: many requests may have it, so that it must not be left
to chance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.hashing import mix64
from kvcm_ray.core.requests import Keys

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

ALWAYS = 255  #: the level of first blocks
LEVEL_MAX = 24  #: of others
_ROW_BITS = 5
ROW = 1 << _ROW_BITS


def levels(keys: Keys, offsets: I64, seed: int = 0) -> U8:
    """The level (m,) of each access; `ALWAYS` for first blocks.

    Args:
        keys: (m,) of whole prompts, one behind the other.
        offsets: (n + 1,) request r has ``keys[offsets[r] : offsets[r + 1]]``.
        seed: for another sample.
    """
    found = np.full(len(keys), ALWAYS, np.uint8)
    at, of_each = sampled(keys, offsets, 0, seed)
    found[at] = of_each
    return found


def sampled(keys: Keys, offsets: I64, level: int, seed: int = 0) -> tuple[I64, U8]:
    """Where the accesses of this level or more are, and the level of each; without first blocks.

    Looks at what is in the sample only: much less than all of a trace if `level` is high.
    """
    at, place = _rows(offsets, min(level, _ROW_BITS))
    ends = np.repeat(offsets[1:], _row_counts(offsets, min(level, _ROW_BITS)))
    for bit in range(min(level, _ROW_BITS) - 1, -1, -1):
        if bit == _ROW_BITS - 1 < level - 1:
            chosen = trailing_zeros(_hash(keys[at], seed) >> np.uint64(_ROW_BITS)) >= level - _ROW_BITS
            at, place, ends = at[chosen], place[chosen], ends[chosen]
        step = ((_hash(keys[at], seed) >> np.uint64(bit)) & np.uint64(1)).view(np.int64) << bit
        at, place = at + step, place + step
        inside = at < ends
        at, place, ends = at[inside], place[inside], ends[inside]
    return at, _higher(keys, at, place, level, seed)


def sampled_alone(keys: Keys, at: I64, level: int, seed: int = 0) -> tuple[I64, U8]:
    """`sampled` of these accesses, when chance decides by the key of each: half of them have level 0."""
    words = _hash(keys[at], seed)
    chosen = words & np.uint64((1 << level) - 1) == 0
    found = np.minimum(trailing_zeros(words[chosen]), LEVEL_MAX).astype(np.uint8)
    return at[chosen], found


def _row_counts(offsets: I64, bits: int) -> I64:
    """(n,) rows of ``2**bits`` blocks of each request, the last of which may be short."""
    behind: I64 = np.maximum(np.diff(offsets) - 1, 0)
    return (behind + (1 << bits) - 1) >> bits


def _rows(offsets: I64, bits: int) -> tuple[I64, I64]:
    """Where each row begins: in the trace, and how many blocks behind the first one of its prompt."""
    counts = _row_counts(offsets, bits)
    before = np.cumsum(counts) - counts
    place = (np.arange(int(counts.sum())) - np.repeat(before, counts)) << bits
    return np.repeat(offsets[:-1] + 1, counts) + place, place


def _higher(keys: Keys, at: I64, place: I64, level: int, seed: int) -> U8:
    """The levels of accesses that are known to have this one."""
    found = np.full(len(at), level, np.uint8)
    left = np.arange(len(at))
    for bit in range(level, _ROW_BITS):
        row = at[left] - (place[left] & ((2 << bit) - 1))
        chosen = (_hash(keys[row], seed) >> np.uint64(bit)).view(np.int64) & 1
        left = left[chosen == (place[left] >> bit) & 1]
        found[left] = bit + 1
    row = at[left] - (place[left] & (ROW - 1))
    more = trailing_zeros(_hash(keys[row], seed) >> np.uint64(_ROW_BITS))
    found[left] = np.minimum(_ROW_BITS + more, LEVEL_MAX)
    return found


def trailing_zeros(words: U64) -> I64:
    """How many low bits are 0; 64 of 0."""
    lowest = words & (~words + np.uint64(1))
    exponent = np.frexp(lowest.astype(np.float64))[1].astype(np.int64)
    return np.where(lowest == 0, 64, exponent - 1)


def _hash(keys: Keys, seed: int) -> U64:
    salt = mix64(np.array([seed], np.int64).view(np.uint64))
    return mix64(keys.view(np.uint64) ^ salt)
