"""Do a manager's counters say what its indexes hold?

Compares the gauges of each group with sums over the records: blocks, bytes used (readable, copies in
slower tiers included, or waiting to be erased), and bytes reserved by sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.errors import KvcmError
from kvcm_ray.index import IndexReader

LOOKS = 4
PAUSE_S = 0.5

Usage = Mapping[str, Mapping[str, float]]  #: gauges of each group, as the manager tells them


def contradictions(data_dir: Path, usage: Callable[[], Usage]) -> list[str]:
    """Sentences; empty if all agrees. Looks again if not: a busy manager moves in between.

    Raises:
        Unavailable: no manager was ever started on `data_dir`.
    """
    view = RegistryView(data_dir)
    try:
        for look in range(LOOKS):
            found = _compare(usage(), {name: _count(view, name) for name in view.groups()})
            if not found or look == LOOKS - 1:
                return found
            time.sleep(PAUSE_S)
    finally:
        view.close()
    return []


def _compare(usage: Usage, counted: Mapping[str, dict[str, int]]) -> list[str]:
    found = []
    for name, facts in counted.items():
        told = usage.get(name, {})
        if not told.get("available"):
            found.append(f"group {name} does not tell its counters")
            continue
        found += [
            f"group {name} says {key} {told.get(key, 0):.0f}, its indexes hold {value}"
            for key, value in facts.items()
            if int(told.get(key, -1)) != value
        ]
    return found


def _count(view: RegistryView, group: str) -> dict[str, int]:
    blocks = used = reserved = 0
    for info in view.instances().values():
        if info.instance_group_name != group:
            continue
        try:
            reader = IndexReader(view.index_path(info))
        except KvcmError:
            continue  # reported by the check of the index
        try:
            sizes = {number: s.slot_bytes for number, s in reader.segments().items()}
            for run in reader.runs():
                alive = run.locations.take(run.alive)
                blocks += len(alive)
                used += _bytes(alive, sizes)
            used += _bytes(reader.all_copies()[1], sizes)
            used += sum(_bytes(record.locations, sizes) for record in reader.trash())
            reserved += sum(_bytes(record.locations, sizes) for record in reader.sessions())
        finally:
            reader.close()
    return {"blocks": blocks, "used_bytes": used, "reserved_bytes": reserved}


def _bytes(where: BlockLocations, sizes: Mapping[int, int]) -> int:
    """Bytes of the slots named, each counted once."""
    places = np.unique(where.segment.astype(np.uint64) << np.uint64(32) | where.slot)
    numbers, counts = np.unique(places >> np.uint64(32), return_counts=True)
    return sum(
        sizes.get(number, 0) * count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
    )
