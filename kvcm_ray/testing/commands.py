"""The ``kvcm`` command in this process, for tests of what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from kvcm_ray.cli.main import main


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


def run_command(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> Ran:
    capsys.readouterr()
    code = main(arguments)
    return Ran(code, *capsys.readouterr())
