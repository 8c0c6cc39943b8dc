"""A light HTTP load generator: one process, epoll, prepared bytes, no parsing but the length.

    python -m kvcm_ray.benchmarks.http_load
        stdin:  {"host", "port", "request" (base64), "connections", "seconds"}
        stdout: {"requests", "seconds", "latencies_us"}

Every connection has one request out at any time. On a machine of two cores the generator must not
cost more than the server, which rules out every HTTP client library.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import sys
import time
from typing import Any

_RECEIVE_BYTES = 1 << 18
_LENGTH = b"content-length:"


class _Connection:
    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.socket = socket.create_connection((host, port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._missing = 0  #: bytes of the answer; 0 = its head is still to come
        self._began = 0

    def send(self) -> None:
        self._began = time.perf_counter_ns()
        self.socket.sendall(self._request)

    def receive(self) -> int | None:
        """Latency in nanoseconds once the answer is complete."""
        count = self.socket.recv_into(self._buffer)
        if not count:
            raise ConnectionError("the server closed the connection")
        if not self._missing:
            head = bytes(self._buffer[: min(count, 2048)])
            end = head.find(b"\r\n\r\n")
            if end < 0 or not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"not a complete answer: {head[:200]!r}")
            at = head.lower().index(_LENGTH) + len(_LENGTH)
            self._missing = end + 4 + int(head[at : head.index(b"\r", at)])
        self._missing -= count
        return None if self._missing else time.perf_counter_ns() - self._began


def load(
    host: str, port: int, request: bytes, connections: int, seconds: float
) -> tuple[float, list[int]]:
    """Seconds that it really took, and the latency of every request in nanoseconds.

    Raises:
        ConnectionError: an answer is not 200, or a connection broke.
    """
    selector = selectors.DefaultSelector()
    open_connections = [_Connection(host, port, request) for _ in range(connections)]
    for connection in open_connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    latencies: list[int] = []
    began = time.perf_counter()
    end = began + seconds
    for connection in open_connections:
        connection.send()
    while (now := time.perf_counter()) < end:
        for key, _ in selector.select(end - now):
            latency = key.data.receive()
            if latency is not None:
                latencies.append(latency)
                key.data.send()
    for connection in open_connections:
        connection.socket.close()
    return now - began, latencies


def http_request(host: str, path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    request = base64.b64decode(job["request"])
    seconds, latencies = load(job["host"], job["port"], request, job["connections"], job["seconds"])
    answer = {"requests": len(latencies), "seconds": seconds}
    json.dump(answer | {"latencies_us": [n / 1000 for n in latencies]}, sys.stdout)


if __name__ == "__main__":
    main()
