"""A client on the manager's node without Ray: look-ups cost no call, changes find the manager that runs."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.client import Client, Instance, connect, connect_async
from kvcm_ray.client.http import HttpBackend, touch_calls
from kvcm_ray.client.runtime import drive
from kvcm_ray.core.limits import KEYS_PER_CALL_MAX, LOOK_UPS_PER_TOUCH_MAX
from kvcm_ray.core.requests import Touch
from kvcm_ray.errors import InvalidArgument, Unavailable
from kvcm_ray.testing.cluster import run_python
from kvcm_ray.testing.served import Served, served
from kvcm_ray.traces import block_pattern

SIZE = 4096
_names = (f"n{n}" for n in itertools.count())


def some_keys(count: int, start: int = 1) -> Any:
    return np.arange(start, start + count, dtype=np.int64) * 0x9E3779B97F4A7C1


@pytest.fixture
def client(manager: Served) -> Iterator[Client]:
    with connect(manager.data_dir, ray=False) as found:
        yield found


@pytest.fixture
def cache(client: Client) -> Instance:
    return client.register(next(_names), block_size=4, specs={"tp0": SIZE})


def calls_of(manager: Served, rpc: str) -> int:
    """How many such calls the manager's HTTP interface has answered."""
    api = HttpBackend(manager.url, blocking=True)
    metrics = drive(api.post("getMetrics", {}, 10))["metrics"]
    drive(api.close())
    return sum(
        int(metric["metric_value"]["int_value"])
        for metric in metrics
        if metric["metric_name"] == "service.query_counter"
        and {"tag_key": "api_name", "tag_value": rpc} in metric["metric_tags"]
    )


def test_a_process_of_its_own_loads_no_ray(manager: Served) -> None:
    code = """
        import sys
        import numpy as np
        from kvcm_ray.client import connect

        keys, data = np.arange(8) * 77, np.random.default_rng(1).integers(0, 255, (8, 4096), np.uint8)
        with connect(sys.argv[1]) as client:
            cache = client.register(sys.argv[2], block_size=4, specs={"tp0": 4096})
            back = np.zeros_like(data)
            print(int(cache.put(keys, data)), cache.match(keys).length, int(cache.get(keys, back)))
            client.flush_touches()
            print(bool((back == data).all()))
        print([name for name in ("ray", "fastapi") if name in sys.modules])
    """
    told = run_python(code, str(manager.data_dir), next(_names))
    assert told.splitlines() == ["8 8 8", "True", "[]"]


def test_look_ups_go_on_while_no_manager_is_there(tmp_path: Path) -> None:
    keys, data = some_keys(20), block_pattern(some_keys(20), SIZE)
    with served(tmp_path / "data", keep=True) as manager:
        client = connect(manager.data_dir, ray=False)
        cache = client.register("i", block_size=4, specs={"tp0": SIZE})
        assert cache.put(keys, data) == 20
        assert cache.match(keys).length == 20
    begin_s = time.monotonic()
    out = np.zeros_like(data)
    assert cache.get(keys, out) == 20
    assert (out == data).all()
    assert cache.match_length([*keys.tolist(), 1]) == 20
    stored = cache.put(some_keys(3, 100), np.zeros((3, SIZE), np.uint8))
    assert (stored, isinstance(stored.error, Unavailable)) == (0, True)
    assert "manager.json is missing" in str(stored.error)
    assert time.monotonic() - begin_s < 2
    again = client.register("i", block_size=4, specs={"tp0": SIZE})
    assert again.match_length(keys) == 20, "what is registered needs no manager"
    with pytest.raises(Unavailable):
        client.register("new", block_size=4, specs={"tp0": SIZE})
    with served(tmp_path / "data") as manager:
        assert cache.put(some_keys(3, 100), np.ones((3, SIZE), np.uint8)) == 3
        assert cache.match_length(some_keys(3, 100)) == 3
    client.close()


def test_a_manager_at_another_port_is_found_by_the_call_that_missed_the_old_one(
    manager: Served, cache: Instance
) -> None:
    file = manager.data_dir / "manager.json"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = f"http://127.0.0.1:{taken.getsockname()[1]}"
    channel: Any = cache._instance._backend._changes  # type: ignore[attr-defined]
    try:
        file.write_text(json.dumps({"url": gone}))
        channel._look_at = 0.0
        assert isinstance(cache.put([1], bytes(SIZE)).error, Unavailable)
        channel._look_at = time.monotonic() + 60  # only a failure makes it look again
        file.write_text(json.dumps({"url": manager.url}))
        stored = cache.put([1], bytes(SIZE))
        assert (stored, stored.error) == (1, None)
    finally:
        file.write_text(json.dumps({"url": manager.url}))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manager_file_is_named(manager: Served, cache: Instance, text: str) -> None:
    file = manager.data_dir / "manager.json"
    channel: Any = cache._instance._backend._changes  # type: ignore[attr-defined]
    try:
        file.write_text(text)
        channel._look_at = 0.0
        error = cache.put([1], bytes(SIZE)).error
        assert isinstance(error, Unavailable)
        assert "manager.json" in str(error)
    finally:
        file.write_text(json.dumps({"url": manager.url}))


def test_a_manager_that_hangs_costs_no_more_than_the_deadline(manager: Served, cache: Instance) -> None:
    keys = some_keys(4)
    cache.put(keys, block_pattern(keys, SIZE))
    file = manager.data_dir / "manager.json"
    channel: Any = cache._instance._backend._changes  # type: ignore[attr-defined]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        try:
            file.write_text(json.dumps({"url": f"http://127.0.0.1:{silent.getsockname()[1]}"}))
            channel._look_at = 0.0
            begin_s = time.monotonic()
            assert isinstance(cache.put([1], bytes(SIZE), timeout_s=0.4).error, Unavailable)
            assert isinstance(cache.match(keys, lease_s=1, timeout_s=0.4).error, Unavailable)
            assert time.monotonic() - begin_s < 1.5
            assert cache.match_length(keys) == 4
        finally:
            file.write_text(json.dumps({"url": manager.url}))


def test_nothing_was_ever_started_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no manager was ever started"):
        connect(tmp_path, ray=False)
    with pytest.raises(InvalidArgument, match="Ray cluster"):
        connect("127.0.0.1:6379", ray=False)


# --------------------------------------------------------------------------------------- touches


def touched(manager: Served, instance_id: str) -> list[Touch]:
    return [touch for touch in manager.backend.touched if touch.instance_id == instance_id]


def test_look_ups_are_reported_as_they_were(manager: Served, client: Client, cache: Instance) -> None:
    keys = some_keys(8)
    cache.put(keys, block_pattern(keys, SIZE))
    before_s = time.time()
    cache.match([*keys.tolist(), 5, 6])
    cache.lookup([5, *keys[:2].tolist()])
    cache.match_length(keys[:3])
    client.flush_touches()
    first, second, third = touched(manager, cache.instance_id)
    assert first.keys.tolist() == keys.tolist()
    assert first.missed is not None
    assert (first.missed.tolist(), first.lookups, first.chained) == ([5, 6], 10, True)
    assert before_s - 1e-3 <= first.time_s <= third.time_s <= time.time()
    assert (second.keys.tolist(), second.lookups, second.chained) == (keys[:2].tolist(), 3, False)
    assert second.missed is None
    assert third.missed is not None
    assert (third.keys.tolist(), third.missed.tolist()) == (keys[:3].tolist(), [])


def test_many_look_ups_take_few_calls_and_no_other_look_up(
    manager: Served, client: Client, cache: Instance
) -> None:
    asked, told = calls_of(manager, "GetCacheLocation"), calls_of(manager, "TouchCache")
    for start in range(300):
        cache.match(some_keys(10, start + 1))
    client.flush_touches()
    assert len(touched(manager, cache.instance_id)) == 300
    assert calls_of(manager, "GetCacheLocation") == asked
    assert 1 <= calls_of(manager, "TouchCache") - told <= 2 + 300 // LOOK_UPS_PER_TOUCH_MAX


def test_an_event_loop_reports_too(manager: Served) -> None:
    name = next(_names)

    async def scene() -> None:
        async with await connect_async(manager.data_dir, ray=False) as client:
            cache = await client.register(name, block_size=4, specs={"tp0": SIZE})
            assert await cache.put([1, 2], bytes(2 * SIZE)) == 2
            assert (await cache.match([1, 2, 3])).length == 2
            await client.flush_touches()

    asyncio.run(scene())
    assert [touch.lookups for touch in touched(manager, name)] == [3]


def test_reports_that_cannot_be_sent_are_told_of_by_flush(tmp_path: Path) -> None:
    with served(tmp_path / "data") as manager:
        client = connect(manager.data_dir, ray=False)
        cache = client.register("i", block_size=4, specs={"tp0": SIZE})
    cache.match([1])
    with pytest.raises(Unavailable):
        client.flush_touches()
    client.close()


def a_touch(instance_id: str, keys: int) -> Touch:
    return Touch(instance_id, some_keys(keys), keys, missed=some_keys(0))


@pytest.mark.parametrize(
    ("touches", "parts"),
    [
        ([], []),
        ([a_touch("a", 1)] * (LOOK_UPS_PER_TOUCH_MAX + 1), [("a", LOOK_UPS_PER_TOUCH_MAX), ("a", 1)]),
        ([a_touch("a", KEYS_PER_CALL_MAX)] * 2, [("a", 1), ("a", 1)]),
        ([a_touch("a", 1), a_touch("b", 1), a_touch("a", 2)], [("a", 2), ("b", 1)]),
    ],
)
def test_calls_stay_within_the_limits(touches: list[Touch], parts: list[tuple[str, int]]) -> None:
    assert [(instance_id, len(look_ups)) for instance_id, look_ups in touch_calls(touches)] == parts
