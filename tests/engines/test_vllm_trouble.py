"""A cache never breaks serving: the manager comes late, is killed, loses bytes, or is gone for good.

The engine goes on, and what it says is the same as without a cache.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcm_ray import cluster
from kvcm_ray.actors import paths
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.engines import Engine, engine, tokens, wait_until

PROMPTS = [tokens(50 + number, 700) for number in range(8)]
FRESH = [tokens(70 + number, 500) for number in range(4)]
WHOLE = 700 // 32 * 32
MOST_S = 120.0  #: for what hangs for longer; computing it all takes a few seconds on a quiet machine


@dataclass
class Expected:
    """What an engine without connector says."""

    known: list[list[int]]  #: of `PROMPTS`
    fresh: list[list[int]]  #: of `FRESH`


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    with engine(tiny_llama, tmp_path_factory.mktemp("reference") / "log") as found:
        return Expected(outputs(found), outputs(found, FRESH))


def outputs(found: Engine, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [answer["tokens"] for answer in found.generate(prompts)]


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


def test_an_engine_outlives_its_manager(tiny_llama: Path, tmp_path: Path, expected: Expected) -> None:
    data = tmp_path / "data"
    settings = {"kvcm_data_dir": str(data), "instance_id": "outlives", "connect_timeout_s": 0.5}
    with engine(tiny_llama, tmp_path / "log", settings) as found:
        assert outputs(found) == expected.known  # there is no such directory yet
        started = cluster.up_detached(data, 0, ("shm:256MiB", "file:256MiB"), replicas=1)
        try:
            wait_until(lambda: cached(found) == WHOLE, 60, "a full hit")
            assert outputs(found) == expected.known
            bytes_are_lost(found, paths.shm_dir(data), expected)
            killed_under_requests(found, started.pid, expected)
            assert outputs(found) == expected.known
            assert cached(found) == WHOLE  # the index and the bytes are still there
            assert found.one(tokens(99, 200))["cached"] == 0  # nobody takes its blocks
        finally:
            cluster.down(data, purge=True)
        shutil.rmtree(data, ignore_errors=True)
        begin = time.monotonic()
        assert outputs(found) == expected.known
        assert time.monotonic() - begin < 30
        assert outputs(found) == expected.known


def bytes_are_lost(found: Engine, shm: Path, expected: Expected) -> None:
    before = found.metrics()["vllm:kvcm_failed_loads"]
    overwrite(shm)
    assert outputs(found) == expected.known
    assert found.metrics()["vllm:kvcm_failed_loads"] >= before + 1
    wait_until(lambda: cached(found) == WHOLE, 60, "saving the lost blocks again")
    for path in shm.rglob("*.dat"):
        os.truncate(path, 0)
    assert outputs(found) == expected.known
    wait_until(lambda: cached(found) == WHOLE, 60, "saving the lost blocks again")


def killed_under_requests(found: Engine, pid: int, expected: Expected) -> None:
    killer = threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL))
    killer.start()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        assert outputs(found) == expected.known
    killer.join()


HANGS = "kvcm_ray.testing.vllm_hung"


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """While this file exists, the engine's file storages hang."""
    path = tmp_path / "hang"
    monkeypatch.setenv("KVCM_TEST_HANGS", str(path))
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.timeout(900)
def test_what_hangs_or_is_gone_costs_its_deadline_and_no_more(
    tiny_llama: Path, tmp_path: Path, switch: Path, expected: Expected
) -> None:
    """Under running requests: a storage that hangs, a stopped group, a storage and an index that are gone."""
    with manager(tmp_path / "data", ("file:512MiB",)) as running:
        settings = {
            "kvcm_data_dir": str(running.data_dir), "instance_id": "hangs", "load_timeout_s": 1.0,
            "save_timeout_s": 2.0,
        }  # fmt: skip
        with engine(tiny_llama, tmp_path / "log", settings, module=HANGS) as found:
            assert outputs(found) == expected.known
            wait_until(lambda: cached(found) == WHOLE, 60, "a full hit")
            assert outputs(found) == expected.known
            assert found.metrics()["vllm:prompt_tokens_cached_by_source{source=disk}"] > 0
            storage_hangs(found, switch, expected)
            group_is_stopped(found, running.pid, expected)
            folder_goes(found, Path(running.data_dir) / "tiers", expected)
            folder_goes(found, Path(running.data_dir) / "groups", expected)


def storage_hangs(found: Engine, switch: Path, expected: Expected) -> None:
    before = failed(found)
    switch.touch()
    begin = time.monotonic()
    for _ in range(2):  # the second time it is known, and left alone
        assert outputs(found) == expected.known
        assert outputs(found, FRESH) == expected.fresh  # and nobody takes their blocks
    assert time.monotonic() - begin < MOST_S
    assert failed(found) > before
    switch.unlink()
    wait_until(lambda: cached(found) == WHOLE, 60, "a full hit after the storage came back")
    assert outputs(found) == expected.known


def group_is_stopped(found: Engine, manager_pid: int, expected: Expected) -> None:
    """What is there is found as ever; nothing new is saved."""
    pid = actor_of(manager_pid, "GroupActor")
    prompt = tokens(91, 300)
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        assert outputs(found) == expected.known
        assert cached(found) == WHOLE
        first = found.one(prompt)
        assert found.one(prompt)["tokens"] == first["tokens"]
        assert time.monotonic() - begin < MOST_S
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: found.one(prompt)["cached"] > 0, 60, "saving after the group goes on")


def folder_goes(found: Engine, folder: Path, expected: Expected) -> None:
    assert any(folder.iterdir())
    remover = threading.Timer(0.3, shutil.rmtree, (folder,), {"ignore_errors": True})
    remover.start()
    begin = time.monotonic()
    for _ in range(4):
        assert outputs(found) == expected.known
    remover.join()
    assert outputs(found) == expected.known
    assert outputs(found, FRESH) == expected.fresh
    assert time.monotonic() - begin < MOST_S


def actor_of(manager_pid: int, name: str) -> int:
    """The process of an actor of a manager, by the name of its class."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"ray::{name}" in text_of(path) and manager_pid in ancestors(int(path.parent.name))
    ]
    assert len(found) == 1, f"{len(found)} processes of {name}"
    return found[0]


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        fields = text_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
        pid = int(fields[1]) if fields else 0


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # it ended meanwhile
