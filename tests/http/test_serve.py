"""The application under Ray Serve: two replicas behind HAProxy, and behind Serve's own proxy."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvcm_ray.testing.http import registration
from kvcm_ray.testing.serve_child import serving

pytestmark = pytest.mark.ray


@pytest.fixture(params=[True, False], ids=["haproxy", "own-proxy"], scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    # Ray's sockets live below its temporary folder, whose path must be short.
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    try:
        with (
            serving(folder / "data", folder, haproxy=request.param) as url,
            httpx.Client(base_url=url, timeout=30) as client,
        ):
            yield client
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_block_through_the_whole_stack(client: httpx.Client) -> None:
    def ok(name: str, **request: object) -> dict[str, object]:
        response = client.post(f"/api/{name}", json=request)
        assert response.status_code == 200, response.text
        assert response.json()["header"]["status"]["code"] == "OK", response.text
        return dict(response.json())

    ok("registerInstance", **registration("i1"))
    keys = list(range(100))
    started = ok("startWriteCache", instance_id="i1", block_keys=keys, write_timeout_seconds=30)
    ok("finishWriteCache", instance_id="i1", write_session_id=started["write_session_id"],
       success_blocks={"offset": 100})  # fmt: skip
    query = {"instance_id": "i1", "block_keys": keys, "query_type": "QT_PREFIX_MATCH"}
    for _ in range(20):  # both replicas
        assert ok("getCacheLocation", **query)["locations"] == started["locations"]
    counted = {
        tuple(t["tag_value"] for t in m["metric_tags"]): m["metric_value"]
        for m in ok("getMetrics")["metrics"]  # type: ignore[attr-defined]
        if m["metric_name"] == "service.query_counter"
    }
    assert int(counted["GetCacheLocation", "default", "i1"]["int_value"]) == 20
    time.sleep(0.3)
    usage = {
        m["metric_name"]: m["metric_value"].get("float_value")
        for m in ok("getMetrics")["metrics"]  # type: ignore[attr-defined]
        if m["metric_name"].startswith("cache_manager_group.")
    }
    assert usage["cache_manager_group.hit_blocks"] == 2000
    assert client.get("/healthz").json()["ready"] is True
    assert client.get("/openapi.json").status_code == 200
    assert client.post("/api/getCacheLocation", content=b"{").status_code == 400
