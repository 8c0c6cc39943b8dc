"""Everything that a group holds, and the few steps that all its transitions share.

`GroupState` (group.py) is the public face; start.py, finish.py, remove.py, reclaim.py, moves.py and
holds.py are the transitions. Each of them first decides and may refuse, then changes the ledger, and
cannot fail from there on. Whichever way blocks come and go, they pass through `serve` and `forget`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.answers import Answers
from kvcm_ray.core.blocks import I64, BlockTable, Ids
from kvcm_ray.core.effects import Effect, PutTrash
from kvcm_ray.core.eviction import EvictionOrder, make_policy
from kvcm_ray.core.growth import Growth
from kvcm_ray.core.marks import policy_of
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig, StorageType
from kvcm_ray.core.quota import Account, Quota, quota_type
from kvcm_ray.core.records import TRASH_BLOCKS_MAX, PinRecord, TrashRecord
from kvcm_ray.core.requests import BlockLocations, Flags, Keys
from kvcm_ray.core.segments import SegmentTable
from kvcm_ray.core.session import Session, SessionTable
from kvcm_ray.core.trash import TrashTable
from kvcm_ray.errors import InstanceNotFound

_GENERATION_MAX = 2**32 - 1
LANES = 8  #: lanes of one instance in the eviction order: one for each storage type
KINDS = tuple(StorageType)


@dataclass(slots=True)
class Instance:
    """What the group holds of one instance. SERVING blocks are in the index, only counted here."""

    info: InstanceInfo
    segments: SegmentTable
    writing: dict[int, Session]  #: session of each key that is WRITING
    key_count: int = 0  #: SERVING blocks
    next_generation: int = 1
    next_trash_id: int = 1
    number: int = 0  #: small, unique among the open instances of the group
    serving_bytes: int = 0  #: of SERVING blocks, copies included
    pins: dict[str, PinRecord] = field(default_factory=dict)
    pinned: Counter[int] = field(default_factory=Counter)  #: pins that name each key

    @property
    def lanes(self) -> range:
        return range(self.number * LANES, (self.number + 1) * LANES)

    def lane(self, kind: StorageType) -> int:
        return self.number * LANES + int(kind)

    def take_generation(self) -> int:
        """A number for a new session. It begins again after 2**32 sessions: no reader holds on to
        a location for that long."""
        taken = self.next_generation
        self.next_generation = taken + 1 if taken < _GENERATION_MAX else 1
        return taken


@dataclass(slots=True)
class Move:
    """A session that copies blocks; `ids` are those that it was made for, -1 if gone by then."""

    session: Session
    ids: Ids
    leaving: Counter[StorageType] = field(default_factory=Counter)  #: bytes of its blocks, by type


@dataclass(slots=True)
class Moves:
    """Copying sessions by session id, and those that no reclaimer has been given yet."""

    by_id: dict[str, Move] = field(default_factory=dict)
    waiting: dict[str, None] = field(default_factory=dict)
    leaving: Counter[StorageType] = field(default_factory=Counter)  #: bytes that are to go, by type


@dataclass(slots=True)
class Plan:
    """What reclaiming remembers from one step to the next. Losing it does no harm."""

    paused: bool = False
    retry_ms: int | None = None  #: the last step found nothing that it could do; not before this
    marks_ms: int | None = None  #: when the marks were last looked at
    #: what was above its high mark and is not down to the low one: types, instance ids, None = all
    falling: set[StorageType | str | None] = field(default_factory=set)
    expiry_ms: int | None = None  #: nothing expires before this; None = look
    shares_ms: int | None = None  #: when shares of retiring instances and pins were last looked at
    full_until_ms: dict[str, int] = field(default_factory=dict)  #: storages that took no blocks lately
    promotions: dict[int, None] = field(default_factory=dict)  #: blocks hit in a slow tier
    draining: bool = False  #: some storage may still have blocks that are to leave it
    unreadable: set[int] = field(default_factory=set)  #: blocks that a move could not read
    leased: tuple[int, int] = (-1, 0)  #: (time, bytes) of the last count


class Ledger:
    """The state of a group. Invariants: see invariants.py."""

    def __init__(self, group: InstanceGroup, storages: Mapping[str, StorageConfig]) -> None:
        self.group = group
        self.storages = dict(storages)
        self.quota = Quota(group)
        self.instances: dict[str, Instance] = {}
        self.sessions = SessionTable()
        self.trash = TrashTable()
        self.answers = Answers()
        self.hit_blocks = 0  #: that readers reported, since the start of the process
        self.lookup_blocks = 0
        self.hits_below: Counter[tuple[str, StorageType]] = Counter()  #: in other tiers than the first
        self.table = BlockTable()
        self.order = EvictionOrder(make_policy(policy_of(group)))
        #: by type of the copy: blocks with one, oldest copy first
        self.copies: dict[StorageType, dict[int, None]] = {}
        self.moves = Moves()
        self.plan = Plan()
        self.growth = Growth()
        self.counters: Counter[str] = Counter()  #: blocks evicted, demoted... since the start

    def instance(self, instance_id: str) -> Instance:
        """Raises InstanceNotFound."""
        found = self.instances.get(instance_id)
        if found is None:
            raise InstanceNotFound(f"no instance {instance_id!r} in group {self.group.name!r}")
        return found

    def kind_of(self, storage: str) -> StorageType:
        """Type of a storage; unspecified if it is no longer registered."""
        config = self.storages.get(storage)
        return config.storage_type if config else StorageType.ST_UNSPECIFIED

    def by_instance(self, ids: Ids) -> list[tuple[Instance, Ids]]:
        """The blocks of each instance, in the order given."""
        numbers = self.table.instance[ids]
        if len(ids) and (numbers == numbers[0]).all():
            return [(self.numbered(int(numbers[0])), ids)]
        return [(self.numbered(n), ids[numbers == n]) for n in np.unique(numbers).tolist()]

    def numbered(self, number: int) -> Instance:
        return next(i for i in self.instances.values() if i.number == number)

    # ---------------------------------------------------------------------------- SERVING blocks

    def serve(
        self,
        instance: Instance,
        keys: Keys,
        locations: BlockLocations,
        now_ms: int,
        *,
        parent: int = -1,
        partial: bool = False,
    ) -> Ids:
        """New SERVING blocks of one session, in prefix order; `parent` is the id before the first."""
        ids = self.enter(instance, keys, locations)
        lane = instance.lane(KINDS[self.table.kind[ids[0]]])
        self.order.add(lane, ids, keys, now_ms, parent=parent, partial=partial)
        self.hold_pinned(instance, ids)
        return ids

    def enter(self, instance: Instance, keys: Keys, locations: BlockLocations) -> Ids:
        """Put SERVING blocks into the table; the order is the caller's business."""
        nbytes, kinds = self.facts(instance, locations)
        ids = self.table.add(instance.number, keys, locations, nbytes, kinds)
        instance.serving_bytes += int(nbytes.sum())
        return ids

    def facts(self, instance: Instance, locations: BlockLocations) -> tuple[I64, npt.NDArray[np.uint8]]:
        """Bytes and quota type of the slot of each location."""
        table, segment = instance.segments, locations.segment
        if len(segment) and (segment == segment[0]).all():
            ids, inverse = np.array([segment[0]]), np.zeros(len(segment), np.intp)
        else:
            ids, inverse = np.unique(segment, return_inverse=True)
        kinds = [self.quota_kind(table.segments[i].storage) for i in ids.tolist()]
        nbytes = [table.slot_bytes[i] for i in ids.tolist()]
        return np.array(nbytes, np.int64)[inverse], np.array(kinds, np.uint8)[inverse]

    def quota_kind(self, storage: str) -> StorageType:
        return quota_type(self.kind_of(storage))

    def find(self, instance: Instance, hits: Flags, found: BlockLocations) -> Ids:
        """Ids of the blocks that an event's look-up found, in order, each once."""
        ids = self.table.find(instance.number, found.take(hits))
        if (ids < 0).any():
            ids = ids[ids >= 0]
        if len(set(ids.tolist())) < len(ids):
            ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
        return ids

    def touch(self, ids: Ids, now_ms: int, *, chained: bool = True, used: bool = True) -> None:
        if len(ids):
            self.order.touch(ids, self.table.keys[ids], now_ms, chained=chained, used=used)

    def leased_bytes(self, now_ms: int) -> int:
        """Bytes of blocks that readers hold, and no pin. Counted every 100 ms at most: reads all."""
        counted_ms, nbytes = self.plan.leased
        if counted_ms < 0 or now_ms >= counted_ms + 100:
            ids = self.table.living()
            ids = ids[~self.table.pinned[ids]]
            nbytes = int(self.table.nbytes[ids[self.order.leased_until(ids) > now_ms]].sum())
            self.plan.leased = now_ms, nbytes
        return nbytes

    def hold_pinned(self, instance: Instance, ids: Ids) -> None:
        """Blocks that a pin names and that are not marked yet."""
        if not instance.pinned:
            return
        table = self.table
        named = np.fromiter((k in instance.pinned for k in table.keys[ids].tolist()), np.bool_, len(ids))
        ids = ids[named & ~table.pinned[ids]]
        table.pinned[ids] = True
        self.order.hold(ids)

    def forget(self, instance: Instance, ids: Ids, *, evicted: bool) -> BlockLocations:
        """Blocks are no longer SERVING; returns all their locations, copies included.

        The caller emits DropCopies (see `copied_keys`) and DropBlocks, and discards the locations.
        """
        table = self.table
        copied = ids[table.copied[ids]]
        locations = BlockLocations.joined([table.places.get(ids), table.copies.get(copied)])
        instance.serving_bytes -= int(table.nbytes[ids].sum() + table.nbytes[copied].sum())
        instance.key_count -= len(ids)
        self.forget_copies(copied)
        if self.plan.unreadable:
            self.plan.unreadable.difference_update(ids.tolist())
        self.order.remove(ids, table.keys[ids], evicted=evicted)
        table.remove(ids)
        return locations

    def copied_keys(self, ids: Ids) -> Keys:
        """Keys of those of the blocks that have a copy."""
        return self.table.keys[ids[self.table.copied[ids]]]

    def note_copies(self, instance: Instance, ids: Ids, locations: BlockLocations) -> None:
        """These blocks, which have none, have a copy from now on."""
        self.table.copied[ids] = True
        self.table.copies.set(ids, locations)
        instance.serving_bytes += int(self.table.nbytes[ids].sum())
        self.queue_copies(instance, ids)

    def queue_copies(self, instance: Instance, ids: Ids) -> None:
        """The copies of these blocks are the youngest of their types."""
        _, kinds = self.facts(instance, self.table.copies.get(ids))
        for block, kind in zip(ids.tolist(), kinds.tolist(), strict=True):
            self.copies.setdefault(KINDS[kind], {})[block] = None

    def forget_copies(self, ids: Ids) -> None:
        """Without counting bytes."""
        self.table.copied[ids] = False
        for block in ids.tolist():
            for queue in self.copies.values():
                queue.pop(block, None)

    def due_after_readers(self, ids: Ids, now_ms: int) -> int:
        """When slots of these blocks may be erased: readers may be at them until then."""
        due_ms = now_ms + max(self.group.delay_before_delete_ms, 0)
        return max(due_ms, int(self.order.leased_until(ids).max(initial=0)))

    # ------------------------------------------------------------------------------------ trash

    def discard(self, instance: Instance, locations: BlockLocations, due_ms: int) -> list[Effect]:
        """Put slots whose bytes are counted as used into the trash."""
        effects: list[Effect] = []
        for begin in range(0, len(locations), TRASH_BLOCKS_MAX):
            part = locations.take(slice(begin, begin + TRASH_BLOCKS_MAX))
            record = TrashRecord(instance.next_trash_id, instance.info.instance_id, due_ms, part)
            instance.next_trash_id += 1
            self.trash.put(record)
            effects.append(PutTrash(instance.info.instance_id, record))
        for storage, nbytes in instance.segments.bytes_by_storage(locations).items():
            self.quota.condemn(self.kind_of(storage), nbytes)
        return effects

    def recount(self) -> None:
        """Derive the quota from what is held. After storages changed or an instance went."""
        self.quota.forget()
        self.count(self.instances.values(), self.sessions.by_id.values(), self.trash.records.values())

    def count(
        self,
        instances: Iterable[Instance],
        sessions: Iterable[Session],
        trash: Iterable[TrashRecord],
    ) -> None:
        """Add to the quota what these instances hold, given all their sessions and trash."""
        for instance in instances:
            table = instance.segments
            for segment_id, segment in table.segments.items():
                account = self.quota.account(self.kind_of(segment.storage))
                account.used += table.taken(segment_id) * table.slot_bytes[segment_id]
        for session in sessions:
            for account, nbytes in self._bytes(session.record.instance_id, session.locations):
                account.used -= nbytes
                account.reserved += nbytes
        for record in trash:
            for account, nbytes in self._bytes(record.instance_id, record.locations):
                account.pending += nbytes

    def _bytes(self, instance_id: str, locations: BlockLocations) -> list[tuple[Account, int]]:
        table = self.instances[instance_id].segments
        by_storage = table.bytes_by_storage(locations).items()
        return [(self.quota.account(self.kind_of(name)), nbytes) for name, nbytes in by_storage]
