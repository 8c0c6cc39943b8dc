"""Everything that a group holds, and the few steps that all its transitions share.

`GroupState` (group.py) is the public face; start.py, finish.py and remove.py are the transitions.
Each of them first decides and may refuse, then changes the ledger, and cannot fail from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvcm_ray.core.answers import Answers
from kvcm_ray.core.effects import Effect, PutTrash
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig, StorageType
from kvcm_ray.core.quota import Account, Quota
from kvcm_ray.core.records import TRASH_BLOCKS_MAX, TrashRecord
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.core.segments import SegmentTable
from kvcm_ray.core.session import Session, SessionTable
from kvcm_ray.core.trash import TrashTable
from kvcm_ray.errors import InstanceNotFound

_GENERATION_MAX = 2**32 - 1


@dataclass(slots=True)
class Instance:
    """What the group holds of one instance. SERVING blocks are in the index, only counted here."""

    info: InstanceInfo
    segments: SegmentTable
    writing: dict[int, Session]  #: session of each key that is WRITING
    key_count: int = 0  #: SERVING blocks
    next_generation: int = 1
    next_trash_id: int = 1

    def take_generation(self) -> int:
        """A number for a new session. It begins again after 2**32 sessions: no reader holds on to
        a location for that long."""
        taken = self.next_generation
        self.next_generation = taken + 1 if taken < _GENERATION_MAX else 1
        return taken


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

    def discard(self, instance: Instance, locations: BlockLocations, due_ms: int) -> list[Effect]:
        """Put blocks whose bytes are counted as used into the trash."""
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
        self.count(
            self.instances.values(), self.sessions.by_id.values(), self.trash.records.values()
        )

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
