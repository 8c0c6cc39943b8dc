"""The command line on a real manager behind HTTP in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.cli import counters
from kvcm_ray.cli.main import main
from kvcm_ray.testing.served import Served, served


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("manager")) / "data") as found:
        yield found


@dataclass(slots=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON object."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


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
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run
