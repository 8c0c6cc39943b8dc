"""A cache never breaks serving: the manager comes late, is killed, loses bytes, or is gone for good.

The engine goes on, and what it says is the same as without a cache.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray import cluster
from kvcm_ray.actors import paths
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.engines import Engine, engine, tokens, wait_until

PROMPTS = [tokens(50 + number, 700) for number in range(8)]
WHOLE = 700 // 32 * 32


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with engine(tiny_llama, tmp_path_factory.mktemp("reference") / "log") as found:
        return [answer["tokens"] for answer in found.generate(PROMPTS)]


def outputs(found: Engine) -> list[list[int]]:
    return [answer["tokens"] for answer in found.generate(PROMPTS)]


def cached(found: Engine) -> int:
    """Tokens that were loaded for every prompt; 0 if a load failed."""
    before = failed(found)
    least = min(int(answer["cached"]) for answer in found.generate(PROMPTS, 1))
    return least if failed(found) == before else 0


def failed(found: Engine) -> float:
    return found.metrics().get("vllm:kvcm_failed_loads", 0.0)


def overwrite(folder: Path) -> None:
    """Every byte of every block; their headers stay."""
    for path in folder.rglob("*.dat"):
        size = path.stat().st_size
        path.open("r+b").write(b"\xa5" * size)


def test_an_engine_outlives_its_manager(tiny_llama: Path, tmp_path: Path, expected: Any) -> None:
    data = tmp_path / "data"
    settings = {"kvcm_data_dir": str(data), "instance_id": "outlives", "connect_timeout_s": 0.5}
    with engine(tiny_llama, tmp_path / "log", settings) as found:
        assert outputs(found) == expected  # there is no such directory yet
        started = cluster.up_detached(data, 0, ("shm:256MiB", "file:256MiB"), replicas=1)
        try:
            wait_until(lambda: cached(found) == WHOLE, 60, "a full hit")
            assert outputs(found) == expected
            bytes_are_lost(found, paths.shm_dir(data), expected)
            killed_under_requests(found, started.pid, expected)
            assert outputs(found) == expected
            assert cached(found) == WHOLE  # the index and the bytes are still there
            assert found.one(tokens(99, 200))["cached"] == 0  # nobody takes its blocks
        finally:
            cluster.down(data, purge=True)
        shutil.rmtree(data, ignore_errors=True)
        begin = time.monotonic()
        assert outputs(found) == expected
        assert time.monotonic() - begin < 30
        assert outputs(found) == expected


def bytes_are_lost(found: Engine, shm: Path, expected: Any) -> None:
    before = found.metrics()["vllm:kvcm_failed_loads"]
    overwrite(shm)
    assert outputs(found) == expected
    assert found.metrics()["vllm:kvcm_failed_loads"] >= before + 1
    wait_until(lambda: cached(found) == WHOLE, 60, "saving the lost blocks again")
    for path in shm.rglob("*.dat"):
        os.truncate(path, 0)
    assert outputs(found) == expected
    wait_until(lambda: cached(found) == WHOLE, 60, "saving the lost blocks again")


def killed_under_requests(found: Engine, pid: int, expected: Any) -> None:
    killer = threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL))
    killer.start()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        assert outputs(found) == expected
    killer.join()


def test_what_comes_too_late_is_computed(tiny_llama: Path, tmp_path: Path, expected: Any) -> None:
    with manager(tmp_path / "data", ("file:512MiB",)) as running:
        settings = {"kvcm_data_dir": str(running.data_dir), "instance_id": "late"}
        with engine(tiny_llama, tmp_path / "log", settings) as found:
            assert outputs(found) == expected
            wait_until(lambda: cached(found) == WHOLE, 60, "a full hit")
            assert outputs(found) == expected
            assert found.metrics()["vllm:prompt_tokens_cached_by_source{source=disk}"] > 0
        settings["load_timeout_s"] = 0.0001
        with engine(tiny_llama, tmp_path / "log", settings) as found:
            assert outputs(found) == expected
            assert found.metrics()["vllm:kvcm_failed_loads"] >= 1
