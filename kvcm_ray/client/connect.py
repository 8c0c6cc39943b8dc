"""Finding a manager: by URL, by data directory, through Ray, or by looking around.

    connect("http://host:6382")   by HTTP alone; needs no Ray in this process
    connect("./kvcm-data")        a data directory of this machine; with Ray or without
    connect("host:6379")          a Ray cluster that a manager runs in
    connect()                     KVCM_ADDRESS, else KVCM_URL, else as "auto"
    connect("auto")               the Ray cluster of this process, else ./kvcm-data

All but the first read the prefix index in this process. Changes are actor calls in a process that is in the
manager's Ray cluster, and HTTP calls to the URL that ``manager.json`` names in any other.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvcm_ray.client.aio import AsyncClient
from kvcm_ray.client.backend import Backend
from kvcm_ray.client.credentials import Credentials
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import AsyncRuntime, SyncRuntime
from kvcm_ray.client.sync import Client
from kvcm_ray.errors import InvalidArgument, KvcmError, Unavailable, Unsupported

DATA_DIR = "kvcm-data"  #: where `kvcm up` puts its data by default, below the working directory


def connect(
    address: str | os.PathLike[str] | None = None,
    *,
    ray: bool | None = None,
    token: str | Path | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    raise_errors: bool = False,
) -> Client:
    """Connect to a manager, for programs that block.

    Args:
        address: URL, data directory, Ray address or "auto"; see this module's text.
        ray: of a data directory: False never uses Ray, True joins the manager's cluster; by default actors
            are called if this process is in that cluster already.
        token: for a manager that asks for accounts, or the `Path` of a file that holds it; by default
            KVCM_TOKEN, the file KVCM_TOKEN_FILE, or what the manager keeps in its data directory.
        ca_file: certificates that an https URL is checked with; by default KVCM_CA_FILE or the system's.
        raise_errors: raise what `Instance.match`, `put` and `get` would report as a miss.

    Raises:
        Unavailable: no manager there. Unsupported: the address needs Ray, which is not installed.
        InvalidArgument: no address, or credentials that cannot be used.
    """
    backend = open_backend(address, blocking=True, ray=ray, credentials=Credentials.of(token, ca_file))
    return Client(AsyncClient(backend, SyncRuntime(), raise_errors))


async def connect_async(
    address: str | os.PathLike[str] | None = None,
    *,
    ray: bool | None = None,
    token: str | Path | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    raise_errors: bool = False,
) -> AsyncClient:
    """Connect to a manager, for programs with an event loop. See `connect`."""
    backend = open_backend(address, blocking=False, ray=ray, credentials=Credentials.of(token, ca_file))
    return AsyncClient(backend, AsyncRuntime(), raise_errors)


def open_backend(
    address: str | os.PathLike[str] | None = None,
    *,
    blocking: bool,
    ray: bool | None = None,
    credentials: Credentials | None = None,
) -> Backend:
    """The metadata side alone, for connectors that bring their own transfers; see `connect`."""
    where = os.fspath(address or os.environ.get("KVCM_ADDRESS") or os.environ.get("KVCM_URL") or "")
    if not isinstance(where, str):
        raise InvalidArgument(f"not an address: {address!r}")
    how = _How(blocking, ray, credentials or Credentials.of())
    if where.startswith(("http://", "https://")):
        return HttpBackend(where, blocking=blocking, credentials=how.credentials)
    if where in ("", "auto"):
        return _look_around(how)
    if Path(where).is_dir():
        return _of_data_dir(Path(where), how)
    if "/" in where and "://" not in where:
        raise Unavailable(f"there is no data directory {where!r}")
    return _of_ray(where, how)


@dataclass(frozen=True, slots=True)
class _How:
    blocking: bool
    ray: bool | None
    credentials: Credentials


def _look_around(how: _How) -> Backend:
    if how.ray is not False and _ray_is_up():
        return _of_ray(None, how)
    if (Path(DATA_DIR) / "manager.json").exists():
        return _of_data_dir(Path(DATA_DIR), how)
    raise Unavailable(
        "no address given: KVCM_ADDRESS and KVCM_URL are not set, this process is in no Ray "
        f"cluster, and ./{DATA_DIR} holds no running manager"
    )


def _of_data_dir(data_dir: Path, how: _How) -> Backend:
    if how.ray:
        _module("join").join_data_dir(data_dir)
        found = _manager_dir()
        if found != data_dir.resolve():
            raise Unavailable(f"this process is in the Ray cluster of {found}, not of {data_dir}")
        return _indexed(data_dir, how, actors=True)
    return _indexed(data_dir, how, actors=how.ray is None and _is_in_ray_of(data_dir))


def _is_in_ray_of(data_dir: Path) -> bool:
    """Whether this process is in the Ray cluster of the manager that runs on a data directory."""
    if not _ray_is_up():
        return False
    try:
        if joined := _module("join").joined_manager(data_dir):  # that one may have been started again since
            return bool(joined == _module("join").manager_facts(data_dir).get("manager_id"))
        return _manager_dir() == data_dir.resolve()
    except KvcmError:
        return False  # no manager is in this cluster, or none runs there


def _of_ray(address: str | None, how: _How) -> Backend:
    if how.ray is False:
        raise InvalidArgument(f"{address!r} is the address of a Ray cluster, which ray=False rules out")
    if not _ray_is_up():
        _module("join").join(address or "auto")
    data_dir = _manager_dir()
    if not data_dir.is_dir():
        raise Unavailable(f"the manager's data directory {data_dir} is not on this node; use its URL")
    return _indexed(data_dir, how, actors=True)


def _manager_dir() -> Path:
    """Data directory of the manager in this process's Ray cluster."""
    handles = _module("handles")
    return Path(handles.RegistryHandle().call_sync("describe")["data_dir"])


def _indexed(data_dir: Path, how: _How, *, actors: bool) -> Backend:
    from kvcm_ray.actors.view import RegistryView
    from kvcm_ray.client.indexed import IndexBackend
    from kvcm_ray.client.manager import ManagerChannel

    view = RegistryView(data_dir)
    channel = None
    if actors:
        from kvcm_ray.client.actors import ActorChannel

        channel = ActorChannel(view, blocking=how.blocking)
    credentials = how.credentials.or_owners(view.data_dir)
    changes = ManagerChannel(view.data_dir, blocking=how.blocking, credentials=credentials, actors=channel)
    return IndexBackend(view, changes, blocking=how.blocking)


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
