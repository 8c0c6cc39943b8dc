"""How reclaiming scales with the pool when the storage is what takes the time.

Local memory and disks are emptied faster than one reclaimer can be told what to empty, so more of
them show nothing. Here each reclaimer waits `PAUSE_S` for every block that it erases, as one would for
a storage behind a network; all else is real: the group's loop, its index, files and their headers.
Reclaimers are threads of this process, since they mostly wait.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.actors.reclaimer import ReclaimerBody
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import InstanceInfo, LocationSpecInfo, ReclaimerSettings
from kvcm_ray.core.requests import U32, Keys, RemoveBlocks
from kvcm_ray.storage_adapters.file import FileStorage
from kvcm_ray.testing.blocks import SPEC
from kvcm_ray.testing.reclaim_lab import ReclaimLab

PAUSE_S = 0.0002
NAME = f"file, {PAUSE_S * 1e3:g} ms a block"
BLOCK_BYTES = 4096
PROMPT = 128
TIMEOUT_S = 120.0


class DistantStorage(FileStorage):
    """Files that take their time to be erased."""

    def delete(self, segment: Any, slots: U32, generations: U32) -> int:
        time.sleep(PAUSE_S * len(slots))
        return super().delete(segment, slots, generations)


def distant_reclaimer(view: RegistryView) -> ReclaimerBody:
    return ReclaimerBody(view, lambda c: DistantStorage(c.global_unique_name, c.root_path))


def rows(pools: tuple[int, ...], blocks: int) -> list[dict[str, Any]]:
    """One row for each size of the pool; keys as those of `reclaim.run`."""
    return [_row(pool, blocks) for pool in pools]


def _row(pool: int, blocks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kvcm-bench-") as folder:
        lab = ReclaimLab(Path(folder), [f"file:{2 * blocks * BLOCK_BYTES}"], reclaimer=distant_reclaimer)
        try:
            lab.registry.register_instance(_info())
            lab.registry.set_reclaimer_settings(ReclaimerSettings(reclaimers=pool))
            keys = _fill(lab, blocks)
            begin_s = time.monotonic()
            for begin in range(0, blocks, PROMPT):
                part = keys[begin : begin + PROMPT]
                lab.service.submit([RemoveBlocks(f"remove-{begin}", "bench", part)]).result(TIMEOUT_S)
            lab.wait_until(lab.settled, TIMEOUT_S)
            seconds = time.monotonic() - begin_s
        finally:
            lab.close()
    return {
        "storage": NAME,
        "block_bytes": BLOCK_BYTES,
        "reclaimers": pool,
        "blocks": blocks,
        "seconds": round(seconds, 3),
        "blocks_per_s": round(blocks / seconds),
    }


def _info() -> InstanceInfo:
    specs = (LocationSpecInfo(SPEC, BLOCK_BYTES),)
    return InstanceInfo("default_quota_group", "default", "bench", 16, specs)


def _fill(lab: ReclaimLab, blocks: int) -> Keys:
    keys: Keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, blocks)
    for begin in range(0, blocks, PROMPT):
        lab.put("bench", keys[begin : begin + PROMPT])
    return keys
