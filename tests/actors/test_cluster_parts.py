"""Parts of starting a manager that need no manager."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvcm_ray.cluster import find, parse_size, parse_tiers, processes
from kvcm_ray.cluster.defaults import default_group, differences
from kvcm_ray.cluster.facts import DataDirLock, Owner, is_process, read_owner
from kvcm_ray.cluster.haproxy import tightened
from kvcm_ray.core.model import StorageType
from kvcm_ray.errors import InUse, InvalidArgument
from kvcm_ray.index.lock import process_start


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 64 << 20), ("1.5G", 3 << 29), ("1000", 1000), ("2kb", 2048), (" 1 TiB ", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1PiB", "MiB", "1 2", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument, match="size"):
        parse_size(text)


@pytest.mark.parametrize("tier", ["ram:1G", "shm", "shm:1G:/x", "file:1G:relative", "file::/x"])
def test_no_tiers(tier: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        parse_tiers([tier], tmp_path)


def test_tiers_become_storages_and_quota(tmp_path: Path) -> None:
    tiers = parse_tiers(["shm:64MiB", "file:1GiB", f"file:2GiB:{tmp_path}/far"], tmp_path)
    names = [t.storage.global_unique_name for t in tiers]
    assert names == ["shm_01", "nfs_01", "nfs_02"]
    assert tiers[0].storage.root_path.startswith("/dev/shm/kvcm-")
    assert tiers[1].storage.root_path == f"{tmp_path}/tiers/nfs_01"
    assert tiers[2].storage.root_path == f"{tmp_path}/far"
    group = default_group(tiers)
    assert group.quota_bytes == (64 << 20) + (3 << 30)
    assert group.quota is not None
    assert [(q.storage_type, q.capacity) for q in group.quota.quota_config] == [
        (StorageType.ST_TAIRMEMPOOL, 64 << 20),
        (StorageType.ST_NFS, 3 << 30),
    ]
    asked = parse_tiers(["shm:1MiB", "file:1GiB:/else"], tmp_path)
    notes = differences(asked, [t.storage for t in tiers[1:]], group)
    assert len(notes) == 3


def test_haproxy_listens_on_loopback_only() -> None:
    config = (
        "global\n    log 127.0.0.1:514 local0 info\n    stats socket /x/admin.sock\n"
        "frontend prometheus\n    bind :9101\n    no log\n"
        "frontend http_frontend\n    bind 0.0.0.0:80\n    log global\n"
        "listen stats\n  bind *:8404\n"
    )
    assert tightened(config) == (
        "global\n    stats socket /x/admin.sock\n"
        "frontend prometheus\n    bind 127.0.0.1:9101\n    no log\n"
        "frontend http_frontend\n    bind 0.0.0.0:80\n    timeout http-request 10s\n"
        "    option http-buffer-request\n    http-request set-header X-Forwarded-For %[src]\n"
        "    log global\n"
        "listen stats\n  bind 127.0.0.1:8404\n"
    )


def test_haproxy_keeps_the_public_address_and_speaks_tls_there() -> None:
    config = (
        "frontend http_frontend\n    bind *:80\n"
        "frontend grpc_frontend\n    # a remark\n    bind *:81 proto h2\n"
        "listen stats\n  bind *:8404\n"
    )
    lines = tightened(config, "/x/tls.pem").splitlines()
    assert "    bind *:80 ssl crt /x/tls.pem ssl-min-ver TLSv1.2 alpn http/1.1" in lines
    assert "    bind *:81 proto h2 ssl crt /x/tls.pem ssl-min-ver TLSv1.2 alpn h2" in lines
    assert "  bind 127.0.0.1:8404" in lines
    assert sum("X-Forwarded-For" in line for line in lines) == 2


def test_lock_names_its_owner(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    owner = Owner(os.getpid(), process_start(os.getpid()), "id", "/tmp/kvcm-x")
    lock.name_owner(owner)
    assert read_owner(tmp_path) == owner
    with pytest.raises(InUse, match=str(os.getpid())):
        DataDirLock(tmp_path)
    assert find(tmp_path) is None
    lock.release()
    assert read_owner(tmp_path) is None
    DataDirLock(tmp_path).release()


def test_lock_waits_for_the_files_of_a_killed_owner(tmp_path: Path) -> None:
    """Its process is gone already, its lock not yet."""
    dying = DataDirLock(tmp_path)
    dying.name_owner(Owner(os.getpid(), 1, "id", "/tmp/kvcm-x"))  # that process is not this one
    threading.Timer(0.3, lambda: os.close(dying._fd)).start()
    began = time.monotonic()
    DataDirLock(tmp_path).release()
    assert time.monotonic() - began > 0.2


def test_a_zombie_is_no_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = process_start(child.pid)
    time.sleep(0.5)
    assert not is_process(child.pid, started)
    child.wait()


def test_members_are_found_by_their_environment_and_ended(tmp_path: Path) -> None:
    from kvcm_ray.cluster import launch

    temp_dir = tmp_path / "kvcm-temp"
    temp_dir.mkdir()
    mark = f"test-{os.getpid()}"
    pipe = launch._start_reaper(mark, temp_dir)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, env={**os.environ, processes.VARIABLE: mark})
    other = subprocess.Popen(command)
    deadline = time.monotonic() + 5
    while processes.members(mark) != [child.pid]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(pipe)
    assert child.wait(10) == -9
    while temp_dir.exists():
        assert time.monotonic() < deadline + 10
        time.sleep(0.05)
    assert other.poll() is None
    other.kill()
    other.wait()
