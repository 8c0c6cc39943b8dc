"""Hits by what a request is: which turn of a dialogue, which class, of which instance or group.

Traces that do not say give one row. Only look-ups count, so a row that has none is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, READ, Accesses
from kvcm_ray.optimizer.replay import Totals, totals
from kvcm_ray.optimizer.scenario import Scenario

BY = ("turn", "class", "instance", "group")


@dataclass(frozen=True, slots=True)
class Row:
    label: str  #: "" where the trace does not say
    totals: Totals


def breakdown(
    accesses: Accesses, hits: I32, by: str = "turn", *, scenario: Scenario | None = None
) -> list[Row]:
    """Totals of each kind of request: turns by number, other kinds in the order of the trace.

    Args:
        hits: (n,) as `replay` and `simulate` give them.
        by: one of `BY`.
        scenario: says which group has which instance; for ``group`` only.

    Raises:
        InvalidArgument: no such kind, or groups without a scenario that has all instances.
    """
    if by not in BY:
        raise InvalidArgument(f"no breakdown by {by!r}; there are {', '.join(BY)}")
    numbers, names = _kinds(accesses, by, scenario)
    kinds = np.unique(numbers[(accesses.ops & READ) > 0]).tolist()
    return [Row(names.get(kind, str(kind)), totals(accesses, hits, numbers == kind)) for kind in kinds]


def _kinds(
    accesses: Accesses, by: str, scenario: Scenario | None
) -> tuple[np.ndarray[tuple[int], np.dtype[np.integer]], dict[int, str]]:
    """(number of the kind of each request, names of those that are not just numbers)."""
    if by == "turn":
        return accesses.turns, {0: ""}
    if by == "class":
        return accesses.classes, dict(enumerate(accesses.class_names))
    if by == "instance":
        return accesses.instances, dict(enumerate(accesses.instance_names))
    if scenario is None:
        raise InvalidArgument("a breakdown by group needs the scenario that says which they are")
    groups, _ = scenario.number(accesses)
    return groups[accesses.instances], {n: group.name for n, group in enumerate(scenario.groups)}
