"""What Ray shows of a manager: names, status lines, and log lines by trace_id."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from ray.util import state

from kvcm_ray.actors import status_line
from kvcm_ray.cluster import Manager
from kvcm_ray.testing.http import registration

pytestmark = pytest.mark.ray

T = TypeVar("T")


def eventually(look: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + 30
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)
    return found


def post(running: Manager, call: str, /, **request: object) -> str:
    """Code of the answer."""
    answer = httpx.post(f"{running.url}/api/{call}", json=request, timeout=30).json()
    return str(answer["header"]["status"]["code"])


def alive(running: Manager) -> dict[str, Any]:
    """By name; of those that other tests ended, Ray remembers some under the same name."""
    found = state.list_actors(running.dashboard_url, detail=True, limit=1000)
    return {each.name: each for each in found if each.state == "ALIVE"}


def test_actors_have_telling_names(running: Manager) -> None:
    found = alive(running)
    said = {name: each.repr_name for name, each in found.items()}
    assert said["group:default"] == "GroupActor(default)"
    assert said["registry"] == f"Registry({running.data_dir})"
    reclaimers = {name: told for name, told in said.items() if name.startswith("reclaimer:")}
    assert reclaimers  # as many as other tests on this manager left
    for name, told in reclaimers.items():
        number, size = name.removeprefix("reclaimer:").split(".")
        assert told == f"Reclaimer({number} of {size})"
    assert any(each.class_name == "ServeReplica:kvcm:gateway" for each in found.values())


def test_actors_have_status_lines(running: Manager) -> None:
    pids = {name: each.pid for name, each in alive(running).items()}

    def shows(name: str, pattern: str) -> None:
        path = Path(f"/proc/{pids[name]}/cmdline")
        eventually(lambda: re.fullmatch(pattern, path.read_bytes().decode().strip("\0")))

    shows("group:default", r"ray::GroupActor default \d+\.\d of \d+\.\d MiB, (\d+% hits, )?\d+ sessions")
    shows("registry", r"ray::Registry \d+ groups, \d+ instances, \d+ storages")
    first = next(name for name in pids if name.startswith("reclaimer:0."))
    shows(first, r"ray::Reclaimer 0 of \d+: erased \d+ records, copied \d+ sessions")


def test_a_group_says_what_is_in_it(running: Manager) -> None:
    """Also right after a call, when Ray has titled the process anew."""
    instance = registration("titled") | {"location_spec_infos": [{"name": "tp0", "size": 1 << 20}]}
    assert post(running, "registerInstance", trace_id="t", **instance) == "OK"
    pid = alive(running)["group:default"].pid
    about = {"trace_id": "t", "instance_id": "titled", "block_keys": [1, 2, 3]}
    assert post(running, "startWriteCache", **about, write_timeout_seconds=60) == "OK"

    def counted() -> re.Match[str] | None:
        assert post(running, "startWriteCache", **about, write_timeout_seconds=60) == "OK"
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode().strip("\0")
        return re.fullmatch(r"ray::GroupActor default .*, [1-9]\d* sessions", title)

    eventually(counted)
    assert (
        post(running, "removeInstance", trace_id="t", instance_group="default", instance_id="titled") == "OK"
    )


def test_a_failed_write_is_in_both_logs_by_its_trace_id(running: Manager, tmp_path: Path) -> None:
    storage = {"global_unique_name": "breaks", "nfs": {"root_path": str(tmp_path / "breaks")}}
    assert post(running, "addStorage", trace_id="t", storage=storage) == "OK"
    asked = httpx.post(f"{running.url}/api/getInstanceGroup", json={"trace_id": "t", "name": "default"})
    group = asked.json()["instance_group"] | {"name": "breaks", "storage_candidates": ["breaks"]}
    assert post(running, "createInstanceGroup", trace_id="t", instance_group=group) == "OK"
    instance = {**registration("broken"), "instance_group": "breaks"}
    assert post(running, "registerInstance", trace_id="t", **instance) == "OK"
    for path in sorted((tmp_path / "breaks").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "breaks").rmdir()
    (tmp_path / "breaks").write_text("no folder any more")
    about = {"instance_id": "broken", "block_keys": [1], "write_timeout_seconds": 9}
    assert post(running, "startWriteCache", trace_id="trace-7f3", **about) != "OK"
    folder = Path(running.temp_dir) / "ray" / "session_latest" / "logs"

    def logged() -> set[str] | None:
        lines = [
            line for path in folder.glob("worker-*.err")
            for line in path.read_text(errors="replace").splitlines() if "[trace_id=trace-7f3]" in line
        ]  # fmt: skip
        found = {"group" if "kvcm_ray.actors.group" in line else "gateway" for line in lines}
        return found if found == {"group", "gateway"} else None

    eventually(logged)
    assert (
        post(running, "removeInstance", trace_id="t", instance_group="breaks", instance_id="broken") == "OK"
    )
    post(running, "removeInstanceGroup", trace_id="t", name="breaks")
    post(running, "removeStorage", trace_id="t", storage_unique_name="breaks")


def test_words_of_a_status_line() -> None:
    rows = {"time_s": [1, 2], "lookup_blocks": [0, 7], "hit_blocks": [0, 5], "sessions": [9, 3]}
    held = {"used_bytes": [0, 1288490189], "quota_bytes": [0, 8 << 30]}
    assert status_line.of_rows({**rows, **held}) == "1.2 of 8.0 GiB, 71% hits, 3 sessions"
    assert status_line.of_rows({**rows, "used_bytes": [7], "quota_bytes": [9]}).startswith("7 of 9 bytes")
    assert status_line.of_rows({"time_s": []}) == "starting"
