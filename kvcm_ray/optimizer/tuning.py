"""Settings of the adaptive policy, chosen on the first half of each trace and judged on the second.

Every candidate is replayed through whole traces, because a cache that begins empty in the middle would be
another cache; only what is counted differs. Nothing of a second half is looked at before the choice is
made. The halves are of the same traffic though, minutes apart: on other traffic the choice may be worth
less.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.eviction.adaptive import AdaptiveSettings
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, Accesses, Flags
from kvcm_ray.optimizer.curve import optimum_hits
from kvcm_ray.optimizer.replay import replay, totals

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HalfRow:
    """Hit ratios in the second half of one trace at one capacity."""

    trace: str
    capacity: int  #: blocks
    lru: float
    production: float  #: the adaptive policy with the settings in the code
    tuned: float  #: with those that were chosen
    optimum: float  #: most that any policy could have


@dataclass(frozen=True, slots=True)
class Tuned:
    settings: AdaptiveSettings  #: the best of the grid on the first halves
    chosen_by: F64  #: (candidates,) mean hit ratio in the first halves, all rows alike
    rows: list[HalfRow]  #: second halves

    @property
    def gain(self) -> float:
        """Mean difference of the hit ratio to production's settings in the second halves."""
        return float(np.mean([row.tuned - row.production for row in self.rows]))

    @property
    def better(self) -> bool:
        """Whether the choice is better than production's settings where it was not chosen."""
        return self.gain > 0


def grid(**values: Sequence[float]) -> list[AdaptiveSettings]:
    """All combinations of these values of `AdaptiveSettings`; the others as production has them."""
    return [
        AdaptiveSettings(**dict(zip(values, chosen, strict=True))) for chosen in product(*values.values())
    ]


def tune(
    traces: Mapping[str, Accesses],
    candidates: Sequence[AdaptiveSettings],
    capacities: Sequence[int],
    *,
    partial_first: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Choose the candidate with the best mean hit ratio over all traces and capacities.

    Args:
        progress: called with how many candidates are done, and of how many.

    Raises:
        InvalidArgument: nothing to choose from or to choose by, or as `replay`.
    """
    if not (traces and candidates and capacities):
        raise InvalidArgument("tuning needs traces, candidates and capacities")
    cases = [
        _Case(name, accesses, capacity, partial_first)
        for name, accesses in traces.items()
        for capacity in capacities
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        scores = np.zeros(len(candidates))
        for done, score in enumerate(pool.map(lambda settings: _mean_of_first(cases, settings), candidates)):
            scores[done] = score
            if progress:
                progress(done + 1, len(candidates))
    chosen = candidates[int(scores.argmax())]
    return Tuned(chosen, scores, [case.row(chosen) for case in cases])


@dataclass(frozen=True, slots=True)
class _Case:
    trace: str
    accesses: Accesses
    capacity: int
    partial_first: bool

    def hits(self, policy: str, settings: AdaptiveSettings | None = None) -> I32:
        return replay(
            self.accesses, policy, self.capacity, partial_first=self.partial_first, settings=settings
        )

    def ratio(self, hits: I32, *, first: bool) -> float:
        """Hit ratio of the first or the second half of the requests."""
        in_first: Flags = np.arange(self.accesses.requests) < self.accesses.requests // 2
        return totals(self.accesses, hits, in_first if first else ~in_first).hit_ratio

    def row(self, chosen: AdaptiveSettings) -> HalfRow:
        hits = [
            self.hits("lru"),
            self.hits("adaptive"),
            self.hits("adaptive", chosen),
            optimum_hits(self.accesses, [self.capacity])[0],
        ]
        return HalfRow(self.trace, self.capacity, *(self.ratio(part, first=False) for part in hits))


def _mean_of_first(cases: Sequence[_Case], settings: AdaptiveSettings) -> float:
    return float(np.mean([case.ratio(case.hits("adaptive", settings), first=True) for case in cases]))
