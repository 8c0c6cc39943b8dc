"""What `deploy/` and `cluster.yaml` hold is what the tools that read it accept, as far as they run here.

Kubernetes' own schemas check the pods and the volume claim, Ray Serve's schema the applications, Ray's
schema the cluster file, systemd the unit, hadolint the container file. KubeRay's own fields have no schema
on a package index; they are compared with what this manifest needs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click import Context
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from kvcm_ray.cli.main import cli
from kvcm_ray.cluster.serve_config import Arguments

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RAYSERVICE = DEPLOY / "kuberay" / "rayservice.yaml"
KUBERNETES = "1.31"


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(RAYSERVICE.read_text()))


def service() -> dict[str, Any]:
    return manifests()[1]["spec"]


def pod_templates() -> list[dict[str, Any]]:
    cluster = service()["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]


def applications(text: str) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(text))


SERVE_CONFIGS = {
    "serve": (DEPLOY / "serve" / "kvcm.yaml").read_text(),
    "kuberay": service()["serveConfigV2"],
}


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serve_takes_the_application(name: str) -> None:
    (application,) = applications(SERVE_CONFIGS[name]).applications
    args = Arguments.model_validate(application.args)
    assert args.route_prefix == application.route_prefix
    assert application.import_path == "kvcm_ray.cluster.serve_config:app"
    assert [d.name for d in application.deployments] == ["gateway"]


def test_an_argument_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="tier"):
        Arguments.model_validate({"data_dir": "/d", "tier": ["shm:1GiB"]})


@pytest.mark.parametrize("number", range(len(pod_templates())))
def test_kubernetes_takes_the_pods(number: int) -> None:
    template = pod_templates()[number]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kubernetes_refuses_a_misspelt_probe() -> None:
    spec = yaml.safe_load(yaml.safe_dump(pod_templates()[0]["spec"]))
    spec["containers"][0]["readinessProbes"] = spec["containers"][0].pop("readinessProbe")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_volume_claim() -> None:
    kubernetes_validate.validate(manifests()[0], KUBERNETES, strict=True)


def test_the_service_fits_itself() -> None:
    claim, outer = manifests()
    assert (outer["apiVersion"], outer["kind"]) == ("ray.io/v1", "RayService")
    head = service()["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in head["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    (application,) = applications(service()["serveConfigV2"]).applications
    assert application.args["data_dir"].startswith("/data/")
    tiers = [parsed for tier in application.args["tiers"] if (parsed := re.match(r"shm:(\d+)GiB", tier))]
    limit = int(head["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
    room = int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert int(tiers[0][1]) < room < limit
    ports = {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]}
    assert ports["serve"] == applications(service()["serveConfigV2"]).http_options.port


def test_ray_takes_the_cluster_file() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="head_setup"):
        validate_config(prepare_config({**config, "head_setup": []}))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "kvcm.service"
    text = (DEPLOY / "systemd" / "kvcm.service").read_text()
    unit.write_text(text.replace("/opt/kvcm/bin/kvcm", "/bin/true").replace("=kvcm\n", "=root\n"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_hadolint_takes_the_container_file() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [str(hadolint), "--no-color", str(DEPLOY / "container" / "Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def commands_in(path: Path) -> list[list[str]]:
    """The arguments of every ``kvcm`` that a file calls."""
    text = path.read_text().replace('", "', " ").replace('"', " ")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [
        found[1].split() for line in lines for found in [re.search(r"kvcm (up .*|down .*)", line)] if found
    ]


@pytest.mark.parametrize(
    "path", [ROOT / "cluster.yaml", DEPLOY / "systemd/kvcm.service", DEPLOY / "container/Containerfile"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_the_command_line_takes_the_options(path: Path) -> None:
    found = commands_in(path)
    assert found
    for name, *arguments in found:
        command = cli.get_command(Context(cli), name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        used = {argument for argument in arguments if argument.startswith("--")}
        assert used <= known, f"{path.name}: kvcm {name} has no {sorted(used - known)}"
