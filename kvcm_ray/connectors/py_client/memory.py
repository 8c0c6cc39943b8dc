"""Callers' memory, given by address: checked before it is touched, and seen as numpy arrays.

An address that is not mapped in this process is an error code, not a segmentation fault (whether memory may
be written to is not checked). Pieces that follow one another in memory count as one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.connectors.py_client.types import BlockBuffer, ClientError, ClientErrorCode, Iov, MemoryType

Bytes = npt.NDArray[np.uint8]
Rows = Sequence[Bytes] | Bytes  #: one row a block

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MS_ASYNC = 1  #: does nothing nowadays but say whether the range is mapped
_libc = ctypes.CDLL(None, use_errno=True)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """The memory of one block: (offset within the block, bytes there), ascending."""

    parts: tuple[tuple[int, Bytes], ...]

    def whole(self, size: int) -> Bytes | None:
        """The memory itself if it is one piece of the block's `size`."""
        if len(self.parts) == 1 and self.parts[0][0] == 0 and len(self.parts[0][1]) == size:
            return self.parts[0][1]
        return None

    def fill(self, block: Bytes) -> None:
        """Take over a block's bytes."""
        for begin, part in self.parts:
            np.copyto(part, block[begin : begin + len(part)])

    def store(self, block: Bytes) -> None:
        """Lay the bytes out as a block; what no piece covers is left as it is."""
        for begin, part in self.parts:
            np.copyto(block[begin : begin + len(part)], part)


def memories(buffers: Sequence[BlockBuffer], size: int) -> list[BlockMemory]:
    """The memory of each buffer, for blocks of `size` bytes.

    Raises:
        ClientError: GPU memory, no bytes or more than the block has, an address that is not mapped.
    """
    blocks = [buffer.iovs for buffer in buffers]
    _check_types([iov.type for iovs in blocks for iov in iovs if not iov.ignore])
    return [_memory(iovs, size, index) for index, iovs in enumerate(blocks)]


def _check_types(types: list[MemoryType]) -> None:
    if len(set(types)) > 1:
        raise ClientError(
            ClientErrorCode.ER_UNCONSISTENT_MEMORY_TYPE, "some buffers of the call are on a GPU, others not"
        )
    if types and types[0] is not MemoryType.CPU:
        raise ClientError(
            ClientErrorCode.ER_UNSUPPORTED_MEMORY_TYPE, "only host memory; set Iov.type to MemoryType.CPU"
        )


def _memory(iovs: list[Iov], size: int, index: int) -> BlockMemory:
    joined: list[tuple[int, int, int]] = []  #: offset within the block, address, bytes
    at = 0
    for iov in iovs:
        _check(iov, index)
        if not iov.ignore:
            last = joined[-1] if joined else (0, 0, 0)
            if joined and last[0] + last[2] == at and last[1] + last[2] == iov.base:
                joined[-1] = (last[0], last[1], last[2] + iov.size)
            else:
                joined.append((at, iov.base, iov.size))
        at += iov.size
    if not joined or at > size:
        text = f"buffer {index} has {at} bytes, the block has {size}"
        raise ClientError(ClientErrorCode.ER_INVALID_LOCAL_BUFFERS, text)
    return BlockMemory(tuple((begin, view(base, length)) for begin, base, length in joined))


def _check(iov: Iov, index: int) -> None:
    if not isinstance(iov.size, int) or iov.size <= 0:
        text = f"buffer {index} has a piece of {iov.size!r} bytes"
        raise ClientError(ClientErrorCode.ER_INVALID_LOCAL_BUFFERS, text)
    if not iov.ignore and not (isinstance(iov.base, int) and mapped(iov.base, iov.size)):
        text = f"buffer {index}: {iov.size} bytes at {iov.base!r} are no memory of this process"
        raise ClientError(ClientErrorCode.ER_INVALID_ADDRESS, text)


def mapped(address: int, length: int) -> bool:
    """Whether a range is memory of this process."""
    if not 0 < address < address + length < 1 << 63:
        return False
    begin = address & -_PAGE
    return bool(_libc.msync(begin, address + length - begin, _MS_ASYNC) == 0)


def view(address: int, length: int) -> Bytes:
    """The memory there. Whoever owns it must keep it."""
    memory: Any = (ctypes.c_uint8 * length).from_address(address)
    found: Bytes = np.frombuffer(memory, np.uint8)
    return found
