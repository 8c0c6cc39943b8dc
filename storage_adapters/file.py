"""Storage on files of any POSIX file system: vectored reads and writes through the page cache.

Nothing is mapped, so nothing can raise SIGBUS: a full disk is an error number, a shortened file a
short read. Writes are not synced; what a power loss takes is a miss, since its header or checksum
is gone.
"""

from __future__ import annotations

from kvcm_ray.storage_adapters.path_storage import PathStorage


class FileStorage(PathStorage):
    """Segments below a directory of a file system."""
