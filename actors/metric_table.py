"""The metrics of a group: names, meanings, and how each is read from `Statistics.report`.

Prometheus at ``GET /metrics``, Ray's own metrics and the documents are made from this table. Names follow
Prometheus: base units, the unit at the end, ``_total`` for counters. Labels are bounded: never a key, a
session, a request or an instance. About 40 series a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Report = Mapping[str, Any]
Labels = tuple[str, ...]
#: Label values (without the group), and the number or the histogram (see `Histogram.to_json`).
Values = Iterable[tuple[Labels, Any]]

BUCKETS_KEPT = (5, 8, 11, 14)  #: of `DURATIONS_S`: 3.2 ms, 26 ms, 0.2 s, 1.6 s


class Kind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    help: str
    labels: Labels = ()  #: of a group's metrics: beside ``group``


@dataclass(frozen=True, slots=True)
class GroupMetric(Metric):
    """A metric with the label ``group`` in front of the others."""

    read: Callable[[Report], Values] = lambda report: ()


def _gauge(name: str, key: str, text: str) -> GroupMetric:
    return GroupMetric(name, Kind.GAUGE, text, (), lambda report: [((), report["gauges"][key])])


def _counter(name: str, key: str, text: str) -> GroupMetric:
    return GroupMetric(name, Kind.COUNTER, text, (), lambda report: [((), report["counters"][key])])


def _by_tier(name: str, kind: Kind, key: str, text: str) -> GroupMetric:
    def read(report: Report) -> Values:
        return [((tier,), row[key]) for tier, row in report["tiers"].items() if row[key] is not None]

    return GroupMetric(name, kind, text, ("tier",), read)


def _by_key(name: str, key: str, label: str, text: str) -> GroupMetric:
    """A counter whose numbers by label value the report has under `key`."""

    def read(report: Report) -> Values:
        return [((value,), count) for value, count in report["counters"][key].items()]

    return GroupMetric(name, Kind.COUNTER, text, (label,), read)


def _named(
    name: str, kind: Kind, label: str, section: str, keys: Mapping[str, str], text: str
) -> GroupMetric:
    """Numbers of a section of the report as values of one label."""

    def read(report: Report) -> Values:
        return [((value,), report[section][key]) for value, key in keys.items()]

    return GroupMetric(name, kind, text, (label,), read)


def reduced(histogram: Mapping[str, Any], kept: Iterable[int] = BUCKETS_KEPT) -> dict[str, Any]:
    """The histogram with these of its bounds only."""
    bounds, counts, begin = [], [], 0
    for i in kept:
        bounds.append(histogram["le"][i])
        counts.append(sum(histogram["counts"][begin : i + 1]))
        begin = i + 1
    return {"le": bounds, "counts": [*counts, sum(histogram["counts"][begin:])], "sum": histogram["sum"]}


def _durations(report: Report) -> Values:
    return [((), reduced(report["histograms"]["call_duration_seconds"]))]


_GAUGE, _COUNTER = Kind.GAUGE, Kind.COUNTER

GROUP_METRICS: tuple[GroupMetric, ...] = (
    _gauge("kvcm_epoch", "epoch", "Starts of the group's actor, the highest over its indexes."),
    _gauge("kvcm_group_quota_bytes", "quota_bytes", "Bytes that the group may hold."),
    _by_tier("kvcm_group_used_bytes", _GAUGE, "used_bytes",
             "Payload bytes of readable blocks and of those that wait to be erased."),
    _gauge("kvcm_group_reserved_bytes", "reserved_bytes", "Bytes set apart for blocks being written."),
    _gauge("kvcm_pending_delete_bytes", "pending_delete_bytes", "Used bytes that wait to be erased."),
    _by_tier("kvcm_tier_quota_bytes", _GAUGE, "quota_bytes",
             "Bytes that the group may hold in the tier, where that has a quota of its own."),
    _gauge("kvcm_group_blocks", "blocks", "Readable blocks."),
    _gauge("kvcm_group_instances", "instances", "Instances of the group that are open."),
    _gauge("kvcm_broken_instances", "broken_instances", "Instances whose index cannot be opened."),
    _counter("kvcm_lookup_blocks_total", "lookup_blocks", "Blocks that readers asked for."),
    _counter("kvcm_hit_blocks_total", "hit_blocks", "Blocks of these that were found."),
    _counter("kvcm_lookup_tokens_total", "lookup_tokens", "Tokens of the blocks that readers asked for."),
    _by_tier("kvcm_hit_tokens_total", _COUNTER, "hit_tokens",
             "Tokens of the blocks that were found, by tier."),
    _named("kvcm_write_sessions", _GAUGE, "state", "gauges",
           {"writing": "writing_sessions", "copying": "moves_in_flight"},
           "Sessions in progress: of writers, and copies between tiers."),
    _named("kvcm_writes_total", _COUNTER, "outcome", "counters",
           {"finished": "finished_writes", "aborted": "aborted_writes", "expired": "expired_sessions"},
           "Write sessions that ended."),
    _by_key("kvcm_refused_writes_total", "refused_writes_by_code", "code",
            "Writes that got no room, by error code."),
    _gauge("kvcm_waiting_writes", "waiting_writes", "Writes that wait for room."),
    _counter("kvcm_written_bytes_total", "written_bytes", "Payload bytes of blocks that became readable."),
    _by_key("kvcm_evicted_bytes_total", "evicted_bytes_by_reason", "reason",
            "Payload bytes of blocks that were given up, by what they had to go for."),
    _named("kvcm_moved_blocks_total", _COUNTER, "reason", "counters",
           {"demoted": "demoted_blocks", "promoted": "promoted_blocks", "drained": "drained_blocks"},
           "Blocks that changed their storage."),
    GroupMetric("kvcm_call_duration_seconds", Kind.HISTOGRAM,
                "From a call's arrival at the group's actor to its answer.", (), _durations),
    _gauge("kvcm_index_map_used_ratio", "map_used_ratio",
           "Part of its map that the fullest index has used; at 1 it takes no more blocks."),
    _counter("kvcm_corrupt_reads_total", "corrupt_reads",
             "Damaged records met in indexes, and blocks that could not be read when they were to be moved."),
    _counter("kvcm_fenced_writes_total", "fenced_writes",
             "Batches of stale incarnations of the actor that were refused, ever."),
    _by_key("kvcm_faults_total", "faults_by_code", "code",
            "Requests that failed for the manager's own reasons."),
    _gauge("kvcm_reclaiming_paused", "paused", "1 while nothing is evicted, moved or erased."),
)  # fmt: skip
