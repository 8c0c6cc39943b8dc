"""Real managers for tests: started like ``kvcm up --detach``, on free ports, always stopped.

`manager` is a context; `shared_manager` is one for the whole test process, which joins its Ray, so that
actor handles work in the tests themselves. A process joins one Ray only: what talks to a second manager
by handles runs in a child (`run_python`).
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcm_ray import cluster
from kvcm_ray.cluster import Manager

SMALL_TIERS = ("shm:64MiB", "file:256MiB")

_shared: Manager | None = None


@contextlib.contextmanager
def manager(
    data_dir: Path, tiers: Sequence[str] = SMALL_TIERS, *, replicas: int = 1, purge: bool = True
) -> Iterator[Manager]:
    """A manager of its own, stopped at the end; with `purge` its data goes too."""
    started = cluster.up_detached(data_dir, 0, tiers, replicas=replicas)
    try:
        yield started
    finally:
        cluster.down(data_dir, purge=purge)


def shared_manager() -> Manager:
    """One manager for all tests of this process; the first call starts it (about 15 s)."""
    global _shared
    if _shared is None:
        folder = Path(tempfile.mkdtemp(prefix="kvcm-test-"))
        _shared = cluster.up_detached(folder / "data", 0, SMALL_TIERS, replicas=1)
        atexit.register(_stop_shared, folder)
        cluster.attach(_shared.data_dir)
    return _shared


def _stop_shared(folder: Path) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.shutdown()
    cluster.down(folder / "data", purge=True)
    shutil.rmtree(folder, ignore_errors=True)


def run_python(code: str, *arguments: str, timeout_s: float = 60) -> str:
    """Run code in a fresh interpreter; returns what it printed. Raises if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
