"""Real managers: one behind HTTP in this process (no Ray), and a running one with actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.client import Client, connect
from kvcm_ray.testing.served import Served, served


@pytest.fixture(scope="session")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("manager")) / "data") as found:
        yield found


@pytest.fixture(
    scope="module",
    params=["url", pytest.param("actors", marks=pytest.mark.ray)],
)
def address(request: pytest.FixtureRequest) -> str:
    """A manager's URL, or the data directory of one whose actors can be called."""
    if request.param == "url":
        return str(request.getfixturevalue("manager").url)
    from kvcm_ray.testing.cluster import shared_manager

    return shared_manager().data_dir


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with connect(address) as found:
        yield found
