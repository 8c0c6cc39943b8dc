"""The application as a Ray Serve deployment.

Two replicas, so that one can die without a failed request; they need no CPU of Ray's account. It
runs behind HAProxy (``RAY_SERVE_ENABLE_HA_PROXY=1``, several times faster) and behind Serve's own
proxy alike. Whoever starts Serve chooses host and port.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.serve import Application

from kvcm_ray import logs
from kvcm_ray.actors import paths
from kvcm_ray.serve_app.app import HotPath, build_app
from kvcm_ray.serve_app.cluster_backend import ClusterBackend
from kvcm_ray.serve_app.grpc import loopback
from kvcm_ray.serve_app.grpc.methods import Methods
from kvcm_ray.serve_app.grpc.servicer import Servicer
from kvcm_ray.serve_app.metrics import Metrics
from kvcm_ray.serve_app.options import GatewayOptions

APP_NAME = "kvcm"
#: The application runs on the replica's own event loop: its handlers are short and never block, and
#: the hop to a thread for user code costs a quarter of the throughput.
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
REPLICAS = 2
ONGOING_REQUESTS_MAX = 1024  #: of one replica


def build_asgi(data_dir: str | os.PathLike[str], options: GatewayOptions | None = None) -> HotPath:
    """The ASGI application of the manager on `data_dir`; the process must have joined its Ray."""
    folder = paths.resolve(data_dir)
    return build_app(ClusterBackend(folder), Metrics(folder / "serve-metrics"), options)


class Gateway(Methods):
    """A replica: one service on the data directory, as an ASGI application and as gRPC methods."""

    def __init__(self, data_dir: str, options: GatewayOptions) -> None:
        logs.configure()
        loopback.install()
        self._app = build_asgi(data_dir, options)
        self.grpc = Servicer(self._app.service)

    def __serve_build_asgi_app__(self) -> HotPath:
        return self._app


def build(
    data_dir: str | os.PathLike[str],
    *,
    replicas: int = REPLICAS,
    node_id: str | None = None,
    stamp: str = "",
    gateway: GatewayOptions | None = None,
) -> Application:
    """The Serve application of the manager on `data_dir`.

    Args:
        node_id: of the data directory, where the cluster has several nodes.
        stamp: deploying with another one than before replaces all replicas, one by one.
        gateway: what the replicas are told; the defaults if None.
    """
    environment = {**_ENVIRONMENT, "KVCM_STAMP": stamp}
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    if node_id is not None:
        options["label_selector"] = {"ray.io/node-id": node_id}
    deployment: Any = serve.deployment(
        name="gateway",
        num_replicas=replicas,
        ray_actor_options=options,
        max_ongoing_requests=ONGOING_REQUESTS_MAX,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
    )(serve.ingress()(Gateway))
    application: Application = deployment.bind(str(paths.resolve(data_dir)), gateway or GatewayOptions())
    return application
