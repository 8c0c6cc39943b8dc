"""What readers asked for and what writers wrote, as arrays: the traffic of a group, some requests in a row.

A look-up is here if it was for a whole prompt, from its first block on; only of those is it known which
blocks were wanted but not there. A write is here once it was let in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.requests import Flags, Keys

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Observed:
    """n requests with m keys, in the order in which the group heard of them."""

    instance_ids: Sequence[str]  #: (n,)
    times_s: F64  #: (n,) unix time
    writes: Flags  #: (n,) a write; else a look-up
    partial: Flags  #: (n,) a write whose last block its prompt fills only partly
    found: I64  #: (n,) look-ups: leading blocks that were held or found; writes: blocks that were there
    counts: I64  #: (n,) keys of each
    keys: Keys  #: (m,) the keys of each request, from the first block of its prompt on
    held: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) look-ups: leading blocks that the engine had itself and did not ask for; or (0,): none."""
