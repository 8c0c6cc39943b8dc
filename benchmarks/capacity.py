"""`kvcm bench capacity`: hit blocks of a trace through a live manager that holds so many blocks.

Each cell is ``kvcm replay --quota-blocks N --policy P --window 1`` in a process of its own, against one
manager with real actors, storage, bytes and evictions: look-ups in the reader's process, their reports
flushed before each write, so that the manager sees the trace's order. Both water marks are the quota.
Blocks are small, which changes nothing but the time that it takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvcm_ray.benchmarks.private import private_manager
from kvcm_ray.errors import KvcmError

TRACE = "conversation"
POLICIES = ("lru", "adaptive")
CAPACITIES = (5_000, 10_000)
QUICK_REQUESTS = 1_000
BLOCK_BYTES = 64
TIER = "shm:1GiB"

Report = Callable[[str], None]


def run(
    *,
    quick: bool = False,
    trace: str = TRACE,
    policies: Sequence[str] = POLICIES,
    capacities: Sequence[int] = CAPACITIES,
    requests: int | None = None,
    partial_tail: bool = False,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Replay `trace` once for each policy and capacity; some minutes for all of a long one.

    Args:
        requests: only the first so many; all by default, `QUICK_REQUESTS` with `quick`.
        partial_tail: let the writes tell which last blocks are filled only partly.

    Returns:
        ``{"rows": [{trace, policy, capacity_blocks, hit_blocks, accessed_blocks, hit_ratio, requests,
        refused_blocks, wrong_bytes, seconds}], "partial_tail"}``

    Raises:
        KvcmError: the manager did not start, or a replay went wrong.
    """
    limit = requests or (QUICK_REQUESTS if quick else None)
    rows = []
    with private_manager([TIER]) as manager:
        for capacity in capacities:
            for policy in policies:
                report(f"{trace}, {policy}, {capacity} blocks")
                found = _replay(manager.data_dir, trace, policy, capacity, limit, partial_tail)
                report(f"{found['hit_blocks']} hit blocks")
                rows.append({"trace": trace, "policy": policy, "capacity_blocks": capacity, **found})
    return {"rows": rows, "partial_tail": partial_tail}


def _replay(
    data_dir: Path, trace: str, policy: str, capacity: int, limit: int | None, partial_tail: bool
) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "kvcm_ray.cli", "replay", trace, "--data-dir", str(data_dir), "--json",
        "--quota-blocks", str(capacity), "--policy", policy, "--window", "1", "--via", "actor",
        "--block-bytes", str(BLOCK_BYTES),
    ]  # fmt: skip
    if limit is not None:
        command += ["--limit", str(limit)]
    if partial_tail:
        command.append("--partial-tail")
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        found = json.loads(ran.stdout)
        names = ("hit_blocks", "accessed_blocks", "hit_ratio", "requests", "refused_blocks",
                 "wrong_bytes", "seconds")  # fmt: skip
        return {name: found[name] for name in names}
    except (ValueError, KeyError) as error:
        raise KvcmError(f"the replay failed with exit code {ran.returncode}: {ran.stdout[-500:]}") from error
