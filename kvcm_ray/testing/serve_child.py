"""A manager with the HTTP interface on a Ray cluster of its own, as a child process of a test.

    python -m kvcm_ray.testing.serve_child DATA_DIR PORT TMP_DIR [--no-haproxy]

Prints one line of JSON when it serves, and ends (with its Ray) when its standard input closes. Its
ports and temporary folders are its own, so that it disturbs no other Ray on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcm_ray.cluster.environment import free_ports


@contextmanager
def serving(data_dir: Path, tmp_dir: Path, *, haproxy: bool) -> Iterator[str]:
    """URL of a manager that serves `data_dir`."""
    port = free_ports(1)[0]
    arguments = [str(data_dir), str(port), str(tmp_dir), *([] if haproxy else ["--no-haproxy"])]
    with (tmp_dir / "serve-child.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "kvcm_ray.testing.serve_child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"the child ended; see {log.name}")
        yield json.loads(line)["url"]
    finally:
        child.stdin.close()
        child.wait(60)


def _environment(tmp_dir: Path, haproxy: bool) -> None:
    """Must be set before Ray is imported."""
    folder = tmp_dir / "haproxy"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_ports(1)[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_ports(1)[0]),
    }


def main(data_dir: str, port: str, tmp_dir: str, *options: str) -> None:
    _environment(Path(tmp_dir), haproxy="--no-haproxy" not in options)
    answer = os.dup(1)
    os.dup2(2, 1)  # what Ray prints is no answer
    import ray
    from ray import serve

    from kvcm_ray.actors import registry
    from kvcm_ray.serve_app.deployment import APP_NAME, build

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=tmp_dir,
        namespace="kvcm", object_store_memory=100 << 20,
    )  # fmt: skip
    actor: Any = registry.get_or_create(Path(data_dir))
    ray.get(actor.wait_ready.remote())
    _add_defaults(actor, data_dir)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, proxy_location="HeadOnly")
    serve.run(build(data_dir), name=APP_NAME, route_prefix="/")
    line = json.dumps({"url": f"http://127.0.0.1:{port}"}) + "\n"
    os.write(answer, line.encode())
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


def _add_defaults(actor: Any, data_dir: str) -> None:
    import ray

    from kvcm_ray.core.model import NfsSpec, StorageConfig
    from kvcm_ray.testing.http import default_group

    storage = StorageConfig("nfs_01", nfs=NfsSpec(f"{data_dir}/tiers/nfs_01"))
    ray.get(actor.call.remote("event-1", "add_storage", storage))
    ray.get(actor.call.remote("event-2", "create_group", default_group()))


if __name__ == "__main__":
    main(*sys.argv[1:])
