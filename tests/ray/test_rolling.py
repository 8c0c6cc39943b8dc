"""`kvcm restart` renews every process of a manager under load, and no request is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray import cluster
from kvcm_ray.cluster.facts import is_process
from kvcm_ray.errors import Unavailable
from kvcm_ray.index.lock import process_start
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.commands import run_command
from kvcm_ray.testing.load import Load

pytestmark = pytest.mark.ray


def test_no_request_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with manager(tmp_path / "data", replicas=2) as running:
        before = actors_of(running)
        with Load(running.url) as load:
            said = run_command(capsys, ["restart", "--data-dir", str(tmp_path / "data"), "--json"]).json
        after = actors_of(running)
        assert load.failures == []
        assert load.answered > 20
        assert said["restarted"][0] == "gateway"
        assert {"registry", "group:default"} <= set(said["restarted"])
        assert said["restarted"][-1] == "registry"
        assert len(after) == len(before)
        assert not before & after, "these processes were not renewed"
        assert cluster.find(tmp_path / "data") == running, "the manager itself stays"


def actors_of(running: cluster.Manager) -> set[tuple[str, int, int]]:
    """Name and process of each actor and replica that we made."""
    found = set()
    for pid in cluster.leftovers(running):
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        if any(each in name for each in ("Registry", "GroupActor", "Reclaimer", "gateway")):
            found.add((name, pid, process_start(pid)))
    assert all(is_process(pid, start) for _, pid, start in found)
    return found


def test_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no manager runs"):
        cluster.restart(tmp_path / "data")
