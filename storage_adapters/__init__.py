"""Storages: segments of slots on shared memory and on files, with checksummed block headers.

`open_storage` gives the adapter of a `StorageConfig`; `base` says what all of them promise.
"""

from __future__ import annotations

from kvcm_ray.core.model import StorageConfig
from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.storage_adapters.base import (
    Buffer,
    Buffers,
    FoundSegment,
    Headers,
    SegmentOwner,
    StorageAdapter,
)

__all__ = [
    "Buffer",
    "Buffers",
    "FoundSegment",
    "Headers",
    "SegmentOwner",
    "StorageAdapter",
    "open_storage",
]


def open_storage(config: StorageConfig) -> StorageAdapter:
    """The adapter of a storage. Nothing is touched until it is used.

    Raises:
        InvalidArgument: the storage has no absolute root path.
        Unsupported: a kind of storage that this version has no adapter for.
    """
    from kvcm_ray.storage_adapters.file import FileStorage
    from kvcm_ray.storage_adapters.shm import SharedMemoryStorage

    name = config.global_unique_name
    if not (config.shm or config.nfs or config.threefs):  # a mounted 3FS is a POSIX path
        raise Unsupported(f"storage {name!r}: no adapter for {config.storage_type.name}")
    if not config.root_path.startswith("/"):
        raise InvalidArgument(f"storage {name!r}: root_path {config.root_path!r} is not absolute")
    kind = SharedMemoryStorage if config.is_shared_memory else FileStorage
    return kind(name, config.root_path)
