"""What the scheduler's side tells the workers with a step, and what they tell it back.

A save is a *job* with a number. The scheduler sends `Capture` in the step that computes the blocks; each
worker copies them out of the engine's cache, layer by layer while the step computes the next ones, and says
so. The scheduler then lets go of them and opens the write session; once its plan is there it is sent too,
the workers write their specs, and the scheduler finishes the session when all have. A job may end at any
time by being dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Flags

#: Numbers of engine blocks, one row for each of our blocks; -1 = there is nothing to copy.
BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LoadPart:
    """Blocks that were found, and where they go."""

    blocks: Blocks
    groups: tuple[int, ...]  #: positions in `Layout.groups`
    ids: tuple[BlockIds, ...]  #: for each of them, shape (len(blocks), engine blocks in one of ours)

    def ids_from(self, begin: int) -> set[int]:
        """Engine blocks of the blocks from number `begin` on."""
        found: set[int] = set()
        for group in self.ids:
            found.update(group[begin:].reshape(-1).tolist())
        return found - {-1}


@dataclass(frozen=True, slots=True)
class Load:
    """Fill a request's engine blocks."""

    request_id: str
    parts: tuple[LoadPart, ...]
    in_step: bool  #: this step computes upon them; else they may take several steps


@dataclass(frozen=True, slots=True)
class Capture:
    """Copy engine blocks, as many of ours as `ids` has rows."""

    job: int
    groups: tuple[int, ...]  #: positions in `Layout.groups`
    ids: tuple[BlockIds, ...]  #: for each of them


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the blocks of a job go: `rows` says which of the captured ones."""

    job: int
    blocks: Blocks
    rows: npt.NDArray[np.intp]
    deadline_s: float  #: CLOCK_MONOTONIC


@dataclass(slots=True)
class Orders:
    """Of one step, for every worker."""

    info: InstanceInfo | None = None
    loads: list[Load] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    failed_steps: int = 0  #: reported ones that the scheduler has reacted to


@dataclass(slots=True)
class Report:
    """Of one worker since its last one, or of several together."""

    captured: Counter[int] = field(default_factory=Counter)  #: by job, how many workers are done
    uncaptured: set[int] = field(default_factory=set)  #: jobs that some worker could not copy
    written: dict[int, tuple[int, Flags]] = field(default_factory=dict)  #: by job: workers, all wrote it
    failed_loads: set[str] = field(default_factory=set)  #: requests; some of their blocks did not come
    failed_steps: int = 0  #: that began although blocks they need had not come
    lost: list[int] = field(default_factory=list)  #: keys whose bytes are not what the index says

    def __bool__(self) -> bool:
        return bool(self.captured or self.written or self.failed_loads or self.lost)

    def merge(self, other: Report) -> Report:
        """Both together."""
        merged = Report(
            self.captured + other.captured,
            self.uncaptured | other.uncaptured,
            dict(self.written),
            self.failed_loads | other.failed_loads,
            self.failed_steps + other.failed_steps,
            self.lost + other.lost,
        )
        for job, (workers, flags) in other.written.items():
            before, good = merged.written.get(job, (0, np.ones(len(flags), np.bool_)))
            merged.written[job] = (before + workers, good & flags)
        return merged
