"""``up``: runs a manager in this process until it is told to stop.

    lock D → environment → Ray head → registry, groups, reclaimers ∥ Serve → defaults → HTTP → manager.json

The process is the head of a private Ray that lives and dies with it: Ray's own processes end with their
parent, and a reaper (`kvcm_ray.cluster.reaper`) ends the rest if this process is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcm_ray import logs
from kvcm_ray.actors.paths import manager_file, resolve
from kvcm_ray.cluster import defaults, door, environment, grpc_port, haproxy, processes, reaper, rolling
from kvcm_ray.cluster.facts import DataDirLock, Manager, Owner, read_owner, version, write_manager
from kvcm_ray.cluster.options import Options
from kvcm_ray.config.declared import apply_at_start
from kvcm_ray.errors import InUse, Unavailable, Unsupported
from kvcm_ray.index.lock import process_start

log = logging.getLogger(__name__)

APP_NAME = "kvcm"
OBJECT_STORE_BYTES = 100_000_000
READY_TIMEOUT_S = 90.0
#: A call to an actor that is restarting fails within a fraction of a second instead of two, and is
#: sent again by the handles. Goes to every process of the cluster, drivers included.
#: Ray ends every process of a cluster whose GCS is away for a minute, with `_exit`. The drivers are
#: inference engines, which a dead manager must cost misses only; our own processes the reaper ends.
SYSTEM_CONFIG = {
    "timeout_ms_task_wait_for_death_info": 100,
    "core_worker_internal_heartbeat_ms": 200,
    "gcs_rpc_server_reconnect_timeout_s": 20 * 24 * 3600,  # in milliseconds it must fit 31 bits
}
WATCH_PERIOD_S = 1.0
#: Ray's processes without which a manager is none.
VITAL = frozenset({"gcs_server", "raylet"})


def up(
    options: Options,
    on_ready: Callable[[Manager], None] | None = None,
    note: Callable[[str], None] = log.info,
) -> None:
    """Run a manager in the foreground; returns after SIGINT or SIGTERM. Main thread only.

    Args:
        on_ready: called once when the manager answers HTTP.
        note: takes sentences about the start and about what differs from what was asked for.

    Raises:
        InUse: a manager runs on the data directory, or the port is taken.
        InvalidArgument: a tier is written wrongly, or anybody could come in (`kvcm_ray.cluster.door`).
        Unavailable: the manager did not get ready in time, or lost a vital process while it ran.
        Unsupported: this process has imported ray.
    """
    _Launch(options, note).run(on_ready)


class _Launch:
    """One run of `up`."""

    def __init__(self, options: Options, note: Callable[[str], None]) -> None:
        self.options = options
        self.note = note
        self.data_dir = resolve(options.data_dir)
        self.tiers = defaults.parse_tiers(options.tiers, self.data_dir)
        self.manager_id = secrets.token_hex(16)
        self.stop = threading.Event()
        self.renew = threading.Event()  #: `rolling.restart` was called
        self.began = time.monotonic()
        self.binary = environment.haproxy_binary()
        door.check(options, haproxy=self.binary is not None)

    def run(self, on_ready: Callable[[Manager], None] | None) -> None:
        if "ray" in sys.modules:
            raise Unsupported("up() sets Ray's environment; this process has imported ray before")
        lock = DataDirLock(self.data_dir)
        port = self.options.port or environment.free_ports(1)[0]
        check_port(self.options.host, port)
        self.grpc_port, sentence = grpc_port.choose(
            self.options, haproxy=self.binary is not None, check=check_port
        )
        if sentence:
            self.note(sentence)
        clear_up_after(self.data_dir)
        self.temp_dir = Path(tempfile.mkdtemp(prefix="kvcm-", dir="/tmp"))
        pid = os.getpid()
        lock.name_owner(Owner(pid, process_start(pid), self.manager_id, str(self.temp_dir)))
        pipe = _start_reaper(self.manager_id, self.temp_dir)
        try:
            self._signals()
            manager = self._start(port)
            write_manager(manager)
            if on_ready is not None:
                on_ready(manager)
            self._watch()
        finally:
            self._end()
            lock.release()
            os.close(pipe)

    # ----------------------------------------------------------------------------------- start

    def _start(self, port: int) -> Manager:
        os.environ.update(environment.ray_environment(self.manager_id, self.temp_dir))
        os.environ.update(environment.serve_environment(self.temp_dir, self.binary))
        os.environ.update(grpc_port.for_processes(self.options, self.grpc_port))
        if self.binary and self.options.tls_cert and self.options.tls_key:
            pem = door.write_pem(self.temp_dir, self.options.tls_cert, self.options.tls_key)
            os.environ[haproxy.TLS_VARIABLE] = str(pem)
        os.environ.update(logs.environment(self.options.log_format, self.options.log_level))
        logs.configure()
        os.environ.pop("RAY_ADDRESS")
        context = self._start_ray()
        self._signals()  # Ray sets its own
        from ray import serve

        from kvcm_ray.actors import registry

        self._unless_stopped()
        actor = registry.get_or_create(self.data_dir, self.options.reclaimers)
        serve.start(
            http_options=self._http_options(port),
            grpc_options=grpc_port.for_serve(self.options, self.grpc_port),
        )
        self._unless_stopped()
        self._make_contents(actor)
        self._unless_stopped()
        self._serve(serve)
        url = f"{'https' if self.options.tls_cert else 'http'}://{self.options.host}:{port}"
        _wait_for_http(url, self.stop)
        self._unless_stopped()
        return Manager(
            url=url,
            grpc=self._grpc(),
            ray_address=_connectable(context["gcs_address"]),
            data_dir=str(self.data_dir),
            ready_s=round(time.monotonic() - self.began, 3),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            manager_id=self.manager_id,
            temp_dir=str(self.temp_dir),
            dashboard_url=f"http://{context['webui_url']}" if context.get("webui_url") else "",
            haproxy=self.binary is not None,
            ray_auth_mode=os.environ["RAY_AUTH_MODE"],
            version=version(),
        )

    def _start_ray(self) -> dict[str, Any]:
        import ray

        (dashboard,) = environment.free_ports(1)
        context: Any = ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=dashboard,
            namespace="kvcm",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(self.temp_dir / "ray"),
            _system_config=SYSTEM_CONFIG,
        )
        self.note(f"Ray runs at {context.address_info['gcs_address']}")
        return dict(context.address_info)

    def _http_options(self, port: int) -> dict[str, Any]:
        """Of Serve; where HAProxy is in front of it, TLS is that one's."""
        options: dict[str, Any] = {"host": self.options.host, "port": port}
        if self.options.tls_cert and not self.binary:
            options |= {"ssl_certfile": self.options.tls_cert, "ssl_keyfile": self.options.tls_key}
        return options

    def _grpc(self) -> str | None:
        """Address of gRPC, once it answers."""
        if not self.grpc_port:
            return None
        if not self.options.tls_cert:  # a client would have to know the certificate's name
            grpc_port.wait(self.options.host, self.grpc_port, READY_TIMEOUT_S, self.stop.is_set)
        return f"{self.options.host}:{self.grpc_port}"

    def _make_contents(self, actor: Any) -> None:
        """Storages and groups that the options ask for, and who may come in."""
        from kvcm_ray.actors.handles import RegistryHandle

        fresh = defaults.apply(actor, self.tiers, asked=bool(self.options.tiers), note=self.note)
        apply_at_start(RegistryHandle(), self.options.declared, fresh=fresh, note=self.note)
        accounts = door.apply(RegistryHandle(), self.data_dir, self.options.accounts, self.note)
        if accounts and not self.options.tls_cert and not door.is_loopback(self.options.host):
            self.note("tokens and keys cross the network unencrypted: --tls-cert and --tls-key change that")

    def _serve(self, serve: Any) -> None:
        from kvcm_ray.serve_app import faults

        faults.forget(self.data_dir)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.run(self._application(), name=APP_NAME, route_prefix="/", blocking=False)

    def _application(self, stamp: str = "") -> Any:
        from kvcm_ray.serve_app.deployment import build
        from kvcm_ray.serve_app.options import GatewayOptions

        told = GatewayOptions(self.options.debug_api, self.options.requests_per_second)
        return build(str(self.data_dir), replicas=self.options.replicas, stamp=stamp, gateway=told)

    def _unless_stopped(self) -> None:
        if self.stop.is_set():
            raise Unavailable("stopped while starting")

    # ------------------------------------------------------------------------------ run and end

    def _signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.stop.set())
        signal.signal(signal.SIGHUP, lambda *_: self.renew.set())

    def _watch(self) -> None:
        """Until stopped; raises if Ray lost a process that nobody restarts."""
        while not self.stop.wait(WATCH_PERIOD_S):
            if self.renew.is_set():
                self.renew.clear()
                rolling.report(self.data_dir, self._restart)
            names = {_process_name(pid) for pid in processes.members(self.manager_id)}
            if lost := VITAL - names:
                raise Unavailable(f"the manager lost {', '.join(sorted(lost))} and ends")

    def _restart(self, note: Callable[[str], None]) -> None:
        rolling.renew_replicas(self._application(stamp=secrets.token_hex(4)), APP_NAME, "/", note)
        rolling.renew_actors(note)

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            manager_file(self.data_dir).unlink()
        if "ray" in sys.modules:
            import ray

            with contextlib.suppress(Exception):
                ray.shutdown()
        if not processes.end_all(self.manager_id, timeout_s=10.0):
            log.error("processes of manager %s are still there", self.manager_id)
        processes.remove_temp_dir(str(self.temp_dir))


def clear_up_after(data_dir: Path) -> None:
    """End what a killed manager of this data directory left behind. The caller holds the lock."""
    owner = read_owner(data_dir)
    if owner is not None:
        processes.end_all(owner.manager_id, timeout_s=20.0)
        processes.remove_temp_dir(owner.temp_dir)
    with contextlib.suppress(FileNotFoundError):
        manager_file(data_dir).unlink()


def _start_reaper(manager_id: str, temp_dir: Path) -> int:
    """Start the reaper; returns the writing end of its pipe, which must stay open."""
    reading, writing = os.pipe()
    script = str(Path(reaper.__file__).resolve())
    subprocess.Popen(
        [sys.executable, "-S", "-E", script, manager_id, str(temp_dir)],
        stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd="/",
    )  # fmt: skip
    os.close(reading)
    return writing


def check_port(host: str, port: int) -> None:
    """Raises InUse if something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = "Choose another --port; 0 picks a free one."
            raise InUse(f"cannot listen on {host}:{port}: {error.strerror}", hint=remedy) from error


def _wait_for_http(url: str, stop: threading.Event) -> None:
    """Until something answers HTTP there."""
    import http.client
    import ssl
    from urllib.parse import urlsplit

    deadline = time.monotonic() + READY_TIMEOUT_S
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in ("0.0.0.0", None) else parts.hostname
    while not stop.is_set():
        if parts.scheme == "https":  # whether it answers is asked, not who does
            context = ssl._create_unverified_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=5, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status < 500:
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Unavailable(f"HTTP does not answer at {url}: {error}") from error
        finally:
            connection.close()
        time.sleep(0.05)
        if time.monotonic() > deadline:
            raise Unavailable(f"HTTP at {url} answers errors only")


def _connectable(gcs_address: str) -> str:
    """The address for ``ray.init(address=...)`` of other processes.

    Ray replaces "127.0.0.1" and "localhost" by the machine's outer address, where this Ray does not
    listen. It leaves the name in capitals alone.
    """
    host, _, port = gcs_address.rpartition(":")
    return f"LOCALHOST:{port}" if host == "127.0.0.1" else gcs_address


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
