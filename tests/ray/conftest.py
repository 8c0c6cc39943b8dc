from __future__ import annotations

import pytest

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster import Manager
from kvcm_ray.testing.cluster import shared_manager


@pytest.fixture(scope="session")
def running() -> Manager:
    """One manager for all tests here; this process has joined its Ray."""
    return shared_manager()


@pytest.fixture
def registry(running: Manager) -> RegistryHandle:
    return RegistryHandle()


@pytest.fixture
def view(running: Manager) -> RegistryView:
    return RegistryView(running.data_dir)


@pytest.fixture
def group(running: Manager) -> GroupHandle:
    return GroupHandle("default")
