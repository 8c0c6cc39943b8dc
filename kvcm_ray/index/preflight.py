"""Looking at ``data.mdb`` before LMDB maps it: a truncated file would end the process by SIGBUS.

LMDB's two meta pages say which page is the last one in use. LMDB itself may leave the file a little
short of that (pages that were allocated and freed in one transaction are never written), so the
writer keeps the file longer than its last page by a reserve; then "shorter than the last page"
always means "truncated". The reserve is also what removing blocks is done with on a full disk.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from kvcm_ray.errors import Corrupt, NotFound, StorageIOError

DATA_FILE = "data.mdb"
PAGE_HEADER_BYTES = 16
META_MAGIC = 0xBEEFC0DE
META_VERSION = 1
RESERVE_BYTES = 1 << 20  #: of a small index
RESERVE_BYTES_MAX = 8 << 20
#: magic u32, version u32, address u64, map size u64; two database records, the first of which
#: begins with the page size u32; then last page u64, transaction number u64.
_META = struct.Struct("<IIQQI92xQQ")
REMEDY = "stop the manager and move the folder away: block headers rebuild the index at the next start"


def reserve_bytes(last_page_end: int) -> int:
    """A change of a few hundred blocks copies as many pages, the more the larger the index is."""
    return min(max(RESERVE_BYTES, last_page_end // 4 & -RESERVE_BYTES), RESERVE_BYTES_MAX)


def data_file(path: Path) -> Path:
    return path / DATA_FILE


def check_file(path: Path) -> None:
    """Refuse an environment whose data file is missing, foreign or shorter than its last page.

    Raises:
        NotFound: no data file.
        Corrupt: anything LMDB would choke on; the message names file and remedy.
        StorageIOError: it cannot be read.
    """
    needed, _, size = _measure(path)
    if size < needed:
        raise Corrupt(
            f"{data_file(path)} has {size} bytes but its last page ends at {needed}; {REMEDY}"
        )


def map_usage(path: Path) -> tuple[int, int]:
    """Bytes of pages that were ever used, and of the map that they must fit. Raises as `check_file`."""
    needed, map_bytes, _ = _measure(path)
    return needed, map_bytes


def _measure(path: Path) -> tuple[int, int, int]:
    """End of the last page, size of the map and size of the file, without opening LMDB."""
    file = data_file(path)
    try:
        with file.open("rb") as handle:
            head = handle.read(2 * 65536)
            size = os.fstat(handle.fileno()).st_size
    except FileNotFoundError:
        raise NotFound(f"no index at {path}") from None
    except OSError as error:
        raise StorageIOError(f"cannot read {file}: {error}") from error
    return *_newest_meta(head, file), size


def sync_file(file: Path) -> None:
    """fsync. Raises StorageIOError."""
    try:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    except OSError as error:
        raise StorageIOError(f"cannot sync {file}: {error}") from error


def _newest_meta(head: bytes, file: Path) -> tuple[int, int]:
    """End of the last page, and the size of the map, according to the newer meta page."""
    newest, needed, map_bytes, page = -1, 0, 0, 0
    for _ in range(2):
        if len(head) < page + PAGE_HEADER_BYTES + _META.size:
            raise Corrupt(f"{file} has no second meta page; {REMEDY}")
        magic, version, _, size, page_bytes, last, number = _META.unpack_from(head, page + PAGE_HEADER_BYTES)
        if magic != META_MAGIC or version != META_VERSION:
            raise Corrupt(f"{file} is not an LMDB data file (meta page at {page}); {REMEDY}")
        if page_bytes not in (4096, 8192, 16384, 32768, 65536):
            raise Corrupt(f"{file} names a page size of {page_bytes} bytes; {REMEDY}")
        if number > newest:
            newest, needed, map_bytes = number, (last + 1) * page_bytes, size
        page = page_bytes
    return needed, map_bytes


def keep_reserve(path: Path, last_page_end: int, known_end: int) -> int:
    """Make the file longer than its last page by the reserve, with its space really allocated.

    Returns how far space is known to be allocated now; `known_end` again if there is none left.
    """
    reserve = reserve_bytes(last_page_end)
    if known_end >= last_page_end + reserve * 3 // 4:
        return known_end
    try:
        handle = os.open(data_file(path), os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(handle, last_page_end, reserve)
        finally:
            os.close(handle)
    except OSError:
        return known_end
    return last_page_end + reserve
