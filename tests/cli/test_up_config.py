"""A manager that a file configures, as programs: declared things are there; doctor and fsck beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcm_ray.cluster import processes

pytestmark = pytest.mark.ray

FILE = """\
data_dir: data
port: 0
replicas: 1
tiers: ["file:16MiB"]
log_format: json
storages:
  disk1: {path: %s}
groups:
  chat: {quota: 8MiB, storages: [nfs_01, disk1], policy: lfu}
"""


def kvcm(*arguments: str, cwd: Path, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVCM_")}
    return subprocess.run(
        [sys.executable, "-m", "kvcm_ray.cli", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def test_a_manager_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "kvcm.yaml").write_text(FILE % (tmp_path / "disk1"))
    where = ("--data-dir", "data")
    up = kvcm("up", "--detach", "--json", cwd=tmp_path)
    try:
        assert up.returncode == 0, up.stderr
        manager = json.loads(up.stdout)
        assert manager["data_dir"] == str(tmp_path / "data")
        listed = json.loads(kvcm("group", "list", "--json", *where, cwd=tmp_path).stdout)
        groups = {group["name"]: group for group in listed["groups"]}
        assert groups["chat"]["quota"]["capacity"] == str(8 << 20)
        assert groups["chat"]["storage_candidates"] == ["nfs_01", "disk1"]
        logging = [_variable(pid, "KVCM_LOG_FORMAT") for pid in processes.members(manager["manager_id"])]
        assert logging.count("json") >= 4, "registry, groups, reclaimers, replica"
        healthy = kvcm("doctor", "--json", *where, cwd=tmp_path)
        assert healthy.returncode == 0, healthy.stdout
        assert json.loads(healthy.stdout)["running"] is True
        refused = kvcm("fsck", "--repair", *where, cwd=tmp_path)
        assert (refused.returncode, "KVCM-C004" in refused.stderr) == (1, True)
        text = (tmp_path / "kvcm.yaml").read_text().replace("8MiB", "9MiB")
        (tmp_path / "kvcm.yaml").write_text(text)
        assert kvcm("config", "apply", "--yes", cwd=tmp_path).returncode == 0
        shown = kvcm("group", "show", "chat", "--json", *where, cwd=tmp_path)
        assert json.loads(shown.stdout)["quota"]["capacity"] == str(9 << 20)
        os.kill(manager["pid"], signal.SIGKILL)
        _until_gone(manager["manager_id"])
        stale = json.loads(kvcm("doctor", "--json", *where, cwd=tmp_path).stdout)
        assert "names a manager that is gone" in stale["problems"][0]["sentence"]
        assert kvcm("fsck", "--repair", "--yes", *where, cwd=tmp_path).returncode == 0
    finally:
        kvcm("down", "--purge", *where, cwd=tmp_path)


def _variable(pid: int, name: str) -> str:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((pair.partition(b"=")[2].decode() for pair in pairs if pair.startswith(name.encode())), "")


def _until_gone(manager_id: str) -> None:
    """The reaper ends the rest."""
    deadline = time.monotonic() + 30
    while processes.members(manager_id) and time.monotonic() < deadline:
        time.sleep(0.1)
