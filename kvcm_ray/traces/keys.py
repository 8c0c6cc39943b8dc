"""From the small block ids of traces to 64-bit prefix keys.

A Mooncake id already stands for a block *and* its prefix, so a bijective mix of the id is its key.
A Qwen-Bailian id stands for a block alone, so keys are chained: each mixes in the key before it.
Both are deterministic, so that two replays of one trace meet the same blocks.

Requests are laid out one behind the other: the keys of request ``r`` are
``keys[offsets[r] : offsets[r + 1]]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.hashing import mix64

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


def keys_of_prefix_ids(ids: Sequence[int] | I64) -> I64:
    """Keys of ids that name whole prefixes; equal ids give equal keys, others differ."""
    return mix64(np.asarray(ids, np.int64).view(np.uint64)).view(np.int64)


def chain_keys(ids: I64, offsets: I64) -> I64:
    """Keys (m,) of ids (m,) that name single blocks: equal only if all ids up to there are equal.

    Place by place: the first blocks of all requests, then all second blocks, and so on.
    """
    keys = mix64(ids.view(np.uint64))
    order = np.argsort(-np.diff(offsets), kind="stable")  # the longest first
    starts, counts = offsets[:-1][order], np.diff(offsets)[order]
    most = int(counts[0]) if len(counts) else 0
    longer = np.searchsorted(-counts, -np.arange(most))  # so many requests have a block at each place
    before = np.zeros(len(order), np.uint64)
    for place, rows in enumerate(longer.tolist()):
        at = starts[:rows] + place
        before = mix64(before[:rows] ^ keys[at])
        keys[at] = before
    return keys.view(np.int64)


def keys_of_block_ids(ids: Sequence[int]) -> I64:
    """`chain_keys` of one request."""
    return chain_keys(np.asarray(ids, np.int64), np.array([0, len(ids)], np.int64))


class Labels:
    """Names by number, in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, names: Sequence[str], count: int) -> I32:
        """The number of each of `count` names; of none, the number of the empty name."""
        numbers = self._numbers
        if not names:
            return np.full(count, numbers.setdefault("", len(numbers)) if count else 0, np.int32)
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._numbers) or ("",)


def keys_apart(keys: I64, counts: I64, instances: I32) -> I64:
    """The keys (m,) of some requests (n,), those of different instances made different.

    Those of instance 0, which may be all, stay as they are. Done twice it undoes itself.
    """
    if not instances.any():
        return keys
    apart = mix64(instances.astype(np.uint64))
    apart[instances == 0] = 0
    return keys ^ np.repeat(apart, counts).view(np.int64)
