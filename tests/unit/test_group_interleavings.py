"""Quota and slots under every interleaving of three clients.

Each client runs a short program on overlapping keys under a quota that does not fit them all. Every
order of all steps is tried. At every step: used + reserved <= quota, and all invariants (the driver
checks them). In the end everything is removed and erased, and nothing may be left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import (
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecInfo,
    NfsSpec,
    StorageConfig,
)
from kvcm_ray.errors import QuotaExceeded, SessionNotFound
from kvcm_ray.testing.group_driver import GroupDriver

QUOTA_BLOCKS = 3
Step = Callable[[GroupDriver, int], None]


def keys_of(client: int) -> list[int]:
    """Neighbouring clients share a key."""
    return [client, client + 1]


def session_of(client: int) -> str:
    return str(client) * 32


def start(d: GroupDriver, client: int) -> None:
    d.start("i", keys_of(client), session_of(client))


def finish(d: GroupDriver, client: int) -> None:
    session = d.state.ledger.sessions.by_id.get(session_of(client))
    d.finish("i", session_of(client), BlockMask(offset=len(session.record.keys) if session else 0))


def fail(d: GroupDriver, client: int) -> None:
    d.finish("i", session_of(client), BlockMask(offset=0))


def remove(d: GroupDriver, client: int) -> None:
    d.remove("i", keys_of(client))


def erase(d: GroupDriver, client: int) -> None:
    d.collect()


def orders(lengths: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every order of the steps of programs of these lengths, as the client of each step."""
    if not any(lengths):
        yield ()
    for client, left in enumerate(lengths):
        if left:
            fewer = (*lengths[:client], left - 1, *lengths[client + 1 :])
            yield from ((client, *rest) for rest in orders(fewer))


def run(programs: tuple[tuple[Step, ...], ...], order: tuple[int, ...]) -> None:
    info = InstanceInfo(instance_id="i", location_spec_infos=(LocationSpecInfo("a", 10),))
    group = InstanceGroup("g", ("nfs",), quota=InstanceGroupQuota(QUOTA_BLOCKS * 10))
    d = GroupDriver(group, {"nfs": StorageConfig("nfs", nfs=NfsSpec("/n"))}, [info])
    position = [0] * len(programs)
    for client in order:
        step = programs[client][position[client]]
        position[client] += 1
        with contextlib.suppress(QuotaExceeded, SessionNotFound):
            step(d, client)
        total = d.state.ledger.quota.total()
        assert 0 <= total.held <= QUOTA_BLOCKS * 10
    d.remove("i", range(10), drop_sessions=True)
    d.now_ms += 10_000
    d.collect()
    assert d.state.ledger.quota.total().held == 0
    assert d.usage()["instances"]["i"]["segments"] <= 1


@pytest.mark.parametrize(
    "programs",
    [
        ((start, finish, remove), (start, fail, erase), (start, finish, erase)),
        ((start, finish), (start, remove, finish), (start, finish, remove, erase)),
    ],
    ids=["finish-fail", "remove-early"],
)
def test_every_interleaving(programs: tuple[tuple[Step, ...], ...]) -> None:
    count = 0
    for order in orders(tuple(len(p) for p in programs)):
        run(programs, order)
        count += 1
    assert count in (1680, 1260)
