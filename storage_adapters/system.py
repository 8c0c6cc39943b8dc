"""System calls that Python lacks, and vectored I/O that finishes what the kernel left undone.

Everything here raises OSError. Nothing here can raise a signal: memory maps are only touched after
`resident` said that every page is there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
IOV_MAX = os.sysconf("SC_IOV_MAX")
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Answers of file systems that cannot do what was asked at all.
UNSUPPORTED_ERRNOS = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK})
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_FLOCK = struct.Struct("@hhqqi4x")  #: struct flock of 64-bit Linux

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

Bytes = npt.NDArray[np.uint8]


def allocate(fd: int, offset: int, length: int) -> bool:
    """Reserve real space. False if the file system cannot do that."""
    return _fallocate(fd, 0, offset, length)


def punch(fd: int, offset: int, length: int) -> bool:
    """Give back the whole pages of a range and zero the rest. False if that is not supported."""
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code in UNSUPPORTED_ERRNOS:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def resident(address: int, length: int) -> bool:
    """True if every page of a mapped range is in memory, so that touching it cannot fail.

    Pages beyond the end of the file are not.
    """
    begin = address & -PAGE
    pages = (address + length - begin + PAGE - 1) // PAGE
    found = np.empty(pages, np.uint8)
    if _libc.mincore(begin, pages * PAGE, found.ctypes.data) != 0:
        return False
    return bool((found & 1).all())


def data_ranges(fd: int, length: int) -> Iterator[tuple[int, int]]:
    """Ranges below `length` that were written; all of it where the file system cannot tell."""
    at = 0
    while at < length:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            if error.errno not in UNSUPPORTED_ERRNOS:
                raise
            begin, at = at, length
        if begin < length:
            yield begin, min(at, length)


def has_data(fd: int, offset: int, length: int) -> bool:
    """True if anything was ever written in the range (or the file system cannot tell)."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + length
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        if error.errno in UNSUPPORTED_ERRNOS:
            return True
        raise


def read_into(fd: int, parts: Sequence[Bytes], offset: int) -> int:
    """Fill `parts` from `offset`; returns the bytes read, less than asked only at end of file."""
    return _transfer(lambda iov, at: os.preadv(fd, iov, at), parts, offset)


def write_from(fd: int, parts: Sequence[Bytes], offset: int) -> None:
    """Write all of `parts` at `offset`."""
    total = sum(part.nbytes for part in parts)
    if _transfer(lambda iov, at: os.pwritev(fd, iov, at), parts, offset) != total:
        raise OSError(errno.EIO, "the kernel wrote nothing and gave no reason")


def _transfer(call: Callable[[Sequence[Any], int], int], parts: Sequence[Bytes], offset: int) -> int:
    done_total = 0
    for first in range(0, len(parts), IOV_MAX):
        pending: list[Any] = list(parts[first : first + IOV_MAX])
        while pending:
            done = call(pending, offset + done_total)
            if done == 0 and any(len(part) for part in pending):
                return done_total
            done_total += done
            pending = _rest(pending, done)
    return done_total


def _rest(parts: list[Any], done: int) -> list[Any]:
    """What remains of `parts` after their first `done` bytes."""
    for index, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[index + 1 :]]
        done -= len(part)
    return []


def lock_range(fd: int, begin: int, length: int, *, exclusive: bool) -> bool:
    """Try to lock a range for this open file. False if somebody else holds it.

    Such locks belong to the open file, not to the process, and vanish with it, also on kill -9.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, begin, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock_all(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def free_bytes(path: str) -> int:
    """Bytes an ordinary user can still allocate below `path` or its nearest existing parent."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path.rstrip("/"))
    stats = os.statvfs(path or "/")
    return stats.f_bavail * stats.f_frsize
