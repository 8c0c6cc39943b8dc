"""`kvcm bench http`: getCacheLocation through the whole stack, all hits, with locations.

Requests/s and latency for several prompt lengths on 1 and on 16 connections, and the same load on a
bare uvicorn + Starlette echo with the same body sizes in the same run, so that the figures can be
read on any machine. Load is made by a process of its own (`http_load`).
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from kvcm_ray.benchmarks.http_load import http_request
from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.errors import KvcmError, Unavailable

KEYS = (16, 128, 1024)
CONNECTIONS = (1, 16)
SECONDS = 2.0
WARM_UP_S = 0.3


def run(
    url: str,
    group: str = "default",
    *,
    keys: Sequence[int] = KEYS,
    connections: Sequence[int] = CONNECTIONS,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Measure the manager at `url`, on an instance of its own that is removed afterwards.

    Returns:
        ``{"rows": [{keys, connections, requests_per_s, p50_us, p99_us, echo_requests_per_s}]}``

    Raises:
        Unavailable: nothing answers at `url`.
        KvcmError: the manager refuses a call.
    """
    instance = f"bench-http-{secrets.token_hex(4)}"
    with httpx.Client(base_url=url, timeout=30) as client:
        call(client, "registerInstance", registration(group, instance))
        try:
            block_keys = write(client, instance, max(keys))
            rows = []
            for count in keys:
                rows += _measure(client, url, instance, block_keys[:count], connections, seconds)
        finally:
            call(client, "removeInstance", {"instance_id": instance})
    return {"rows": rows}


def _measure(
    client: httpx.Client,
    url: str,
    instance: str,
    block_keys: list[int],
    connections: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:
    query = {"instance_id": instance, "query_type": "QT_PREFIX_MATCH", "block_keys": block_keys}
    body = json.dumps({"trace_id": "bench", **query}).encode()
    answer = client.post("/api/getCacheLocation", content=body)
    found = len(answer.json()["locations"])
    if found != len(block_keys):
        raise KvcmError(f"only {found} of {len(block_keys)} blocks were found")
    target = urlsplit(url)
    host, port = target.hostname or "127.0.0.1", target.port or 80
    request = http_request(host, "/api/getCacheLocation", body)
    rows = []
    with _echo(len(answer.content)) as echo_port:
        echo_request = http_request(host, "/", body)
        for count in connections:
            echo = load("127.0.0.1", echo_port, echo_request, count, seconds)
            row = load(host, port, request, count, seconds)
            rows.append(
                {"keys": len(block_keys), "connections": count}
                | row
                | {"echo_requests_per_s": echo["requests_per_s"]}
            )
    return rows


def load(host: str, port: int, request: bytes, connections: int, seconds: float) -> dict[str, Any]:
    """Figures of one load, after a short one to warm up."""
    job = {
        "host": host,
        "port": port,
        "request": base64.b64encode(request).decode(),
        "connections": connections,
    }
    for duration in (WARM_UP_S, seconds):
        done = subprocess.run(
            [sys.executable, "-m", "kvcm_ray.benchmarks.http_load"],
            input=json.dumps(job | {"seconds": duration}),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Unavailable(f"load on {host}:{port} failed: {done.stderr.strip()[-300:]}")
    return figures(json.loads(done.stdout), f"{host}:{port}", seconds)


def figures(result: dict[str, Any], where: str, seconds: float) -> dict[str, Any]:
    """Of what a load generator printed. Raises Unavailable if nothing was answered."""
    latencies = np.array(result["latencies_us"])
    if not len(latencies):
        raise Unavailable(f"{where} answered no request within {seconds} s")
    return {
        "requests_per_s": round(result["requests"] / result["seconds"], 1),
        "p50_us": round(float(np.percentile(latencies, 50)), 1),
        "p99_us": round(float(np.percentile(latencies, 99)), 1),
    }


@contextmanager
def _echo(response_bytes: int) -> Iterator[int]:
    """Port of a bare echo server."""
    (port,) = free_ports(1)
    arguments = ["-m", "kvcm_ray.benchmarks.http_echo", str(port), str(response_bytes)]
    server = subprocess.Popen([sys.executable, *arguments])
    try:
        _wait_for(port, server)
        yield port
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise Unavailable("the echo server does not start")


def write(client: httpx.Client, instance: str, count: int) -> list[int]:
    """Register `count` blocks as written (their bytes do not matter here); their keys."""
    generator = np.random.default_rng(0)
    keys: list[int] = generator.integers(-(2**63), 2**63 - 1, count).tolist()
    started = call(
        client,
        "startWriteCache",
        {"instance_id": instance, "block_keys": keys, "write_timeout_seconds": 60},
    )
    finish = {
        "instance_id": instance,
        "write_session_id": started["write_session_id"],
        "success_blocks": {"offset": len(started["locations"])},
    }
    call(client, "finishWriteCache", finish)
    return keys


def registration(group: str, instance: str) -> dict[str, Any]:
    return {
        "instance_group": group,
        "instance_id": instance,
        "block_size": 16,
        "model_deployment": {"model_name": "bench", "dtype": "none"},
        "location_spec_infos": [{"name": "tp0", "size": 1024}],
    }


def call(client: httpx.Client, name: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = client.post(f"/api/{name}", json=request).json()
    except httpx.TransportError as error:
        raise Unavailable(f"nothing answers at {client.base_url}: {error}") from error
    status = answer.get("header", {}).get("status", {})
    if status.get("code") != "OK":
        raise KvcmError(f"{name}: {status.get('code')} {status.get('message')}")
    return answer
