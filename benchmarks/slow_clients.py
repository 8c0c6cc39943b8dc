"""`kvcm bench slow-clients`: what a good client notices of many that dawdle.

One good client asks without a pause on one connection, in turn beside nobody and beside the slow ones:
a third of those send the head of a request byte by byte, a third its body, a third never read the answer.
Each sends a byte a second and comes back as soon as it was cut off. Every round measures both, so that
what else runs on the machine counts for both; the ratio is that of the medians of their p99.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import statistics
import threading
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from kvcm_ray.benchmarks.http import call, load, registration, write
from kvcm_ray.benchmarks.http_load import http_request

CLIENTS = 200
ROUNDS = 3
SECONDS = 4.0
KEYS = 128
KEYS_OF_A_LONG_ANSWER = 4096
BYTE_PERIOD_S = 1.0


def run(
    url: str,
    group: str = "default",
    *,
    clients: int = CLIENTS,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Measure the manager at `url`, on an instance of its own that is removed afterwards.

    Returns:
        ``{"rows": [{idle_p99_us, slow_p99_us, idle_per_s, slow_per_s, connected, cut_off}], "clients",
        "idle_p99_us", "slow_p99_us", "ratio"}``

    Raises:
        Unavailable: nothing answers at `url`.
    """
    instance = f"bench-slow-{secrets.token_hex(4)}"
    target = urlsplit(url)
    host, port = target.hostname or "127.0.0.1", target.port or 80
    with httpx.Client(base_url=url, timeout=30) as client:
        call(client, "registerInstance", registration(group, instance))
        try:
            keys = write(client, instance, KEYS_OF_A_LONG_ANSWER)
            good, long = (_query(host, instance, keys[:count]) for count in (KEYS, len(keys)))
            rows = [_round(host, port, good, long, clients, seconds) for _ in range(rounds)]
        finally:
            call(client, "removeInstance", {"instance_id": instance})
    idle, slow = (statistics.median(row[name] for row in rows) for name in ("idle_p99_us", "slow_p99_us"))
    summary = {"clients": clients, "idle_p99_us": idle, "slow_p99_us": slow}
    return {"rows": rows, **summary, "ratio": round(slow / idle, 2)}


def _query(host: str, instance: str, keys: list[int]) -> bytes:
    body = {"trace_id": "bench", "instance_id": instance, "query_type": "QT_PREFIX_MATCH", "block_keys": keys}
    return http_request(host, "/api/getCacheLocation", json.dumps(body).encode())


def _round(host: str, port: int, good: bytes, long: bytes, clients: int, seconds: float) -> dict[str, Any]:
    idle = load(host, port, good, 1, seconds)
    with SlowClients(host, port, long, clients) as slow:
        beside = load(host, port, good, 1, seconds)
        connected, cut_off = slow.connected, slow.cut_off
    return {
        "idle_p99_us": idle["p99_us"],
        "slow_p99_us": beside["p99_us"],
        "idle_per_s": idle["requests_per_s"],
        "slow_per_s": beside["requests_per_s"],
        "connected": connected,
        "cut_off": cut_off,
    }


class SlowClients:
    """Dawdlers on a thread, from entering until leaving the context.

    Args:
        request: a whole request with a body and a long answer.
        count: how many at a time.
    """

    def __init__(self, host: str, port: int, request: bytes, count: int) -> None:
        self._target = (host, port)
        self._request = request
        self._body_at = request.index(b"\r\n\r\n") + 4
        self._count = count
        self._sockets: list[socket.socket | None] = [None] * count
        self._sent = [0] * count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.cut_off = 0  #: connections that the manager ended

    @property
    def connected(self) -> int:
        return sum(one is not None for one in self._sockets)

    def __enter__(self) -> SlowClients:
        for n in range(self._count):
            self._open(n)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        for one in self._sockets:
            if one is not None:
                one.close()

    def _open(self, n: int) -> None:
        one = socket.create_connection(self._target, timeout=10)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        first = (20, self._body_at, len(self._request))[n % 3]
        one.sendall(self._request[:first])
        one.setblocking(False)
        self._sockets[n], self._sent[n] = one, first

    def _run(self) -> None:
        """Everybody's next byte, evenly over each period."""
        pause_s = BYTE_PERIOD_S / self._count
        n = 0
        while not self._stop.wait(pause_s):
            self._one_byte(n)
            n = (n + 1) % self._count

    def _one_byte(self, n: int) -> None:
        one = self._sockets[n]
        if one is None or self._ended(n, one):
            if one is not None:
                one.close()
                self.cut_off += 1
            self._sockets[n] = None
            try:
                self._open(n)
            except OSError:
                return
        elif self._sent[n] < len(self._request):
            try:
                self._sent[n] += one.send(self._request[self._sent[n] : self._sent[n] + 1])
            except OSError:
                one.close()
                self._sockets[n] = None
                self.cut_off += 1

    def _ended(self, n: int, one: socket.socket) -> bool:
        """Whether the manager answered or closed; whoever never reads does not look."""
        if n % 3 == 2:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(one, selectors.EVENT_READ)
            return bool(selector.select(0))
