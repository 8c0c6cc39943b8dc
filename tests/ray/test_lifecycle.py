"""Starting and stopping managers: restart, two side by side, refusals, kill -9 of the manager itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcm_ray import cluster
from kvcm_ray.actors.paths import shm_dir
from kvcm_ray.cluster import Manager
from kvcm_ray.cluster.launch import SYSTEM_CONFIG
from kvcm_ray.errors import InUse
from kvcm_ray.testing.cluster import manager, run_python

pytestmark = pytest.mark.ray

#: Writes 40 blocks to an instance on shm and 40 more to one on files, or looks for them.
CLIENT = """
    import sys
    import numpy as np
    from kvcm_ray import cluster
    from kvcm_ray.actors.handles import RegistryHandle
    from kvcm_ray.actors.view import RegistryView
    from kvcm_ray.testing.blocks import Engine, instance
    data_dir, action = sys.argv[1:]
    cluster.attach(data_dir)
    RegistryHandle().call_sync("register_instance", instance("lasting"))
    engine = Engine(RegistryView(data_dir), "lasting")
    keys = np.arange(1, 41, dtype=np.int64) * 7919
    if action == "put":
        assert engine.put(keys).committed == 40
    print(int(engine.found(keys).sum()))
"""


def answers(url: str) -> bool:
    with urllib.request.urlopen(url + "/healthz", timeout=5) as reply:
        return bool(reply.status == 200)


def test_life_of_a_data_directory(tmp_path: Path, running: Manager) -> None:
    """Beside the shared manager: start, refuse a second one, stop, start again with all blocks."""
    folder = tmp_path / "data"
    with manager(folder, purge=False) as first:
        assert answers(first.url)
        assert answers(running.url)
        with pytest.raises(InUse, match="already"):
            cluster.up_detached(folder, 0)
        assert run_python(CLIENT, str(folder), "put") == "40"
        ids = cluster.leftovers(first)
        assert ids
    assert not cluster.leftovers(first)
    assert cluster.find(folder) is None
    assert not Path(first.temp_dir).exists()
    assert shm_dir(folder).exists()
    assert answers(running.url), "stopping one manager must not touch another"

    with manager(folder, purge=True) as second:
        assert run_python(CLIENT, str(folder), "find") == "40"
        os.kill(second.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while cluster.leftovers(second) or Path(second.temp_dir).exists():
            assert time.monotonic() < deadline, cluster.leftovers(second)
            time.sleep(0.1)
        assert cluster.find(folder) is None
    assert not folder.exists()
    assert not shm_dir(folder).exists()


def test_port_taken(tmp_path: Path, running: Manager) -> None:
    port = int(running.url.rpartition(":")[2])
    with pytest.raises(InUse, match="cannot listen"):
        cluster.up_detached(tmp_path / "other", port)
    assert not cluster.down(tmp_path / "other", purge=True)


#: An engine: says what it stored and read of 8 blocks, once for each line that it is sent.
ENGINE = """
    import sys
    import numpy as np
    from kvcm_ray.client import connect
    client = connect(sys.argv[1], ray=sys.argv[2] == "joined")
    instance = client.register("outlives", block_size=16, specs={"tp0": 4096})
    data = np.arange(8 * 4096, dtype=np.uint32).astype(np.uint8).reshape(8, 4096)
    for line in sys.stdin:
        first = int(line)
        stored = instance.put(list(range(first, first + 8)), data, timeout_s=2)
        back = np.zeros_like(data)
        flags = instance.get(list(range(8)), back).flags
        print(int(stored), int(flags.sum()), bool((back == data).all()), flush=True)
"""


@contextlib.contextmanager
def engine_process(folder: Path, how: str) -> Iterator[Callable[[int], str]]:
    command = [sys.executable, "-c", textwrap.dedent(ENGINE), str(folder), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        talk, listen = child.stdin, child.stdout

        def ask(first: int) -> str:
            print(first, file=talk, flush=True)
            return listen.readline().strip()

        yield ask
        talk.close()
        child.kill()


def test_an_engine_outlives_its_manager(tmp_path: Path) -> None:
    """Killed: reads go on, writes fail in time. Started again: the same client writes again. One engine is
    in the manager's Ray, the other one does without."""
    folder = tmp_path / "data"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(manager(folder, purge=False))
        joined = stack.enter_context(engine_process(folder, "joined"))
        alone = stack.enter_context(engine_process(folder, "alone"))
        assert (joined(0), alone(16)) == ("8 8 True", "8 8 True")
        os.kill(first.pid, signal.SIGKILL)
        cluster.down(folder)  # ends what is left of it
        began = time.monotonic()
        assert alone(24) == "0 8 True"
        assert time.monotonic() - began < 1
        assert joined(8) == "0 8 True"
        assert time.monotonic() - began < 5
        stack.enter_context(manager(folder, purge=True))
        assert (joined(8), alone(24)) == ("8 8 True", "8 8 True")


def test_engines_do_not_end_with_the_gcs() -> None:
    """Ray ends drivers that miss the GCS for so long; ours must live on without a manager."""
    assert SYSTEM_CONFIG["gcs_rpc_server_reconnect_timeout_s"] > 7 * 24 * 3600
