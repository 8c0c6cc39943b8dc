"""The rule: what would sending a prompt to each replica cost, in pieces of prompt to compute?

    cost = pieces that neither the replica nor the shared cache holds
           + what loading the shared ones costs (1 - worth of a loaded piece)
           + queue length * pieces that a waiting request counts for

The replica with the lowest cost gets the prompt. A match of everything in the shared cache makes all replicas
of a node nearly equal, so load decides; a match in one replica's own cache attracts, until its queue is
longer than the match is worth. No clock, no chance and no Ray in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    replica: str
    queue: int  #: requests that it has now
    own: int  #: leading pieces in its own cache
    worth: float  #: of a piece that it loads from the shared cache, 0..1


def best(
    candidates: Sequence[Candidate], *, pieces: int, shared: float, least: float, queue_pieces: float
) -> list[str]:
    """The replicas of lowest cost, those of equal cost (to half a piece) together; [] if no match counts.

    Args:
        pieces: of the whole prompt. shared: leading ones in the shared cache, fractions allowed.
        least: a match of fewer pieces than this counts as none.
        queue_pieces: what a waiting request counts for.
    """
    costs: dict[str, float] = {}
    longest = 0.0
    for one in candidates:
        loaded = max(0.0, shared - one.own) * one.worth
        match = one.own + loaded
        longest = max(longest, match)
        costs[one.replica] = max(0.0, pieces - match) + one.queue * queue_pieces
    if not costs or longest < least:
        return []
    lowest = min(costs.values())
    return [replica for replica, cost in costs.items() if cost <= lowest + 0.5]
