"""Leftovers of removed instances: what a death between unregistering and erasing leaves behind.

An index directory ``<instance>-<uid>`` whose uid is not registered belongs to nobody. Its segments go
first, then the directory, so that dying in the middle leaves it to be found again.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from kvcm_ray.storage_adapters import StorageAdapter


def leftover_dirs(group_dir: Path, registered_uids: Collection[str]) -> list[Path]:
    """Index directories of a group whose instance is not registered."""
    if not group_dir.is_dir():
        return []
    return [
        path
        for path in sorted(group_dir.iterdir())
        if path.is_dir() and path.name.rpartition("-")[2] not in registered_uids
    ]


def remove_leftovers(
    group_dir: Path, registered_uids: Collection[str], adapters: Iterable[StorageAdapter]
) -> int:
    """Remove segments and directories of unregistered instances; returns how many instances.

    Raises:
        StorageIOError: a segment cannot be removed (its index directory stays).
    """
    leftovers = leftover_dirs(group_dir, registered_uids)
    uids = {path.name.rpartition("-")[2] for path in leftovers}
    if uids:
        for adapter in adapters:
            drop_segments_of(adapter, uids)
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)


def drop_segments_of(adapter: StorageAdapter, uids: Collection[str]) -> int:
    """Remove all segments of these instances from a storage; returns the bytes freed."""
    freed = 0
    for found in list(adapter.list_segments()):
        if found.owner is not None and found.owner.uid in uids and found.segment is not None:
            freed += adapter.drop_segment(found.segment)
    return freed
