"""What is special about the client by actor handles: touches, other processes, addresses."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.actors.handles import GroupHandle
from kvcm_ray.client import Client, connect
from kvcm_ray.client.actors import ActorChannel
from kvcm_ray.cluster import Manager
from kvcm_ray.errors import Unavailable
from kvcm_ray.testing.cluster import run_python, shared_manager
from kvcm_ray.testing.served import served
from kvcm_ray.traces import block_pattern

pytestmark = pytest.mark.ray

SIZE = 4096
_names = (f"a{os.getpid()}-{n}" for n in itertools.count())


@pytest.fixture(scope="module")
def running() -> Manager:
    return shared_manager()


@pytest.fixture(scope="module")
def client(running: Manager) -> Iterator[Client]:
    with connect(running.data_dir) as found:
        yield found


def some_keys(count: int) -> Any:
    return np.arange(1, count + 1, dtype=np.int64) * 0x9E3779B97F4A7C1


def test_reads_are_reported_in_the_background(client: Client) -> None:
    cache = client.register(next(_names), block_size=4, specs={"tp0": SIZE})
    group = GroupHandle("default")
    keys = some_keys(8)
    cache.put(keys, block_pattern(keys, SIZE))
    before = group.ask_sync("usage")
    cache.match([*keys.tolist(), 5, 6])
    deadline = time.monotonic() + 10
    while (after := group.ask_sync("usage"))["lookup_blocks"] == before["lookup_blocks"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert after["lookup_blocks"] - before["lookup_blocks"] == 10
    assert after["hit_blocks"] - before["hit_blocks"] == 8


def test_another_process_finds_what_this_one_wrote(running: Manager, client: Client) -> None:
    cache = client.register(next(_names), block_size=4, specs={"tp0": SIZE})
    keys = some_keys(20)
    assert cache.put(keys, block_pattern(keys, SIZE)) == 20
    code = """
        import sys
        import numpy as np
        from kvcm_ray.client import connect
        from kvcm_ray.traces import wrong_bytes

        keys = np.arange(1, 21, dtype=np.int64) * 0x9E3779B97F4A7C1
        for address in sys.argv[2:]:
            with connect(address) as client:
                out = np.zeros((20, 4096), np.uint8)
                print(int(client.instance(sys.argv[1]).get(keys, out)), wrong_bytes(keys, out))
    """
    told = run_python(code, cache.instance_id, running.url, running.data_dir, running.ray_address)
    assert told.splitlines() == ["20 0"] * 3


def test_a_client_by_url_needs_no_ray(running: Manager) -> None:
    code = """
        import sys
        from kvcm_ray.client import connect

        client = connect(sys.argv[1])
        cache = client.register(sys.argv[2], block_size=4, specs={"tp0": 64})
        print(int(cache.put([1, 2], bytes(range(128)))), int(cache.get([1, 2], bytearray(128))))
        print([name for name in ("ray", "lmdb", "fastapi") if name in sys.modules])
    """
    told = run_python(code, running.url, next(_names)).splitlines()
    assert told[0] == "2 2"
    assert "ray" not in told[1]
    assert "fastapi" not in told[1]


def test_auto_is_the_cluster_of_this_process(
    running: Manager, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVCM_URL", raising=False)
    monkeypatch.delenv("KVCM_ADDRESS", raising=False)
    for address in (None, "auto"):
        with connect(address) as found:
            assert found.address == running.data_dir


def test_a_process_is_in_one_cluster_only(running: Manager, client: Client, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "manager.json").write_text('{"ray_address": "127.0.0.1:1"}')
    with pytest.raises(Unavailable, match="not of"):
        connect(other, ray=True)


def test_actors_are_called_where_the_process_is_in_the_manager_s_ray(
    running: Manager, tmp_path: Path
) -> None:
    def channel(**how: Any) -> Any:
        with connect(running.data_dir, **how) as client:
            return client._client.backend._changes._channel()  # type: ignore[attr-defined]

    assert isinstance(channel(), ActorChannel)
    assert isinstance(channel(ray=True), ActorChannel)
    assert channel(ray=False).address == running.url
    with served(tmp_path / "data") as other, connect(other.data_dir) as client:  # this Ray is not its own
        cache = client.register("i", block_size=4, specs={"tp0": SIZE})
        assert cache.put([1], bytes(SIZE)) == 1
        assert client._client.backend._changes._channel().address == other.url  # type: ignore[attr-defined]


def test_a_process_without_ray_uses_a_running_manager(running: Manager) -> None:
    code = """
        import sys
        from kvcm_ray.client import connect

        with connect(sys.argv[1]) as client:
            cache = client.register(sys.argv[2], block_size=4, specs={"tp0": 64})
            print(int(cache.put([1, 2], bytes(range(128)))), int(cache.get([1, 2], bytearray(128))))
            client.flush_touches()
        print([name for name in ("ray", "fastapi") if name in sys.modules])
    """
    before = GroupHandle("default").ask_sync("usage")["lookup_blocks"]
    assert run_python(code, running.data_dir, next(_names)).splitlines() == ["2 2", "[]"]
    assert GroupHandle("default").ask_sync("usage")["lookup_blocks"] == before + 2
