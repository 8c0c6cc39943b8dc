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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvcm_ray.actors.facts import Facts, Now
from kvcm_ray.actors.histogram import Histogram
from kvcm_ray.actors.opening import open_instance_index
from kvcm_ray.actors.paths import index_dir
from kvcm_ray.actors.perform import Noted, Transaction
from kvcm_ray.actors.sweep import drop_segments_of
from kvcm_ray.core.events import Copied, DeletesConfirmed, Event, ReclaimEvent, Tick, Want
from kvcm_ray.core.group import GroupState
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, Segment, StorageConfig
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.records import SessionRecord, TrashRecord
from kvcm_ray.core.requests import Reply, Request, StartWrite
from kvcm_ray.errors import Fenced, InstanceNotFound, InvalidArgument, KvcmError, NoStorageAvailable
from kvcm_ray.index import IndexStats, IndexWriter
from kvcm_ray.storage_adapters import SegmentOwner, StorageAdapter, open_storage

log = logging.getLogger(__name__)


T = TypeVar("T")
R = TypeVar("R")

REFUSALS_MAX = 4  #: waiting writes of an instance that are tried in vain before the others are left


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a copying session; `copied` is None if nothing is known of it."""

    instance_id: str
    session_id: str
    copied: Copied | None


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
        self._noted: list[Noted] = []
        self.commits = Histogram()
        self._failed_storage = ""  #: the last that could not make a segment
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
    def instances(self) -> Mapping[str, InstanceInfo]:
        """The open instances by id."""
        return self._infos

    def index_path(self, instance_id: str) -> Path:
        """Directory of an open instance's index."""
        return index_dir(self.data_dir, self._infos[instance_id])

    def uid(self, instance_id: str) -> str:
        """Of the registration that is open; "" if none is."""
        info = self._infos.get(instance_id)
        return info.uid if info is not None else ""

    def is_shared_memory(self, storage: str) -> bool:
        return storage in self._storages and self._storages[storage].is_shared_memory

    def open_instance(self, info: InstanceInfo) -> None:
        """Open (or make) the instance's index and take it into the state. Idempotent; what changed
        of a registration (user data, retirement) acts from then on.

        Raises:
            InvalidArgument: another registration of that id is open.
            Corrupt, StorageFull: see `opening`.
        """
        known = self._infos.get(info.instance_id)
        if known is not None:
            if known.uid != info.uid:
                raise InvalidArgument(f"instance {info.instance_id!r} is open under another uid")
            if known != info:
                self._infos[info.instance_id] = info
                self.state.set_instance(info)
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
        self, requests: Sequence[Request], now: Now | None = None, ahead_bytes: int = 0
    ) -> list[Reply | KvcmError]:
        """Answer many requests with one commit for each touched instance.

        Returns one reply or one error value for each request, in order. A failed commit or a storage
        that cannot make a segment fails the requests of its instance in the batch, and changes nothing.

        Args:
            ahead_bytes: room that writes among them must leave, because others wait for it.
        """
        now = now or Now.read()

        def work(txn: Transaction, part: Sequence[Request]) -> list[Reply | KvcmError]:
            facts = Facts(txn, self.state, now, ahead_bytes)
            return [self._answer(facts, request) for request in part]

        return self._isolated(requests, lambda request: request.instance_id, work)

    def submit_waiting(
        self, waiting: Sequence[tuple[StartWrite, Want]], ahead_bytes: int = 0, now: Now | None = None
    ) -> list[Reply | KvcmError | None]:
        """Try writes that wait for room, each of which must leave room for those before it, and for
        `ahead_bytes` that were before all of them.

        Returns one answer for each; None for those that were not tried, as several of their instance
        were refused before them.
        """
        now = now or Now.read()

        def work(txn: Transaction, part: Sequence[tuple[StartWrite, Want]]) -> list[Reply | KvcmError | None]:
            answers: list[Reply | KvcmError | None] = []
            refusals: Counter[str] = Counter()
            ahead = ahead_bytes
            for request, want in part:
                answer: Reply | KvcmError | None = None
                stays: Want | None = want  # it goes on waiting, with this
                if refusals[want.instance_id] < REFUSALS_MAX:
                    answer = self._answer(Facts(txn, self.state, now, ahead), request)
                    stays = want_of(want.instance_id, answer) if isinstance(answer, KvcmError) else None
                if stays is not None:
                    refusals[want.instance_id] += 1
                    ahead += stays.nbytes
                answers.append(answer)
            return answers

        return self._isolated(waiting, lambda pair: pair[1].instance_id, work)

    def tick(self, now: Now | None = None) -> KvcmError | None:
        """Expire sessions whose deadline is reached, a bounded number in one commit; the error is
        the commit's. ``state.next_session_ms`` tells whether there are more."""
        done = self._event(Tick((now or Now.read()).ms))
        return done if isinstance(done, KvcmError) else None

    def reclaim(self, now: Now | None = None, wants: Sequence[Want] = ()) -> bool | KvcmError:
        """Make room: one bounded step in one commit.

        Returns True if something was done. The error is the commit's, or that of a storage that could
        make no segment; the next steps do without such a storage for a while.
        """
        now = now or Now.read()
        return self._event(ReclaimEvent(now.ms, now.s, tuple(wants)))

    def settle(
        self,
        erased: Mapping[str, Sequence[int]],
        moved: Sequence[Moved] = (),
        now: Now | None = None,
    ) -> KvcmError | None:
        """Take what reclaimers report, in one commit: trash ids by instance whose bytes are gone, and
        sessions that were copied. Instances and sessions that are gone too are no error."""
        now = now or Now.read()
        parts = [(name, tuple(ids)) for name, ids in erased.items() if name in self._infos and ids]
        for part in parts:
            self._mend(*part)
        items: list[tuple[str, tuple[int, ...] | Moved]] = [
            *parts, *((m.instance_id, m) for m in moved if m.instance_id in self._infos),
        ]  # fmt: skip

        def work(
            txn: Transaction, part: Sequence[tuple[str, tuple[int, ...] | Moved]]
        ) -> list[KvcmError | None]:
            facts = Facts(txn, self.state, now)
            for name, item in part:
                event: Event | None = (
                    facts.moved(name, item.session_id, item.copied)
                    if isinstance(item, Moved)
                    else DeletesConfirmed(name, item, now.ms)
                )
                if event is not None:
                    txn.perform(self.state.handle(event).effects)
            return [None] * len(part)

        done = self._isolated(items, lambda item: item[0], work)
        return next((error for error in done if error is not None), None)

    def confirm_deletes(
        self, instance_id: str, trash_ids: tuple[int, ...], now: Now | None = None
    ) -> KvcmError | None:
        """The bytes of these trash records are gone; see `settle`."""
        return self.settle({instance_id: trash_ids}, (), now)

    def moved(
        self, instance_id: str, session_id: str, copied: Copied | None, now: Now | None = None
    ) -> KvcmError | None:
        """A copying session has ended; see `settle`."""
        return self.settle({}, [Moved(instance_id, session_id, copied)], now)

    def due_moves(self, limit: int) -> list[SessionRecord]:
        """Sessions to be copied by a reclaimer; each is handed out once, again after a rebuild."""
        return self.state.due_moves(limit)

    def set_paused(self, paused: bool) -> None:
        """Paused, nothing is evicted or moved, and neither trash nor moves are handed out."""
        self.state.paused = paused

    def due_trash(self, limit: int = 64, now: Now | None = None) -> list[TrashRecord]:
        """Trash to be erased now. Each record is handed out once, until it failed or a rebuild."""
        return self.state.due_trash((now or Now.read()).ms, limit)

    def trash_failed(self, instance_id: str, trash_ids: tuple[int, ...], now: Now | None = None) -> None:
        """Erasing these failed: `due_trash` hands them out again after a pause."""
        self.state.trash_failed(instance_id, trash_ids, (now or Now.read()).ms)

    def take_dropped_segments(self) -> list[Segment]:
        """Segments whose records are gone and whose files are to be removed; handed out once."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def take_noted(self) -> list[Noted]:
        """What was committed of blocks that go or move and sessions that expire; handed out once."""
        noted, self._noted = self._noted, []
        return noted

    def segment(self, instance_id: str, segment_id: int) -> Segment | None:
        return self._segments.get(instance_id, {}).get(segment_id)

    def usage(self) -> dict[str, Any]:
        """`GroupState.usage` plus what the shell knows: plain JSON values."""
        return {
            **self.state.usage(),
            "fenced": self.fenced,
            "index": {name: dataclasses.asdict(stats) for name, stats in self.index_stats().items()},
            "broken": {name: error.to_dict() for name, error in self.broken.items()},
        }

    def index_stats(self) -> dict[str, IndexStats]:
        """Of each open instance."""
        return {name: writer.stats() for name, writer in self._writers.items()}

    def capacity(self, now: Now | None = None) -> dict[str, Any]:
        """The capacity report; see `GroupState.capacity`."""
        now = now or Now.read()
        return self.state.capacity(now.ms, now.s)

    # --------------------------------------------------------------------------------- internals

    def _event(self, event: Event) -> bool | KvcmError:
        """Handle what is nobody's request, in one commit; True if it had effects."""
        touched: set[str] = set()

        def work(txn: Transaction) -> bool:
            effects = self.state.handle(event).effects
            touched.update(effect.instance_id for effect in effects)
            txn.perform(effects)
            return bool(effects)

        return self._transact(work, touched)

    def _isolated(
        self,
        items: Sequence[T],
        instance_of: Callable[[T], str],
        work: Callable[[Transaction, Sequence[T]], list[R]],
    ) -> list[R | KvcmError]:
        """Do `work`, which gives one result for each item, in one transaction for all instances; if
        that fails, in one for each, so that only those in trouble fail. It is also done again if a
        storage failed: there may be others."""
        names = {instance_of(item) for item in items}
        results: list[R] | KvcmError = self._transact(lambda txn: work(txn, items), names)
        if not isinstance(results, KvcmError):
            return [*results]
        answers: list[R | KvcmError] = [results] * len(items)
        if (len(names) == 1 and not self._failed_storage) or self.fenced:
            return answers
        for name in sorted(names):
            index = [i for i, item in enumerate(items) if instance_of(item) == name]
            part = [items[i] for i in index]
            own = self._transact(lambda txn, part=part: work(txn, part), {name})  # type: ignore[misc]
            for position, i in enumerate(index):
                answers[i] = own if isinstance(own, KvcmError) else own[position]
        return answers

    def _transact(self, work: Callable[[Transaction], R], names: set[str]) -> R | KvcmError:
        """Run `work`, which touches these instances, in a transaction.

        Returns its result. The error if it or its commit failed: then nothing is done, and the state of
        the instances is what the index says.
        """
        if self.fenced:
            return Fenced("a newer incarnation owns the group's indexes")
        self._failed_storage = ""
        transaction = Transaction(self._writers, self._create_segment)
        try:
            with transaction:
                result = work(transaction)
        except Exception as cause:
            failure = cause if isinstance(cause, KvcmError) else _internal(cause)
            log.warning("group %s: nothing done: %s", self.group.name, failure)
            self._rebuild(failure, names)
            if self._failed_storage:
                self.state.storage_failed(self._failed_storage, Now.read().ms)
            return failure
        for instance_id, segment in transaction.created:
            self._segments[instance_id][segment.segment_id] = segment
        for instance_id, segment_id in transaction.dropped:
            self._dropped.append(self._segments[instance_id].pop(segment_id))
        self._noted += transaction.noted
        self.commits.add(transaction.commit_s)
        return result

    def _answer(self, facts: Facts, request: Request) -> Reply | KvcmError:
        if request.instance_id not in self._infos:
            return self.broken.get(request.instance_id) or InstanceNotFound(
                f"instance {request.instance_id!r} is not open in group {self.group.name!r}"
            )
        full = facts.txn.index(request.instance_id).full
        if full is not None and isinstance(request, StartWrite):
            return full  # before the state changes, so that a full disk costs no rebuild
        outcome = self.state.handle(facts.event(request))
        facts.txn.perform(outcome.effects)
        assert outcome.reply is not None
        return outcome.reply

    def _create_segment(self, instance_id: str, segment: Segment) -> None:
        info = self._infos[instance_id]
        owner = SegmentOwner(self.group.name, instance_id, info.uid)
        try:
            self.adapter(segment.storage).create_segment(segment, owner)
        except KvcmError:
            self._failed_storage = segment.storage
            raise

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
        now = Now.read()
        self.state.open_instance(info, recovered, now.ms, now.s)

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
