"""The transition table, and that GroupState knows no other transitions.

For every pair of a state and an event: bring a block into the state, let the event happen, look
where the block is. Pairs that the table lacks leave it where it was, as a refusal or as nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcm_ray.core.block import TRANSITIONS, WIRE_NAMES, BlockEvent, BlockState
from kvcm_ray.core.limits import SESSION_TIMEOUT_DEFAULT_MS
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import (
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecInfo,
    NfsSpec,
    StorageConfig,
)
from kvcm_ray.errors import SessionNotFound
from kvcm_ray.testing.group_driver import GroupDriver

KEY, FIRST, SECOND = 7, "1" * 32, "2" * 32


def start(d: GroupDriver) -> None:
    session = FIRST if FIRST not in d.state.ledger.sessions else SECOND
    d.start("i", [KEY], session)


def finish(offset: int) -> Callable[[GroupDriver], None]:
    def act(d: GroupDriver) -> None:
        d.finish("i", FIRST, BlockMask(offset=offset))

    return act


def expire(d: GroupDriver) -> None:
    d.tick(SESSION_TIMEOUT_DEFAULT_MS)


def remove(d: GroupDriver) -> None:
    d.remove("i", [KEY])


def delete(d: GroupDriver) -> None:
    d.now_ms += 10_000
    d.collect()


ACTS: dict[BlockEvent, Callable[[GroupDriver], None]] = {
    BlockEvent.START: start,
    BlockEvent.FINISHED: finish(1),
    BlockEvent.FAILED: finish(0),
    BlockEvent.EXPIRED: expire,
    BlockEvent.REMOVED: remove,
    BlockEvent.DELETED: delete,
}

WAYS: dict[BlockState, list[BlockEvent]] = {
    BlockState.ABSENT: [],
    BlockState.WRITING: [BlockEvent.START],
    BlockState.SERVING: [BlockEvent.START, BlockEvent.FINISHED],
    BlockState.DELETING: [BlockEvent.START, BlockEvent.FINISHED, BlockEvent.REMOVED],
}


def new_driver() -> GroupDriver:
    info = InstanceInfo(instance_id="i", location_spec_infos=(LocationSpecInfo("a", 10),))
    group = InstanceGroup("g", ("nfs",), quota=InstanceGroupQuota(100))
    return GroupDriver(group, {"nfs": StorageConfig("nfs", nfs=NfsSpec("/n"))}, [info])


def bytes_of(d: GroupDriver) -> dict[BlockState, int]:
    usage = d.usage()
    return {
        BlockState.WRITING: usage["reserved_bytes"],
        BlockState.SERVING: usage["used_bytes"] - usage["pending_delete_bytes"],
        BlockState.DELETING: usage["pending_delete_bytes"],
    }


def state_of(d: GroupDriver) -> BlockState:
    """By the bytes of the one block that was ever written."""
    states = [state for state, nbytes in bytes_of(d).items() if nbytes]
    assert len(states) <= 1
    return states[0] if states else BlockState.ABSENT


@pytest.mark.parametrize("state", BlockState)
@pytest.mark.parametrize("event", BlockEvent)
def test_transition(state: BlockState, event: BlockEvent) -> None:
    d = new_driver()
    for step in WAYS[state]:
        ACTS[step](d)
    assert state_of(d) is state
    before = d.usage()
    try:
        ACTS[event](d)
    except SessionNotFound:
        assert event in (BlockEvent.FINISHED, BlockEvent.FAILED)
        assert state is not BlockState.WRITING
        assert d.usage() == before
    expected = TRANSITIONS.get((state, event), state)
    if (state, event) == (BlockState.WRITING, BlockEvent.REMOVED):
        # The key is gone at once; the slot follows when its writer has finished.
        assert d.meta("i", [KEY]).states.tolist() == [BlockState.ABSENT]
        ACTS[BlockEvent.FINISHED](d)
    if (state, event) == (BlockState.DELETING, BlockEvent.START):
        # Another block of the same key, in another slot; the old one stays where it was.
        assert bytes_of(d) == {
            BlockState.WRITING: 10,
            BlockState.SERVING: 0,
            BlockState.DELETING: 10,
        }
        return
    assert state_of(d) is expected


def test_the_table_is_closed() -> None:
    assert set(TRANSITIONS.values()) == set(BlockState)
    assert {state for state, _ in TRANSITIONS} == set(BlockState)
    assert {event for _, event in TRANSITIONS} == set(BlockEvent)
    assert set(WIRE_NAMES) == set(BlockState)
