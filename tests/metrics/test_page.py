"""``GET /metrics``: names by the book, bounded labels, the same numbers as everywhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvcm_ray.actors.metric_table import GROUP_METRICS, Kind, Metric
from kvcm_ray.core.model import ShmSpec, StorageConfig
from kvcm_ray.monitoring.promql import labels_of
from kvcm_ray.serve_app import figures as figures_module
from kvcm_ray.serve_app.metrics import Metrics, Series
from kvcm_ray.serve_app.metrics_text import MANAGER_METRICS
from kvcm_ray.testing.http import Http, default_group

SERIES_MAX = 40  #: of a group with two tiers
ALL: tuple[Metric, ...] = (*MANAGER_METRICS, *GROUP_METRICS)
UNITS = {"seconds", "bytes", "ratio", "info"}
#: What is counted by itself, so that its name is its unit.
THINGS = {"blocks", "tokens", "writes", "sessions", "instances", "requests", "reads", "faults", "reports"}
LABELS = {"group", "tier", "storage", "reason", "op", "code", "state", "outcome", "version", "format"}
STATES = {"kvcm_epoch", "kvcm_group_up", "kvcm_reclaiming_paused", "kvcm_storage_state"}  # have no unit


def samples(http: Http, **headers: str) -> list[Sample]:
    response = http.run(http.client.get("/metrics", headers=headers))
    assert response.status_code == 200
    return [s for family in text_string_to_metric_families(response.text) for s in family.samples]


def value(found: Iterable[Sample], name: str, **labels: str) -> float:
    (one,) = (s.value for s in found if s.name == name and labels.items() <= s.labels.items())
    return one


@pytest.fixture
def busy(http: Http) -> Http:
    http.register("i1")
    http.write("i1", [1, 2, 3])
    http.prefix("i1", [1, 2, 9])
    http.refused("startWriteCache", "INVALID_ARGUMENT", instance_id="i1")
    http.run(http.backend.flush_touches())
    return http


# ------------------------------------------------------------------------------------------- lint


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_names_labels_and_help(metric: Metric) -> None:
    assert re.fullmatch(r"kvcm_[a-z]+(_[a-z0-9]+)*", metric.name)
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    *_, unit = metric.name.removesuffix("_total").split("_")
    assert unit in UNITS | THINGS or metric.name in STATES
    if metric.kind is Kind.HISTOGRAM:
        assert unit == "seconds"
    assert not re.search(r"_(ms|us|kb|mb|gb|percent|pct)(_|$)", metric.name), "base units"
    assert not re.search(r"(gauge|counter|histogram|metric)", metric.name)
    assert set(labels_of(metric)) <= LABELS
    assert metric.help[0].isupper() or metric.help[0].isdigit()
    assert metric.help.endswith(".")
    assert 15 < len(metric.help) < 140


def test_names_are_unique() -> None:
    names = [metric.name for metric in ALL]
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------- page


def test_the_page_has_every_metric_and_says_what_happened(busy: Http) -> None:
    text = busy.get("/metrics").text
    for metric in ALL:
        assert f"# HELP {metric.name} {metric.help}" in text
        assert f"# TYPE {metric.name} {metric.kind}" in text
    found = samples(busy)
    assert value(found, "kvcm_lookup_tokens_total", group="default") == 3 * 128
    assert value(found, "kvcm_hit_tokens_total", group="default", tier="ST_NFS") == 2 * 128
    assert value(found, "kvcm_group_used_bytes", group="default") == 3 * 1024
    assert value(found, "kvcm_group_quota_bytes", group="default") == 1 << 30
    assert value(found, "kvcm_requests_total", op="StartWriteCache", code="OK") == 1
    assert value(found, "kvcm_requests_total", op="StartWriteCache", code="INVALID_ARGUMENT") == 1
    assert value(found, "kvcm_request_duration_seconds_count", op="StartWriteCache") == 2
    assert value(found, "kvcm_replica_lag_seconds", group="default") == 0
    assert value(found, "kvcm_storage_state", storage="nfs_01", state="enabled") == 1
    assert value(found, "kvcm_build_info") == 1


def test_histograms_add_up(busy: Http) -> None:
    found = samples(busy)
    for name, labels in (
        ("kvcm_call_duration_seconds", {"group": "default"}),
        ("kvcm_request_duration_seconds", {"op": "StartWriteCache"}),
    ):
        buckets = [
            s.value for s in found if s.name == f"{name}_bucket" and labels.items() <= s.labels.items()
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == value(found, f"{name}_count", **labels)
        assert value(found, f"{name}_sum", **labels) > 0


def test_the_wire_tells_the_same(busy: Http) -> None:
    found = samples(busy)
    told = {
        (m["metric_name"], *(tag["tag_value"] for tag in m["metric_tags"])): m["metric_value"]
        for m in busy.ok("getMetrics")["metrics"]
    }
    used = value(found, "kvcm_group_used_bytes", group="default")
    assert told["cache_manager_group.used_bytes", "default"] == {"float_value": used}
    assert told["cache_manager_group.usage_ratio", "default"] == {"float_value": used / (1 << 30)}
    assert told["cache_manager_group.hit_blocks", "default"] == {"float_value": 2}
    assert told["service.query_counter", "StartWriteCache", "default", "i1"] == {"int_value": "2"}


def test_a_group_of_two_tiers_has_few_series(http: Http, tmp_path_factory: pytest.TempPathFactory) -> None:
    memory = StorageConfig("memory", shm=ShmSpec(str(tmp_path_factory.mktemp("memory"))))
    http.run(http.backend.registry("add_storage", memory))
    group = default_group()
    changed = {**http.ok("getInstanceGroup", name="default")["instance_group"],
               "storage_candidates": ["memory", "nfs_01"], "version": 2}  # fmt: skip
    http.ok("updateInstanceGroup", instance_group=changed, current_version=1)
    http.register("i1")
    http.write("i1", list(range(20)))
    own = [s for s in samples(http) if s.labels.get("group") == group.name]
    tiers = {s.labels["tier"] for s in own if "tier" in s.labels}
    assert tiers == {"ST_TAIRMEMPOOL", "ST_NFS"}
    assert len(own) <= SERIES_MAX
    labels = {label for s in samples(http) for label in s.labels}
    assert labels <= LABELS | {"le"}


def test_a_group_that_does_not_answer_is_told_and_the_others_are_there(
    busy: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = busy.ok("getInstanceGroup", name="default")["instance_group"]
    for name in ("hangs", "gone"):
        busy.run(busy.backend.registry("create_group", default_group_named(name)))
    busy.backend.groups_control.services.pop("gone").stop()
    ask = busy.backend.ask

    async def slow(group: str, *args: object) -> dict:
        import asyncio

        if group == "hangs":
            await asyncio.sleep(60)
        return await ask(group, *args)

    monkeypatch.setattr(busy.backend, "ask", slow)
    monkeypatch.setattr(figures_module, "DEADLINE_S", 0.2)
    found = samples(busy)
    up = {s.labels["group"]: s.value for s in found if s.name == "kvcm_group_up"}
    assert up == {"default": 1, "gone": 0, "hangs": 0}
    assert {s.labels["group"] for s in found if s.name == "kvcm_group_blocks"} == {"default"}
    assert shown["name"] == "default"


def default_group_named(name: str):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(default_group(), name=name)


def test_openmetrics_is_spoken_to_who_asks(busy: Http) -> None:
    response: httpx.Response = busy.run(
        busy.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    )
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_groups_are_asked_once_a_second(busy: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = busy.backend.ask

    async def counted(group: str, *args: object) -> dict:
        asked.append(args)
        return await ask(group, *args)

    monkeypatch.setattr(busy.backend, "ask", counted)
    for _ in range(20):
        busy.get("/metrics")
    assert len(asked) <= 3


def test_lost_reports_and_damage_are_counted(busy: Http) -> None:
    busy.backend.count("dropped_reports", "default", 5)
    reader = busy.backend.reader(busy.backend.instance("i1"))
    reader._damage.records += 2
    found = samples(busy)
    assert value(found, "kvcm_dropped_reports_total", group="default") == 5
    assert value(found, "kvcm_corrupt_reads_total", group="default") == 2
    assert value(samples(busy), "kvcm_corrupt_reads_total", group="default") == 2


def test_what_replicas_count_is_no_call(busy: Http) -> None:
    busy.metrics.add("dropped_reports", "default", 1)
    assert not any(series.api.startswith("#") for series in busy.metrics.totals())
    assert busy.metrics.extras() == {("dropped_reports", "default"): 1}


def test_codes_and_latencies_survive_and_add_up(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from kvcm_ray.serve_app.messages import ErrorCode

    one, two = Metrics(tmp_path), Metrics(tmp_path)
    one.count(Series("A", "g", "i"), 0.0004)
    two.count(Series("A"), 0.3, ErrorCode.IO_ERROR)
    two.count(Series("A"), 99.0, ErrorCode.IO_ERROR)
    counts = one.by_api()["A"]
    assert (counts.calls, counts.errors, counts.total_us) == (3, 2, 400 + 300_000 + 99_000_000)
    assert (counts.by_latency[0], counts.by_latency[-1], sum(counts.by_latency)) == (1, 1, 3)
    assert sum(counts.by_code) == 3
    one.close()
    two.close()
