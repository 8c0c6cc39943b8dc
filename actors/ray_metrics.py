"""A group's metrics as Ray's own, so that the Prometheus of a Ray cluster finds them with everything else.

On where Ray collects metrics: in clusters of others by default; a manager's private Ray has that switched
off, because it costs every actor call, and is scraped at ``GET /metrics``. Names and numbers are those of
`metric_table`; Ray puts ``ray_`` in front. Of a histogram only sum and count: Ray takes single durations.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from ray.util import metrics

from kvcm_ray.actors.metric_table import GROUP_METRICS, GroupMetric, Kind

log = logging.getLogger(__name__)

PERIOD_S = 5.0
SWITCH = "RAY_enable_metrics_collection"  #: Ray's own


def wanted() -> bool:
    """Whether this process's Ray collects metrics."""
    return os.environ.get(SWITCH, "1").lower() not in ("0", "false")


class RayMetrics:
    """Sets the metrics of one group, in a thread of its own.

    Args:
        group: its name.
        report: asks for `Statistics.report` without instances.
    """

    def __init__(self, group: str, report: Callable[[], Future[dict[str, Any]]]) -> None:
        self._group = group
        self._report = report
        self._metrics = {metric.name: _made(metric) for metric in GROUP_METRICS}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        threading.Thread(target=self._run, name="ray-metrics", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(PERIOD_S):
            try:
                self.set(self._report().result(PERIOD_S))
            except Exception:  # the next time may do; the group goes on anyway
                log.exception("could not set Ray's metrics of group %s", self._group)

    def set(self, report: Mapping[str, Any]) -> None:
        """Hand the numbers of a report to Ray."""
        for metric in GROUP_METRICS:
            for labels, value in metric.read(report):
                tags = dict(zip(("group", *metric.labels), (self._group, *labels), strict=True))
                for made, number in zip(self._metrics[metric.name], _numbers(metric, value), strict=True):
                    self._put(made, labels, float(number), tags)

    def _put(
        self, made: metrics.Gauge | metrics.Counter, labels: tuple[str, ...], number: float,
        tags: dict[str, str],
    ) -> None:  # fmt: skip
        if isinstance(made, metrics.Gauge):
            made.set(number, tags)
            return
        key = made.info["name"], labels
        if (more := number - self._told.get(key, 0.0)) > 0:
            made.inc(more, tags)
            self._told[key] = number


def _made(metric: GroupMetric) -> list[metrics.Gauge | metrics.Counter]:
    keys = ("group", *metric.labels)
    if metric.kind is Kind.GAUGE:
        return [metrics.Gauge(metric.name, metric.help, keys)]
    names = [metric.name] if metric.kind is Kind.COUNTER else [f"{metric.name}_sum", f"{metric.name}_count"]
    return [metrics.Counter(name, metric.help, keys) for name in names]


def _numbers(metric: GroupMetric, value: Any) -> Iterator[float]:
    if metric.kind is Kind.HISTOGRAM:
        yield from (value["sum"], sum(value["counts"]))
    else:
        yield value
