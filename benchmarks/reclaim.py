"""`kvcm bench reclaim`: making room, and what the foreground notices of it.

* ``rows``: blocks a second. Storage "metadata" is the group engine alone, on a real index in this
  process: choosing victims and committing their removal, no byte erased (``reclaimers`` is 0). The
  others are the whole way through a manager with so many reclaimers: the quota of a full group is cut,
  and the time runs until the bytes of all those blocks are erased and their slots free. For "shm to
  file" only the quota of shared memory is cut, so that the blocks are copied to files, verified, before
  they are erased. How they grow with the pool on a slow storage: `distant`.
* look-ups while 500 000 blocks are reclaimed, and writes into a full cache: `foreground`.
* with ``soak_s``, only a soak: many writers against a small quota; see `soak`.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.benchmarks import distant, foreground, soak, writer
from kvcm_ray.benchmarks.children import run_children
from kvcm_ray.benchmarks.private import EXACT, Control, is_idle, private_manager
from kvcm_ray.core.model import (
    CacheConfig,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecInfo,
    NfsSpec,
    StorageConfig,
    TriggerStrategy,
)
from kvcm_ray.errors import KvcmError

PARTS = ("rows", "lookups", "writes")
RECLAIMERS = (1, 2, 4)
DISTANT_POOLS = (1, 2, 4, 8, 16)
DISTANT_BLOCKS, QUICK_DISTANT_BLOCKS = 40_000, 4_000
BLOCK_BYTES = 4096  #: a page, the least that a storage can give back
BLOCKS, QUICK_BLOCKS = 100_000, 10_000
METADATA_BLOCKS, QUICK_METADATA_BLOCKS = 500_000, 50_000
FILLERS = 2
PROMPT = 512
MOVED_BLOCK_BYTES = 64 << 10
MOVED_BLOCKS, QUICK_MOVED_BLOCKS = 16_000, 2_000
ROOM = 8 << 30
TIMEOUT_S = 300.0

Report = Callable[[str], None]


def run(
    *,
    quick: bool = False,
    parts: Sequence[str] = PARTS,
    reclaimers: Sequence[int] = RECLAIMERS,
    soak_s: float | None = None,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Start managers in temporary directories, measure them, remove them. Takes some minutes.

    Returns:
        ``{"rows": [{storage, block_bytes, reclaimers, blocks, seconds, blocks_per_s}], ...}`` with what
        `foreground.lookups` and `foreground.writes` return; or ``{"soak": ...}`` with `soak_s`.

    Raises:
        KvcmError: a manager or a client did not start, or did not get done.
    """
    if soak_s is not None:
        return {"soak": soak.run(soak_s, report)}
    result: dict[str, Any] = {"rows": []}
    if "rows" in parts:
        report("metadata only")
        result["rows"].append(metadata_row(QUICK_METADATA_BLOCKS if quick else METADATA_BLOCKS))
        result["rows"] += _storage_rows(reclaimers, quick, report)
        report("a storage that takes its time")
        result["rows"] += distant.rows(DISTANT_POOLS, QUICK_DISTANT_BLOCKS if quick else DISTANT_BLOCKS)
    if "lookups" in parts:
        result |= foreground.lookups(quick, report)
    if "writes" in parts:
        result |= foreground.writes(quick, report)
    return result


# ------------------------------------------------------------------------------- metadata only


def metadata_row(blocks: int) -> dict[str, Any]:
    """Evict `blocks` blocks of an engine without a manager, in the steps that its loop would take."""
    from kvcm_ray.actors.facts import Now

    with _engine(blocks) as (engine, shrink):
        shrink()
        steps = []
        begin_s = time.perf_counter()
        while engine.state.next_reclaim_ms(Now.read().ms) is not None:
            step_s = time.perf_counter()
            done = engine.reclaim(Now.read())
            if isinstance(done, KvcmError):
                raise done
            if not done:
                break
            steps.append(time.perf_counter() - step_s)
        seconds = time.perf_counter() - begin_s
        evicted = engine.capacity()["reclaim"]["evicted_blocks"]
    return {
        "storage": "metadata",
        "block_bytes": 0,
        "reclaimers": 0,
        "blocks": evicted,
        "seconds": round(seconds, 3),
        "blocks_per_s": round(evicted / seconds),
        "step_p50_us": round(float(np.percentile(steps, 50)) * 1e6),
        "step_p99_us": round(float(np.percentile(steps, 99)) * 1e6),
    }


@contextmanager
def _engine(blocks: int) -> Iterator[tuple[Any, Callable[[], None]]]:
    """An engine that holds so many blocks, and a function that cuts its quota to a hundredth."""
    from kvcm_ray.actors.engine import GroupEngine

    folder = Path(tempfile.mkdtemp(prefix="kvcm-bench-"))
    storages = {"files": StorageConfig("files", nfs=NfsSpec(str(folder / "files")))}
    info = InstanceInfo("", "bench", "bench", 16, (LocationSpecInfo("tp0", 64),), uid="0badcafe")
    strategy = CacheReclaimStrategy("files", trigger_strategy=TriggerStrategy(used_percentage=1.0))
    group = InstanceGroup(
        "bench", ("files",), "bench", 0, InstanceGroupQuota(blocks * 64), CacheConfig(strategy)
    )
    (folder / "files").mkdir()
    engine = GroupEngine(folder, group, storages, [info])
    small = dataclasses.replace(group, quota=InstanceGroupQuota(blocks * 64 // 100))
    try:
        _fill(engine, blocks)
        yield engine, lambda: engine.configure(small, storages)
    finally:
        engine.close()
        shutil.rmtree(folder, ignore_errors=True)


def _fill(engine: Any, blocks: int) -> None:
    """Prompts of `PROMPT` new blocks, some at a time."""
    from kvcm_ray.core.mask import BlockMask
    from kvcm_ray.core.requests import FinishWrite, StartWrite

    chance = np.random.default_rng(1)
    for begin in range(0, blocks, PROMPT * 8):
        counts = [min(PROMPT, blocks - at) for at in range(begin, min(begin + PROMPT * 8, blocks), PROMPT)]
        names = [f"{begin + number:032}" for number in range(len(counts))]
        keys = [chance.integers(-(2**63), 2**63 - 1, count) for count in counts]
        starts = [StartWrite(f"s{n}", "bench", k, n, 60_000) for n, k in zip(names, keys, strict=True)]
        finishes = [
            FinishWrite(f"f{n}", "bench", n, BlockMask(offset=count))
            for n, count in zip(names, counts, strict=True)
        ]
        for reply in (*engine.submit_batch(starts), *engine.submit_batch(finishes)):
            if isinstance(reply, KvcmError):
                raise reply


# ----------------------------------------------------------------------------- with their bytes


def _storage_rows(reclaimers: Sequence[int], quick: bool, report: Report) -> list[dict[str, Any]]:
    blocks = QUICK_BLOCKS if quick else BLOCKS
    moved = QUICK_MOVED_BLOCKS if quick else MOVED_BLOCKS
    kinds: list[tuple[str, list[str], int, int]] = [
        ("shm", ["shm_01"], blocks, BLOCK_BYTES),
        ("file", ["nfs_01"], blocks, BLOCK_BYTES),
        ("shm to file", ["shm_01", "nfs_01"], moved, MOVED_BLOCK_BYTES),
    ]
    rows = []
    with private_manager(["shm:4GiB", "file:16GiB"]) as manager:
        for kind, storages, count, size in kinds:
            for pool in reclaimers:
                report(f"{kind}, {pool} reclaimers")
                manager.reclaimer(reclaimers=pool, paused=False)
                found = _reclaim(manager, kind, pool, storages, count, size)
                rows.append({"storage": kind, "block_bytes": size, "reclaimers": pool, **found})
    return rows


def _reclaim(
    manager: Control, kind: str, pool: int, storages: list[str], blocks: int, block_bytes: int
) -> dict[str, Any]:
    """Fill a group with real bytes, then cut its quota; until all that had to go is gone."""
    group = f"{kind.replace(' ', '-')}-{pool}"
    small = blocks * block_bytes // 100
    manager.create_group(group, ROOM, storages, **EXACT)
    fill(manager, group, blocks, block_bytes)
    manager.reclaimer(paused=True)
    manager.set_quota(group, small if len(storages) == 1 else ROOM, small)
    before = manager.capacity(group)
    begin_s = time.monotonic()
    manager.reclaimer(paused=False)
    end_s, after = manager.wait(
        group, lambda now: now["tiers"][0]["used_bytes"] <= small and is_idle(now), "emptied", TIMEOUT_S
    )
    seconds = end_s - begin_s
    done = sum(
        after["reclaim"][name] - before["reclaim"][name] for name in ("evicted_blocks", "demoted_blocks")
    )
    manager.call("removeInstance", instance_group=group, instance_id=group)
    return {"blocks": done, "seconds": round(seconds, 3), "blocks_per_s": round(done / seconds)}


def fill(manager: Control, group: str, blocks: int, block_bytes: int) -> None:
    """Write so many new blocks, bytes included, to an instance named like the group."""
    command = [
        "--data-dir", manager.data_dir, "--instance", group, "--group", group,
        "--block-bytes", block_bytes, "--blocks", blocks // FILLERS, "--with-bytes",
    ]  # fmt: skip
    run_children(writer.MODULE, [command] * FILLERS, TIMEOUT_S)
    manager.wait_idle(group)
