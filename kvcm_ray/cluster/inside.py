"""A manager inside a Ray cluster that runs already, next to the deployments that use it.

    up_inside(data_dir)    from a driver of that cluster, or anywhere with `ray_address`
    down_inside(manager)   removes what `up_inside` made, nothing else

All of it is detached actors and one Serve application, on the node of the data directory: they outlive
the driver and end with the cluster. The actor `Host` owns the data directory in place of the process of
`kvcm up`: it holds the lock, starts the rest and writes ``manager.json``, again after it died. A Ray
cluster has one manager at most. Ray and Serve keep the settings that they were started with. Ray is
imported only where it is used: `up` must set Ray's environment first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcm_ray.actors.join import join, mode_of_others
from kvcm_ray.actors.names import HOST, NAMESPACE, REGISTRY
from kvcm_ray.actors.paths import manager_file, resolve
from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT
from kvcm_ray.cluster import defaults, door, rolling
from kvcm_ray.cluster.facts import DataDirLock, Manager, Owner, find, version, write_manager
from kvcm_ray.errors import InUse, InvalidArgument, KvcmError, Unavailable
from kvcm_ray.index.lock import process_start

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
ROUTE_PREFIX = "/kvcm"


@dataclass(frozen=True, slots=True)
class InsideOptions:
    data_dir: str
    tiers: tuple[str, ...]
    route_prefix: str
    replicas: int
    reclaimers: int
    debug_api: bool = False
    accounts: bool | None = None  #: as in `kvcm_ray.cluster.Options`
    declared: bool = False  #: the Serve application is somebody else's: a Serve config file's


def up_inside(
    data_dir: str | os.PathLike[str],
    tiers: Sequence[str] = (),
    *,
    ray_address: str = "auto",
    route_prefix: str = ROUTE_PREFIX,
    replicas: int = 2,
    reclaimers: int = RECLAIMERS_DEFAULT,
    debug_api: bool = False,
    accounts: bool | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Manager:
    """Start a manager in a running Ray cluster, with the data directory on this node; wait until it is
    ready. If that very manager runs there already, it is left as it is.

    Args:
        ray_address: of the cluster, unless this process is connected to one.
        route_prefix: of the HTTP API among the applications of this cluster's Serve.
        others: as for `up`.

    Raises:
        InUse: another manager runs in that cluster, or on that data directory.
        InvalidArgument: a tier or the prefix is written wrongly, or Serve listens on an outer address and
            no accounts are required.
        Unavailable: no such cluster, or the manager did not get ready in time.
    """
    folder = resolve(data_dir)
    options = InsideOptions(
        str(folder), tuple(tiers), route_prefix, replicas, reclaimers, debug_api, accounts=accounts
    )
    _check(options)
    join(ray_address, auth_mode=mode_of_others())
    began = time.monotonic()
    manager = start_host(options)
    note(f"ready after {time.monotonic() - began:.1f} s")
    return manager


def start_host(options: InsideOptions, node_id: str | None = None) -> Manager:
    """The manager of this process's Ray cluster, which is started unless it runs.

    Args:
        node_id: of the data directory; this node's if None.

    Raises:
        as `up_inside`.
    """
    _check(options)
    if (host := _host()) is None:
        from kvcm_ray.actors import detached

        if _actor(REGISTRY) is not None:
            raise InUse(
                "this Ray cluster has a manager already, that of `kvcm up`; use it, or another cluster"
            )
        host = detached.get_or_create(Host, HOST, options, node_id=node_id)
    manager = _facts(host)
    if manager.data_dir != str(resolve(options.data_dir)):
        raise InUse(f"this Ray cluster has a manager already, on {manager.data_dir}: {manager.url}")
    return manager


def _check(options: InsideOptions) -> None:
    """Raises `InvalidArgument` for a tier or a prefix that is written wrongly."""
    prefix = options.route_prefix
    if not prefix.startswith("/") or (prefix != "/" and prefix.endswith("/")):
        raise InvalidArgument(f"a route prefix begins with / and does not end with it, got {prefix!r}")
    defaults.parse_tiers(options.tiers, resolve(options.data_dir))


def down_inside(manager: Manager) -> None:
    """Remove the manager from its Ray cluster. Its blocks stay; see `down`.

    Raises:
        Unavailable: it could not be stopped.
    """
    import ray
    from ray import serve

    join(manager.ray_address, auth_mode=manager.ray_auth_mode)
    host = _host()
    if host is None or _facts(host).manager_id != manager.manager_id:
        raise Unavailable(f"this process is not in the Ray cluster of the manager on {manager.data_dir}")
    with contextlib.suppress(ray.exceptions.RayError):
        serve.delete(_app_name(), _blocking=True)
    _end_actors()
    ray.kill(host, no_restart=True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while manager.alive:
        if time.monotonic() > deadline:
            raise Unavailable(f"process {manager.pid} of the manager did not end")
        time.sleep(0.05)
    manager_file(Path(manager.data_dir)).unlink(missing_ok=True)


def restart_inside(manager: Manager) -> list[str]:
    """Restart the manager's replicas and actors; see `rolling`. Raises `Unavailable`."""
    import ray

    join(manager.ray_address, auth_mode=manager.ray_auth_mode)
    host = _host()
    if host is None or _facts(host).manager_id != manager.manager_id:
        raise Unavailable(f"this process is not in the Ray cluster of the manager on {manager.data_dir}")
    restarted: list[str] = ray.get(host.restart.remote(), timeout=rolling.RESTART_TIMEOUT_S)
    return restarted


class Host:
    """The actor that owns the data directory.

    What keeps it from starting is what `facts` raises: an error in `__init__` would lose its type.
    """

    def __init__(self, options: InsideOptions) -> None:
        self._options = options
        self._began = time.monotonic()
        self._folder = resolve(options.data_dir)
        self._id = secrets.token_hex(16)
        self._manager: Manager | KvcmError
        try:
            self._manager = self._start()
        except KvcmError as error:
            self._manager = error
        except Exception as error:
            self._manager = Unavailable(f"the manager did not start: {error}")

    def __repr__(self) -> str:
        return f"Manager({self._folder})"

    def facts(self) -> Manager:
        if isinstance(self._manager, KvcmError):
            raise self._manager
        return self._manager

    def restart(self) -> list[str]:
        """Renew replicas, unless a Serve config file has them, and actors; says which."""
        restarted: list[str] = []
        if not self._options.declared:
            app = self._application(stamp=secrets.token_hex(4))
            rolling.renew_replicas(app, _app_name(), self._options.route_prefix, restarted.append)
        rolling.renew_actors(restarted.append)
        return restarted

    def _start(self) -> Manager:
        lock = DataDirLock(self._folder)
        try:
            lock.name_owner(Owner(os.getpid(), process_start(os.getpid()), self._id, ""))
            manager = self._start_all()
            write_manager(manager)
        except Exception:
            _end_actors()
            lock.release()
            raise
        self._lock = lock  # held until this process ends
        return manager

    def _start_all(self) -> Manager:
        import ray

        from kvcm_ray.actors import registry

        actor = registry.get_or_create(self._folder, self._options.reclaimers)
        tiers = defaults.parse_tiers(self._options.tiers, self._folder)
        defaults.apply(actor, tiers, asked=bool(self._options.tiers), note=print)
        self._guard()
        context: Any = ray.get_runtime_context()
        return Manager(
            url=self._serve(),
            grpc=None,
            ray_address=context.gcs_address,
            data_dir=str(self._folder),
            ready_s=round(time.monotonic() - self._began, 3),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            manager_id=self._id,
            temp_dir="",
            dashboard_url="",
            haproxy=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1",
            ray_auth_mode=os.environ.get("RAY_AUTH_MODE", "disabled"),
            version=version(),
            inside=True,
        )

    def _guard(self) -> None:
        """Accounts as they were asked for, before anybody is answered. Raises `InvalidArgument`."""
        from ray import serve
        from ray.serve.context import _get_global_client

        from kvcm_ray.actors.handles import RegistryHandle

        serve.start()
        client: Any = _get_global_client()
        wanted = door.accounts_wanted(self._options.accounts, self._folder)
        door.check_inside(client.http_config.host, wanted)
        door.apply(RegistryHandle(), self._folder, self._options.accounts, print)

    def _serve(self) -> str:
        """Run the application on this node; its URL."""
        from ray import serve
        from ray.serve.context import _get_global_client

        from kvcm_ray.serve_app import faults

        running = self._options.declared or _app_name() in serve.status().applications  # this is a restart
        if not running:
            faults.forget(self._folder)
            prefix = self._options.route_prefix
            serve.run(self._application(), name=_app_name(), route_prefix=prefix, blocking=False)
        client: Any = _get_global_client()
        http = client.http_config
        host = "127.0.0.1" if http.host in (None, "", "0.0.0.0") else http.host
        return f"http://{host}:{http.port}{self._options.route_prefix.rstrip('/')}"

    def _application(self, stamp: str = "") -> Any:
        import ray

        from kvcm_ray.serve_app.deployment import build
        from kvcm_ray.serve_app.options import GatewayOptions

        node_id = ray.get_runtime_context().get_node_id()
        told = GatewayOptions(self._options.debug_api)
        return build(
            self._folder, replicas=self._options.replicas, node_id=node_id, stamp=stamp, gateway=told
        )


def _app_name() -> str:
    from kvcm_ray.serve_app.deployment import APP_NAME

    return APP_NAME


def _host() -> Any:
    """The cluster's `Host`; None if it has none."""
    return _actor(HOST)


def _actor(name: str) -> Any:
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _end_actors() -> None:
    """All that a `Host` starts."""
    import ray

    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["namespace"] == NAMESPACE and each["name"] != HOST and (actor := _actor(each["name"])):
            ray.kill(actor, no_restart=True)


def _facts(host: Any) -> Manager:
    """What the `Host` says, once it is ready. Raises the `KvcmError` that kept it from starting, and
    ends it then, so that the next one can try again."""
    import ray

    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            manager: Manager = ray.get(host.facts.remote(), timeout=max(deadline - time.monotonic(), 0.0))
            return manager
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(f"the manager was not ready after {START_TIMEOUT_S:g} s") from error
            time.sleep(0.1)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, KvcmError):
                ray.kill(host, no_restart=True)
                raise cause from None
            raise Unavailable(f"the manager did not start: {error}") from error


def is_inside(data_dir: Path) -> Manager | None:
    """The manager of a data directory, if it runs and does so inside a Ray cluster of others."""
    manager = find(data_dir)
    return manager if manager is not None and manager.inside else None
