"""`kvcm bench write`: blocks a second through start and finish, metadata only.

Every client is a process of its own (`writer`) that writes prompts of new blocks in batches: one
start_write and one finish_write a batch through the real group actor, with one batch or a window of
batches in flight. No block bytes are written, so that the figure is the manager's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.benchmarks import writer
from kvcm_ray.benchmarks.children import run_children
from kvcm_ray.benchmarks.private import private_manager

BATCH = 64
#: Batches a client keeps in flight: an engine saves several requests' blocks at the same time.
WINDOW = 16
CLIENTS = (1, 8)
SECONDS, QUICK_SECONDS = 5.0, 1.5
QUOTA = "file:8TiB"  #: segments are sparse files: nothing is written to them here


def run(
    *,
    quick: bool = False,
    clients: Sequence[int] = CLIENTS,
    batch: int = BATCH,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Start a manager in a temporary directory, measure it, remove it. Takes half a minute.

    Returns:
        ``{"rows": [{clients, window, batch, blocks_per_s, batch_p50_us, batch_p99_us}], "one_at_a_time":
        the same with one batch in flight, "index_bytes_per_block", "blocks"}``. A batch's time is start
        and finish together; bytes of the indexes (one for each row) are as allocated on disk, with
        the log and the reserve that each of them has.

    Raises:
        Unavailable: the manager or a client did not start.
    """
    time_s = seconds or (QUICK_SECONDS if quick else SECONDS)
    with private_manager([QUOTA]) as manager:
        rows = [_measure(manager.data_dir, count, WINDOW, batch, time_s) for count in clients]
        singles = [_measure(manager.data_dir, count, 1, batch, time_s) for count in clients]
        blocks, size = _index_size(manager.data_dir)
    return {
        "rows": rows,
        "one_at_a_time": singles,
        "index_bytes_per_block": round(size / blocks, 1) if blocks else None,
        "blocks": blocks,
    }


def _measure(data_dir: Path, clients: int, window: int, batch: int, seconds: float) -> dict[str, Any]:
    command = [
        "--data-dir", data_dir, "--instance", f"bench-write-{clients}-{window}",
        "--window", window, "--batch", batch, "--seconds", seconds,
    ]  # fmt: skip
    told = run_children(writer.MODULE, [command] * clients, seconds)
    times = np.concatenate([np.array(answer["batch_s"]) for answer in told])
    return {
        "clients": clients,
        "window": window,
        "batch": batch,
        "blocks_per_s": round(sum(answer["blocks"] / answer["seconds"] for answer in told)),
        "batch_p50_us": round(float(np.percentile(times, 50)) * 1e6),
        "batch_p99_us": round(float(np.percentile(times, 99)) * 1e6),
    }


def _index_size(data_dir: Path) -> tuple[int, int]:
    """Blocks and allocated bytes of all indexes."""
    from kvcm_ray.actors.view import RegistryView
    from kvcm_ray.index import IndexReader

    view = RegistryView(data_dir)
    blocks = size = 0
    for info in view.instances().values():
        path = view.index_path(info)
        reader = IndexReader(path)
        blocks += reader.key_count()
        size += (path / "data.mdb").stat().st_blocks * 512
        reader.close()
    view.close()
    return blocks, size
