"""What a group actor does, without Ray: requests in, one commit, replies out.

`GroupEngine` owns the group's `GroupState`, one `IndexWriter` for each instance and the storage
adapters. It decides nothing itself: it looks up the facts that an event needs in the very transaction
that will carry the event's effects, lets `GroupState` decide, and makes the effects true.

Rules: one thread at a time; a reply leaves only after its commit. If a commit fails, nothing of the
batch is answered as done and `GroupState` is rebuilt from the indexes. Once fenced, an engine refuses
everything for ever, because a newer incarnation has taken over.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcm_ray.actors.opening import open_instance_index
from kvcm_ray.actors.paths import index_dir
from kvcm_ray.actors.perform import Transaction
from kvcm_ray.actors.sweep import drop_segments_of
from kvcm_ray.core.events import (
    DeletesConfirmed,
    Event,
    FinishWriteEvent,
    GetMetaEvent,
    RemoveEvent,
    StartWriteEvent,
    Tick,
    TouchEvent,
)
from kvcm_ray.core.group import GroupState
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, Segment, StorageConfig
from kvcm_ray.core.records import TrashRecord
from kvcm_ray.core.requests import (
    FinishWrite,
    GetMeta,
    RemoveBlocks,
    Reply,
    Request,
    StartWrite,
    Touch,
    TrimInstance,
)
from kvcm_ray.errors import Fenced, InstanceNotFound, InvalidArgument, KvcmError, NoStorageAvailable
from kvcm_ray.index import IndexWriter
from kvcm_ray.storage_adapters import SegmentOwner, StorageAdapter, open_storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Now:
    """The time of an event: milliseconds of CLOCK_MONOTONIC, unix seconds."""

    ms: int
    s: int

    @staticmethod
    def read() -> Now:
        return Now(time.monotonic_ns() // 1_000_000, int(time.time()))


class GroupEngine:
    """One group's single writer.

    Args:
        data_dir: data directory of the manager.
        group, storages: configuration; see `configure`.
        instances: registered instances of the group, opened at once; those that cannot be opened
            are `broken` until they can.
    """

    def __init__(
        self,
        data_dir: Path,
        group: InstanceGroup,
        storages: Mapping[str, StorageConfig],
        instances: Iterable[InstanceInfo] = (),
    ) -> None:
        self.data_dir = data_dir
        self.group = group
        self.fenced = False
        #: Instances whose index cannot be opened, and why.
        self.broken: dict[str, KvcmError] = {}
        self._storages: dict[str, StorageConfig] = {}
        self._adapters: dict[str, StorageAdapter] = {}
        self._writers: dict[str, IndexWriter] = {}
        self._infos: dict[str, InstanceInfo] = {}
        #: Segments of each open instance by id, as the index has them.
        self._segments: dict[str, dict[int, Segment]] = {}
        self._dropped: list[Segment] = []
        self.state = GroupState(group, storages)
        self.configure(group, storages)
        for info in instances:
            self.try_open_instance(info)

    # ---------------------------------------------------------------------------- configuration

    def configure(self, group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> None:
        """Take a changed group or changed storages; acts from the next batch on."""
        for name in [n for n, a in self._adapters.items() if storages.get(n) != self._storages.get(n)]:
            self._adapters.pop(name).close()
        self.group = group
        self._storages = dict(storages)
        self.state.configure(group, self._storages)

    def adapter(self, storage: str) -> StorageAdapter:
        """The adapter of a registered storage. Raises `NoStorageAvailable` if it is not registered."""
        if storage not in self._storages:
            raise NoStorageAvailable(f"storage {storage!r} is not registered (any more)")
        if storage not in self._adapters:
            self._adapters[storage] = open_storage(self._storages[storage])
        return self._adapters[storage]

    @property
    def instances(self) -> list[str]:
        """Ids of the open instances."""
        return list(self._infos)

    def infos(self) -> list[InstanceInfo]:
        return list(self._infos.values())

    def index_path(self, instance_id: str) -> Path:
        """Directory of an open instance's index."""
        return index_dir(self.data_dir, self._infos[instance_id])

    def is_shared_memory(self, storage: str) -> bool:
        return storage in self._storages and self._storages[storage].is_shared_memory

    def open_instance(self, info: InstanceInfo) -> None:
        """Open (or make) the instance's index and take it into the state. Idempotent.

        Raises:
            InvalidArgument: another registration of that id is open.
            Corrupt, StorageFull: see `opening`.
        """
        known = self._infos.get(info.instance_id)
        if known is not None:
            if known.uid != info.uid:
                raise InvalidArgument(f"instance {info.instance_id!r} is open under another uid")
            return
        writer = open_instance_index(
            index_dir(self.data_dir, info), info, self.group.durability, self.open_adapters()
        )
        self._writers[info.instance_id] = writer
        self._infos[info.instance_id] = info
        try:
            self._load(info)
        except KvcmError as error:
            self._set_broken(info, error)
            raise
        self.broken.pop(info.instance_id, None)
        self._drop_unknown_segments(info)

    def try_open_instance(self, info: InstanceInfo) -> None:
        """`open_instance`, but an error, whatever it is, only makes the instance's requests fail."""
        try:
            self.open_instance(info)
        except Exception as error:
            self._set_broken(info, error if isinstance(error, KvcmError) else _internal(error))

    def drop_instance(self, info: InstanceInfo) -> None:
        """Forget an instance, remove its segments, then its index directory. Idempotent.

        Raises:
            StorageIOError: a segment cannot be removed; the directory stays, so call it again.
        """
        known = self._infos.get(info.instance_id)
        if known is not None and known.uid == info.uid:
            self.state.close_instance(info.instance_id)
            self._writers.pop(info.instance_id).close()
            del self._infos[info.instance_id], self._segments[info.instance_id]
        for adapter in self.open_adapters().values():
            drop_segments_of(adapter, {info.uid})
        shutil.rmtree(index_dir(self.data_dir, info), ignore_errors=True)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        for adapter in self._adapters.values():
            adapter.close()
        self._writers, self._adapters = {}, {}

    # ---------------------------------------------------------------------------------- batches

    def submit_batch(
        self, requests: Sequence[Request], now: Now | None = None
    ) -> list[Reply | KvcmError]:
        """Answer many requests with one commit for each touched instance.

        Returns one reply or one error value for each request, in order. A failed commit or a storage
        that cannot make a segment fails the requests of its instance in the batch, and changes nothing.
        """
        now = now or Now.read()
        names = {request.instance_id for request in requests}
        replies = self._answer_all(requests, now, names)
        if not isinstance(replies, KvcmError):
            return replies
        answers: list[Reply | KvcmError] = [replies] * len(requests)
        if len(names) == 1 or self.fenced:
            return answers
        # Somebody's storage or index is in trouble. Each instance for itself, so that only they fail.
        for name in sorted(names):
            index = [i for i, request in enumerate(requests) if request.instance_id == name]
            own = self._answer_all([requests[i] for i in index], now, {name})
            for position, i in enumerate(index):
                answers[i] = own if isinstance(own, KvcmError) else own[position]
        return answers

    def tick(self, now: Now | None = None) -> KvcmError | None:
        """Expire sessions whose deadline is reached, a bounded number in one commit; the error is
        the commit's. ``state.next_session_ms`` tells whether there are more."""
        return self._event(Tick((now or Now.read()).ms))

    def confirm_deletes(
        self, instance_id: str, trash_ids: tuple[int, ...], now: Now | None = None
    ) -> KvcmError | None:
        """The bytes of these trash records are gone. An instance that is gone too is no error."""
        if instance_id not in self._infos:
            return None
        self._mend(instance_id, trash_ids)
        return self._event(DeletesConfirmed(instance_id, trash_ids, (now or Now.read()).ms))

    def due_trash(self, limit: int = 64, now: Now | None = None) -> list[TrashRecord]:
        """Trash to be erased now. Each record is handed out once, until it failed or a rebuild."""
        return self.state.due_trash((now or Now.read()).ms, limit)

    def trash_failed(
        self, instance_id: str, trash_ids: tuple[int, ...], now: Now | None = None
    ) -> None:
        """Erasing these failed: `due_trash` hands them out again after a pause."""
        self.state.trash_failed(instance_id, trash_ids, (now or Now.read()).ms)

    def take_dropped_segments(self) -> list[Segment]:
        """Segments whose records are gone and whose files are to be removed; handed out once."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def segment(self, instance_id: str, segment_id: int) -> Segment | None:
        return self._segments.get(instance_id, {}).get(segment_id)

    def usage(self) -> dict[str, Any]:
        """`GroupState.usage` plus what the shell knows: plain JSON values."""
        index = {name: dataclasses.asdict(w.stats()) for name, w in self._writers.items()}
        broken = {name: error.to_dict() for name, error in self.broken.items()}
        return {**self.state.usage(), "fenced": self.fenced, "index": index, "broken": broken}

    # --------------------------------------------------------------------------------- internals

    def _event(self, event: Event) -> KvcmError | None:
        touched: set[str] = set()

        def handle(txn: Transaction) -> list[Reply | KvcmError]:
            effects = self.state.handle(event).effects
            touched.update(effect.instance_id for effect in effects)
            txn.perform(effects)
            return []

        done = self._transact(handle, touched)
        return done if isinstance(done, KvcmError) else None

    def _answer_all(
        self, requests: Sequence[Request], now: Now, names: set[str]
    ) -> list[Reply | KvcmError] | KvcmError:
        return self._transact(lambda txn: [self._answer(txn, r, now) for r in requests], names)

    def _transact(
        self, work: Callable[[Transaction], list[Reply | KvcmError]], names: set[str]
    ) -> list[Reply | KvcmError] | KvcmError:
        """Run `work`, which touches these instances, in a transaction.

        Returns its result. The error if it or its commit failed: then nothing is done, and the state of
        the instances is what the index says.
        """
        if self.fenced:
            return Fenced("a newer incarnation owns the group's indexes")
        transaction = Transaction(self._writers, self._create_segment)
        try:
            with transaction:
                replies = work(transaction)
        except Exception as cause:
            failure = cause if isinstance(cause, KvcmError) else _internal(cause)
            log.warning("group %s: nothing done: %s", self.group.name, failure)
            self._rebuild(failure, names)
            return failure
        for instance_id, segment in transaction.created:
            self._segments[instance_id][segment.segment_id] = segment
        for instance_id, segment_id in transaction.dropped:
            self._dropped.append(self._segments[instance_id].pop(segment_id))
        return replies

    def _answer(self, txn: Transaction, request: Request, now: Now) -> Reply | KvcmError:
        if request.instance_id not in self._infos:
            return self.broken.get(request.instance_id) or InstanceNotFound(
                f"instance {request.instance_id!r} is not open in group {self.group.name!r}"
            )
        full = txn.index(request.instance_id).full
        if full is not None and isinstance(request, StartWrite):
            return full  # before the state changes, so that a full disk costs no rebuild
        outcome = self.state.handle(_EVENTS[type(request)](txn, request, now))
        txn.perform(outcome.effects)
        assert outcome.reply is not None
        return outcome.reply

    def _create_segment(self, instance_id: str, segment: Segment) -> None:
        info = self._infos[instance_id]
        owner = SegmentOwner(self.group.name, instance_id, info.uid)
        self.adapter(segment.storage).create_segment(segment, owner)

    def _mend(self, instance_id: str, trash_ids: tuple[int, ...]) -> None:
        """Make files anew that vanished from below slots about to be free, or nobody could ever
        write there again."""
        records = self.state.ledger.trash.records
        known = [records[instance_id, i] for i in trash_ids if (instance_id, i) in records]
        for segment_id in {i for record in known for i in set(record.locations.segment.tolist())}:
            segment = self._segments[instance_id][segment_id]
            try:
                if problem := self.adapter(segment.storage).check_segment(segment):
                    self._create_segment(instance_id, segment)
                    log.warning("instance %s: %s; made anew, empty", instance_id, problem)
            except KvcmError as error:
                log.warning("instance %s: segment %d: %s", instance_id, segment_id, error)

    def _rebuild(self, error: KvcmError, names: set[str]) -> None:
        """Make the state of these instances again from what is committed."""
        if isinstance(error, Fenced):
            self.fenced = True
            return
        for info in [info for name, info in self._infos.items() if name in names]:
            try:
                self._load(info)
            except Exception as again:
                self._set_broken(info, again if isinstance(again, KvcmError) else _internal(again))

    def _load(self, info: InstanceInfo) -> None:
        recovered = self._writers[info.instance_id].recover()
        self._segments[info.instance_id] = {s.segment_id: s for s in recovered.segments}
        self.state.open_instance(info, recovered)

    def _set_broken(self, info: InstanceInfo, error: KvcmError) -> None:
        """Its index can be read no more; refuse its requests until `open_instance` works again."""
        log.error("instance %s is out of order: %s", info.instance_id, error)
        if info.instance_id in self.state.ledger.instances:
            self.state.close_instance(info.instance_id)
        writer = self._writers.pop(info.instance_id, None)
        if writer is not None:
            writer.close()
        self._infos.pop(info.instance_id, None)
        self._segments.pop(info.instance_id, None)
        self.broken[info.instance_id] = error

    def _drop_unknown_segments(self, info: InstanceInfo) -> None:
        """Files of segments that were never committed, or whose drop was committed only."""
        known = {s.path for s in self._segments[info.instance_id].values()}
        for adapter in self.open_adapters().values():
            for found in list(adapter.list_segments()):
                ours = found.owner is not None and found.owner.uid == info.uid
                if ours and found.segment and found.path not in known:
                    adapter.drop_segment(found.segment)

    def open_adapters(self) -> dict[str, StorageAdapter]:
        """Adapters of all storages that open; one that does not is skipped."""
        adapters = {}
        for name in self._storages:
            try:
                adapters[name] = self.adapter(name)
            except KvcmError as error:
                log.warning("group %s: storage %s: %s", self.group.name, name, error)
        return adapters


def _internal(cause: Exception) -> KvcmError:
    """A defect of ours: told to the caller as an error, and to the log with its place."""
    log.error("internal error", exc_info=cause)
    return KvcmError(f"internal error: {type(cause).__name__}: {cause}")


# ------------------------------------------------------------------- requests as events, with facts


def _start(txn: Transaction, request: StartWrite, now: Now) -> Event:
    exists, _ = txn.index(request.instance_id).lookup(request.keys)
    return StartWriteEvent(request, exists, now.ms, now.s)


def _finish(txn: Transaction, request: FinishWrite, now: Now) -> Event:
    return FinishWriteEvent(request, now.ms, now.s)


def _remove(txn: Transaction, request: RemoveBlocks, now: Now) -> Event:
    hits, found = txn.index(request.instance_id).lookup(request.keys)
    return RemoveEvent(request.event_id, request.instance_id, request.keys, hits, found, now.ms)


def _trim(txn: Transaction, request: TrimInstance, now: Now) -> Event:
    index = txn.index(request.instance_id)
    keys = index.select_written(request.begin_s, request.end_s)
    hits, found = index.lookup(keys)
    return RemoveEvent(
        request.event_id, request.instance_id, keys, hits, found, now.ms, request.drop_sessions
    )


def _get_meta(txn: Transaction, request: GetMeta, now: Now) -> Event:
    hits, found = txn.index(request.instance_id).lookup(request.keys)
    return GetMetaEvent(request.instance_id, request.keys, hits, found)


def _touch(txn: Transaction, request: Touch, now: Now) -> Event:
    return TouchEvent(request.instance_id, request.keys, request.lookups, now.ms)


_EVENTS: dict[type, Callable[..., Event]] = {
    StartWrite: _start,
    FinishWrite: _finish,
    RemoveBlocks: _remove,
    TrimInstance: _trim,
    GetMeta: _get_meta,
    Touch: _touch,
}
