"""A trace as arrays: which blocks each request asked for, in the order of the requests.

Block ids are dense: ``0 .. unique - 1``. The blocks of request ``r`` are
``blocks[offsets[r] : offsets[r + 1]]``, in prefix order and without repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvcm_ray.core.ragged import places
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.traces.formats import READ, REQUEST, WRITE
from kvcm_ray.traces.keys import F64, I32, I64, U8, Flags

__all__ = ["F64", "I32", "I64", "READ", "REQUEST", "U8", "WRITE", "Accesses", "Flags"]


@dataclass(frozen=True, slots=True)
class Accesses:
    """n requests, m accesses, u different blocks."""

    blocks: I32  #: (m,)
    offsets: I64  #: (n + 1,)
    keys: I64  #: (u,) prefix key of each block; those of two instances differ
    times_s: F64  #: (n,) as in the trace; only differences mean anything
    input_tokens: I64  #: (n,) length of the prompt; 0 where the trace does not say
    output_tokens: I64  #: (n,)
    partial: Flags  #: (n,) the prompt fills its last block only partly
    ops: U8  #: (n,) `READ`, `WRITE` or `REQUEST`
    turns: I64  #: (n,) of the dialogue, from 1; 0 where the trace does not say
    instances: I32  #: (n,) index into `instance_names`
    classes: I32  #: (n,) index into `class_names`
    held: Flags  #: (m,) the engine had the block already (only look-ups say so), or (0,): none
    instance_names: tuple[str, ...]
    class_names: tuple[str, ...]
    block_tokens: int  #: tokens of a full block; 0 if unknown
    chained: bool  #: each block always comes after the same block, as prefix keys do
    #: k of a recording that has only one of 2**k blocks in a row behind the first one of each prompt
    sample_level: int = 0

    @property
    def requests(self) -> int:
        return len(self.offsets) - 1

    @property
    def unique(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> I64:
        """(n,) blocks of each request."""
        return np.diff(self.offsets)

    @property
    def places(self) -> I32:
        """(m,) how many blocks come before each in its prompt."""
        return places(self.offsets)

    @property
    def whole(self) -> bool:
        """All are `REQUEST`s: no look-up without a write, no write without a look-up."""
        return bool((self.ops == REQUEST).all())

    def part(self, start: int, stop: int) -> Accesses:
        """Requests ``start <= r < stop`` alone, blocks numbered anew.

        Raises:
            InvalidArgument: not a range of requests.
        """
        if not 0 <= start <= stop <= self.requests:
            raise InvalidArgument(f"requests {start} to {stop} are not within 0 to {self.requests}")
        first, last = self.offsets[start], self.offsets[stop]
        used, blocks = np.unique(self.blocks[first:last], return_inverse=True)
        rows = slice(start, stop)
        return replace(
            self,
            blocks=blocks.astype(np.int32),
            offsets=self.offsets[start : stop + 1] - first,
            keys=self.keys[used],
            held=self.held[first:last],
            times_s=self.times_s[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            partial=self.partial[rows],
            ops=self.ops[rows],
            turns=self.turns[rows],
            instances=self.instances[rows],
            classes=self.classes[rows],
        )
