"""One storage of each kind, empty."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.storage_adapters import StorageAdapter
from kvcm_ray.storage_adapters.file import FileStorage
from kvcm_ray.storage_adapters.shm import SharedMemoryStorage
from kvcm_ray.testing.memory_storage import MemoryStorage
from kvcm_ray.testing.storage_lab import Lab


@pytest.fixture
def shm_root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="kvcm-test-", dir="/dev/shm"))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(params=["shm", "file", "memory"])
def lab(request: pytest.FixtureRequest, tmp_path: Path, shm_root: Path) -> Iterator[Lab]:
    """Every kind of storage: what this fixture tests is what all of them promise."""
    yield from _lab(request.param, tmp_path, shm_root)


@pytest.fixture(params=["shm", "file"])
def path_lab(request: pytest.FixtureRequest, tmp_path: Path, shm_root: Path) -> Iterator[Lab]:
    """The storages that have files."""
    yield from _lab(request.param, tmp_path, shm_root)


def _lab(kind: str, tmp_path: Path, shm_root: Path) -> Iterator[Lab]:
    storage: StorageAdapter
    if kind == "shm":
        storage = SharedMemoryStorage("s", str(shm_root))
    elif kind == "file":
        storage = FileStorage("s", str(tmp_path / "tier"))
    else:
        storage = MemoryStorage("s")
    yield Lab(storage)
    storage.close()
