"""Everything that must hold in a group, derived again from scratch.

Takes what the index says is SERVING, lays it beside the sessions and the trash, and compares the
sum with every counter that `GroupState` keeps by adding and subtracting. Used by tests after every
event and by operators' checks; an empty list means that all is well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from kvcm_ray.core.group import GroupState
from kvcm_ray.core.ledger import Instance, Ledger
from kvcm_ray.core.model import StorageType
from kvcm_ray.core.quota import Account, quota_type
from kvcm_ray.core.requests import BlockLocations

Served = Mapping[int, tuple[int, int, int]]  #: key -> (segment, slot, generation)


def check(state: GroupState, served: Mapping[str, Served]) -> list[str]:
    """Sentences about what is wrong; `served` gives the SERVING blocks of every open instance."""
    ledger = state.ledger
    wrong: list[str] = []
    accounts: dict[StorageType, Account] = {}
    for instance_id, instance in ledger.instances.items():
        blocks = served.get(instance_id, {})
        wrong += _slots(ledger, instance, blocks, accounts)
        wrong += _writing(ledger, instance, blocks)
        if instance.key_count != len(blocks):
            wrong.append(
                f"{instance_id}: key_count {instance.key_count}, {len(blocks)} are SERVING"
            )
    wrong += _strangers(ledger)
    if (kept := _not_empty(ledger.quota.accounts)) != _not_empty(accounts):
        wrong.append(f"quota says {kept}, the blocks make {accounts}")
    return wrong


def _not_empty(accounts: Mapping[StorageType, Account]) -> dict[StorageType, Account]:
    return {kind: account for kind, account in accounts.items() if account != Account()}


def _positions(locations: BlockLocations) -> Iterator[tuple[int, int]]:
    yield from zip(locations.segment.tolist(), locations.slot.tolist(), strict=True)


def _slots(
    ledger: Ledger, instance: Instance, blocks: Served, accounts: dict[StorageType, Account]
) -> list[str]:
    """Every slot has one owner or is free; adds the owners' bytes to `accounts`."""
    instance_id, segments = instance.info.instance_id, instance.segments.segments
    sessions = ledger.sessions.of_instance(instance_id)
    serving = Counter((segment, slot) for segment, slot, _ in blocks.values())
    writing = Counter(p for s in sessions for p in _positions(s.locations))
    trash = Counter(
        p for t in ledger.trash.of_instance(instance_id) for p in _positions(t.locations)
    )
    owners = serving + writing + trash
    free, wrong = _free(instance)
    existing = {(s.segment_id, slot) for s in segments.values() for slot in range(s.slots)}
    wrong += [f"slot {p} has {n} owners" for p, n in owners.items() if n > 1]
    wrong += [f"slot {p} is free and owned" for p in free & owners.keys()]
    wrong += [f"slot {p} is lost" for p in existing - free - owners.keys()]
    wrong += [f"slot {p} does not exist" for p in (free | owners.keys()) - existing]
    for place in owners.keys() & existing:
        segment = segments[place[0]]
        kind = quota_type(ledger.kind_of(segment.storage))
        account = accounts.setdefault(kind, Account())
        account.used += segment.slot_bytes * (serving[place] + trash[place])
        account.reserved += segment.slot_bytes * writing[place]
        account.pending += segment.slot_bytes * trash[place]
    return [f"{instance_id}: {sentence}" for sentence in wrong]


def _free(instance: Instance) -> tuple[set[tuple[int, int]], list[str]]:
    """Free slots as the allocators' extents say, and where their counters disagree."""
    free: set[tuple[int, int]] = set()
    wrong = []
    for allocator in instance.segments.allocators():
        extents = allocator.free_extents()
        ours = {(segment, first + i) for segment, first, n in extents for i in range(n)}
        if len(ours) != allocator.free_total:
            wrong.append(f"free_total is {allocator.free_total}, {len(ours)} slots are free")
        free |= ours
    for segment_id, segment in instance.segments.segments.items():
        taken = segment.slots - sum(1 for owner, _ in free if owner == segment_id)
        if taken != instance.segments.taken(segment_id):
            wrong.append(f"segment {segment_id} counts {instance.segments.taken(segment_id)} taken")
    return free, wrong


def _writing(ledger: Ledger, instance: Instance, blocks: Served) -> list[str]:
    """`writing` holds exactly the keys of the sessions that were not removed; none is SERVING."""
    instance_id = instance.info.instance_id
    expected: dict[int, str] = {}
    wrong = []
    for session in ledger.sessions.of_instance(instance_id):
        record = session.record
        for key in set(record.keys[~record.removed].tolist()):
            if key in expected:
                wrong.append(f"{instance_id}: key {key} is in two sessions")
            if key in blocks:
                wrong.append(f"{instance_id}: key {key} is WRITING and SERVING")
            expected[key] = record.session_id
    actual = {key: session.record.session_id for key, session in instance.writing.items()}
    if actual != expected:
        wrong.append(f"{instance_id}: writing is {actual}, the sessions make {expected}")
    return wrong


def _strangers(ledger: Ledger) -> list[str]:
    """Sessions and trash belong to open instances."""
    owners = {s.record.instance_id for s in ledger.sessions.by_id.values()}
    owners |= {instance_id for instance_id, _ in ledger.trash.records}
    return [
        f"{name} is not open but has sessions or trash" for name in owners - set(ledger.instances)
    ]
