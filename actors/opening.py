"""Opening the index of an instance, whatever state a crash or another boot left it in.

An index that cannot be trusted after another boot is set aside by `IndexWriter` itself; one that is
damaged is set aside here. Either way the new index is filled from the block headers of the file tiers,
so the worst that damage costs is the blocks of shared memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from kvcm_ray.core.model import Durability, InstanceInfo
from kvcm_ray.errors import Corrupt
from kvcm_ray.index import IndexWriter
from kvcm_ray.index.boot import set_aside
from kvcm_ray.index.rebuild import rebuild
from kvcm_ray.storage_adapters import StorageAdapter

log = logging.getLogger(__name__)


def open_instance_index(
    path: Path,
    info: InstanceInfo,
    durability: Durability,
    adapters: Mapping[str, StorageAdapter],
) -> IndexWriter:
    """Claim the index as its only writer; make it if there is none.

    Raises:
        StorageFull, StorageIOError, Unavailable, Unsupported: see `IndexWriter`.
    """
    tag = f"{info.instance_id}/{info.uid}"
    try:
        writer = IndexWriter(path, instance_tag=tag, durability=durability)
    except Corrupt as error:
        log.error("instance %s: %s; rebuilding it from block headers", info.instance_id, error)
        set_aside(path)
        writer = IndexWriter(path, instance_tag=tag, durability=durability)
    if writer.needs_rebuild:
        rebuild(writer, adapters, info, int(time.time()))
    return writer
