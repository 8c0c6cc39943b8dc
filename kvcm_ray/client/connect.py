"""Finding a manager: by URL, by data directory, through Ray, or by looking around.

    connect("http://host:6382")   by HTTP alone; needs no Ray in this process
    connect("./kvcm-data")        a data directory of this machine
    connect("host:6379")          a Ray cluster that a manager runs in
    connect()                     KVCM_ADDRESS, else KVCM_URL, else as "auto"
    connect("auto")               the Ray cluster of this process, else ./kvcm-data

All but the first read the prefix index in this process and call actors for the rest.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from kvcm_ray.client.aio import AsyncClient
from kvcm_ray.client.backend import Backend
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import AsyncRuntime, SyncRuntime
from kvcm_ray.client.sync import Client
from kvcm_ray.errors import InvalidArgument, Unavailable, Unsupported

DATA_DIR = "kvcm-data"  #: where `kvcm up` puts its data by default, below the working directory


def connect(address: str | os.PathLike[str] | None = None, *, raise_errors: bool = False) -> Client:
    """Connect to a manager, for programs that block.

    Args:
        address: URL, data directory, Ray address or "auto"; see this module's text.
        raise_errors: raise what `Instance.match`, `put` and `get` would report as a miss.

    Raises:
        Unavailable: no manager there. Unsupported: the address needs Ray, which is not installed.
    """
    backend = _backend(address, blocking=True)
    return Client(AsyncClient(backend, SyncRuntime(), raise_errors))


async def connect_async(
    address: str | os.PathLike[str] | None = None, *, raise_errors: bool = False
) -> AsyncClient:
    """Connect to a manager, for programs with an event loop. See `connect`."""
    return AsyncClient(_backend(address, blocking=False), AsyncRuntime(), raise_errors)


def _backend(address: str | os.PathLike[str] | None, *, blocking: bool) -> Backend:
    where = os.fspath(address or os.environ.get("KVCM_ADDRESS") or os.environ.get("KVCM_URL") or "")
    if not isinstance(where, str):
        raise InvalidArgument(f"not an address: {address!r}")
    if where.startswith(("http://", "https://")):
        return HttpBackend(where, blocking=blocking)
    if where in ("", "auto"):
        return _look_around(blocking)
    if Path(where).is_dir():
        return _of_data_dir(Path(where), blocking)
    if "/" in where and "://" not in where:
        raise Unavailable(f"there is no data directory {where!r}")
    return _of_ray(where, blocking)


def _look_around(blocking: bool) -> Backend:
    if _ray_is_up():
        return _of_ray(None, blocking)
    if (Path(DATA_DIR) / "manager.json").exists():
        return _of_data_dir(Path(DATA_DIR), blocking)
    raise Unavailable(
        "no address given: KVCM_ADDRESS and KVCM_URL are not set, this process is in no Ray "
        f"cluster, and ./{DATA_DIR} holds no running manager"
    )


def _of_data_dir(data_dir: Path, blocking: bool) -> Backend:
    join = _module("join")
    facts, joined = join.manager_facts(data_dir), join.joined_manager(data_dir)
    if joined and joined != facts.get("manager_id"):  # it was started again since
        return _direct(data_dir, blocking)
    join.join_data_dir(data_dir)
    found = _manager_dir()
    if found != data_dir.resolve():
        raise Unavailable(f"this process is in the Ray cluster of {found}, not of {data_dir}")
    return _direct(data_dir, blocking)


def _of_ray(address: str | None, blocking: bool) -> Backend:
    if not _ray_is_up():
        _module("join").join(address or "auto")
    data_dir = _manager_dir()
    if not data_dir.is_dir():
        raise Unavailable(f"the manager's data directory {data_dir} is not on this node; use its URL")
    return _direct(data_dir, blocking)


def _manager_dir() -> Path:
    """Data directory of the manager in this process's Ray cluster."""
    handles = _module("handles")
    return Path(handles.RegistryHandle().call_sync("describe")["data_dir"])


def _direct(data_dir: Path, blocking: bool) -> Backend:
    from kvcm_ray.actors.view import RegistryView
    from kvcm_ray.client.direct import DirectBackend

    return DirectBackend(RegistryView(data_dir), blocking=blocking)


def _module(name: str) -> Any:
    """A module of the actors; those need Ray, which a client by URL does without."""
    try:
        return import_module(f"kvcm_ray.actors.{name}")
    except ImportError as error:
        raise Unsupported(
            "this address needs Ray: pip install 'kvcm-ray[ray]', or use the manager's URL"
        ) from error


def _ray_is_up() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())
