"""BlockMask: which blocks of a list are meant, as the wire says it.

Two forms: ``offset`` marks the first so many, ``values`` marks one by one. Neither set is "no mask".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class BlockMask:
    offset: int | None = None
    values: tuple[bool, ...] | None = None

    def covers(self, count: int) -> npt.NDArray[np.bool_]:
        """Lenient form for reads: one flag for each of `count` blocks, True = masked.

        Blocks beyond the values are unmasked; an offset too large or negative masks everything
        (the protocol casts it to an unsigned number).
        """
        flags = np.zeros(count, np.bool_)
        if self.offset is not None:
            flags[: count if self.offset < 0 else self.offset] = True
        elif self.values is not None:
            head = self.values[:count]
            flags[: len(head)] = head
        return flags

    def exactly(self, count: int) -> npt.NDArray[np.bool_]:
        """Strict form for finishing a write: the mask must fit `count` blocks.

        Raises:
            InvalidArgument: wrong number of values, or an offset outside 0..count.
        """
        if self.offset is not None:
            if not 0 <= self.offset <= count:
                raise InvalidArgument(f"success_blocks.offset {self.offset} is not within 0..{count}")
        elif len(self.values or ()) != count:
            given = len(self.values or ())
            raise InvalidArgument(f"success_blocks has {given} values for {count} new blocks")
        return self.covers(count)

    @staticmethod
    def from_flags(flags: npt.NDArray[np.bool_]) -> BlockMask:
        """The protocol's choice: an offset if the True ones are a prefix, else values."""
        head = int(np.argmin(flags)) if not flags.all() else len(flags)
        if not flags[head:].any():
            return BlockMask(offset=head)
        return BlockMask(values=tuple(bool(f) for f in flags))
