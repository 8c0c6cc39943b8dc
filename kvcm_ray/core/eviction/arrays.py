"""Small array helpers of this package: types, growth on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]  #: block ids: small non-negative integers, chosen by the caller
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

_SIZE_MIN = 1024
_IDS_MAX = 1 << 31


def size_for(size: int, blocks: Ids) -> int:
    """`size`, or more if that is needed to index by `blocks`; it at least doubles when it grows.

    Raises:
        AssertionError: an id is negative or above 2**31: ids are indexes, not keys.
    """
    if len(blocks) == 0:
        return size
    top = int(blocks.max())
    if top < size:
        return size
    assert top < _IDS_MAX, f"block id {top} is not a small integer"
    return max(top + 1, 2 * size, _SIZE_MIN)


def grown(array: npt.NDArray[Any], size: int, fill: int) -> npt.NDArray[Any]:
    """A copy of `array` with `size` elements, the new ones equal to `fill`."""
    longer = np.full(size, fill, array.dtype)
    longer[: len(array)] = array
    return longer
