"""What is special about the client by URL: addresses, managers that are away, URIs."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.client import connect
from kvcm_ray.errors import Unavailable
from kvcm_ray.testing.served import Served
from kvcm_ray.traces import block_pattern

SIZE = 512
_names = (f"u{n}" for n in itertools.count())


def some_keys(count: int, start: int = 1) -> Any:
    return np.arange(start, start + count, dtype=np.int64) * 0x9E3779B97F4A7C1


def test_uris_say_where_the_bytes_are(manager: Served) -> None:
    with connect(manager.url) as client:
        cache = client.register(next(_names), block_size=4, specs={"tp0": SIZE})
        keys = some_keys(3)
        cache.put(keys, block_pattern(keys, SIZE))
        uris = cache.match(keys).uris("tp0")
        assert len(uris) == 3
        assert all(u.startswith("file://memory/dev/shm/") and f"size={SIZE}" in u for u in uris)
        assert cache.match(keys).uris("nope") == ["", "", ""]


def test_a_manager_that_is_away_is_a_miss(manager: Served) -> None:
    with connect(manager.url) as gone:
        cache = gone.register(next(_names), block_size=4, specs={"tp0": SIZE})
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
            gone._client.backend._client.base_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            keys, out = some_keys(2), np.zeros((2, SIZE), np.uint8)
            begin_s = time.monotonic()
            got = cache.get(keys, out, deadline_s=0.3)
            assert (got, isinstance(got.error, Unavailable)) == (0, True)
            found = cache.match(keys, timeout_s=0.3)
            assert (found.length, isinstance(found.error, Unavailable)) == (0, True)
            assert cache.match_length(keys, timeout_s=0.3) == 0
            stored = cache.put(keys, out, timeout_s=0.3)
            assert (stored, isinstance(stored.error, Unavailable)) == (0, True)
            assert time.monotonic() - begin_s < 3.0
            with pytest.raises(Unavailable):
                cache.lookup(keys, timeout_s=0.3)


def test_raise_errors(manager: Served) -> None:
    with connect(manager.url, raise_errors=True) as strict:
        cache = strict.register(next(_names), block_size=4, specs={"tp0": SIZE})
        strict._client.backend._client.base_url = "http://127.0.0.1:9"
        with pytest.raises(Unavailable):
            cache.match([1])
        with pytest.raises(Unavailable):
            cache.get([1], bytearray(SIZE))
        with pytest.raises(Unavailable):
            cache.put([1], bytearray(SIZE))


def test_something_else_that_speaks_http_is_named(manager: Served) -> None:
    with connect(f"{manager.url}/docs") as wrong, pytest.raises(Unavailable, match="KVCM"):
        wrong.instance("x")


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        ("http://127.0.0.1:9", "no answer"),
        ("/no/such/directory", "no data directory"),
    ],
)
def test_no_manager_there(address: str, cause: str) -> None:
    with pytest.raises(Unavailable, match=cause), connect(address) as client:
        client.instance("x")


def test_no_address(tmp_path: Path) -> None:
    """In a process of its own: other tests may have joined a cluster, which would be found."""
    code = """
        import pytest
        from kvcm_ray.client import connect
        from kvcm_ray.errors import Unavailable

        with pytest.raises(Unavailable, match="KVCM_ADDRESS and KVCM_URL are not set"):
            connect()
        with pytest.raises(Unavailable, match="no manager was ever started on"):
            connect("empty")
    """
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVCM_")}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, check=True)


def test_the_url_may_come_from_the_environment(manager: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCM_ADDRESS", raising=False)
    monkeypatch.setenv("KVCM_URL", manager.url)
    with connect() as client:
        assert client.address == manager.url
