"""The edges: limits, health, documentation, header rules, failing dependencies, read reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.core import limits
from kvcm_ray.serve_app import app as app_module
from kvcm_ray.serve_app.endpoints import ADMIN, ENDPOINTS, HOT
from kvcm_ray.serve_app.messages import ErrorCode
from kvcm_ray.serve_app.metrics import Metrics, Series
from kvcm_ray.testing.http import Http, registration


def test_every_endpoint_answers_an_empty_object(http: Http) -> None:
    admin = {e.path for e in ADMIN}
    for endpoint in ENDPOINTS:
        response = http.raw(endpoint.path, b"{}")
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        header = response.json()["header"]
        assert list(header) == (
            ["status", "request_id"] if endpoint.path in admin else ["status", "request_id", "tracer_result"]
        )
        assert re.fullmatch(r"_\d{16}", header["request_id"])


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\xff", b"{}x"])
def test_malformed_bodies(http: Http, body: bytes) -> None:
    for endpoint in ENDPOINTS:
        response = http.raw(endpoint.path, body)
        assert (response.status_code, response.content) == (400, b"{}"), endpoint.path
        assert "json" not in response.headers.get("content-type", "")


def test_unknown_paths_and_methods_answer_json(http: Http) -> None:
    assert isinstance(http.raw("/api/nope", b"{}").json(), dict)
    assert http.raw("/api/nope", b"{}").status_code == 404
    response = http.get("/api/getCacheLocation")
    assert response.status_code == 405
    assert isinstance(response.json(), dict)


def test_a_body_over_the_limit(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "REQUEST_BYTES_MAX", 1000)
    for path in ("/api/getCacheLocation", "/api/addStorage"):
        response = http.raw(path, b"{" + b" " * 2000 + b"}")
        assert response.status_code == 413
        assert response.json()["header"]["status"]["code"] == "INVALID_ARGUMENT"
        assert http.raw(path, b"{" + b" " * 998 + b"}").status_code == 200


async def received(chunks: list[bytes]) -> bytes:
    messages = [
        {"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    return await app_module.read_body({"headers": []}, receive)


def test_chunked_bodies(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    assert http.run(received([b"ab", b"", b"c"])) == b"abc"
    monkeypatch.setattr(app_module, "REQUEST_BYTES_MAX", 2)
    with pytest.raises(app_module.TooLarge):
        http.run(received([b"ab", b"c", b"d"]))


def test_too_many_keys_and_tokens(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    http.register("i1")
    keys = list(range(limits.KEYS_PER_CALL_MAX + 1))
    for name in ("getCacheLocation", "startWriteCache", "getCacheMeta", "removeCache"):
        message = http.refused(name, "INVALID_ARGUMENT", instance_id="i1", block_keys=keys, query_type=2)
        assert str(limits.KEYS_PER_CALL_MAX) in message
    monkeypatch.setattr(limits, "TOKENS_PER_CALL_MAX", 10)
    http.refused("getCacheLocation", "INVALID_ARGUMENT", instance_id="i1", token_ids=keys[:11])


def test_health(http: Http) -> None:
    assert http.get("/healthz/live").json() == {"live": True}
    assert http.run(http.client.head("/healthz")).status_code == 200, "what load balancers send"
    ready = http.get("/healthz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    http.backend.failing = True
    assert http.get("/healthz/live").status_code == 200
    broken = http.get("/healthz/ready")
    assert broken.status_code == 503
    assert broken.json()["dependencies"] == {"registry": "unreachable"}
    assert http.ok("checkHealth")["is_health"] is False


def test_without_actors_reads_go_on_and_changes_say_not_ready(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1])
    http.backend.failing = True
    assert len(http.prefix("i1", [1])) == 1
    http.refused("startWriteCache", "SERVICE_NOT_READY", instance_id="i1", block_keys=[2])
    http.refused("addStorage", "SERVICE_NOT_READY", storage={
        "global_unique_name": "s", "nfs": {"root_path": "/tmp/x"},
    })  # fmt: skip
    answer = http.ok("getMetrics")
    values = {m["metric_name"]: m["metric_value"] for m in answer["metrics"]}
    assert values["cache_manager_group.available"] == {"float_value": 0}
    http.backend.failing = False


def test_a_bug_is_an_answer_not_a_5xx(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.backend, "storages", lambda: 1 / 0)
    message = http.refused("listStorage", "INTERNAL_ERROR")
    assert "ZeroDivisionError" in message


def test_documentation_is_made_from_the_messages(http: Http) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href|url)[=:] *["\'](.*?)["\']', page.text)
    assert sources
    for source in sources:  # nothing from outside, and everything is there
        assert source.startswith("/"), source
        assert http.get(source).status_code == 200, source
    paths = http.get("/openapi.json").json()["paths"]
    assert {e.path for e in ENDPOINTS} <= set(paths)
    for endpoint in ENDPOINTS:
        content = paths[endpoint.path]["post"]["requestBody"]["content"]["application/json"]
        assert "trace_id" in content["schema"]["properties"]
        assert content["example"] is not None
    keys = paths[HOT[0].path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert keys["properties"]["query_type"]["enum"][2] == "QT_PREFIX_MATCH"


def test_examples_of_the_documentation_work(http: Http) -> None:
    http.ok("registerInstance", **registration("i1"))
    for endpoint in ENDPOINTS:
        request = dict(endpoint.example or {})
        if endpoint.rpc in ("AddStorage", "UpdateStorage"):
            root = str(http.data_dir / "extra")
            request["storage"] = request["storage"] | {"nfs": {"root_path": root}}
        if "<from" in str(request) or endpoint.rpc in ("LeaderDemote", "RemoveInstance", "RollbackInstance"):
            continue  # not to be done, or not yet
        http.ok(endpoint.path.removeprefix("/api/"), **request)


def test_reads_are_reported_to_the_group_in_batches(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1, 2, 3])
    http.prefix("i1", [1, 2, 9])
    http.prefix("i1", [8])
    http.run(http.backend.flush_touches())
    http.ok("getCacheLocation", instance_id="i1", block_keys=[3, 7, 1], query_type="QT_BATCH_GET")
    http.run(http.backend.flush_touches())
    told = [(t.keys.tolist(), t.lookups, t.chained) for t in http.backend.touched]
    assert told == [([1, 2], 3, True), ([], 1, True), ([3, 1], 3, False)]
    usage = http.run(http.backend.ask("default", "usage"))
    assert (usage["hit_blocks"], usage["lookup_blocks"]) == (4, 7)


def test_reports_are_dropped_rather_than_queued_without_bound(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcm_ray.serve_app.backend.TOUCH_KEYS_MAX", 4)
    monkeypatch.setattr("kvcm_ray.serve_app.backend.TOUCH_PERIOD_S", 3600.0)
    http.register("i1")
    http.write("i1", [1, 2])
    for _ in range(5):
        http.prefix("i1", [1, 2])
    assert http.backend.touches_dropped == 3
    http.backend._flushing.cancel()
    http.backend._flushing = None
    http.backend.failing = True
    http.run(http.backend._send_touches())
    assert http.backend.touches_dropped == 5
    http.backend.failing = False
    monkeypatch.setattr("kvcm_ray.serve_app.backend.TOUCHES_MAX", 1)
    http.prefix("i1", [7])
    http.prefix("i1", [7])
    assert http.backend.touches_dropped == 6
    http.backend._flushing.cancel()
    http.backend._flushing = None


def test_counters_are_shared_and_survive_their_process(tmp_path: Path) -> None:
    one, two = Metrics(tmp_path), Metrics(tmp_path)
    series = Series("GetCacheLocation", "g", "i")
    one.count(series, 0.001)
    two.count(series, 0.003, ErrorCode.IO_ERROR)
    total = one.totals()[series]
    assert (total.calls, total.errors, total.last_us, total.total_us) == (2, 1, 3000, 4000)
    one.close()
    three = Metrics(tmp_path)
    three.count(series, 0.001)
    assert two.totals()[series].calls == 3
    assert len(list(tmp_path.glob("*.counters"))) == 2
    two.close()
    three.close()


def test_counters_are_bounded(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for i in range(3000):
        metrics.count(Series("A", "g", f"i{i}"), 0.001)
    totals = metrics.totals()
    assert sum(c.calls for c in totals.values()) == 3000
    assert Series("A") in totals
    metrics.close()
