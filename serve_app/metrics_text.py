"""The page ``GET /metrics``: Prometheus' text, or OpenMetrics to who asks for it.

Rendered by prometheus_client from the tables of metrics: those of groups (`actors.metric_table`), and those
of the manager here. Any replica answers for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvcm_ray.actors.metric_table import GROUP_METRICS, Kind, Metric
from kvcm_ray.core.model import StorageConfig
from kvcm_ray.index.codec import FORMAT_VERSION
from kvcm_ray.serve_app.figures import Figures, GroupFigures
from kvcm_ray.serve_app.metrics import CODES, LATENCIES_S, Counts, Metrics

BUILD = Metric("kvcm_build_info", Kind.GAUGE, "1, with the version and the format of indexes as labels.",
               ("version", "format"))  # fmt: skip
REQUESTS = Metric("kvcm_requests_total", Kind.COUNTER, "Calls over HTTP and gRPC, by how they ended.",
                  ("op", "code"))  # fmt: skip
DURATIONS = Metric("kvcm_request_duration_seconds", Kind.HISTOGRAM,
                   "How long calls over HTTP and gRPC took in the replica, waiting for actors included.",
                   ("op",))  # fmt: skip
STORAGES = Metric("kvcm_storage_state", Kind.GAUGE, "1 for the state that the storage is in.",
                  ("storage", "state"))  # fmt: skip
UP = Metric("kvcm_group_up", Kind.GAUGE,
            "1 if the group's actor answered in time; else its metrics are missing.",
            ("group",))  # fmt: skip
LAG = Metric("kvcm_replica_lag_seconds", Kind.GAUGE,
             "For how long the answering replica has not seen the last commit that the group told of.",
             ("group",))  # fmt: skip
DROPPED = Metric("kvcm_dropped_reports_total", Kind.COUNTER,
                 "Look-ups that replicas could not report to the group, so that they count as no hits.",
                 ("group",))  # fmt: skip

MANAGER_METRICS = (BUILD, REQUESTS, DURATIONS, STORAGES, UP, LAG, DROPPED)
STATES = ("enabled", "disabled", "draining")

_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Page:
    """Of one replica.

    Args:
        figures: what groups report.
        metrics: what replicas count.
        storages: reads the registered storages.
    """

    def __init__(self, figures: GroupFigures, metrics: Metrics, storages: Any) -> None:
        self._figures = figures
        self._metrics = metrics
        self._storages = storages

    async def render(self, accept: str) -> tuple[str, bytes]:
        """Content type and text."""
        figures = await self._figures.read()
        storages = dict(self._storages())
        # In a thread: some ten milliseconds for a hundred groups, in which look-ups go on.
        return await asyncio.to_thread(self._text, figures, storages, accept)

    def _text(
        self, figures: Figures, storages: Mapping[str, StorageConfig], accept: str
    ) -> tuple[str, bytes]:
        registry = CollectorRegistry()
        registry.register(_Collected([*_manager(self._metrics, storages), *_groups(figures)]))
        encode, content_type = choose_encoder(accept)
        return content_type, encode(registry)


class _Collected(Collector):
    def __init__(self, families: Sequence[_Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[_Family]:
        return self._families

    def describe(self) -> Iterable[_Family]:
        return ()


def _family(metric: Metric, labels: Sequence[str]) -> _Family:
    if metric.kind is Kind.COUNTER:
        return CounterMetricFamily(metric.name, metric.help, labels=labels)
    if metric.kind is Kind.HISTOGRAM:
        return HistogramMetricFamily(metric.name, metric.help, labels=labels)
    return GaugeMetricFamily(metric.name, metric.help, labels=labels)


def _add(family: _Family, labels: Sequence[str], value: Any) -> None:
    if isinstance(family, HistogramMetricFamily):
        ends = [*map(repr, value["le"]), "+Inf"]
        buckets = list(zip(ends, accumulate(value["counts"]), strict=True))
        family.add_metric(labels, buckets, value["sum"])
    else:
        family.add_metric(labels, value)


def _groups(figures: Figures) -> Iterator[_Family]:
    known = {name: report for name, report in figures.groups.items() if report is not None}
    for metric in GROUP_METRICS:
        family = _family(metric, ("group", *metric.labels))
        for name, report in known.items():
            for labels, value in metric.read(report):
                _add(family, (name, *labels), value)
        yield family
    for other, values in (
        (UP, {name: int(name in known) for name in figures.groups}),
        (LAG, {name: figures.lag_s[name] for name in known}),
        (DROPPED, figures.dropped_reports),
    ):
        family = _family(other, other.labels)
        for name, value in values.items():
            _add(family, (name,), value)
        yield family


def _manager(metrics: Metrics, storages: Mapping[str, StorageConfig]) -> Iterator[_Family]:
    build = _family(BUILD, BUILD.labels)
    _add(build, (version("kvcm-ray"), str(FORMAT_VERSION)), 1)
    requests, durations = _family(REQUESTS, REQUESTS.labels), _family(DURATIONS, DURATIONS.labels)
    for api, counts in sorted(metrics.by_api().items()):
        for code, count in zip(CODES, counts.by_code, strict=True):
            if count:
                _add(requests, (api, code.name), count)
        _add(durations, (api,), _histogram(counts))
    states = _family(STORAGES, STORAGES.labels)
    for name, config in sorted(storages.items()):
        for state in STATES:
            _add(states, (name, state), int(state == _state(config)))
    yield from (build, requests, durations, states)


def _histogram(counts: Counts) -> dict[str, Any]:
    return {"le": LATENCIES_S, "counts": counts.by_latency, "sum": counts.total_us / 1e6}


def _state(config: StorageConfig) -> str:
    if config.is_draining:
        return "draining"
    return "enabled" if config.is_available else "disabled"
