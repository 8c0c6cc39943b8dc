"""Open files of segments: bounded, shared by threads, dropped when the files were replaced.

A handle is the pair of open files of one (segment, spec). It is used under ``with cache.use(...)``;
evicting it meanwhile only closes it after its last user.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import Segment, safe_name
from kvcm_ray.errors import InvalidArgument, SegmentMissing
from kvcm_ray.storage_adapters import system
from kvcm_ray.storage_adapters.header import HEADER_BYTES

LOCK_POLL_S = 0.0005
LOCK_FILES_MAX = 2  #: idle lock files kept for each handle
FILES_PER_HANDLE = 5  #: data, header, the copy that the map holds, lock files


def data_path(directory: Path, spec_name: str) -> Path:
    return directory / f"{safe_name(spec_name)}.dat"


def header_path(directory: Path, spec_name: str) -> Path:
    return directory / f"{safe_name(spec_name)}.hdr"


def spec_size(segment: Segment, spec_name: str) -> int:
    """Bytes of one slot of a spec.

    Raises:
        InvalidArgument: the segment has no such spec.
    """
    for spec in segment.specs:
        if spec.name == spec_name:
            return spec.size
    raise InvalidArgument(f"segment {segment.path} has no spec {spec_name!r}")


class Handle:
    """Data and header file of one spec of one segment."""

    def __init__(self, directory: Path, segment: Segment, spec_name: str) -> None:
        """Opens both files.

        Raises:
            SegmentMissing: one of them does not exist.
            OSError: anything else.
        """
        self.segment = segment
        self.spec_name = spec_name
        self.size = spec_size(segment, spec_name)
        self.data_path = data_path(directory, spec_name)
        self.header_path = header_path(directory, spec_name)
        self.users = 0
        self.evicted = False
        self.data = -1
        self.header = -1
        self._map: npt.NDArray[np.uint8] | None = None
        self._locks: list[int] = []
        self._guard = threading.Lock()
        try:
            self.data = os.open(self.data_path, os.O_RDWR | os.O_CLOEXEC)
            self.header = os.open(self.header_path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            self.close()
            raise SegmentMissing(f"{error.filename} does not exist") from None
        except OSError:
            self.close()
            raise

    @property
    def unlinked(self) -> bool:
        return any(os.fstat(fd).st_nlink == 0 for fd in (self.data, self.header))

    @property
    def replaced(self) -> bool:
        """True if the paths lead to other files now, or to none."""
        for fd, path in ((self.data, self.data_path), (self.header, self.header_path)):
            try:
                there = os.stat(path)
            except OSError:
                return True
            here = os.fstat(fd)
            if (here.st_ino, here.st_dev) != (there.st_ino, there.st_dev):
                return True
        return False

    @property
    def slots(self) -> int:
        """Slots whose payload and header lie within the files."""
        within = min(
            os.fstat(self.data).st_size // self.size,
            os.fstat(self.header).st_size // HEADER_BYTES,
        )
        return min(within, self.segment.slots)

    def require(self, slots: int) -> None:
        """Both files hold the first `slots` slots.

        Raises:
            SegmentMissing.
        """
        for fd, path, need in (
            (self.data, self.data_path, slots * self.size),
            (self.header, self.header_path, slots * HEADER_BYTES),
        ):
            have = os.fstat(fd).st_size
            if have < need:
                raise SegmentMissing(f"{path} has {have} bytes, {need} are needed")

    def mapped(self, spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint8] | None:
        """The data file as memory if all (offset, length) of it can be touched safely, else None.

        Whoever touches them holds the lock of the slots, so that nobody punches them meanwhile.
        """
        end = max((offset + length for offset, length in spans), default=0)
        view = self._map
        if view is None or len(view) < end:
            view = self._make_map()
        if view is None or len(view) < end:
            return None
        address = view.ctypes.data
        for offset, length in spans:
            if not system.resident(address + offset, length):
                return None
        return view

    def _make_map(self) -> npt.NDArray[np.uint8] | None:
        with self._guard:
            length = os.fstat(self.data).st_size
            if length == 0:
                return None
            try:
                view = np.frombuffer(mmap.mmap(self.data, length), np.uint8)
            except (OSError, ValueError):
                return None  # out of address space or shrunk just now: plain reads still work
            self._map = view
            return view

    @contextlib.contextmanager
    def locked(
        self, first: int, count: int, *, exclusive: bool = False, wait_s: float = 0.0
    ) -> Iterator[bool]:
        """Hold slots ``first:first+count``; yields False if they could not be had within `wait_s`.

        Many may hold them shared (to copy), one may hold them exclusively (to punch). Every holder
        uses an open file of its own, since such locks belong to the open file.
        """
        fd = self._take_lock_file()
        try:
            deadline = time.monotonic() + wait_s
            while not (held := system.lock_range(fd, first, count, exclusive=exclusive)):
                if time.monotonic() >= deadline:
                    break
                time.sleep(LOCK_POLL_S)
            yield held
        finally:
            with contextlib.suppress(OSError):
                system.unlock_all(fd)
                fd = self._keep_lock_file(fd)
            if fd >= 0:
                os.close(fd)

    def _take_lock_file(self) -> int:
        with self._guard:
            if self._locks:
                return self._locks.pop()
        # By its number, so that it is surely the file we have open, even if the path was replaced.
        return os.open(f"/proc/self/fd/{self.header}", os.O_RDWR | os.O_CLOEXEC)

    def _keep_lock_file(self, fd: int) -> int:
        with self._guard:
            if len(self._locks) < LOCK_FILES_MAX and not self.evicted:
                self._locks.append(fd)
                return -1
        return fd

    def after_fork(self) -> None:
        self._guard = threading.Lock()
        self.close()

    def close(self) -> None:
        """Nobody uses it any more. The mapping goes when its last numpy view goes."""
        with self._guard:
            fds = [fd for fd in (self.data, self.header, *self._locks) if fd >= 0]
            self.data = self.header = -1
            self._locks, self._map = [], None
        for fd in fds:
            os.close(fd)


class HandleCache:
    """At most `handles_max` idle handles, least recently used first out."""

    def __init__(self, root: str, handles_max: int | None = None) -> None:
        self.root = Path(root)
        self._max = handles_max or _default_handles_max()
        self._guard = threading.Lock()
        self._handles: OrderedDict[tuple[str, str], Handle] = OrderedDict()
        _caches.add(self)

    @contextlib.contextmanager
    def use(self, segment: Segment, spec_name: str) -> Iterator[Handle]:
        """The handle of a spec, opened if needed.

        Raises:
            SegmentMissing, OSError.
        """
        handle = self._acquire(segment, spec_name)
        try:
            yield handle
        finally:
            self._release(handle)

    def _acquire(self, segment: Segment, spec_name: str) -> Handle:
        name = (segment.path, spec_name)
        with self._guard:
            handle = self._handles.get(name)
            if handle is not None and (handle.segment != segment or handle.unlinked):
                self._evict(name)
                handle = None
            if handle is None:
                handle = Handle(self.root / segment.path, segment, spec_name)
                self._handles[name] = handle
                self._shrink()
            handle.users += 1
            self._handles.move_to_end(name)
            return handle

    def _release(self, handle: Handle) -> None:
        with self._guard:
            handle.users -= 1
            last = handle.evicted and handle.users == 0
        if last:
            handle.close()

    def _shrink(self) -> None:
        while len(self._handles) > self._max:
            self._evict(next(iter(self._handles)))

    def _evict(self, name: tuple[str, str]) -> None:
        handle = self._handles.pop(name)
        handle.evicted = True
        if handle.users == 0:
            handle.close()

    def forget(self, segment: Segment) -> None:
        """Drop the handles of a segment."""
        with self._guard:
            for name in [n for n in self._handles if n[0] == segment.path]:
                self._evict(name)

    def close(self) -> None:
        with self._guard:
            for name in list(self._handles):
                self._evict(name)

    def __len__(self) -> int:
        return len(self._handles)

    def after_fork(self) -> None:
        """In a forked child: locks are shared with the parent's open files, so open our own."""
        self._guard = threading.Lock()
        for handle in self._handles.values():
            handle.after_fork()
        self._handles = OrderedDict()


_caches: weakref.WeakSet[HandleCache] = weakref.WeakSet()


def _default_handles_max() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    share = 4096 if soft == resource.RLIM_INFINITY else soft // 2  # the rest is the caller's
    return max(8, min(512, share // FILES_PER_HANDLE))


def _forget_all() -> None:
    for cache in list(_caches):
        cache.after_fork()


os.register_at_fork(after_in_child=_forget_all)
