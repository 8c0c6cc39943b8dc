"""The order of eviction against a naive model, under any sequence of operations.

The model knows parents by identity, so a parent that left cannot be confused with a block that took
its id. After every selection each victim is checked to be free to leave at its turn, and that none is
missing if fewer were found than asked for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcm_ray.core.eviction import POLICIES, EvictionOrder, make_policy

LANES = 3


@dataclass(eq=False)
class Block:
    id: int
    key: int
    lane: int
    touched: int
    parent: Block | None
    resident: bool = True
    holds: int = 0
    lease: int = 0
    children: set[Block] = field(default_factory=set)

    def living_parent(self) -> Block | None:
        return self.parent if self.parent and self.parent.resident else None

    def root(self) -> Block:
        block = self
        while parent := block.living_parent():
            block = parent
        return block


def ids(blocks: list[Block]) -> np.ndarray:
    return np.array([block.id for block in blocks], np.int64)


def keys(blocks: list[Block]) -> np.ndarray:
    return np.array([block.key for block in blocks], np.int64)


class OrderMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.order = EvictionOrder(make_policy("lru"))
        self.blocks: dict[int, Block] = {}
        self.unused = list(range(40))
        self.next_key = itertools.count(1)
        self.now = 1000

    # ------------------------------------------------------------------------------- helpers

    def some(self, data: st.DataObject, least: int = 1) -> list[Block]:
        """Distinct resident blocks in any order."""
        chosen = st.lists(st.sampled_from(sorted(self.blocks)), min_size=least, max_size=12, unique=True)
        return [self.blocks[i] for i in data.draw(chosen)]

    def forget(self, gone: list[Block]) -> None:
        for block in gone:
            block.resident = False
            if block.parent:
                block.parent.children.discard(block)
            del self.blocks[block.id]
            self.unused.append(block.id)

    def link(self, block: Block, parent: Block | None) -> None:
        block.parent = parent
        if parent:
            parent.children.add(block)

    def evictable(self, lanes: list[int], leaves_only: bool, before: int) -> int:
        """How many could leave at most, one after the other."""
        gone: set[Block] = set()
        while True:
            free = [
                block
                for block in self.blocks.values()
                if block not in gone and block.lane in lanes and not block.holds
                and block.lease <= self.now and block.touched < before
                and (not leaves_only or all(child in gone for child in block.children))
            ]  # fmt: skip
            if not free:
                return len(gone)
            gone.update(free)

    def check_victims(self, found: np.ndarray, lanes: list[int], leaves_only: bool) -> list[Block]:
        victims = [self.blocks[int(i)] for i in found]
        assert len(set(victims)) == len(victims)
        gone: set[Block] = set()
        for block in victims:
            assert block.lane in lanes
            assert block.holds == 0
            assert block.lease <= self.now
            if leaves_only:
                assert block.children <= gone, "a block would leave before its child"
            gone.add(block)
        return victims

    def evict(self, victims: list[Block], data: st.DataObject) -> None:
        """Any prefix of the victims may leave alone."""
        gone = victims[: data.draw(st.integers(0, len(victims)))]
        self.order.remove(ids(gone), keys(gone), evicted=True)
        self.forget(gone)

    # --------------------------------------------------------------------------------- rules

    @precondition(lambda self: self.unused)
    @rule(data=st.data(), lane=st.integers(0, LANES - 1), n=st.integers(1, 6), partial=st.booleans())
    def add(self, data: st.DataObject, lane: int, n: int, partial: bool) -> None:
        parent_id = data.draw(st.sampled_from([-1, *sorted(self.blocks)]))
        parent = self.blocks.get(parent_id)
        new: list[Block] = []
        for _ in range(min(n, len(self.unused))):
            block = Block(self.unused.pop(), next(self.next_key), lane, self.now, None)
            self.link(block, new[-1] if new else parent)
            new.append(block)
        self.order.add(lane, ids(new), keys(new), self.now, parent=parent_id, partial=partial)
        self.blocks.update((block.id, block) for block in new)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), chained=st.booleans())
    def touch(self, data: st.DataObject, chained: bool) -> None:
        touched = self.some(data)
        self.order.touch(ids(touched), keys(touched), self.now, chained=chained)
        for block in touched:
            block.touched = self.now
        if not chained:
            return
        roots = [block.root() for block in touched]
        orphans = [i for i in range(1, len(touched)) if touched[i].living_parent() is None]
        for i in orphans:
            later = [touched[j] for j in orphans if j >= i]
            if roots[i - 1] not in later:  # no circle
                self.link(touched[i], touched[i - 1])

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), lane=st.integers(0, LANES - 1))
    def move(self, data: st.DataObject, lane: int) -> None:
        moved = self.some(data)
        self.order.move(ids(moved), lane)
        for block in moved:
            block.lane = lane

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        held = self.some(data)
        self.order.hold(ids(held))
        for block in held:
            block.holds += 1

    @precondition(lambda self: any(block.holds for block in self.blocks.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = [block for block in self.blocks.values() if block.holds]
        released = data.draw(st.lists(st.sampled_from(held), min_size=1, unique=True))
        self.order.release(ids(released))
        for block in released:
            block.holds -= 1

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), ms=st.integers(0, 20))
    def lease(self, data: st.DataObject, ms: int) -> None:
        leased = self.some(data)
        self.order.lease(ids(leased), self.now + ms)
        for block in leased:
            block.lease = max(block.lease, self.now + ms)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        removed = self.some(data)
        self.order.remove(ids(removed), keys(removed), evicted=False)
        self.forget(removed)

    @rule(
        data=st.data(),
        lanes=st.lists(st.integers(0, LANES), unique=True),
        count=st.integers(0, 30),
        leaves_only=st.booleans(),
    )
    def victims(self, data: st.DataObject, lanes: list[int], count: int, leaves_only: bool) -> None:
        found = self.order.victims(lanes, count, self.now, leaves_only=leaves_only)
        victims = self.check_victims(found, lanes, leaves_only)
        assert len(victims) == min(count, self.evictable(lanes, leaves_only, self.now + 1))
        if leaves_only:
            self.evict(victims, data)

    @rule(data=st.data(), lanes=st.lists(st.integers(0, LANES), unique=True), age=st.integers(0, 10))
    def expired(self, data: st.DataObject, lanes: list[int], age: int) -> None:
        before = self.now - age
        found = self.order.expired(lanes, before, 40, self.now)
        victims = self.check_victims(found, lanes, leaves_only=True)
        assert all(block.touched < before for block in victims)
        self.evict(victims, data)

    @rule(name=st.sampled_from(POLICIES))
    def use(self, name: str) -> None:
        self.order.use(make_policy(name))

    @rule(data=st.data(), name=st.sampled_from(POLICIES))
    def restart(self, data: st.DataObject, name: str) -> None:
        """Everything is restored in several calls, blocks and calls in any order."""
        self.order = EvictionOrder(make_policy(name))
        for lane in data.draw(st.permutations(range(LANES))):
            mine = [block for block in self.blocks.values() if block.lane == lane]
            parents = [block.living_parent() for block in mine]
            self.order.restore(
                lane,
                ids(mine),
                keys(mine),
                np.array([parent.id if parent else -1 for parent in parents], np.int64),
                np.array([block.touched for block in mine], np.int64),
            )
        for block in self.blocks.values():
            block.holds = block.lease = 0

    @rule(ms=st.integers(1, 10))
    def wait(self, ms: int) -> None:
        self.now += ms

    # ----------------------------------------------------------------------------- invariants

    @invariant()
    def counts_agree(self) -> None:
        everything = list(self.blocks.values())
        for lane in range(LANES):
            mine = {block.id for block in everything if block.lane == lane}
            assert self.order.count([lane]) == len(mine)
            assert set(self.order.blocks_of(lane).tolist()) == mine
        known = ids(everything)
        assert self.order.touched_ms(known).tolist() == [block.touched for block in everything]
        assert self.order.leased_until(known).tolist() == [block.lease for block in everything]

    @invariant()
    def coldest_is_one_in_order(self) -> None:
        coldest = self.order.coldest_ms(range(LANES))
        free = {block.touched for block in self.blocks.values() if not block.holds}
        assert (coldest in free) if free else (coldest is None)


OrderMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOrder = OrderMachine.TestCase
