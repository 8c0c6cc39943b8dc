"""The registry on disk: storages, groups, instances, accounts and tokens in one LMDB environment.

Key: ``<kind>/<name>`` in UTF-8. Value: 4 bytes CRC-32 of key and payload, little endian, then a msgpack
map made by `core.model.to_plain`. The CRC covers the key, so a misplaced value does not pass either.
A change may carry an event id, remembered in the same commit (``event/<id>``), so that a caller who
repeats a call after its answer was lost does not do it twice.
Every commit is fsynced whatever the groups' durability is: the registry changes rarely and everything
hangs on it. One process writes (the registry actor); any number read.

LMDB wants one environment for a path in a process, so environments are shared here.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from kvcm_ray.core.model import (
    AccessSettings,
    Account,
    InstanceGroup,
    InstanceInfo,
    ReclaimerSettings,
    StorageConfig,
    Token,
    from_plain,
    to_plain,
)
from kvcm_ray.errors import Unavailable
from kvcm_ray.index.environment import translated
from kvcm_ray.index.preflight import check_file, data_file

Record = StorageConfig | InstanceGroup | InstanceInfo | Account | Token | ReclaimerSettings | AccessSettings

KINDS: dict[type, str] = {
    StorageConfig: "storage",
    InstanceGroup: "group",
    InstanceInfo: "instance",
    Account: "account",
    Token: "token",
    ReclaimerSettings: "reclaimer",
    AccessSettings: "access",
}
MAP_SIZE = 1 << 30
EVENTS_REMEMBERED_MAX = 1_024
_EVENT = b"event/"
_POOL = "pool"  #: there is one pool of reclaimers
_DOOR = "door"  #: and one door to the manager


@dataclass(slots=True)
class Contents:
    """All records at one moment, each kind by name in name order. Treat as read-only."""

    txn_id: int
    storages: dict[str, StorageConfig]
    groups: dict[str, InstanceGroup]
    instances: dict[str, InstanceInfo]
    accounts: dict[str, Account]
    reclaimer: ReclaimerSettings | None = None  #: None: nobody has set it
    tokens: dict[str, Token] = field(default_factory=dict)  #: by digest
    access: AccessSettings = field(default_factory=AccessSettings)


class _Shared:
    """The process's environment of one path; opened for writing as soon as somebody writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env: lmdb.Environment | None = None
        self.writable = False
        self.users = 0
        self.lock = threading.Lock()

    def open(self, write: bool) -> None:
        with self.lock:
            self.users += 1
            if self.env is not None and (self.writable or not write):
                return
            if self.env is not None:
                self.env.close()
            try:
                self.env = _open_env(self.path, write)
            except BaseException:
                self.env, self.users = None, self.users - 1
                raise
            self.writable = write

    def close(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.env is not None:
                self.env.close()
                self.env, self.writable = None, False


_shared: dict[Path, _Shared] = {}
_shared_lock = threading.Lock()


def _open_env(path: Path, write: bool) -> lmdb.Environment:
    if write:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if data_file(path).exists():
        check_file(path)
    elif not write:
        raise Unavailable(f"no registry at {path}: no manager was ever started on this data directory")
    try:
        return lmdb.open(
            str(path), map_size=MAP_SIZE, subdir=True, readonly=not write, metasync=True, sync=True,
            map_async=False, writemap=False, readahead=False, meminit=True, lock=True,
            max_readers=1024, max_dbs=0, create=write, mode=0o600, max_spare_txns=4,
        )  # fmt: skip
    except lmdb.Error as error:
        raise translated(error, path) from error


class RegistryStore:
    """Typed access to the records.

    Args:
        path: directory of the environment.
        write: open for writing, creating it if needed.

    Raises:
        Unavailable: there is no registry at `path` (reading only).
        Corrupt, StorageIOError: it cannot be opened.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        with _shared_lock:
            self._env = _shared.setdefault(path, _Shared(path))
        self._env.open(write)
        self.corrupt_records = 0

    def close(self) -> None:
        self._env.close()

    @property
    def _lmdb(self) -> lmdb.Environment:
        assert self._env.env is not None, "store is closed"
        return self._env.env

    def txn_id(self) -> int:
        """Number of the last commit; costs about a microsecond."""
        return int(self._lmdb.info()["last_txnid"])

    def read(self) -> Contents:
        """Everything, in one consistent read. Damaged records are left out and counted."""
        tables: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS.values()}
        with self._lmdb.begin() as txn:
            txn_id = txn.id()
            for kind, name, value in self._records(txn):
                tables[kind][name] = value
        return Contents(
            txn_id, tables["storage"], tables["group"], tables["instance"], tables["account"],
            tables["reclaimer"].get(_POOL), tables["token"], tables["access"].get(_DOOR, AccessSettings()),
        )  # fmt: skip

    def write(
        self,
        put: Iterable[Record] = (),
        drop: Iterable[tuple[type, str]] = (),
        event_id: str = "",
    ) -> None:
        """Put and drop records in one synced commit, and remember the event id if there is one.

        Raises:
            StorageFull: the disk or the map is full; nothing was changed.
        """
        try:
            with self._lmdb.begin(write=True) as txn:
                if event_id:
                    self._remember(txn, event_id)
                for record in put:
                    key = _key(type(record), name_of(record))
                    payload = msgpack.packb(to_plain(record))
                    txn.put(key, _crc(key, payload) + payload)
                for kind, name in drop:
                    txn.delete(_key(kind, name))
        except lmdb.Error as error:
            raise translated(error, self._env.path) from error

    def done(self, event_id: str) -> bool:
        """True if a change with this event id was committed (among the last so many)."""
        if not event_id:
            return False
        with self._lmdb.begin() as txn:
            return txn.get(_EVENT + event_id.encode()) is not None

    def _remember(self, txn: lmdb.Transaction, event_id: str) -> None:
        cursor = txn.cursor()
        held = []
        if cursor.set_range(_EVENT):
            for key, value in cursor:
                if not bytes(key).startswith(_EVENT):
                    break
                held.append((bytes(value), bytes(key)))
        for _, key in sorted(held)[: max(0, len(held) - EVENTS_REMEMBERED_MAX + 1)]:
            txn.delete(key)
        txn.put(_EVENT + event_id.encode(), txn.id().to_bytes(8, "big"))

    def _records(self, txn: lmdb.Transaction) -> Iterator[tuple[str, str, Any]]:
        classes = {kind: cls for cls, kind in KINDS.items()}
        for key, value in txn.cursor():
            if bytes(key).startswith(_EVENT):
                continue
            kind, _, name = bytes(key).decode().partition("/")
            payload = bytes(value[4:])
            if bytes(value[:4]) != _crc(bytes(key), payload) or kind not in classes:
                self.corrupt_records += 1
                continue
            yield kind, name, from_plain(classes[kind], msgpack.unpackb(payload))


def name_of(record: Record) -> str:
    if isinstance(record, StorageConfig):
        return record.global_unique_name
    if isinstance(record, InstanceGroup):
        return record.name
    if isinstance(record, InstanceInfo):
        return record.instance_id
    if isinstance(record, Token):
        return record.digest
    if isinstance(record, ReclaimerSettings):
        return _POOL
    if isinstance(record, AccessSettings):
        return _DOOR
    return record.user_name


def _key(kind: type, name: str) -> bytes:
    return f"{KINDS[kind]}/{name}".encode()


def _crc(key: bytes, payload: bytes) -> bytes:
    return zlib.crc32(payload, zlib.crc32(key)).to_bytes(4, "little")
