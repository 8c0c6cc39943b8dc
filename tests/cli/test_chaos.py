"""``kvcm demo --chaos``: who is killed, what the verdict counts, and the whole of it on a real manager."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kvcm_ray.cli import chaos as module
from kvcm_ray.cli.chaos import Chaos
from kvcm_ray.cli.demo import _verdict
from kvcm_ray.cluster.processes import VARIABLE


@contextmanager
def process(title: str, manager_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that only looks like one of a manager."""
    child = subprocess.Popen([title, "-c", "import time; time.sleep(60)"], executable=sys.executable,
                             env={**os.environ, VARIABLE: manager_id})  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_only_actors_and_replicas_of_this_manager_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_S", 0.3)
    monkeypatch.setattr(module, "EVERY_S", 0.3)
    mine, said = uuid4().hex, list[str]()
    with (
        process("ray::GroupActor", mine) as group,
        process("ray::Registry.call", mine) as registry,
        process("raylet", mine) as raylet,
        process("kvcm GroupActor", mine) as other,
        process("ray::GroupActor", uuid4().hex) as foreign,
    ):
        with Chaos(mine, said.append) as killer:
            deadline = time.monotonic() + 20
            while (group.poll() is None or registry.poll() is None) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.8)
        assert (group.poll(), registry.poll()) == (-9, -9)
        assert [each.poll() for each in (raylet, other, foreign)] == [None] * 3
    assert killer.kills == {"group actor": 1, "registry": 1}
    assert said == [
        f"  kill -9 {group.pid}, a group actor; 1 so far",
        f"  kill -9 {registry.pid}, a registry; 2 so far",
    ]


def test_each_kind_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are many processes of one kind."""
    monkeypatch.setattr(module, "FIRST_S", 0.3)
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    mine = uuid4().hex
    with (
        process("ray::GroupActor", mine), process("ray::GroupActor", mine), process("ray::GroupActor", mine),
        process("ray::ServeReplica:kvcm:gateway", mine) as replica,
        process("ray::ReclaimerActor", mine) as reclaimer,
        Chaos(mine, lambda _: None) as killer,
    ):  # fmt: skip
        deadline = time.monotonic() + 20
        while killer.kills.total() < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (replica.wait(5), reclaimer.wait(5)) == (-9, -9)
    assert killer.kills["HTTP replica"] == killer.kills["reclaimer"] == 1


REPORT = {
    "wrong_bytes": 0, "unreadable_blocks": 0, "refused_blocks": 0, "lost_blocks": 0, "hit_blocks": 9,
}  # fmt: skip
FSCK = {"orphan_bytes": 0, "dangling_locations": 0, "corrupt_records": 0, "counters_ok": True}


def verdict(*, kills: int | None = 3, report: dict[str, Any] | None = None, **fsck: Any) -> str:
    killer = None
    if kills is not None:
        killer = Chaos("nobody", lambda _: None)
        killer.kills = Counter({"registry": kills} if kills else {})
    return _verdict({**REPORT, **(report or {})}, {**FSCK, **fsck}, killer)


def test_the_verdict() -> None:
    assert verdict() == verdict(kills=None) == ""
    assert verdict(report={"refused_blocks": 7}) == "", "what nobody acknowledged may be refused"
    assert verdict(kills=None, report={"refused_blocks": 7}) == "refused_blocks is 7"
    assert verdict(report={"lost_blocks": 1}) == "lost_blocks is 1"
    assert verdict(report={"wrong_bytes": 2}, orphan_bytes=3) == "wrong_bytes is 2, orphan_bytes is 3"
    assert verdict(kills=0) == "nothing was killed"
    assert verdict(report={"hit_blocks": 0}) == "the cache never hit"
    assert verdict(counters_ok=False) == "counters are wrong"


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_demo_survives_its_chaos(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvcm_ray.cli", "demo", "--chaos", "--seconds", "25"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r"^  kill -9 \d+, ", ran.stderr, re.MULTILINE)) >= 3
    assert "a group actor; " in ran.stderr
    assert "acknowledged and lost: 0\n" in ran.stderr
    assert "demo ok" in ran.stderr
    assert list(tmp_path.iterdir()) == []
