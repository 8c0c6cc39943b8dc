"""GroupState against a naive model, under random events.

The model holds dictionaries of keys and lists of byte counts, and knows nothing of slots. It
predicts every reply and every refusal. After every event the driver re-derives all counters from
the index (`invariants.check`), and a refused event must have changed nothing. Restarts rebuild the
state from what the effects recorded, and the usage must be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcm_ray.core.events import DeletesConfirmed
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import (
    CacheConfig,
    CacheReclaimStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecGroup,
    LocationSpecInfo,
    MetaIndexerConfig,
    NfsSpec,
    QuotaConfig,
    ShmSpec,
    StorageConfig,
    StorageType,
)
from kvcm_ray.core.requests import Removed, WriteFinished
from kvcm_ray.core.session import LATE_WRITER_MS
from kvcm_ray.errors import (
    InvalidArgument,
    KeyLimitReached,
    NoStorageAvailable,
    QuotaExceeded,
    SessionNotFound,
)
from kvcm_ray.testing.group_driver import GroupDriver

SIZES = {"": 10, "a": 6, "b": 4}  #: bytes of a block by spec group
KINDS = {"shm": "ST_TAIRMEMPOOL", "nfs": "ST_NFS"}  #: candidates in order
STORAGES = {
    "shm": StorageConfig("shm", shm=ShmSpec("/dev/shm/x")),
    "nfs": StorageConfig("nfs", nfs=NfsSpec("/n")),
}
INFOS = [
    InstanceInfo(
        instance_group_name="g",
        instance_id=name,
        location_spec_infos=(LocationSpecInfo("a", 6), LocationSpecInfo("b", 4)),
        location_spec_groups=(LocationSpecGroup("a", ("a",)), LocationSpecGroup("b", ("b",))),
        uid="00000000",
    )
    for name in ("i", "j")
]

instance_ids = st.sampled_from(["i", "j"])
key_lists = st.lists(st.integers(-3, 9), max_size=7)


@dataclass
class ModelSession:
    instance_id: str
    keys: list[int]  #: new ones, repetitions included
    sizes: dict[int, int]  #: bytes of each distinct one
    storage: str
    deadline_ms: int
    removed: set[int] = field(default_factory=set)


@dataclass
class Model:
    """What there is to know about a group without slots."""

    total: int
    limits: dict[str, int]  #: bytes by storage
    max_keys: int
    delay_ms: int
    enabled: set[str]
    serving: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    sessions: dict[str, ModelSession] = field(default_factory=dict)
    trash: list[tuple[int, str, int]] = field(default_factory=list)  #: due, storage, bytes

    def held(self) -> Iterator[tuple[str, int]]:
        """(storage, bytes) of all blocks in any state."""
        yield from self.serving.values()
        yield from ((storage, nbytes) for _, storage, nbytes in self.trash)
        for session in self.sessions.values():
            yield from ((session.storage, n) for n in session.sizes.values())

    def held_on(self, storage: str) -> int:
        return sum(nbytes for name, nbytes in self.held() if name == storage)

    def known(self, instance_id: str) -> set[int]:
        """Keys that are SERVING or WRITING."""
        known = {key for owner, key in self.serving if owner == instance_id}
        for session in self.sessions.values():
            if session.instance_id == instance_id:
                known |= set(session.keys) - session.removed
        return known

    def place(self, nbytes: int) -> str | type[Exception]:
        if not self.enabled:
            return NoStorageAvailable
        total = sum(n for _, n in self.held())
        for storage in KINDS:
            limit = self.limits.get(storage, self.total)
            fits = self.held_on(storage) + nbytes <= limit and total + nbytes <= self.total
            if storage in self.enabled and fits:
                return storage
        return QuotaExceeded

    def discard(self, session: ModelSession, keys: Sequence[int], due_ms: int) -> None:
        self.trash += [(due_ms, session.storage, session.sizes[key]) for key in keys]


class GroupMachine(RuleBasedStateMachine):
    @initialize(
        total=st.integers(0, 150),
        shm=st.none() | st.integers(0, 60),
        max_keys=st.sampled_from([0, 0, 6]),
        delay_ms=st.sampled_from([0, 50]),
    )
    def begin(self, total: int, shm: int | None, max_keys: int, delay_ms: int) -> None:
        limits = {} if shm is None else {"shm": shm}
        self.model = Model(total, limits, max_keys, delay_ms, set(KINDS))
        self.driver = GroupDriver(self.group(), STORAGES, INFOS)
        self.next_session = 0
        self.finished: list[tuple[str, str, str, WriteFinished]] = []

    def group(self) -> InstanceGroup:
        model = self.model
        entries = tuple(QuotaConfig(StorageType[KINDS[s]], n) for s, n in model.limits.items())
        return InstanceGroup(
            name="g",
            storage_candidates=tuple(KINDS),
            quota=InstanceGroupQuota(model.total, entries),
            cache_config=CacheConfig(
                reclaim_strategy=CacheReclaimStrategy(delay_before_delete_ms=model.delay_ms),
                meta_indexer_config=MetaIndexerConfig(max_key_count=model.max_keys),
            ),
        )

    # -------------------------------------------------------------------------------- writing

    @rule(instance_id=instance_ids, keys=key_lists, data=st.data())
    def start(self, instance_id: str, keys: list[int], data: st.DataObject) -> None:
        grouped = data.draw(st.booleans())
        groups = [data.draw(st.sampled_from(["", "a", "b"])) for _ in keys] if grouped else []
        timeout_ms = data.draw(st.sampled_from([100, 500, 1000]))
        session_id = f"{self.next_session:032d}"
        self.next_session += 1
        known = self.model.known(instance_id)
        new = [key for key in keys if key not in known]
        sizes: dict[int, int] = {}
        for key, name in zip(keys, groups or [""] * len(keys), strict=True):
            if key not in known:
                sizes.setdefault(key, SIZES[name])
        limit = self.model.max_keys
        expected: str | type[Exception] = ""
        if new and limit and len(known) + len(sizes) > limit:
            expected = KeyLimitReached
        elif new:
            expected = self.model.place(sum(sizes.values()))

        def call() -> object:
            return self.driver.start(
                instance_id,
                keys,
                session_id,
                event_id=f"start {session_id}",
                timeout_ms=timeout_ms,
                groups=groups,
            )

        if not isinstance(expected, str):
            with pytest.raises(expected):
                call()
            return
        reply = call()
        assert reply.exists.tolist() == [key in known for key in keys]
        assert reply.storage == expected
        assert len(reply.locations) == len(new)
        for segment, key in zip(reply.locations.segment.tolist(), new, strict=True):
            assert reply.segments[segment].slot_bytes == sizes[key]
        places = zip(reply.locations.segment.tolist(), reply.locations.slot.tolist(), strict=True)
        by_key: dict[int, set[tuple[int, int]]] = {}
        for key, place in zip(new, places, strict=True):
            by_key.setdefault(key, set()).add(place)
        assert all(len(found) == 1 for found in by_key.values()), "one slot for equal keys"
        if new:
            deadline = self.driver.now_ms + timeout_ms
            self.model.sessions[session_id] = ModelSession(instance_id, new, sizes, expected, deadline)
            assert call().locations.slot.tolist() == reply.locations.slot.tolist()
            total = sum(n for _, n in self.model.held())
            assert total <= self.model.total, "an accepted write exceeds the quota"

    @precondition(lambda self: self.model.sessions)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        session_id = data.draw(st.sampled_from(sorted(self.model.sessions)))
        session = self.model.sessions[session_id]
        n = len(session.keys)
        flags = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        if data.draw(st.booleans()):
            flags = [True] * n
        with pytest.raises(InvalidArgument):
            self.driver.finish(session.instance_id, session_id, BlockMask(offset=n + 1))
        other = "j" if session.instance_id == "i" else "i"
        with pytest.raises(SessionNotFound):
            self.driver.finish(other, session_id, BlockMask(values=tuple(flags)))
        failed = {key for key, flag in zip(session.keys, flags, strict=True) if not flag}
        dropped = [key for key in session.sizes if key in failed | session.removed]
        kept = [key for key in session.sizes if key not in dropped]
        event_id = f"finish {session_id}"
        mask = BlockMask(values=tuple(flags))
        reply = self.driver.finish(session.instance_id, session_id, mask, event_id=event_id)
        assert reply == WriteFinished(len(kept), len(dropped))
        self.finished.append((session.instance_id, session_id, event_id, reply))
        del self.model.sessions[session_id]
        for key in kept:
            self.model.serving[session.instance_id, key] = session.storage, session.sizes[key]
        self.model.discard(session, dropped, self.driver.now_ms)

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        instance_id, session_id, event_id, reply = data.draw(st.sampled_from(self.finished))
        mask = BlockMask(offset=0)
        assert self.driver.finish(instance_id, session_id, mask, event_id=event_id) == reply
        with pytest.raises(SessionNotFound):
            self.driver.finish(instance_id, session_id, mask, event_id="another")

    # ------------------------------------------------------------------------- removing, time

    @rule(instance_id=instance_ids, keys=key_lists, drop_sessions=st.sampled_from([0, 0, 0, 1]))
    def remove(self, instance_id: str, keys: list[int], drop_sessions: int) -> None:
        model, now = self.model, self.driver.now_ms
        count = 0
        for key in set(keys):
            block = model.serving.pop((instance_id, key), None)
            if block is not None:
                model.trash.append((now + model.delay_ms, *block))
                count += 1
        for session_id, session in list(model.sessions.items()):
            if session.instance_id == instance_id:
                live = set(session.sizes) - session.removed
                count += len(live if drop_sessions else live & set(keys))
                session.removed |= set(keys)
                if drop_sessions:
                    model.discard(session, list(session.sizes), now + LATE_WRITER_MS)
                    del model.sessions[session_id]
        reply = self.driver.remove(instance_id, keys, drop_sessions=bool(drop_sessions))
        assert reply == Removed(count)

    @rule(ms=st.sampled_from([0, 1, 60, 400, 2000]))
    def tick(self, ms: int) -> None:
        self.driver.tick(ms)
        now = self.driver.now_ms
        for session_id, session in list(self.model.sessions.items()):
            if session.deadline_ms <= now:
                self.model.discard(session, list(session.sizes), now + LATE_WRITER_MS)
                del self.model.sessions[session_id]

    @rule(limit=st.integers(1, 4), fails=st.booleans())
    def collect(self, limit: int, fails: bool) -> None:
        now, model = self.driver.now_ms, self.model
        for record in self.driver.state.due_trash(now, limit):
            assert record.due_ms <= now
            ids = (record.trash_id,)
            if fails:
                self.driver.state.trash_failed(record.instance_id, ids, now)
                continue
            segments = self.driver.index.instances[record.instance_id].segments
            for segment in record.locations.segment.tolist():
                found = segments[segment]
                entry = (record.due_ms, found.storage, found.slot_bytes)
                model.trash.remove(entry)
            self.driver.handle(DeletesConfirmed(record.instance_id, ids, now))

    @rule()
    def drain(self) -> None:
        """All trash goes in the end, whatever happened to it."""
        self.tick(100_000)
        self.tick(LATE_WRITER_MS)
        self.driver.collect()
        self.model.trash.clear()

    # ------------------------------------------------------------------ administration, restart

    @rule()
    def restart(self) -> None:
        self.driver.restart()

    @rule(enabled=st.sets(st.sampled_from(list(KINDS))), total=st.integers(0, 200))
    def configure(self, enabled: set[str], total: int) -> None:
        self.model.enabled, self.model.total = enabled, total
        storages = {name: replace(config, is_available=name in enabled) for name, config in STORAGES.items()}
        self.driver.configure(self.group(), storages)

    @invariant()
    def usage_is_the_models(self) -> None:
        model, usage = self.model, self.driver.usage()
        reserved = sum(sum(s.sizes.values()) for s in model.sessions.values())
        assert usage["reserved_bytes"] == reserved
        assert usage["used_bytes"] == sum(n for _, n in model.held()) - reserved
        assert usage["pending_delete_bytes"] == sum(n for _, _, n in model.trash)
        assert usage["sessions"] == len(model.sessions)
        assert usage["blocks"] == len(model.serving)
        for name, kind in KINDS.items():
            own = usage["by_type"].get(kind, {"used_bytes": 0, "reserved_bytes": 0})
            assert own["used_bytes"] + own["reserved_bytes"] == model.held_on(name)
        deadlines = [session.deadline_ms for session in model.sessions.values()]
        assert self.driver.state.next_session_ms() == min(deadlines, default=None)
        served = {(i, key) for i, blocks in self.driver.index.served().items() for key in blocks}
        assert served == set(model.serving)


GroupMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestGroup = GroupMachine.TestCase
