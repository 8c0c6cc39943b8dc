"""One LMDB environment per path and process, shared by writers and readers of that process.

LMDB must not be opened twice in one process, so environments live in a process-wide cache and are
counted. A reader opens read-only; if a writer comes later in the same process, the environment is
opened again with the writer's flags, which readers do not notice. For that every read transaction
runs under `SharedEnvironment.lock` (60 ns, and the GIL serialises readers of a process anyway).

Never ``writemap`` (a full disk would end the process by SIGBUS). Never across fork.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from kvcm_ray.core.model import Durability
from kvcm_ray.errors import Corrupt, KvcmError, NotFound, StorageFull, StorageIOError, Unavailable
from kvcm_ray.index.preflight import REMEDY, RESERVE_BYTES, check_file, data_file
from kvcm_ray.index.tables import INTEGER_KEYED, STRING_KEYED, Tables, open_tables

MAX_READERS = 1024
READER_MAP_BYTES = 1 << 30  #: LMDB takes the file's own map size if that is larger


@dataclass(frozen=True, slots=True)
class Mode:
    """How an environment is opened. Readers take it as they find it."""

    write: bool
    sync: bool = True
    map_bytes: int = READER_MAP_BYTES


READ = Mode(write=False)


def write_mode(durability: Durability, map_bytes: int) -> Mode:
    return Mode(write=True, sync=durability is Durability.COMMIT, map_bytes=map_bytes)


class SharedEnvironment:
    """An open environment with its tables; replaced in place when it must be opened again."""

    def __init__(self, path: Path, mode: Mode) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.users = 0
        self.forked = False
        self._open(mode)

    def _open(self, mode: Mode) -> None:
        """The file must have passed `check_file`, or be absent (writers only)."""
        if not mode.write:
            check_file(self.path)
        with lmdb_errors(self.path):
            env = lmdb.open(
                str(self.path),
                map_size=mode.map_bytes,
                subdir=True,
                readonly=not mode.write,
                metasync=True,
                sync=mode.sync,
                map_async=False,
                mode=0o644,
                create=mode.write,
                readahead=True,
                writemap=False,
                meminit=True,
                max_readers=MAX_READERS,
                max_dbs=len(INTEGER_KEYED) + len(STRING_KEYED),
                max_spare_txns=16,
                lock=True,
            )
        try:
            self.tables = self._tables(env, mode)
        except BaseException:
            env.close()
            raise
        self.env, self.mode, self.inode = env, mode, inode_of(self.path)
        self.page_bytes = int(env.stat()["psize"])

    def _tables(self, env: Any, mode: Mode) -> Tables:
        """Handles of the tables; made if this is a writer's environment.

        LMDB keeps a handle only if the transaction that opened it is committed, and py-lmdb ends
        read transactions otherwise; without one it uses a transaction of the environment's kind.
        """
        with lmdb_errors(self.path):
            if mode.write:
                with env.begin(write=True) as txn:
                    return open_tables(env, txn, create=True)
            try:
                return open_tables(env, None, create=False)
            except (lmdb.NotFoundError, lmdb.ReadonlyError):
                raise NotFound(f"the index at {self.path} is not set up yet") from None

    def reopen(self, mode: Mode) -> None:
        """Close and open again; no read transaction is open since `lock` is held by the caller."""
        if self.forked:
            self._refuse_fork()
        self.env.close()
        self.inode = (0, 0)  # should opening fail, the next user tries again
        self._open(mode)

    def fits(self, mode: Mode) -> bool:
        """True if users of `mode` can use it as it is."""
        if inode_of(self.path) != self.inode:
            return False
        return not mode.write or (
            self.mode.write and (self.mode.sync or not mode.sync) and self.mode.map_bytes >= mode.map_bytes
        )

    def begin(self) -> Any:
        """A read transaction with `keys` as its default table. The caller holds `lock`."""
        if self.forked:
            self._refuse_fork()
        try:
            return self.env.begin(self.tables.keys, None, False, True)
        except lmdb.MapResizedError:
            self.env.set_mapsize(0)
        except lmdb.ReadersFullError:
            self.env.reader_check()
        except lmdb.Error as error:
            raise translated(error, self.path) from error
        with lmdb_errors(self.path):
            return self.env.begin(self.tables.keys, None, False, True)

    @contextmanager
    def read(self) -> Iterator[tuple[Any, Tables]]:
        """A read transaction with its tables. For the hot paths `begin` is used directly."""
        with self.lock, lmdb_errors(self.path):
            txn = self.begin()
            try:
                yield txn, self.tables
            finally:
                txn.abort()

    def _refuse_fork(self) -> None:
        raise Unavailable(
            f"the index {self.path} was opened before this process was forked; "
            "start worker processes by spawn"
        )


_cache: dict[str, SharedEnvironment] = {}
_cache_lock = threading.Lock()


def acquire(path: Path, mode: Mode) -> SharedEnvironment:
    """The environment of `path`, opened (again) if need be. Give it back by `release`.

    A writer must hold the `WriterLock` of the path, so that no write transaction is open.
    """
    name = os.path.realpath(path)
    with _cache_lock:
        shared = _cache.get(name)
        if shared is None:
            shared = _cache[name] = SharedEnvironment(Path(name), mode)
        elif not shared.fits(mode):
            with shared.lock:
                wider = shared.mode if shared.mode.write and not mode.write else mode
                shared.reopen(wider)
        shared.users += 1
        return shared


def release(shared: SharedEnvironment) -> None:
    """Closes the environment with its last user."""
    with _cache_lock:
        shared.users -= 1
        if shared.users == 0:
            with shared.lock:
                if not shared.forked:
                    shared.env.close()
            if _cache.get(str(shared.path)) is shared:
                del _cache[str(shared.path)]


def inode_of(path: Path) -> tuple[int, int] | None:
    """Identity of the data file; None if there is none."""
    try:
        status = os.stat(data_file(path))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _after_fork() -> None:
    for shared in _cache.values():
        shared.forked = True
        shared.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))


@contextmanager
def lmdb_errors(path: Path) -> Iterator[None]:
    """Turns errors of LMDB into ours."""
    try:
        yield
    except lmdb.Error as error:
        raise translated(error, path) from error


def _is_full(path: Path) -> bool:
    try:
        disk = os.statvfs(path)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < RESERVE_BYTES


def translated(error: lmdb.Error, path: Path) -> KvcmError:
    text = str(error)
    if isinstance(error, lmdb.MapFullError):
        return StorageFull(f"the index map of {path} is full")
    if isinstance(error, lmdb.ReadersFullError):
        return Unavailable(f"{MAX_READERS} processes or threads read {path} already")
    short = os.strerror(errno.EIO) in text and _is_full(path)  # LMDB's word for a write cut short
    if short or any(reason in text for reason in _FULL):
        return StorageFull(f"no room for the index at {path}: {text}")
    damaged = (
        lmdb.CorruptedError,
        lmdb.PageNotFoundError,
        lmdb.InvalidError,
        lmdb.VersionMismatchError,
        lmdb.BadValsizeError,
    )
    if isinstance(error, damaged):
        return Corrupt(f"the index at {path} is damaged: {text}; {REMEDY}")
    return StorageIOError(f"index at {path}: {text}")
