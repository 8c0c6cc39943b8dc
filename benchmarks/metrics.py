"""`kvcm bench metrics`: how long ``GET /metrics`` takes, with many groups.

Real group actors are a process of about 100 MB each, so a real manager with as many as a small machine holds
is measured over HTTP; then the same code in one process, where each group has its loop but no process of its
own. Scrapes are further apart than the second for which the figures are kept, so each asks every group.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.benchmarks.private import Control, private_manager

GROUPS = 100
ACTORS, QUICK_ACTORS = 20, 4
SCRAPES, QUICK_SCRAPES = 10, 3
PAUSE_S = 1.05  #: longer than figures are kept
SETTLE_S = 10.0


def run(*, quick: bool = False) -> dict[str, Any]:
    """Takes two minutes, most of it to start actors.

    Returns:
        ``{"rows": [{groups, where, scrapes, p50_ms, max_ms, bytes, series_of_a_group}]}``.

    Raises:
        Unavailable: the manager did not start.
    """
    actors, scrapes = (QUICK_ACTORS, QUICK_SCRAPES) if quick else (ACTORS, SCRAPES)
    return {"rows": [_with_actors(actors, scrapes), asyncio.run(_in_process(GROUPS, scrapes))]}


def _with_actors(groups: int, scrapes: int) -> dict[str, Any]:
    with private_manager(["file:1GiB"]) as manager:
        shown = manager.call("getInstanceGroup", name="default")["instance_group"]
        for number in range(1, groups):
            group = copy.deepcopy(shown) | {"name": f"g{number:03d}", "version": 1}
            manager.call("createInstanceGroup", instance_group=group)
        time.sleep(SETTLE_S)
        times, text = [], ""
        for _ in range(scrapes):
            time.sleep(PAUSE_S)
            began = time.perf_counter()
            text = _page(manager)
            times.append(time.perf_counter() - began)
    return _row(groups, "actors, over HTTP", times, text)


def _page(manager: Control) -> str:
    with urllib.request.urlopen(f"{manager.backend.address}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


async def _in_process(groups: int, scrapes: int) -> dict[str, Any]:
    from kvcm_ray.core.model import NfsSpec, StorageConfig
    from kvcm_ray.serve_app.figures import GroupFigures
    from kvcm_ray.serve_app.metrics import Metrics
    from kvcm_ray.serve_app.metrics_text import Page
    from kvcm_ray.testing.http import default_group
    from kvcm_ray.testing.local_backend import LocalBackend

    with tempfile.TemporaryDirectory(prefix="kvcm-bench-") as name:
        backend = LocalBackend(Path(name) / "data")
        metrics = Metrics(Path(name) / "counters")
        try:
            await backend.registry("add_storage", StorageConfig("nfs_01", nfs=NfsSpec(f"{name}/nfs/")))
            for number in range(groups):
                group = dataclasses.replace(default_group(), name=f"g{number:03d}")
                await backend.registry("create_group", group)
            page = Page(GroupFigures(backend, metrics), metrics, backend.storages)
            times, text = [], b""
            for _ in range(scrapes):
                await asyncio.sleep(PAUSE_S)
                began = time.perf_counter()
                _, text = await page.render("")
                times.append(time.perf_counter() - began)
        finally:
            metrics.close()
            await asyncio.to_thread(backend.close)
    return _row(groups, "in process", times, text.decode())


def _row(groups: int, where: str, times: list[float], text: str) -> dict[str, Any]:
    of_group = f'group="{"default" if where.startswith("actors") else "g000"}"'
    return {
        "groups": groups,
        "where": where,
        "scrapes": len(times),
        "p50_ms": round(float(np.median(times)) * 1e3, 1),
        "max_ms": round(max(times) * 1e3, 1),
        "bytes": len(text),
        "series_of_a_group": sum(of_group in line for line in text.splitlines()),
        "groups_up": sum(
            line.startswith("kvcm_group_up") and line.endswith(" 1.0") for line in text.splitlines()
        ),
    }
