"""Callers' buffers in one of two shapes that storages take: a 2-D byte array, or one array a block.

Accepted: one contiguous buffer of ``blocks * block_bytes`` bytes, or a list of one buffer for each
block. A buffer is anything with contiguous memory in this process: numpy array of any dtype,
memoryview, bytearray, bytes (to write only), CPU torch tensor. Nothing is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument

Buffer = Any
#: What callers pass: one buffer over all blocks, or a list of one buffer a block.
BlockBuffers = Any
#: The same for each spec by name, or for the only spec.
SpecBuffers = BlockBuffers | Mapping[str, BlockBuffers]
Bytes = npt.NDArray[np.uint8]
#: Normal form: shape (blocks, block_bytes), or a list of arrays of block_bytes.
Rows = Bytes | list[Bytes]

PIECE_BYTES = 4 * 1024 * 1024  #: of blocks that are copied at once
_THREAD = threading.local()


def rows_of(buffers: BlockBuffers, blocks: int, block_bytes: int, *, writable: bool) -> Rows:
    """Views of `buffers`, one row a block.

    Raises:
        InvalidArgument: wrong number or size of buffers, memory that is not contiguous, not in this
            process, or read-only where it is to be filled.
    """
    if isinstance(buffers, list | tuple):
        if len(buffers) != blocks:
            raise InvalidArgument(f"{len(buffers)} buffers given for {blocks} blocks")
        return [
            _sized(buffer, block_bytes, f"buffer {index}", writable) for index, buffer in enumerate(buffers)
        ]
    whole = _sized(buffers, blocks * block_bytes, "the buffer", writable)
    return whole.reshape(blocks, block_bytes)


def select(rows: Rows, index: npt.NDArray[np.intp]) -> Rows:
    """The rows at ascending positions `index`, as views (fancy indexing would copy)."""
    if len(index) == 0:
        return rows[:0]
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return rows[first : last + 1]
    return [rows[i] for i in index.tolist()]


def by_spec(buffers: SpecBuffers, spec: str | None, names: Sequence[str]) -> dict[str, BlockBuffers]:
    """Which buffers belong to which spec of an instance with specs `names`.

    Raises:
        InvalidArgument: an unknown spec, none at all, or an ambiguous call (several specs, none
        named).
    """
    if isinstance(buffers, Mapping):
        if spec is not None:
            raise InvalidArgument("give either a mapping of specs or `spec`, not both")
        chosen = dict(buffers)
    elif spec is not None:
        chosen = {spec: buffers}
    elif len(names) == 1:
        chosen = {names[0]: buffers}
    else:
        raise InvalidArgument(
            f"the instance has the specs {', '.join(names)}: name one with `spec`, "
            "or give a mapping of spec to buffers"
        )
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        wrong = f"unknown spec {unknown[0]!r}" if unknown else "no buffers given"
        raise InvalidArgument(f"{wrong}; the instance has {', '.join(names)}")
    return chosen


def _sized(buffer: Buffer, size: int, what: str, writable: bool) -> Bytes:
    view = _byte_view(buffer, what)
    if view.size != size:
        raise InvalidArgument(f"{what} has {view.size} bytes where {size} are needed")
    if writable and not view.flags.writeable:
        raise InvalidArgument(f"{what} is read-only and cannot be filled")
    return view


def _byte_view(buffer: Buffer, what: str) -> Bytes:
    """A flat byte view of `buffer`'s own memory."""
    array = buffer
    if not isinstance(array, np.ndarray):
        array = _torch_bytes(buffer, what) if hasattr(buffer, "data_ptr") else _exported(buffer, what)
    if not array.flags.c_contiguous:
        raise InvalidArgument(f"{what} is not contiguous in memory")
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat


def _exported(buffer: Buffer, what: str) -> npt.NDArray[Any]:
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise InvalidArgument(f"{what} is a {type(buffer).__name__}, not a buffer") from error
    if not view.c_contiguous:
        raise InvalidArgument(f"{what} is not contiguous in memory")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def _torch_bytes(tensor: Any, what: str) -> npt.NDArray[Any]:
    if tensor.device.type != "cpu":
        raise InvalidArgument(f"{what} is on {tensor.device}; copy it to the CPU first")
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{what} is not contiguous in memory")
    import torch  # type: ignore[import-not-found]  # a tensor was given, so it is there

    flat: npt.NDArray[Any] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def staging(blocks: int, block_bytes: int) -> Bytes:
    """Memory of this thread alone, a row a block; fresh pages for each call would cost more than the copy."""
    memory: Bytes | None = getattr(_THREAD, "memory", None)
    if memory is None or memory.size < blocks * block_bytes:
        _THREAD.memory = memory = np.empty(max(PIECE_BYTES, blocks * block_bytes), np.uint8)
    return memory[: blocks * block_bytes].reshape(blocks, block_bytes)
