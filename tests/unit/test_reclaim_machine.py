"""Making room under random events: two instances on two tiers, with pins, leases, drains and restarts.

What goes first is the policies' business. This checks what must hold whatever they choose:

* the driver's invariants after every event, and that no block outlives its ancestors by a step;
* nothing but a step or an explicit removal takes a block away, and a step takes no held one;
* used + reserved never grows beyond a quota, in total and by type;
* steps are bounded, and once there is nothing more to do everything that can be is below its mark;
* a write that is told to wait gets its room, if nobody holds anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcm_ray.core import effects as fx
from kvcm_ray.core.events import Want
from kvcm_ray.core.marks import marks_of, step_blocks
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import LocationSpecGroup, ReclaimPolicy
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.records import SessionKind
from kvcm_ray.errors import KeyLimitReached, NoStorageAvailable, QuotaExceeded
from kvcm_ray.testing.group_driver import GroupDriver
from kvcm_ray.testing.small_groups import BLOCK, NFS, SHM, STORAGES, group_of, instance

GROUPS = (LocationSpecGroup("a", ("a",)),)  #: blocks of 6 bytes; all others have 10
INFOS = [instance(name, location_spec_groups=GROUPS) for name in "ij"]

names = st.sampled_from("ij")


@st.composite
def chains(draw: st.DrawFn) -> list[int]:
    """A prompt: some start with the same blocks."""
    shared = [100, 101, 102][: draw(st.integers(0, 3))]
    branch = draw(st.integers(0, 3))
    return shared + [10 * branch + i for i in range(draw(st.integers(0 if shared else 1, 6)))]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "blocks": draw(st.integers(6, 24)),
        "shm": draw(st.none() | st.integers(2, 12)),
        "nfs": draw(st.none() | st.integers(5, 16)),
        "storages": draw(st.sampled_from([("shm", "nfs"), ("nfs",), ("nfs", "shm")])),
        "policy": draw(st.sampled_from(list(ReclaimPolicy))),
        "high": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        "low": draw(st.sampled_from([0.0, 0.3, 0.5])),
        "max_keys": draw(st.sampled_from([0, 0, 10])),
        "step": draw(st.sampled_from([0, 0, 2])),
        "delay_ms": draw(st.sampled_from([0, 30])),
        "ttl_s": draw(st.sampled_from([0, 0, 0, 5])),
    }


class ReclaimMachine(RuleBasedStateMachine):
    @initialize(configuration=configurations())
    def begin(self, configuration: dict[str, Any]) -> None:
        self.driver = GroupDriver(group_of(**configuration), STORAGES, INFOS)
        self.sessions: dict[str, str] = {}
        self.number = 0
        self.blocks = self.contents()
        self.held = self.levels()
        self.leased: dict[tuple[str, int], tuple[int, int]] = {}  #: block -> (its birth, until)
        self.put([("i", [100, 101, 0, 1], False), ("j", [100, 101, 102], True), ("i", [20, 21], False)])

    # ---------------------------------------------------------------------------- what there is

    def contents(self) -> dict[tuple[str, int], int]:
        """SERVING blocks, with a number that tells blocks of the same key apart."""
        kept = self.driver.index.instances
        return {(name, key): kept[name].born[key] for name in kept for key in kept[name].served}

    def levels(self) -> dict[str, int]:
        quota = self.driver.state.ledger.quota
        return {"total": quota.total().held, "shm": quota.account(SHM).held, "nfs": quota.account(NFS).held}

    def quotas(self) -> dict[str, int]:
        quota = self.driver.state.ledger.quota
        return {
            "total": quota.capacity,
            **{n: quota.capacities[k] for n, k in (("shm", SHM), ("nfs", NFS)) if k in quota.capacities},
        }

    def is_held(self, block: tuple[str, int]) -> bool:
        """Pinned or leased."""
        name, key = block
        if any(key in pin.keys for pin in self.driver.index.instances[name].pins.values()):
            return True
        birth, until_ms = self.leased.get(block, (0, 0))
        return birth == self.blocks.get(block) and until_ms > self.driver.now_ms

    def write_sessions(self) -> Iterator[str]:
        for session_id, session in self.driver.state.ledger.sessions.by_id.items():
            if session.record.kind is SessionKind.WRITE:
                yield session_id

    # -------------------------------------------------------------------------------- writing

    def begin_write(self, name: str, keys: list[int], small: bool, tail: bool) -> str | None:
        """The session of a write, which waits for room if that makes sense."""
        self.number += 1
        session_id = f"{self.number:032d}"
        facts: dict[str, Any] = {"timeout_ms": 1_000, "partial_tail": tail}
        if small:
            facts["groups"] = ["a"] * len(keys)
        for _ in range(12):  # making room may take blocks that a retiring instance has already
            try:
                self.driver.start(name, keys, session_id, **facts)
                return session_id
            except NoStorageAvailable:
                return None
            except (QuotaExceeded, KeyLimitReached) as refusal:
                told, want = str(refusal), want_of(name, refusal)
            note(told)
            if want is None:
                return None
            self.make_room([want])
        assert self.somebody_holds_something(), f"no room was made: {told}"
        return None

    @rule(name=names, keys=chains(), small=st.booleans(), tail=st.booleans())
    def write(self, name: str, keys: list[int], small: bool, tail: bool) -> None:
        session_id = self.begin_write(name, keys, small, tail)
        if session_id in self.driver.state.ledger.sessions.by_id:
            self.sessions[session_id] = name

    @rule(writes=st.lists(st.tuples(names, chains(), st.booleans()), min_size=1, max_size=4))
    def put(self, writes: list[tuple[str, list[int], bool]]) -> None:
        """Write and finish at once."""
        for name, keys, tail in writes:
            session_id = self.begin_write(name, keys, False, tail)
            if session_id in self.driver.state.ledger.sessions.by_id:
                self.sessions[session_id] = name
                self.end_write(session_id)

    @rule(writes=st.lists(st.tuples(names, chains(), st.booleans()), min_size=1, max_size=4))
    def put_more(self, writes: list[tuple[str, list[int], bool]]) -> None:
        """The same: half of what happens to a group is this."""
        self.put(writes)

    def end_write(self, session_id: str, flags: Sequence[bool] = ()) -> None:
        name = self.sessions.pop(session_id)
        session = self.driver.state.ledger.sessions.by_id[session_id]
        mask = BlockMask(values=tuple(flags)) if flags else BlockMask(offset=len(session.record.keys))
        self.driver.finish(name, session_id, mask)
        self.blocks |= self.contents()

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        session_id = data.draw(st.sampled_from(sorted(self.sessions)))
        session = self.driver.state.ledger.sessions.by_id.get(session_id)
        if session is None:
            del self.sessions[session_id]
            return
        count = len(session.record.keys)
        self.end_write(session_id, data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))

    def somebody_holds_something(self) -> bool:
        delayed = self.driver.state.next_trash_ms() is not None  # erased after the readers' delay
        moves = self.driver.state.ledger.moves.by_id
        held = any(self.is_held(block) for block in self.blocks)
        return bool(delayed or moves or held or list(self.write_sessions()))

    # ---------------------------------------------------------------------- using and holding

    @rule(name=names, keys=chains(), chained=st.booleans())
    def touch(self, name: str, keys: list[int], chained: bool) -> None:
        self.driver.touch(name, keys, chained=chained)

    @rule(name=names, keys=chains(), lease_ms=st.sampled_from([1, 100, 3_000]))
    def lease(self, name: str, keys: list[int], lease_ms: int) -> None:
        self.driver.lease(name, keys, lease_ms)
        until_ms = self.driver.now_ms + lease_ms
        for block in {(name, key) for key in keys} & self.blocks.keys():
            birth, before = self.leased.get(block, (0, 0))
            longer = max(before, until_ms) if birth == self.blocks[block] else until_ms
            self.leased[block] = self.blocks[block], longer

    @rule(name=names, keys=chains(), pin=st.sampled_from("pq"), seconds=st.sampled_from([0, 0, 2]))
    def pin(self, name: str, keys: list[int], pin: str, seconds: int) -> None:
        self.driver.pin(name, pin, keys, until_s=self.driver.now_s + seconds if seconds else 0)

    @rule(name=names, pin=st.sampled_from("pq"))
    def unpin(self, name: str, pin: str) -> None:
        if pin in self.driver.index.instances[name].pins:
            self.driver.unpin(name, pin)

    @rule(name=names, keys=chains(), drop_sessions=st.sampled_from([False, False, True]))
    def remove(self, name: str, keys: list[int], drop_sessions: bool) -> None:
        self.driver.remove(name, keys, drop_sessions=drop_sessions)
        for key in keys:
            self.blocks.pop((name, key), None)

    # ----------------------------------------------------------------------------- making room

    @rule(wants=st.lists(st.tuples(names, st.integers(1, 8)), max_size=2))
    def step(self, wants: list[tuple[str, int]]) -> None:
        self.reclaim([Want(name, n * BLOCK, n) for name, n in wants])

    def reclaim(self, wants: Sequence[Want]) -> bool:
        """One step, looked at; whether it did anything."""
        driver = self.driver
        held = {block for block in self.blocks if self.is_held(block)}
        bound = step_blocks(driver.group, len(driver.state.ledger.table))
        driver.reclaim(wants)
        gone = self.blocks.keys() - self.contents().keys()
        lost = {block for block in gone & held if self.is_held(block)}  # pins may end in the very step
        assert not lost, f"held blocks {lost} were dropped"
        touched = sum(len(e.keys) for e in driver.effects if isinstance(e, fx.DropBlocks))
        touched += sum(len(e.record.keys) for e in driver.effects if isinstance(e, fx.PutSession))
        assert touched <= bound
        self.blocks = {block: birth for block, birth in self.blocks.items() if block not in gone}
        return bool(driver.effects)

    def make_room(self, wants: Sequence[Want] = ()) -> None:
        """All that can be done now; must come to an end."""
        driver = self.driver
        for _ in range(1_000):
            due = driver.state.next_reclaim_ms(driver.now_ms)
            busy = (bool(wants) or (due is not None and due <= driver.now_ms)) and self.reclaim(wants)
            if not (driver.run_moves() or driver.collect() or busy):
                return
        raise AssertionError("always more to do")

    @rule(data=st.data(), limit=st.integers(1, 3))
    def copy(self, data: st.DataObject, limit: int) -> None:
        for record in self.driver.state.due_moves(limit):
            count = len(record.keys)
            flags = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
            self.driver.moved(record, flags)

    @rule(limit=st.integers(1, 3), fails=st.booleans())
    def erase(self, limit: int, fails: bool) -> None:
        if not fails:
            self.driver.collect(limit)
            return
        for record in self.driver.state.due_trash(self.driver.now_ms, limit):
            self.driver.state.trash_failed(record.instance_id, (record.trash_id,), self.driver.now_ms)

    @rule()
    def settle(self) -> None:
        """After a while without requests everything is below its mark, or held."""
        driver, ledger = self.driver, self.driver.state.ledger
        for _ in range(4):
            driver.tick(70_000)
            self.make_room()
        for _ in range(4):  # what the last of these dropped or moved is erased
            driver.tick(2_000)
            self.make_room()
        self.sessions.clear()
        total = ledger.quota.total()
        assert (total.reserved, total.pending) == (0, 0)
        if any(self.is_held(block) for block in self.blocks):
            return
        marks, limit = marks_of(driver.group), driver.group.max_key_count
        assert total.used <= marks.high * ledger.quota.capacity
        for owner in ledger.instances.values() if limit else ():
            assert owner.key_count <= marks.high * limit

    @rule(ms=st.sampled_from([1, 1, 60, 400, 2_000]))
    def wait(self, ms: int) -> None:
        self.driver.tick(ms)

    # --------------------------------------------------------------------------- administration

    @rule(configuration=configurations())
    def configure(self, configuration: dict[str, Any]) -> None:
        self.driver.configure(group_of(**configuration))
        self.held = self.levels()

    @rule(draining=st.sampled_from(["", "", "shm", "nfs"]), disabled=st.sampled_from(["", "", "shm"]))
    def storages(self, draining: str, disabled: str) -> None:
        storages = {
            name: replace(config, is_draining=name == draining, is_available=name != disabled)
            for name, config in STORAGES.items()
        }
        self.driver.configure(storages=storages)

    @rule(name=names, seconds=st.sampled_from([0, 1, 10]))
    def retire(self, name: str, seconds: int) -> None:
        since_s = self.driver.now_s if seconds else 0
        info = instance(name, location_spec_groups=GROUPS)
        self.driver.set_instance(replace(info, retiring_since_s=since_s, retiring_seconds=seconds))

    @rule()
    def restart(self) -> None:
        self.driver.restart()
        self.leased.clear()

    # -------------------------------------------------------------------------- always

    @invariant()
    def no_block_vanishes(self) -> None:
        """Nor comes from nowhere."""
        if hasattr(self, "driver"):
            assert self.contents() == self.blocks

    @invariant()
    def quotas_hold(self) -> None:
        """What grew is within its quota; what a smaller quota left over only shrinks."""
        if not hasattr(self, "driver"):
            return
        levels = self.levels()
        for name, quota in self.quotas().items():
            assert levels[name] <= max(quota, self.held.get(name, 0)), name
        self.held = levels

    @invariant()
    def the_report_adds_up(self) -> None:
        if not hasattr(self, "driver"):
            return
        told = self.driver.state.capacity(self.driver.now_ms, self.driver.now_s)
        for name in ("used_bytes", "reserved_bytes", "pending_delete_bytes", "pinned_bytes", "leased_bytes"):
            assert told[name] == sum(tier[name] for tier in told["tiers"]), name
        assert told["blocks"] == len(self.blocks) == sum(row["blocks"] for row in told["instances"])
        assert 0 <= told["reclaimable_bytes"] <= told["used_bytes"]


ReclaimMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestReclaim = ReclaimMachine.TestCase
