"""A gRPC load generator: one process, asyncio, prepared bytes, nothing parsed.

    python -m kvcm_ray.benchmarks.grpc_load
        stdin:  {"address", "path", "request" (base64), "connections", "seconds"}
        stdout: {"requests", "seconds", "latencies_us"}

Every connection is a channel of its own with one request out at any time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from typing import Any

import grpc

#: Channels to one address share a connection unless each has a pool of its own.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


async def load(
    address: str, path: str, request: bytes, connections: int, seconds: float
) -> tuple[float, list[float]]:
    """Seconds that it really took, and the latency of every request in microseconds.

    Raises:
        grpc.aio.AioRpcError: a call failed.
    """
    latencies: list[float] = []
    began = time.perf_counter()
    until = began + seconds

    async def one() -> None:
        async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
            call = channel.unary_unary(path)
            while (sent := time.perf_counter()) < until:
                await call(request, timeout=30)
                latencies.append((time.perf_counter() - sent) * 1e6)

    await asyncio.gather(*(one() for _ in range(connections)))
    return time.perf_counter() - began, latencies


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    request = base64.b64decode(job["request"])
    seconds, latencies = asyncio.run(
        load(job["address"], job["path"], request, job["connections"], job["seconds"])
    )
    json.dump({"requests": len(latencies), "seconds": seconds, "latencies_us": latencies}, sys.stdout)


if __name__ == "__main__":
    main()
