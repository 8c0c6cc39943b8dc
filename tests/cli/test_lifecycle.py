"""``kvcm up`` and ``kvcm down`` as programs, and replays through the actors of what they started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import shared_manager

pytestmark = pytest.mark.ray

KVCM = [sys.executable, "-m", "kvcm_ray.cli"]
UP_KEYS = {"url", "grpc", "ray_address", "data_dir", "ready_s"}


def kvcm(*arguments: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVCM, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


def runs(pid: int) -> bool:
    """A process that ended but that nobody waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.fixture(scope="module")
def foreground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A manager in the foreground; its data directory and the line that ended its start."""
    data_dir = tmp_path_factory.mktemp("up") / "data"
    command = [*KVCM, "up", "--data-dir", str(data_dir), "--port", "0", "--tier", "file:64MiB"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield data_dir, child.stdout.readline()
        child.send_signal(signal.SIGINT)
        rest, _ = child.communicate(timeout=60)
        assert (child.returncode, rest) == (0, ""), "Ctrl-C is a clean end"
        assert kvcm("status", "--data-dir", str(data_dir)).returncode == 3
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        kvcm("down", "--data-dir", str(data_dir), "--purge")


def test_up_ends_its_start_with_one_line(foreground: tuple[Path, str]) -> None:
    data_dir, line = foreground
    url = json.loads((data_dir / "manager.json").read_text())["url"]
    for told in (url, str(data_dir), f"kvcm status --data-dir {data_dir}"):
        assert told in line


def test_a_second_up_is_refused(foreground: tuple[Path, str]) -> None:
    data_dir, _ = foreground
    for more in ((), ("--detach",)):
        second = kvcm("up", "--data-dir", str(data_dir), "--port", "0", *more, "--json")
        assert second.returncode == 1
        assert "KVCM-C004" in second.stderr
        assert json.loads(second.stdout)["error"]["error"] == "InUse"


@pytest.mark.parametrize("window", ["1", "8"])
def test_replay_through_actors(foreground: tuple[Path, str], window: str) -> None:
    data_dir, _ = foreground
    ran = kvcm(
        "replay", "synthetic", "--limit", "100", "--block-bytes", "512", "--window", window,
        "--instance", f"r{window}", "--data-dir", str(data_dir), "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["requests"] == 100
    assert found["hit_blocks"] > 0
    assert found["wrong_bytes"] == found["unreadable_blocks"] == found["refused_blocks"] == 0
    checked = kvcm("fsck", "--deep", "--data-dir", str(data_dir), "--json")
    assert checked.returncode == 0, checked.stdout


def test_up_in_the_background_and_down(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    up = kvcm("up", "--detach", "--data-dir", str(data_dir), "--port", "0",
              "--tier", "shm:16MiB", "--tier", "file:16MiB", "--json")  # fmt: skip
    try:
        assert up.returncode == 0, up.stderr
        facts = json.loads(up.stdout)
        assert facts.keys() >= UP_KEYS
        status = kvcm("status", "--url", facts["url"], "--json")
        (group,) = json.loads(status.stdout)["groups"]
        assert group["quota_bytes"] == 32 << 20
        assert runs(facts["pid"])
    finally:
        down = kvcm("down", "--data-dir", str(data_dir), "--purge", "--json")
    assert (down.returncode, json.loads(down.stdout)["stopped"]) == (0, True)
    assert not runs(facts["pid"])
    assert not data_dir.exists()
    again = kvcm("down", "--data-dir", str(data_dir), "--json")
    assert (again.returncode, json.loads(again.stdout)["stopped"]) == (0, False)


@pytest.mark.parametrize("arguments", [("--tier", "tape:1GiB"), ("--tier", "shm:much"), ("--port", "99999")])
def test_up_with_bad_options(tmp_path: Path, arguments: tuple[str, str]) -> None:
    ran = kvcm("up", "--data-dir", str(tmp_path / "data"), *arguments)
    assert ran.returncode in (1, 2)
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert arguments[1].removeprefix("shm:") in ran.stderr


def test_write_benchmark_on_a_running_manager() -> None:
    from kvcm_ray.benchmarks import write

    data_dir = Path(shared_manager().data_dir)
    row = write._measure(data_dir, clients=2, window=2, batch=16, seconds=0.3)
    assert row.keys() >= {"clients", "batch", "blocks_per_s"}
    assert row["blocks_per_s"] > 0
    blocks, size = write._index_size(data_dir)
    assert blocks > 0
    assert size / blocks > 24, "a location alone takes more"


@pytest.mark.heavy
def test_the_demo(tmp_path: Path) -> None:
    ran = subprocess.run([*KVCM, "demo", "--seconds", "3"], capture_output=True, text=True,
                         timeout=280, check=False, cwd=tmp_path)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "demo ok" in ran.stderr
