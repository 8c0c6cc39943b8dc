"""The real application on a real manager in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.testing.http import Http


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Http]:
    """A fresh manager with storage ``nfs_01`` and group ``default``."""
    server = Http(tmp_path / "data")
    server.start_default(tmp_path / "nfs")
    yield server
    server.close()
