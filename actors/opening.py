"""Opening the index of an instance, whatever state a crash or another boot left it in.

An index that cannot be trusted after another boot is set aside by `IndexWriter` itself; one that is
damaged, or whose folder or identity vanished though there are segments, is set aside here. Either way
the new index is filled from block headers, so damage costs no block that its storage still holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from kvcm_ray.core.model import Durability, InstanceInfo
from kvcm_ray.errors import Corrupt
from kvcm_ray.index import IndexWriter
from kvcm_ray.index.boot import read_identity, set_aside
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
        if read_identity(path) is None and _has_segments(adapters, info):
            log.error("instance %s: its index at %s is gone; rebuilding it", info.instance_id, path)
            set_aside(path)  # whatever is left; an index beside that folder is rebuilt
        writer = IndexWriter(path, instance_tag=tag, durability=durability)
    except Corrupt as error:
        log.error("instance %s: %s; rebuilding it from block headers", info.instance_id, error)
        set_aside(path)
        writer = IndexWriter(path, instance_tag=tag, durability=durability)
    if writer.needs_rebuild:
        rebuild(writer, adapters, info, int(time.time()))
    return writer


def _has_segments(adapters: Mapping[str, StorageAdapter], info: InstanceInfo) -> bool:
    return any(
        found.owner is not None and found.owner.uid == info.uid
        for adapter in adapters.values()
        for found in adapter.list_segments()
    )
