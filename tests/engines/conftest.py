"""Models and a manager for the tests of engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.cluster import Manager
from kvcm_ray.testing import smollm2 as weights
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.engines import llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """One manager for the tests that do not harm it."""
    folder = tmp_path_factory.mktemp("manager")
    with manager(folder / "data", ("shm:1GiB", "file:2GiB")) as found:
        yield found


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of real weights; fetches 93 MB once."""
    return weights.folder()
