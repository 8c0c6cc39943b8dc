"""gRPC and HTTP on one manager in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.testing.grpc import Grpc, grpc_beside
from kvcm_ray.testing.http import Http


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Http]:
    """A fresh manager with storage ``nfs_01``, group ``default`` and the debug API."""
    server = Http(tmp_path / "data", GatewayOptions(debug_api=True))
    server.start_default(tmp_path / "nfs")
    yield server
    server.close()


@pytest.fixture
def rpc(http: Http) -> Iterator[Grpc]:
    with grpc_beside(http) as grpc:
        yield grpc
