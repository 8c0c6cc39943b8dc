"""The application as a Ray Serve deployment.

Two replicas, so that one can die without a failed request; they need no CPU of Ray's account. It
runs behind HAProxy (``RAY_SERVE_ENABLE_HA_PROXY=1``, several times faster) and behind Serve's own
proxy alike. Whoever starts Serve chooses host and port.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ray import serve
from ray.serve import Application

from kvcm_ray.actors import paths
from kvcm_ray.serve_app.app import HotPath, build_app
from kvcm_ray.serve_app.cluster_backend import ClusterBackend
from kvcm_ray.serve_app.metrics import Metrics

APP_NAME = "kvcm"
#: The application runs on the replica's own event loop: its handlers are short and never block, and
#: the hop to a thread for user code costs a quarter of the throughput.
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
REPLICAS = 2
ONGOING_REQUESTS_MAX = 1024  #: of one replica


def build_asgi(data_dir: str | os.PathLike[str]) -> HotPath:
    """The ASGI application of the manager on `data_dir`; the process must have joined its Ray."""
    folder = paths.resolve(data_dir)
    return build_app(ClusterBackend(folder), Metrics(folder / "serve-metrics"))


class Gateway:
    """A replica: one ASGI application on the data directory."""

    def __init__(self, data_dir: str) -> None:
        logging.getLogger("kvcm_ray").setLevel(logging.INFO)
        self._data_dir = data_dir

    def __serve_build_asgi_app__(self) -> HotPath:
        return build_asgi(self._data_dir)


def build(
    data_dir: str | os.PathLike[str], *, replicas: int = REPLICAS, node_id: str | None = None
) -> Application:
    """The Serve application of the manager on `data_dir`.

    Args:
        node_id: of the data directory, where the cluster has several nodes.
    """
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": _ENVIRONMENT}}
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
    application: Application = deployment.bind(str(paths.resolve(data_dir)))
    return application
