"""Block keys from token ids, as the Tair KVCM protocol defines them.

One 64-bit value runs over all tokens, so the key of a block names its whole prefix. Managers that
share blocks must agree on every bit, therefore the published vectors are a test. And a mix of 64-bit words,
for all that needs its own hash of a key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.limits import TOKENS_PER_CALL_MAX
from kvcm_ray.errors import InvalidArgument

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def block_keys_from_tokens(
    tokens: Sequence[int] | npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int64]:
    """Keys of the ``len(tokens) // block_size`` full blocks; a partial last block has none.

    Raises:
        InvalidArgument: block_size <= 0, or more tokens than TOKENS_PER_CALL_MAX.
    """
    if block_size <= 0:
        raise InvalidArgument(
            f"block_size {block_size} must be positive to derive keys from tokens"
        )
    if len(tokens) > TOKENS_PER_CALL_MAX:
        raise InvalidArgument(f"{len(tokens)} token_ids, more than {TOKENS_PER_CALL_MAX} a call")
    # Plain integers also of a list of NumPy's: the sums below go beyond 64 bits.
    values = tokens.tolist() if isinstance(tokens, np.ndarray) else list(map(int, tokens))
    count = len(values) // block_size
    keys = np.empty(count, np.uint64)
    h = 0
    for block in range(count):
        for value in values[block * block_size : (block + 1) * block_size]:
            # h is kept unsigned; the last term turns h >> 32 into the signed (arithmetic) shift.
            h ^= (value + _GOLDEN + (h << 12) + (h >> 32) - ((h >> 63) << 32)) & _MASK
        keys[block] = h
    return keys.view(np.int64)


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words, whose bits all depend on all (the splitmix64 finaliser)."""
    z = words + np.uint64(_GOLDEN)  # wraps around, as arithmetic on unsigned arrays does
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
