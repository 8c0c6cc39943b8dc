"""SlotAllocator against a set of free slots."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcm_ray.core.allocator import SlotAllocator

Place = tuple[int, int]


def places(segment: np.ndarray, slot: np.ndarray) -> list[Place]:
    assert segment.dtype == slot.dtype == np.uint32
    return list(zip(segment.tolist(), slot.tolist(), strict=True))


def free(allocator: SlotAllocator, given: list[Place]) -> None:
    rows = np.array(given, np.uint32).reshape(-1, 2)
    allocator.free(rows[:, 0].copy(), rows[:, 1].copy())


class AllocatorMachine(RuleBasedStateMachine):
    """The model: the set of free slots, and the list of taken ones."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator()
        self.slots: dict[int, int] = {}
        self.free: set[Place] = set()
        self.taken: list[Place] = []
        self.next_id = 1

    @rule(taken=st.lists(st.booleans(), min_size=1, max_size=12), fresh=st.booleans())
    def add_segment(self, taken: list[bool], fresh: bool) -> None:
        flags = np.zeros(len(taken), np.bool_) if fresh else np.array(taken)
        self.allocator.add_segment(self.next_id, len(taken), None if fresh else flags)
        self.slots[self.next_id] = len(taken)
        for slot, is_taken in enumerate(flags.tolist()):
            place = self.next_id, slot
            if is_taken:
                self.taken.append(place)
            else:
                self.free.add(place)
        self.next_id += 1

    @rule(share=st.floats(0, 1))
    def allocate(self, share: float) -> None:
        count = round(share * len(self.free))
        longest = max((n for _, _, n in self.allocator.free_extents()), default=0)
        got = places(*self.allocator.allocate(count))
        assert len(got) == len(set(got)) == count
        assert set(got) <= self.free
        if 0 < count <= longest:
            first = got[0]
            assert got == [(first[0], first[1] + i) for i in range(count)], "one extent suffices"
        self.free -= set(got)
        self.taken += got

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.taken), unique=True))
        free(self.allocator, chosen)
        self.free |= set(chosen)
        self.taken = [place for place in self.taken if place not in set(chosen)]

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def remove_segment(self, data: st.DataObject) -> None:
        segment = data.draw(st.sampled_from(sorted(self.slots)))
        if self.allocator.taken(segment):
            return
        self.allocator.remove_segment(segment)
        del self.slots[segment]
        self.free = {place for place in self.free if place[0] != segment}

    @invariant()
    def agrees_with_the_model(self) -> None:
        extents = self.allocator.free_extents()
        assert {(s, first + i) for s, first, n in extents for i in range(n)} == self.free
        assert self.allocator.free_total == len(self.free)
        assert self.allocator.slots_total == sum(self.slots.values())
        for (s, first, n), (t, after, _) in pairwise(extents):
            assert s != t or first + n < after, "neighbouring extents are merged"
        for segment in self.slots:
            assert self.allocator.taken(segment) == sum(1 for s, _ in self.taken if s == segment)


AllocatorMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAllocator = AllocatorMachine.TestCase


def test_a_used_segment_is_filled_before_a_fresh_one_is_begun() -> None:
    allocator = SlotAllocator()
    allocator.add_segment(1, 8)
    allocator.allocate(6)
    allocator.add_segment(2, 64)
    assert places(*allocator.allocate(2)) == [(1, 6), (1, 7)]


def test_a_request_is_split_into_few_extents() -> None:
    allocator = SlotAllocator()
    allocator.add_segment(1, 20)
    allocator.allocate(20)
    free(allocator, [(1, 0), (1, 4), (1, 5), (1, 6), (1, 7), (1, 10), (1, 11)])
    assert places(*allocator.allocate(6)) == [(1, 4), (1, 5), (1, 6), (1, 7), (1, 10), (1, 11)]


def test_freeing_twice_is_caught() -> None:
    allocator = SlotAllocator()
    allocator.add_segment(1, 4)
    allocator.allocate(1)
    free(allocator, [(1, 0)])
    with pytest.raises(AssertionError, match="twice"):
        free(allocator, [(1, 0)])


def test_removing_a_segment_in_use_is_caught() -> None:
    allocator = SlotAllocator()
    allocator.add_segment(1, 4)
    allocator.allocate(1)
    with pytest.raises(AssertionError, match="in use"):
        allocator.remove_segment(1)


def test_the_same_calls_give_the_same_slots() -> None:
    def run() -> list[Place]:
        allocator = SlotAllocator()
        out = []
        for segment in (1, 2):
            allocator.add_segment(segment, 50)
        for step in range(1, 8):
            got = places(*allocator.allocate(step * 2))
            free(allocator, got[::3])
            out += got
        return out

    assert run() == run()
