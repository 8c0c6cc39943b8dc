"""Real managers: one behind HTTP in this process (no Ray), and a running one with actors.

Clients of the first one: by its URL, and by its data directory, which read the index themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcm_ray.client import Client, connect
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.testing.served import Served, served


@pytest.fixture(scope="session")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("manager")) / "data") as found:
        yield found


@pytest.fixture(
    scope="module",
    params=["url", "node", pytest.param("actors", marks=pytest.mark.ray)],
)
def address(request: pytest.FixtureRequest) -> str:
    """A manager's URL or data directory, or the data directory of one whose actors can be called."""
    if request.param != "actors":
        manager = request.getfixturevalue("manager")
        return str(manager.url if request.param == "url" else manager.data_dir)
    from kvcm_ray.testing.cluster import shared_manager

    return shared_manager().data_dir


@pytest.fixture(scope="module")
def by_actors(address: str, request: pytest.FixtureRequest) -> bool:
    manager: Served = request.getfixturevalue("manager")
    return address not in (manager.url, str(manager.data_dir))


@pytest.fixture(scope="module")
def usage_of(by_actors: bool, request: pytest.FixtureRequest) -> Callable[[str], dict[str, int]]:
    """What a group says that it holds and was asked, without going through the client."""
    if by_actors:
        from kvcm_ray.actors.handles import GroupHandle

        return lambda group: GroupHandle(group).ask_sync("usage")
    manager: Served = request.getfixturevalue("manager")
    services = manager.backend.groups_control.services
    return lambda group: services[group].usage().result()


@pytest.fixture(scope="module")
def api(address: str) -> Iterator[HttpBackend]:
    """The HTTP interface of the manager at `address`."""
    url = address
    if not address.startswith("http"):
        url = json.loads((Path(address) / "manager.json").read_bytes())["url"]
    found = HttpBackend(url, blocking=True)
    yield found
    drive(found.close())


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with connect(address) as found:
        yield found
