"""The writing side of an index: one owner by epoch, one transaction and log entry a batch.

Opening claims the next epoch inside a transaction; every later transaction reads the epoch again
before it changes anything, so an older incarnation that still runs is `Fenced`. All waiting has a
deadline.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmdb

from kvcm_ray.core.model import Durability
from kvcm_ray.core.records import RecoveredInstance
from kvcm_ray.errors import Corrupt, Fenced, KvcmError, StorageFull, StorageIOError
from kvcm_ray.index import boot, codec, environment, preflight, recovery, tables
from kvcm_ray.index.batch import IndexBatch
from kvcm_ray.index.codec import Counters
from kvcm_ray.index.lock import WriterLock
from kvcm_ray.index.log import LogEntry, LogGap, follow, read_log

MAP_BYTES = 64 << 30
MAP_RESERVE_BYTES = 4 << 20  #: for removing blocks from a full index
LOCK_TIMEOUT_S = 10.0
READER_CHECK_COMMITS = 1024  #: slots of dead readers are freed every so many commits


@dataclass(frozen=True, slots=True)
class IndexStats:
    key_count: int
    bytes_on_disk: int  #: allocated, log included
    commit_seq: int
    epoch: int
    log_first: int
    log_bytes: int
    map_used_ratio: float  #: pages ever used; some of them may be free again


class IndexStore:
    """What writer and replica have in common: files, lock, transactions."""

    def __init__(
        self,
        path: Path | str,
        *,
        instance_tag: str,
        durability: Durability = Durability.PROCESS,
        map_size: int = MAP_BYTES,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        self.path = Path(path)
        self.durability = Durability(durability)
        self._map_bytes = map_size
        self._timeout_s = lock_timeout_s
        self._commits = 0
        self._allocated = 0
        self._closed = False
        self._make_folder()
        self._lock = WriterLock(self.path)
        try:
            self._lock.acquire(lock_timeout_s)
            try:
                self.needs_rebuild = self._prepare_files(boot.boot_id())
                mode = environment.write_mode(durability, map_size + MAP_RESERVE_BYTES)
                self._shared = environment.acquire(self.path, mode)
                self._set_up(instance_tag)
            finally:
                self._lock.release()
        except BaseException:
            self.close()
            raise

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageIOError(f"cannot make {self.path}: {error}") from error

    def _prepare_files(self, this_boot: str) -> bool:
        """Check or set aside what is there; returns whether the index has to be rebuilt."""
        identity = boot.read_identity(self.path)
        file = preflight.data_file(self.path)
        fresh = boot.Identity(codec.FORMAT_VERSION, this_boot, self.durability.value, True)
        self._identity = fresh
        if identity is None:
            rebuild = (self.path / boot.ASIDE_FOLDER).exists()
            self._identity = replace(fresh, complete=not rebuild)
            # Never set up: an earlier attempt died before anything was acknowledged.
            if not rebuild and file.exists():
                file.unlink()
            return rebuild
        if not boot.trusted(identity, this_boot):
            boot.set_aside(self.path)
            self._identity = replace(fresh, complete=False)
            return True
        if not file.exists():
            raise Corrupt(f"{file} is gone; {preflight.REMEDY}")
        preflight.check_file(self.path)
        self._identity = replace(fresh, complete=identity.complete)
        return not identity.complete

    def _set_up(self, instance_tag: str) -> None:
        """First records of a new index, or a check that an old one is what it should be."""
        wanted = codec.pack([codec.FORMAT_VERSION, instance_tag])
        with environment.lmdb_errors(self.path), self._shared.env.begin(write=True) as txn:
            handles = self._shared.tables
            if not txn.stat(handles.meta)["entries"]:
                tables.put_meta(txn, handles, tables.FORMAT, wanted)
                tables.put_meta(txn, handles, tables.EPOCH, codec.U64.pack(0))
                tables.put_meta(txn, handles, tables.COUNTERS, Counters().encode())
            found = tables.get_meta(txn, handles, tables.FORMAT)
        if found != wanted:
            told = codec.unpack(found) if found else "damaged"
            raise Corrupt(f"{self.path} is not the index of {instance_tag!r}: it says {told}")
        self._keep_reserve()
        if self.durability is Durability.COMMIT:
            with environment.lmdb_errors(self.path):
                self._shared.env.sync(True)  # what was committed with durability `process` before
        if boot.read_identity(self.path) != self._identity:  # a full disk takes no file, not even this
            boot.write_identity(self.path, self._identity)

    @contextmanager
    def _transaction(self) -> Iterator[IndexBatch]:
        """A write transaction with its batch; committed at the end, aborted by an exception."""
        self._lock.acquire(self._timeout_s)
        try:
            with environment.lmdb_errors(self.path):
                txn = self._shared.env.begin(self._shared.tables.keys, None, True, True)
                try:
                    handles = self._shared.tables
                    yield IndexBatch(txn, handles, self._counters(txn), self._full(txn))
                    txn.commit()
                except BaseException:
                    txn.abort()
                    raise
            self._after_commit()
        except StorageIOError:
            self._recover_environment()
            raise
        finally:
            self._lock.release()

    def _recover_environment(self) -> None:
        """After a failed sync LMDB refuses an environment; open it again, as nothing is known."""
        try:
            self._shared.env.begin().abort()
        except lmdb.Error:
            with self._shared.lock:
                self._shared.reopen(self._shared.mode)

    def _after_commit(self) -> None:
        self._commits += 1
        self._keep_reserve()
        if self._commits % READER_CHECK_COMMITS == 0:
            with suppress(KvcmError):  # the commit is done whatever happens here
                self.reader_check()

    def _keep_reserve(self) -> bool:
        """Whether there is allocated room behind the last page."""
        end = self._last_page_end()
        self._allocated = preflight.keep_reserve(self.path, end, self._allocated)
        return self._allocated >= end + preflight.reserve_bytes(end) * 3 // 4

    def _last_page_end(self) -> int:
        last: int = self._shared.env.info()["last_pgno"]
        return (last + 1) * self._shared.page_bytes

    def _counters(self, txn: Any) -> Counters:
        payload = tables.get_meta(txn, self._shared.tables, tables.COUNTERS)
        if payload is None:
            raise Corrupt(f"the counters of {self.path} are damaged; {preflight.REMEDY}")
        return Counters.decode(payload)

    def _epoch(self, txn: Any) -> int:
        payload = tables.get_meta(txn, self._shared.tables, tables.EPOCH)
        if payload is None:
            raise Corrupt(f"the epoch of {self.path} is damaged; {preflight.REMEDY}")
        return int(codec.U64.unpack(payload)[0])

    def _full(self, txn: Any) -> StorageFull | None:
        """The error for whatever would grow the index, if only a reserve of map or disk is left.

        The last page never goes down, so pages in use are counted once there is no room behind it.
        On a full disk a quarter of them has to be free: a commit copies every page that it changes,
        and what it frees can be used by the commit after the next one only.
        """
        end = self._last_page_end()
        if end >= self._map_bytes:
            room, full = self._map_bytes, f"has used its map of {self._map_bytes} bytes"
        elif not self._keep_reserve():
            room, full = end * 3 // 4, "finds no room on the disk"
        else:
            return None
        pages = 0
        for name in tables.INTEGER_KEYED + tables.STRING_KEYED:
            stat = txn.stat(getattr(self._shared.tables, name))
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        if pages * self._shared.page_bytes < room:
            return None
        return StorageFull(f"the index at {self.path} {full}")

    def stats(self) -> IndexStats:
        with self._shared.read() as (txn, _):
            counters, epoch = self._counters(txn), self._epoch(txn)
        info = self._shared.env.info()
        status = preflight.data_file(self.path).stat()
        return IndexStats(
            key_count=counters.blocks,
            bytes_on_disk=status.st_blocks * 512,
            commit_seq=counters.seq,
            epoch=epoch,
            log_first=counters.log_first,
            log_bytes=counters.log_bytes,
            map_used_ratio=self._last_page_end() / info["map_size"],
        )

    def log(self, from_seq: int) -> Iterator[LogEntry]:
        """Entries from commit `from_seq` on, up to the last one. Raises LogGap, Corrupt."""

        def read(seq: int) -> list[LogEntry]:
            with self._shared.read() as (txn, handles):
                return read_log(txn, handles, seq)

        return follow(read, from_seq)

    def snapshot(self, target: Path | str) -> None:
        """Copy the index, compacted and consistent, into a new folder; an `IndexReplica` opens it.

        The folder may be moved to another machine: it is synced and trusted in any boot.

        Raises:
            StorageFull, StorageIOError.
        """
        folder = Path(target)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageIOError(f"cannot make {folder}: {error}") from error
        with environment.lmdb_errors(folder):
            self._shared.env.copy(str(folder), compact=True)
        preflight.sync_file(preflight.data_file(folder))
        boot.write_identity(folder, replace(self._identity, durability=Durability.COMMIT.value))

    def reader_check(self) -> int:
        """Free the slots of readers that died; returns how many those were."""
        with environment.lmdb_errors(self.path):
            return int(self._shared.env.reader_check())

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_shared"):
            environment.release(self._shared)
        self._lock.close()


class IndexWriter(IndexStore):
    """The owner of an index. Raises on opening:

    Corrupt: the file is truncated, foreign or damaged; the message names file and remedy.
    Unavailable: another process stays inside a transaction for longer than `lock_timeout_s`.
    Unsupported, StorageFull, StorageIOError.

    `needs_rebuild` says that an untrusted index was set aside and this one is still empty.
    """

    epoch: int = 0

    def _set_up(self, instance_tag: str) -> None:
        super()._set_up(instance_tag)
        with environment.lmdb_errors(self.path):
            handles = self._shared.tables
            with self._shared.env.begin(handles.keys, None, True, True) as txn:
                epoch = self._epoch(txn) + 1
                this_boot = self._identity.boot
                before = tables.get_meta(txn, handles, tables.BOOT)
                batch = IndexBatch(txn, handles, self._counters(txn), None)
                expire = before is not None and before.decode() != this_boot
                batch.claim(epoch, this_boot, expire=expire)
                batch.finish(epoch)
        self.epoch = epoch
        self.reader_check()

    @contextmanager
    def begin(self) -> Iterator[IndexBatch]:
        """One transaction; committed (and logged) when the block ends, dropped by an exception.

        Raises:
            Fenced: a newer incarnation owns the index; nothing was changed.
            Unavailable: another process stays inside a transaction.
            StorageFull, StorageIOError: nothing of it may be called done.
        """
        with self._transaction() as batch:
            owner = self._epoch(batch._txn)
            if owner != self.epoch:
                raise Fenced(f"epoch {owner} owns {self.path}; this writer has epoch {self.epoch}")
            yield batch
            if batch.ops:
                batch.finish(self.epoch)

    def recover(self) -> RecoveredInstance:
        """All that `GroupState` needs.

        Damaged records, blocks in unknown segments, and copies in unknown segments or of absent
        blocks are dropped from the index first.

        Raises:
            Fenced, Corrupt: see `begin`.
        """
        with self.begin():
            pass  # raises Fenced
        found = self._read_instance()
        if found is None:
            with self.begin() as batch:
                batch.repair()
            found = self._read_instance()
        if found is None:
            raise Corrupt(f"repairing {self.path} did not help; {preflight.REMEDY}")
        return found

    def _read_instance(self) -> RecoveredInstance | None:
        """Outside a write transaction, as it is slow."""
        with self._shared.read() as (txn, handles):
            return recovery.read_instance(txn, handles, self._counters(txn))

    def rebuilt(self) -> None:
        """Say that the rebuild is done; the index that was set aside is deleted."""
        self._identity = replace(self._identity, complete=True)
        boot.write_identity(self.path, self._identity)
        self.needs_rebuild = False
        shutil.rmtree(self.path / boot.ASIDE_FOLDER, ignore_errors=True)


class IndexReplica(IndexStore):
    """A copy that follows another index by its log; `IndexWriter` opens it to take over."""

    def apply(self, entry: LogEntry) -> bool:
        """Do what one commit did. False if it is in already.

        Raises:
            LogGap: entries between the last one applied and this one are missing.
            Fenced: the entry is of an older owner than the last one applied.
        """
        epoch, ops = entry.decode()
        with self._transaction() as batch:
            seq = batch.counters.seq
            if entry.seq <= seq:
                return False
            if entry.seq != seq + 1:
                raise LogGap(f"commit {entry.seq} does not follow {seq}, the last at {self.path}")
            if epoch < self._epoch(batch._txn):
                raise Fenced(f"commit {entry.seq} is of epoch {epoch}, which has been replaced")
            batch.apply(ops)
            batch.finish(epoch)
        return True
