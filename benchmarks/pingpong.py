"""The yardstick of every latency figure: 64 bytes to another process and back over loopback TCP.

TCP_NODELAY, both processes pinned, to two *different* cores; left to the scheduler the figure jumps
by a factor of four with the placement.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

MESSAGE_BYTES = 64
WARM_UP = 200


def pingpong_p50_us(rounds: int = 2_000) -> float:
    """Median time of one round trip in microseconds."""
    return float(np.percentile(pingpong_us(rounds), 50))


def pingpong_us(rounds: int = 2_000) -> np.ndarray:
    """Microseconds of each of `rounds` round trips."""
    cores = sorted(os.sched_getaffinity(0))
    here, there = cores[0], cores[-1]
    server = subprocess.Popen(
        [sys.executable, __file__, str(there)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with pinned(here), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _round_trips(connection, rounds)
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Runs the calling thread on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _round_trips(connection: socket.socket, rounds: int) -> np.ndarray:
    message, times = bytes(MESSAGE_BYTES), np.empty(rounds + WARM_UP)
    for number in range(rounds + WARM_UP):
        start = time.perf_counter_ns()
        connection.sendall(message)
        _receive(connection)
        times[number] = time.perf_counter_ns() - start
    return times[WARM_UP:] / 1e3


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(MESSAGE_BYTES)
    while 0 < len(data) < MESSAGE_BYTES:
        data += connection.recv(MESSAGE_BYTES - len(data))
    return data


def _serve(core: int) -> None:
    """Answers one connection until it is closed; prints its port first."""
    os.sched_setaffinity(0, {core})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        listener.settimeout(30)
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := _receive(connection):
            connection.sendall(data)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
