"""Host memory that a GPU's driver knows: registered with CUDA, so that copies to and from it are real DMA.

A process without CUDA gets ordinary memory and nothing else happens. A driver that refuses costs a warning:
copies work with ordinary memory too, through a buffer of the driver's.

Only memory of ours is registered, not the mappings of shared-memory segments. Registering pins the pages
that are behind a range at that moment; a tier frees space by punching holes into its segments, after which
the range has other pages for the CPU, but still the old ones for the GPU. A copy from there could bring bytes
of a block that is gone, although the CPU has just verified the one that is there.
"""

from __future__ import annotations

import bisect
import logging
import mmap
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

PORTABLE = 1  #: known to all GPUs of the process; the value is CUDA's


class Ranges:
    """Ranges of addresses that do not overlap. Not thread-safe."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._begins)

    def add(self, begin: int, end: int) -> None:
        """Raises InvalidArgument if it is empty or overlaps another one."""
        at = bisect.bisect_left(self._begins, begin)
        before = at > 0 and self._ends[at - 1] > begin
        after = at < len(self._begins) and self._begins[at] < end
        if begin >= end or before or after:
            raise InvalidArgument(f"addresses {begin:#x}..{end:#x} are empty, or registered in part already")
        self._begins.insert(at, begin)
        self._ends.insert(at, end)

    def holds(self, begin: int, end: int) -> bool:
        """Whether all of it lies in one range: a copy must not cross from one to the next."""
        at = bisect.bisect_right(self._begins, begin) - 1
        return at >= 0 and end <= self._ends[at]

    def remove(self, begin: int) -> bool:
        """Forget the range that begins there; False if there is none."""
        at = bisect.bisect_left(self._begins, begin)
        if at == len(self._begins) or self._begins[at] != begin:
            return False
        del self._begins[at], self._ends[at]
        return True

    def take(self) -> list[int]:
        """Where the ranges begin; there are none afterwards."""
        begins, self._begins, self._ends = self._begins, [], []
        return begins


class HostMemory:
    """Makes buffers for copies, pinned where there is CUDA. Safe for use by several threads."""

    def __init__(self) -> None:
        self._registered = Ranges()
        self._lock = threading.Lock()
        self._refused = False

    def new(self, size: int) -> Bytes:
        """A buffer of `size` bytes, which starts a page of memory of its own if it is pinned."""
        driver = _driver()
        if driver is None or size == 0:
            return np.empty(size, np.uint8)
        buffer: Bytes = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self._register(driver, buffer)
        return buffer

    def drop(self, buffer: Bytes) -> None:
        """The buffer is given up; what was pinned is let go of before its memory is."""
        begin = int(buffer.ctypes.data)
        with self._lock:
            known = self._registered.remove(begin)
        if known:
            _unregister(begin)

    def is_pinned(self, buffer: Bytes) -> bool:
        begin = int(buffer.ctypes.data)
        with self._lock:
            return self._registered.holds(begin, begin + buffer.nbytes)

    def close(self) -> None:
        """Let go of all that is pinned; the buffers stay usable."""
        with self._lock:
            begins = self._registered.take()
        for begin in begins:
            _unregister(begin)

    def _register(self, driver: Any, buffer: Bytes) -> None:
        begin = int(buffer.ctypes.data)
        result = int(driver.cudaHostRegister(begin, buffer.nbytes, PORTABLE))
        if result == 0:
            with self._lock:
                self._registered.add(begin, begin + buffer.nbytes)
        elif not self._refused:
            self._refused = True
            log.warning(
                "the driver does not pin host memory (CUDA error %d; a limit of locked memory?); "
                "copies to and from the GPU are slower", result,
            )  # fmt: skip


def _driver() -> Any | None:
    """CUDA's runtime, if this process uses torch with a GPU; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.cudart()


def _unregister(begin: int) -> None:
    driver = _driver()
    result = 0 if driver is None else int(driver.cudaHostUnregister(begin))
    if result:
        log.warning("the driver does not let go of pinned memory (CUDA error %d)", result)
