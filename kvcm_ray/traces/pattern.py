"""Block contents that follow from the key, so that a reader can tell right bytes from wrong ones.

Word ``i`` of a block is ``mix(key) + i * odd``: two keys differ in every word, and a block shifted
by any number of words differs from itself. Making them is one vectorised addition.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.hashing import mix64

_ODD = 0xD1342543DE82EF95


@functools.lru_cache(maxsize=8)
def _steps(words: int) -> npt.NDArray[np.uint64]:
    return np.arange(words, dtype=np.uint64) * np.uint64(_ODD)


def block_pattern(keys: npt.NDArray[np.int64], block_bytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of each key's block: shape ``(len(keys), block_bytes)``, C-contiguous."""
    words = -(-block_bytes // 8)
    first = mix64(keys.astype(np.int64, copy=False).view(np.uint64))
    blocks = (first[:, None] + _steps(words)[None, :]).view(np.uint8)
    return np.ascontiguousarray(blocks[:, :block_bytes])


def wrong_bytes(keys: npt.NDArray[np.int64], blocks: npt.NDArray[np.uint8]) -> int:
    """How many bytes of `blocks` (one row a key) are not what `block_pattern` wrote."""
    expected = block_pattern(keys, blocks.shape[1])
    if np.array_equal(expected, blocks):
        return 0
    return int(np.count_nonzero(expected != blocks))
