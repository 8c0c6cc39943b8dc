"""Traces: one trace from client to storage across processes, to a real collector; nothing when off."""

from __future__ import annotations

import gzip
import http.server
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvcm_ray import cluster, tracing
from kvcm_ray.testing.http import Http

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Tracing is on in this process, and here are its spans."""
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(tracing, "on", True)
    monkeypatch.setattr(tracing, "_tracer", lambda: provider.get_tracer("test"))
    yield kept
    provider.shutdown()


def test_a_call_is_a_span_of_its_callers_trace(http: Http, spans: InMemorySpanExporter) -> None:
    http.run(http.client.post("/api/listStorage", json={"trace_id": "mine"}, headers={"traceparent": PARENT}))
    http.run(http.client.post("/api/getCacheLocation", json={"trace_id": "x", "instance_id": "ghost"}))
    first, second = spans.get_finished_spans()
    assert (first.name, second.name) == ("kvcm ListStorage", "kvcm GetCacheLocation")
    assert f"{first.context.trace_id:032x}" == TRACE
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == PARENT.split("-")[2]
    assert first.attributes is not None
    assert (first.attributes["kvcm.trace_id"], first.attributes["kvcm.code"]) == ("mine", "OK")
    assert second.parent is None
    assert second.attributes is not None
    assert second.attributes["kvcm.code"] == "INSTANCE_NOT_EXIST"


def test_what_is_no_traceparent_begins_a_trace(http: Http, spans: InMemorySpanExporter) -> None:
    http.run(http.client.post("/api/listStorage", json={}, headers={"traceparent": "rubbish"}))
    (span,) = spans.get_finished_spans()
    assert span.parent is None


def test_off_makes_no_spans_and_carries_nothing() -> None:
    assert not tracing.on, "tests run without KVCM_TRACING"
    with tracing.span("x") as nothing:
        assert nothing is None
        assert tracing.carried() == ""
    tracing.done(["x"], [PARENT], 0, [{}])


def test_without_the_packages_there_is_a_line_in_the_log_and_nothing_else() -> None:
    code = """
        import sys
        sys.modules["opentelemetry.exporter"] = None
        from kvcm_ray import tracing
        assert tracing.on
        with tracing.span("x") as span:
            assert span is None
        assert tracing.carried() == ""
    """
    environment = {**os.environ, tracing.VARIABLE: "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'kvcm-ray[tracing]'" in done.stderr


# --------------------------------------------------------------------------- across processes

CLIENT = """
    import sys, httpx, numpy as np
    from kvcm_ray.client import connect
    data_dir, url, parent = sys.argv[1:]
    keys = np.arange(1, 9)
    blocks = np.random.default_rng(7).integers(0, 255, (8, 4096), dtype=np.uint8)
    with connect(data_dir) as client:
        instance = client.register("i", "default", block_size=16, specs={"tp0": 4096})
        assert instance.put(keys, blocks) == 8
        assert instance.get(keys, np.zeros_like(blocks)).flags.all()
    answer = httpx.post(url + "/api/startWriteCache", headers={"traceparent": parent}, json={
        "trace_id": "from-http", "instance_id": "i", "block_keys": [100, 101]})
    assert answer.json()["header"]["status"]["code"] == "OK", answer.text
"""


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP collector on a free port: (its URL, resource spans as they come)."""
    got: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            got.extend(ExportTraceServiceRequest.FromString(body).resource_spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()


def by_trace(got: list[Any]) -> dict[str, dict[str, set[int]]]:
    """trace id -> span name -> processes."""
    found: dict[str, dict[str, set[int]]] = {}
    for resource in list(got):
        pid = next(a.value.int_value for a in resource.resource.attributes if a.key == "process.pid")
        for scope in resource.scope_spans:
            for span in scope.spans:
                found.setdefault(span.trace_id.hex(), {}).setdefault(span.name, set()).add(pid)
    return found


@pytest.mark.ray
def test_a_trace_goes_from_client_and_http_through_the_actor_to_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, got):
        for name, value in {
            tracing.VARIABLE: "1", "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "200",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        manager = cluster.up_detached(tmp_path / "data", 0, ["shm:16MiB"], replicas=1)
        try:
            arguments = [str(manager.data_dir), manager.url, PARENT]
            program = textwrap.dedent(CLIENT)
            subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=120)
            wait_for_spans(got)
        finally:
            cluster.down(tmp_path / "data", purge=True)
    traces = by_trace(got)
    put = next(names for names in traces.values() if "kvcm put" in names)
    assert {"kvcm put", "storage write", "group StartWrite", "group FinishWrite"} <= put.keys()
    assert put["kvcm put"] == put["storage write"]
    assert put["group StartWrite"].isdisjoint(put["kvcm put"]), "the actor is another process"
    assert any("storage read" in names for names in traces.values() if "kvcm get" in names)
    over_http = traces[TRACE]
    assert {"kvcm StartWriteCache", "group StartWrite"} <= over_http.keys()
    assert over_http["kvcm StartWriteCache"].isdisjoint(over_http["group StartWrite"])


def wait_for_spans(got: list[Any]) -> None:
    import time

    until = time.monotonic() + 20
    while "group StartWrite" not in by_trace(got).get(TRACE, {}) and time.monotonic() < until:
        time.sleep(0.1)
