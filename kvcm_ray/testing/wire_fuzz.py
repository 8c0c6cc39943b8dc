"""Bytes that no HTTP client would send, sent to a real server; and what must be true of it afterwards.

    attempts(seed, count)   what to send, the same for the same seed
    send_all(url, ...)      sends it over many connections; which statuses came back
    serving(data_dir)       a manager in a child process, whose memory is its own

Whatever is sent, a server may refuse it or hang up, but neither answer with 5xx nor stop working.
"""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

CONNECTIONS = 8
PATIENCE_S = 5.0  #: for the answer to a whole request
GLANCE_S = 0.05  #: for an answer to something that may get none
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_PATHS = (
    "getCacheLocation",
    "startWriteCache",
    "finishWriteCache",
    "getStatistics",
    "listStorage",
    "nothing",
)


@dataclass(frozen=True, slots=True)
class Attempt:
    kind: str
    pieces: tuple[bytes, ...]  #: sent one by one
    whole: bool = False  #: a request that every server answers
    half_close: bool = False  #: after the last piece, before anything is read
    pause_s: float = 0.0  #: between pieces


def attempts(seed: int, count: int) -> Iterator[Attempt]:
    """`count` attempts, of all kinds in turn."""
    for number in range(count):
        chance = random.Random(f"{seed}:{number}")
        yield _KINDS[number % len(_KINDS)](chance)


def send_all(url: str, what: Iterable[Attempt]) -> Counter[str]:
    """Statuses by kind, ``"chunked 400"``; ``"chunked none"`` counts attempts without an answer.

    Raises:
        AssertionError: a whole request got no answer.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    found: Counter[str] = Counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for attempt, statuses in pool.map(lambda each: (each, _send(address, each)), what):
            assert statuses or not attempt.whole, f"no answer to {attempt}"
            found.update(f"{attempt.kind} {status}" for status in statuses or ["none"])
    return found


def failures(found: Counter[str]) -> dict[str, int]:
    """Answers of 5xx among these."""
    return {what: n for what, n in found.items() if what.split()[-1].startswith("5")}


def _send(address: tuple[str, int], attempt: Attempt) -> list[str]:
    with socket.create_connection(address, timeout=PATIENCE_S) as connection, suppress(OSError):
        received = b""
        with suppress(BrokenPipeError, ConnectionResetError):  # it hung up early; there may be an answer
            for piece in attempt.pieces:
                connection.sendall(piece)
                time.sleep(attempt.pause_s)
        if attempt.half_close:
            connection.shutdown(socket.SHUT_WR)
        connection.settimeout(PATIENCE_S if attempt.whole else GLANCE_S)
        with suppress(OSError):
            while more := connection.recv(1 << 16):
                received += more
                connection.settimeout(GLANCE_S)
        return [status.decode() for status in _STATUS.findall(received)]
    return []


# ------------------------------------------------------------------------------------------- what is sent


def _body(chance: random.Random) -> bytes:
    keys = [chance.randint(-3, 12) for _ in range(chance.randint(0, 4))]
    good = {"trace_id": "fuzz", "instance_id": chance.choice(["i1", "", "ghost"]), "block_keys": keys}
    return chance.choice([json.dumps(good).encode(), b"", b"{", b"[]", b"null", chance.randbytes(40), b"{}"])


def _path(chance: random.Random) -> str:
    return f"/api/{chance.choice(_PATHS)}"


def _request(chance: random.Random, body: bytes | None = None, *headers: bytes) -> bytes:
    """A request that is in order, its body perhaps not."""
    body = _body(chance) if body is None else body
    lines = [b"POST %s HTTP/1.1" % _path(chance).encode(), b"Host: m", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, *headers, b"", body])


def _head(chance: random.Random, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST %s HTTP/1.1" % _path(chance).encode(), b"Host: m", *headers, b"", b""])


def _cut(chance: random.Random, data: bytes, pieces: int) -> tuple[bytes, ...]:
    at = sorted(chance.randrange(len(data) + 1) for _ in range(pieces - 1))
    return tuple(data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True))


def _whole(chance: random.Random) -> Attempt:
    return Attempt("whole", (_request(chance),), whole=True)


def _request_line(chance: random.Random) -> Attempt:
    method = chance.choice([b"POST", b"GET", b"", b"p\x00st", b"X" * 5000, b"OPTIONS", b"TRACE", b"CONNECT"])
    target = chance.choice(
        [b"/api/getCacheLocation", b"/" + b"a" * 20_000, b"*", b"http://[::1", b"/%zz%00%ff",b"\xff\xfe",
         b"", b"/api/../../etc/passwd", b"//api//", b"/a b c", b"m:80", b"/?" + b"&" * 2000]
    )  # fmt: skip
    version = chance.choice([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2", b"", b"ICY", b"HTTP/1.1 x"])
    end = chance.choice([b"\r\n", b"\n", b"\r", b"\r\n\r\n"])
    return Attempt("request-line", (b" ".join([method, target, version]) + end + b"Host: m\r\n\r\n",))


def _headers(chance: random.Random) -> Attempt:
    odd = [
        b"no colon", b": no name", b"A" * 70_000 + b": 1", b"X: " + b"y" * 70_000,
        b"X\x00: 1", b"X: \x00\x01",
        b"Host: other", b" folded: yes", b"Authorization: Basic !!!", b"Authorization: Bearer \xff",
        b"Accept: " + b"*/*," * 500, b"Connection: close, upgrade", b"Expect: 100-continue", b"Expect: 42",
        b"traceparent: 00-zz-zz-01", b"X-Forwarded-For: " + b"1," * 300, b"Range: bytes=-1", b"\r: 1",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13",
        b"Content-Encoding: gzip", b"Content-Type: \xe9", b"\r\n".join(b"H%d: 1" % i for i in range(300)),
    ]  # fmt: skip
    chosen = chance.sample(odd, chance.randint(1, 3))
    return Attempt("headers", (_request(chance, None, *chosen),))


def _length(chance: random.Random) -> Attempt:
    length = chance.choice(
        [b"-1", b"99999999999999999999999", b"+5", b"0x10", b"5, 6", b"", b"1e3", b" 5 5", b"\xb2", b"7\x00",
         b"1000000", b"4294967296", b"67108865"]
    )  # fmt: skip
    more = [b"Content-Length: 3"] if chance.random() < 0.3 else []
    return Attempt("content-length", (_head(chance, b"Content-Length: " + length, *more) + _body(chance),))


def _chunked(chance: random.Random) -> Attempt:
    body = _body(chance) or b"{}"
    good = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    sent = chance.choice(
        [good, good[:-5], b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n", b"ffffffffffffffffff\r\n{}",
         b"2\r\n{}0\r\n",
         b"2;a=b;" + b"c" * 300 + b"\r\n{}\r\n0\r\n\r\n", good[:-2] + b"Trailer: 1\r\n\r\n", b"0\r\n\r\n",
         b"1\r\n{\r\n" * 50, b"\r\n\r\n\r\n", chance.randbytes(30)]
    )  # fmt: skip
    coding = chance.choice([*[b"chunked"] * 3, b"gzip, chunked", b"chunked, chunked", b"nonsense"])
    more = [b"Content-Length: 2"] if chance.random() < 0.2 else []
    return Attempt("chunked", _cut(chance, _head(chance, b"Transfer-Encoding: " + coding, *more) + sent, 2))


def _pipelined(chance: random.Random) -> Attempt:
    sent = [_request(chance) for _ in range(chance.randint(2, 6))]
    if chance.random() < 0.5:
        sent.insert(chance.randrange(1, len(sent) + 1), chance.randbytes(50))
    return Attempt("pipelined", _cut(chance, b"".join(sent), chance.randint(1, 3)), whole=True)


def _half_closed(chance: random.Random) -> Attempt:
    data = _request(chance)
    return Attempt("half-closed", (data[: chance.randrange(1, len(data) + 1)],), half_close=True)


def _slow(chance: random.Random) -> Attempt:
    """Byte by byte; and some never get to the end."""
    data = _request(chance)
    whole = chance.random() < 0.7
    data = data if whole else data[: len(data) // 2]
    return Attempt("slow", _cut(chance, data, chance.randint(3, 12)), whole=whole, pause_s=0.003)


def _binary(chance: random.Random) -> Attempt:
    known = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        bytes(200),
        b"SSH-2.0-x\r\n", b"\r\n\r\n\r\n\r\n", b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n", b"*1\r\n$4\r\nPING\r\n",
    ]  # fmt: skip
    noise = chance.randbytes(chance.randint(1, 3000))
    return Attempt("binary", (chance.choice([*known, noise, noise]),))


def _flipped(chance: random.Random) -> Attempt:
    """A request in which some bytes are others."""
    data = bytearray(_request(chance))
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return Attempt("flipped", (bytes(data),))


_KINDS: tuple[Callable[[random.Random], Attempt], ...] = (
    _whole, _request_line, _headers, _length, _chunked, _pipelined, _half_closed, _slow, _binary, _flipped,
)  # fmt: skip


# --------------------------------------------------------------------------------------------- the server


@contextmanager
def serving(data_dir: Path) -> Iterator[tuple[str, int]]:
    """URL and pid of a manager without Ray, see `kvcm_ray.testing.served`, in a process of its own."""
    log_path = data_dir.with_name(f"{data_dir.name}.log")
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "kvcm_ray.testing.wire_fuzz", str(data_dir)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        assert line, f"the child ended; see {log_path}"
        yield json.loads(line)["url"], child.pid
    finally:
        child.stdin.close()
        child.wait(60)


def main(data_dir: str) -> None:
    from kvcm_ray.testing.served import served

    with served(Path(data_dir)) as running:
        sys.stdout.write(json.dumps({"url": running.url}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
