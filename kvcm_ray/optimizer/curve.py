"""Hits at every capacity at once, and the most that any policy could have.

Touching the blocks of a request last to first makes LRU a stack algorithm for prefixes: what a cache
of C blocks holds is what one of C + 1 holds, less one block. So one pass gives each access the smallest
capacity at which it hits, and a histogram of these gives the hits at every capacity.

The optimum drops the block whose next use is farthest, of two in one request the deeper one. A parent's
next use is never later than its child's, so this keeps prefixes closed: it is attainable, and for hit
blocks nothing is better (for costs that grow with the place in the prompt something may be).

Where look-ups and writes are recorded apart, a look-up touches the leading run of what was ever written,
and a write all of its blocks. That is exact if the write of what a look-up missed comes right behind it;
behind other requests it is near, since a block has its place in the stack meanwhile, and `replay` is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import F64, I32, I64, READ, Accesses


@dataclass(frozen=True, slots=True)
class Curve:
    """Hits as a function of the capacity: a staircase of k steps."""

    capacities: I64  #: (k,) in blocks, increasing: where hits become more
    hits: F64 | I64  #: (k,) from there on; blocks, or whatever the accesses were weighted with
    accessed: float  #: what all accesses together weigh

    def at(self, capacities: int | Sequence[int] | npt.ArrayLike) -> F64 | I64:
        """Hits at each of these capacities, in their shape."""
        step = np.searchsorted(self.capacities, np.asarray(capacities), side="right")
        hits: F64 | I64 = np.concatenate([np.zeros(1, self.hits.dtype), self.hits])
        return hits[step]

    def ratio(self, capacities: int | Sequence[int] | npt.ArrayLike) -> F64:
        """Hits as a share of all accesses."""
        return np.asarray(self.at(capacities) / max(self.accessed, 1e-300), np.float64)

    @property
    def infinite(self) -> float:
        """Hits of a cache that never drops anything."""
        return self.hits[-1].item() if len(self.hits) else 0

    def capacity_for(self, ratio: float) -> int | None:
        """The smallest capacity in blocks with at least this hit ratio; None if there is none."""
        if ratio <= 0:
            return 0
        step = int(np.searchsorted(self.hits, ratio * self.accessed * (1 - 1e-12)))
        return int(self.capacities[step]) if step < len(self.hits) else None


def hit_curve(
    accesses: Accesses, *, partial_first: bool = False, weights: npt.NDArray[np.float64] | None = None
) -> Curve:
    """Hits of leaf-first LRU at every capacity: exact, but see above if not all is looked up and written.

    Args:
        partial_first: partial last blocks that were seen once only leave before all others. (The live
            policy has those first that were used once *since they were admitted*. That depends on the
            capacity; it gives almost the same hits, exactly by `replay`.)
        weights: (m,) what a hit of each access is worth, tokens or FLOPs; a block each by default.

    Raises:
        InvalidArgument: not as many weights as accesses.
    """
    distances = stack_distances(accesses, partial_first=partial_first)
    if weights is not None and weights.shape != distances.shape:
        raise InvalidArgument(f"{len(distances)} accesses need as many weights, not {weights.shape}")
    accessed = looked_up(accesses, weights)
    counts = np.bincount(distances, weights)
    counts[:1] = 0
    steps = np.flatnonzero(counts)
    return Curve(steps, np.cumsum(counts[steps]), accessed)


def looked_up(accesses: Accesses, weights: F64 | None = None) -> float:
    """How many accesses look up, or what those weigh together."""
    reads = (accesses.ops & READ) > 0
    if weights is None:
        return float(accesses.lengths[reads].sum())
    return float(weights[np.repeat(reads, accesses.lengths)].sum())


def stack_distances(accesses: Accesses, *, partial_first: bool = False) -> I32:
    """(m,) the smallest capacity in blocks at which each access hits; 0 if there is none, or it only
    writes."""
    from kvcm_ray.optimizer.kernels import curve

    partial = accesses.partial if partial_first else np.zeros_like(accesses.partial)
    trace = accesses.blocks, accesses.offsets, accesses.ops
    return curve.stack_distances(*trace, partial, accesses.unique)


def optimum(accesses: Accesses, capacities: Sequence[int]) -> I64:
    """Hit blocks of the offline optimum at each capacity: shape ``(len(capacities),)``.

    Exact for a trace that is `chained` and `whole`. An upper bound for others: a block that only a
    look-up missed may count as there.

    Raises:
        InvalidArgument: a capacity is not positive.
    """
    return np.array([hits.sum() for hits in optimum_hits(accesses, capacities)], np.int64)


def optimum_hits(accesses: Accesses, capacities: Sequence[int]) -> list[I32]:
    """For each capacity, the hit blocks of each request: shape ``(n,)``."""
    from kvcm_ray.optimizer.kernels import curve

    for capacity in capacities:
        positive(capacity)
    nexts = curve.next_uses(accesses.blocks, accesses.offsets, accesses.ops, accesses.unique)
    return [curve.optimum_hits(nexts, accesses.offsets, capacity) for capacity in capacities]


def positive(capacity: int) -> None:
    """Raises InvalidArgument if a capacity is not at least one block."""
    if capacity < 1:
        raise InvalidArgument(f"a capacity must be at least one block, got {capacity}")
