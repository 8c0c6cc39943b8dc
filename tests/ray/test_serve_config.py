"""`serve deploy` of the shipped file starts a manager in a Ray cluster, rolls out changes; the probes hold.

The cluster is one that `ray start` made, as KubeRay does; its ports are replaced by free ones.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from kvcm_ray import cluster
from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.testing.load import Load

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 120.0


@dataclass
class Ray:
    environment: dict[str, str]
    dashboard: int
    agent: int

    def serve(self, *arguments: str) -> str:
        address = ["-a", f"http://127.0.0.1:{self.dashboard}"]
        done = subprocess.run(
            [BIN / "serve", *arguments, *address], env=self.environment, capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[Ray]:
    gcs, dashboard, agent = free_ports(3)
    with tempfile.TemporaryDirectory(
        prefix="kvcm-ray-", dir="/tmp"
    ) as folder:  # its sockets want a short path
        environment = {
            **os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder,
            "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        command = [
            BIN / "ray", "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--temp-dir={folder}", "--object-store-memory=100000000",
        ]  # fmt: skip
        with (tmp_path / "ray.log").open("wb") as log:
            head = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            started = Ray(environment, dashboard, agent)
            wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}/api/gcs_healthz"))
            yield started
        finally:
            head.terminate()  # with --block it ends what it started
            head.wait(60)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=3).status_code == 200
    return False


def failed(ray: Ray) -> bool:
    facts = httpx.get(f"http://127.0.0.1:{ray.dashboard}/api/serve/applications/", timeout=10).json()
    return "DEPLOY_FAILED" in [each["status"] for each in facts["applications"].values()]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def probes(name: str) -> Iterator[str]:
    """The shell commands by which Kubernetes asks the pods."""
    service = list(yaml.safe_load_all((ROOT / "deploy/kuberay/rayservice.yaml").read_text()))[1]
    groups = service["spec"]["rayClusterConfig"]
    templates = [groups["headGroupSpec"], *groups["workerGroupSpecs"]]
    for container in (template["template"]["spec"]["containers"][0] for template in templates):
        if name in container:
            yield container[name]["exec"]["command"][-1]


def test_a_serve_config_file_runs_a_manager(ray: Ray, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    data = tmp_path / "data"
    config = yaml.safe_load((ROOT / "deploy/serve/kvcm.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= {"data_dir": str(data), "tiers": ["shm:16MiB", "file:32MiB"]}
    file = tmp_path / "kvcm.yaml"
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}/kvcm"

    wait_until(lambda: probe_states(ray, port, "readinessProbe")[0])  # before Serve runs
    ray.serve("deploy", str(file))
    wait_until(lambda: answers(f"{url}/healthz") or failed(ray))
    assert not failed(ray), ray.serve("status")
    assert probe_states(ray, port, "readinessProbe") == [True, True]
    assert probe_states(ray, port, "livenessProbe") == [True]
    manager = cluster.find(data)
    assert manager is not None
    assert manager.url == url

    with Load(url) as load:
        first = replicas(ray)
        application["deployments"][0]["ray_actor_options"] = {
            "runtime_env": {"env_vars": {"KVCM_ROLLED": "1"}}
        }
        file.write_text(yaml.safe_dump(config))
        ray.serve("deploy", str(file))
        wait_until(lambda: not first & replicas(ray) and len(replicas(ray)) == 2)
    assert load.answered > 20
    assert load.failures == []
    again = cluster.find(data)
    assert again is not None
    assert again.pid == manager.pid, "the manager's actors are not touched by a change of the replicas"


def replicas(ray: Ray) -> set[str]:
    """Names of the replicas that run."""
    facts = httpx.get(f"http://127.0.0.1:{ray.dashboard}/api/serve/applications/", timeout=10).json()
    running = facts["applications"]["kvcm"]["deployments"]["gateway"]["replicas"]
    return {each["replica_id"] for each in running if each["state"] == "RUNNING"}


def probe_states(ray: Ray, port: int, name: str) -> list[bool]:
    ports = {"52365": ray.agent, "8265": ray.dashboard, "8000": port}
    states = []
    for command in probes(name):
        for theirs, ours in ports.items():
            command = command.replace(f":{theirs}/", f":{ours}/")
        states.append(
            subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0
        )
    return states
