"""Files of slots as the contract has them: slot i at i * size, no header, nothing to prove what is there.

These are the locations of other managers, on a file system that both reach. A file is created when it is
written first, it grows and never shrinks, and processes that write different slots of it do not disturb one
another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from kvcm_ray.connectors.py_client.memory import BlockMemory, Rows
from kvcm_ray.storage_adapters import system


def read(path: str, slots: Sequence[int], size: int, wanted: Sequence[BlockMemory], out: Rows) -> None:
    """Fill the rows of `out` as far as `wanted` asks for them. Raises OSError, EOFError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for slot, memory, row in zip(slots, wanted, out, strict=True):
            for begin, part in memory.parts:
                target = row[begin : begin + len(part)]
                if system.read_into(fd, [target], slot * size + begin) != len(part):
                    raise EOFError(f"{path} ends before slot {slot}")
    finally:
        os.close(fd)


def write(path: str, slots: Sequence[int], size: int, blocks: Sequence[BlockMemory]) -> None:
    """Store blocks in their slots, synced. Raises OSError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _grow(fd, (max(slots) + 1) * size)
        for slot, memory in zip(slots, blocks, strict=True):
            for begin, part in memory.parts:
                system.write_from(fd, [part], slot * size + begin)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _grow(fd: int, length: int) -> None:
    """Like this and not by truncating: another process may just be making it longer still."""
    if os.fstat(fd).st_size < length and not system.allocate(fd, 0, length):
        system.write_from(fd, [np.zeros(1, np.uint8)], length - 1)
