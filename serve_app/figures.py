"""What all groups report, asked at once and kept for a second: the source of every kind of metrics.

A group that does not answer in time is left out and told as down, so that one that hangs hides no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from kvcm_ray.errors import KvcmError
from kvcm_ray.serve_app.backend import Backend
from kvcm_ray.serve_app.metrics import Metrics

log = logging.getLogger(__name__)

FRESH_S = 1.0
DEADLINE_S = 1.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one moment."""

    groups: dict[str, dict[str, Any] | None]  #: `Statistics.report` without instances; None: no answer
    lag_s: dict[str, float]  #: how much older this process's view of a group's indexes is
    dropped_reports: dict[str, int]  #: by group, of all replicas


class GroupFigures:
    """Of one replica.

    Args:
        backend: who is asked.
        metrics: what the replicas count.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._task: asyncio.Task[Figures] | None = None
        self._asked_s = 0.0
        self._level_s: dict[str, float] = {}  #: when a group's view was last level with its writer

    async def read(self, fresh_s: float = FRESH_S) -> Figures:
        """The figures, asked for at most so long ago."""
        now = time.monotonic()
        if self._task is None or (self._task.done() and now - self._asked_s >= fresh_s):
            self._asked_s = now
            self._task = asyncio.get_running_loop().create_task(self._ask())
        return await asyncio.shield(self._task)

    async def _ask(self) -> Figures:
        names = sorted(self._backend.groups())
        answers = await asyncio.gather(*(self._of(name) for name in names))
        groups = dict(zip(names, answers, strict=True))
        self._backend.count_damage()
        extras = self._metrics.extras()
        for name, report in groups.items():
            if report is not None:
                report["counters"]["corrupt_reads"] += extras.get(("corrupt_records", name), 0)
        dropped = {name: extras.get(("dropped_reports", name), 0) for name in names}
        return Figures(groups, self._lags(groups), dropped)

    async def _of(self, group: str) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._backend.ask(group, "statistics", False)
        except TimeoutError:
            log.warning("group %s gave no statistics within %g s", group, DEADLINE_S)
        except KvcmError as error:
            log.warning("group %s gave no statistics: %s", group, error)
        return None

    def _lags(self, groups: dict[str, dict[str, Any] | None]) -> dict[str, float]:
        """0 where all commits that the writer told of are visible here; else since when they are not."""
        now, seen = time.monotonic(), self._backend.commits_seen()
        lags = {}
        for name, report in groups.items():
            told = report["commit_seq"].items() if report is not None else ()
            if all(seen.get(instance, seq) >= seq for instance, seq in told):
                self._level_s[name] = now
            lags[name] = now - self._level_s.setdefault(name, now)
        return lags
