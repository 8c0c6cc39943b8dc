"""`kvcm bench grpc`: getCacheLocation over gRPC and over HTTP, in turns in one run, all hits.

Load is made by a process of its own. gRPC's Python client costs much more than the HTTP load generator, a
few prepared bytes on a socket: where both share the cores with the server, its rows are a lower bound.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from kvcm_ray.benchmarks import http
from kvcm_ray.benchmarks.http_load import http_request
from kvcm_ray.errors import Unavailable
from kvcm_ray.serve_app.grpc.client import rpc


def run(
    url: str,
    address: str,
    group: str = "default",
    *,
    keys: Sequence[int] = http.KEYS,
    connections: Sequence[int] = http.CONNECTIONS,
    seconds: float = http.SECONDS,
) -> dict[str, Any]:
    """Measure the manager at `url`, whose gRPC is at `address`, on an instance that is removed afterwards.

    Returns:
        ``{"rows": [{keys, connections, requests_per_s, p50_us, p99_us, http_requests_per_s, http_p50_us}]}``

    Raises:
        Unavailable: nothing answers there.
        KvcmError: the manager refuses a call.
    """
    instance = f"bench-grpc-{secrets.token_hex(4)}"
    rows = []
    with httpx.Client(base_url=url, timeout=30) as client:
        http.call(client, "registerInstance", http.registration(group, instance))
        try:
            block_keys = http.write(client, instance, max(keys))
            for count in keys:
                for many in connections:
                    query = {"instance_id": instance, "block_keys": block_keys[:count]}
                    over_grpc = _grpc(address, query, many, seconds)
                    over_http = _http(url, query, many, seconds)
                    named = {f"http_{name}": over_http[name] for name in ("requests_per_s", "p50_us")}
                    rows.append({"keys": count, "connections": many} | over_grpc | named)
        finally:
            http.call(client, "removeInstance", {"instance_id": instance})
    return {"rows": rows}


def _grpc(address: str, query: dict[str, Any], connections: int, seconds: float) -> dict[str, Any]:
    method = rpc("GetCacheLocation")
    request = method.request(trace_id="bench", query_type="QT_PREFIX_MATCH", **query).SerializeToString()
    job = {
        "address": address,
        "path": method.path,
        "request": base64.b64encode(request).decode(),
        "connections": connections,
    }
    for duration in (http.WARM_UP_S, seconds):
        done = subprocess.run(
            [sys.executable, "-m", "kvcm_ray.benchmarks.grpc_load"],
            input=json.dumps(job | {"seconds": duration}), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Unavailable(f"load on {address} failed: {done.stderr.strip()[-300:]}")
    return http.figures(json.loads(done.stdout), address, seconds)


def _http(url: str, query: dict[str, Any], connections: int, seconds: float) -> dict[str, Any]:
    target = urlsplit(url)
    host, port = target.hostname or "127.0.0.1", target.port or 80
    body = json.dumps({"trace_id": "bench", "query_type": "QT_PREFIX_MATCH", **query}).encode()
    return http.load(host, port, http_request(host, "/api/getCacheLocation", body), connections, seconds)
