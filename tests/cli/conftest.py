"""The command line on a real manager behind HTTP in this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcm_ray.cli import counters
from kvcm_ray.testing.commands import Ran, run_command
from kvcm_ray.testing.served import Served, served


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("manager")) / "data") as found:
        yield found


@pytest.fixture
def kvcm(
    manager: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run a command in this process against the manager."""
    monkeypatch.setenv("KVCM_DATA_DIR", str(manager.data_dir))
    monkeypatch.delenv("KVCM_URL", raising=False)
    monkeypatch.setattr(counters, "PAUSE_S", 0.1)
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*arguments: str) -> Ran:
        return run_command(capsys, arguments)

    return run
