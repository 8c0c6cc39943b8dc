"""The caller's memory, seen as bytes without a copy.

`Views` holds one row of equal length a block. Where the rows lie one after another in memory it
also has them as one array, because few large copies are much faster than many small ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.storage_adapters.base import Buffer, Buffers

Bytes = npt.NDArray[np.uint8]

#: Below this size looking for adjacent rows costs more than it saves.
ADJACENT_BYTES_MIN = 32 * 1024


class Views:
    """Rows of `size` bytes. ``matrix`` is (blocks, size) if the rows are adjacent, else None."""

    __slots__ = ("matrix", "rows", "size")

    def __init__(self, buffers: Buffers, size: int, *, writable: bool) -> None:
        self.size = size
        self.matrix: Bytes | None = None
        if isinstance(buffers, np.ndarray) and buffers.ndim >= 2 and buffers.flags.c_contiguous:
            self.matrix = _as_matrix(buffers, size)
            self.rows: list[Bytes] = []
            _check_writable(self.matrix, writable)
            return
        self.rows = [_as_bytes(b, size, writable, i) for i, b in enumerate(buffers)]
        if size >= ADJACENT_BYTES_MIN:
            self.matrix = _adjacent(self.rows, size)

    def __len__(self) -> int:
        return len(self.rows) if self.matrix is None else len(self.matrix)

    def row(self, index: int) -> Bytes:
        return self.rows[index] if self.matrix is None else self.matrix[index]

    def each(self, begin: int, end: int) -> Iterable[Bytes]:
        """Rows ``begin:end`` one by one."""
        return self.rows[begin:end] if self.matrix is None else self.matrix[begin:end]

    def parts(self, begin: int, end: int) -> list[Bytes]:
        """The memory of rows ``begin:end`` in as few pieces as possible."""
        if self.matrix is None:
            return self.rows[begin:end]
        return [self.matrix[begin:end].reshape(-1)]


def _as_matrix(array: npt.NDArray[Any], size: int) -> Bytes:
    count = len(array)
    if array.dtype.hasobject:
        raise InvalidArgument("buffers of Python objects are no memory to copy")
    if count and array.nbytes != count * size:
        raise InvalidArgument(f"buffers hold {array.nbytes} bytes for {count} blocks of {size} bytes each")
    return array.reshape(-1).view(np.uint8).reshape(count, size if count else 0)


def _as_bytes(buffer: Buffer, size: int, writable: bool, index: int) -> Bytes:
    try:
        view = _memory_of(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidArgument(f"buffer {index} is not contiguous memory: {error}") from error
    if view.nbytes != size:
        raise InvalidArgument(f"buffer {index} has {view.nbytes} bytes, the spec has {size}")
    _check_writable(view, writable)
    return view


def _memory_of(buffer: Buffer) -> Bytes:
    if hasattr(buffer, "data_ptr"):
        return _tensor_bytes(buffer)
    if isinstance(buffer, np.ndarray):  # of any dtype, also those the buffer protocol does not know
        if not buffer.flags.c_contiguous:
            raise ValueError("the array has gaps")
        return buffer.reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8)


def _tensor_bytes(tensor: Any) -> Bytes:
    """Memory of a CPU tensor of any dtype (bfloat16 has no numpy twin, so no detour over numpy)."""
    if tensor.device.type != "cpu":
        raise ValueError(f"the tensor is on {tensor.device}; copy it to the CPU first")
    if not tensor.is_contiguous():
        raise ValueError("the tensor has gaps")
    count = tensor.numel() * tensor.element_size()
    if not count:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * count).from_address(tensor.data_ptr()), np.uint8)


def _check_writable(view: Bytes, writable: bool) -> None:
    if writable and not view.flags.writeable:
        raise InvalidArgument("cannot read into memory that is read-only")


def _adjacent(rows: list[Bytes], size: int) -> Bytes | None:
    """The rows as one array if each begins where the one before ends. The caller keeps `rows`."""
    first = rows[0].ctypes.data if rows else 0
    for index, row in enumerate(rows):
        if row.ctypes.data != first + index * size:
            return None
    if not rows:
        return None
    return np.lib.stride_tricks.as_strided(rows[0], (len(rows), size), (size, 1))
