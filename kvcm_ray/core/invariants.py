"""Everything that must hold in a group, derived again from scratch.

Takes what the index says is SERVING, with its copies and pins, lays it beside the sessions and the
trash, and compares the sum with every table and counter that `GroupState` keeps by adding and
subtracting. Used by tests after every event and by operators' checks; an empty list means that all is
well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.core.group import GroupState
from kvcm_ray.core.ledger import KINDS, LANES, Instance, Ledger
from kvcm_ray.core.model import StorageType
from kvcm_ray.core.quota import Account, quota_type
from kvcm_ray.core.records import PinRecord, SessionKind
from kvcm_ray.core.requests import BlockLocations

Served = Mapping[int, tuple[int, int, int]]  #: key -> (segment, slot, generation)


@dataclass(frozen=True, slots=True)
class Held:
    """What the index says of one instance."""

    served: Served = field(default_factory=dict)
    copies: Served = field(default_factory=dict)  #: second locations
    pins: Mapping[str, PinRecord] = field(default_factory=dict)


def check(state: GroupState, held: Mapping[str, Held]) -> list[str]:
    """Sentences about what is wrong; `held` has all open instances that are not empty."""
    ledger = state.ledger
    wrong: list[str] = []
    accounts: dict[StorageType, Account] = {}
    for instance_id, instance in ledger.instances.items():
        index = held.get(instance_id, Held())
        found = _slots(ledger, instance, index, accounts)
        found += _writing(ledger, instance, index.served)
        found += _blocks(ledger, instance, index)
        found += _order(ledger, instance)
        found += _pins(ledger, instance, index)
        wrong += [f"{instance_id}: {sentence}" for sentence in found]
    wrong += _strangers(ledger)
    wrong += _moves(ledger)
    wrong += _copies(ledger)
    if (kept := _not_empty(ledger.quota.accounts)) != _not_empty(accounts):
        wrong.append(f"quota says {kept}, the blocks make {accounts}")
    return wrong


def _not_empty(accounts: Mapping[StorageType, Account]) -> dict[StorageType, Account]:
    return {kind: account for kind, account in accounts.items() if account != Account()}


def _positions(locations: BlockLocations) -> Iterator[tuple[int, int]]:
    yield from zip(locations.segment.tolist(), locations.slot.tolist(), strict=True)


def _rows(locations: BlockLocations) -> list[tuple[int, int, int]]:
    columns = (locations.segment, locations.slot, locations.generation)
    return list(zip(*(column.tolist() for column in columns), strict=True))


# ---------------------------------------------------------------------------------- slots, bytes


def _slots(
    ledger: Ledger, instance: Instance, index: Held, accounts: dict[StorageType, Account]
) -> list[str]:
    """Every slot has one owner or is free; adds the owners' bytes to `accounts`.

    Owners: a block, a copy of one, a session (of a writer or of a move's target), a trash record.
    """
    instance_id, segments = instance.info.instance_id, instance.segments.segments
    sessions = ledger.sessions.of_instance(instance_id)
    places = [*index.served.values(), *index.copies.values()]
    serving = Counter((segment, slot) for segment, slot, _ in places)
    writing = Counter(p for s in sessions for p in _positions(s.locations))
    trash = Counter(p for t in ledger.trash.of_instance(instance_id) for p in _positions(t.locations))
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
    total = sum(segments[segment].slot_bytes for segment, _, _ in places if segment in segments)
    if instance.serving_bytes != total:
        wrong.append(f"serving_bytes {instance.serving_bytes}, the blocks make {total}")
    return wrong


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
    owners = Counter(segment for segment, _ in free)
    for segment_id, segment in instance.segments.segments.items():
        taken = segment.slots - owners[segment_id]
        if taken != instance.segments.taken(segment_id):
            wrong.append(f"segment {segment_id} counts {instance.segments.taken(segment_id)} taken")
    return free, wrong


# ------------------------------------------------------------------------------------- sessions


def _writing(ledger: Ledger, instance: Instance, blocks: Served) -> list[str]:
    """`writing` holds exactly the keys of the writers' sessions that were not removed; none is
    SERVING."""
    expected: dict[int, str] = {}
    wrong = []
    for session in ledger.sessions.of_instance(instance.info.instance_id):
        record = session.record
        if record.kind is not SessionKind.WRITE:
            continue
        for key in set(record.keys[~record.removed].tolist()):
            if key in expected:
                wrong.append(f"key {key} is in two sessions")
            if key in blocks:
                wrong.append(f"key {key} is WRITING and SERVING")
            expected[key] = record.session_id
    actual = {key: session.record.session_id for key, session in instance.writing.items()}
    if actual != expected:
        wrong.append(f"writing is {actual}, the sessions make {expected}")
    return wrong


def _strangers(ledger: Ledger) -> list[str]:
    """Sessions, trash and blocks belong to open instances, which have numbers of their own."""
    owners = {s.record.instance_id for s in ledger.sessions.by_id.values()}
    owners |= {instance_id for instance_id, _ in ledger.trash.records}
    wrong = [f"{name} is not open but has sessions or trash" for name in owners - set(ledger.instances)]
    numbers = [instance.number for instance in ledger.instances.values()]
    if len(set(numbers)) < len(numbers):
        wrong.append(f"two instances have the same number: {numbers}")
    strange = set(ledger.table.instance[ledger.table.living()].tolist()) - set(numbers)
    if strange:
        wrong.append(f"the block table has blocks of unknown instances {strange}")
    return wrong


def _moves(ledger: Ledger) -> list[str]:
    """`moves` are exactly the copying sessions; a block is `moving` if one of them copies it from where
    it is."""
    table, wrong = ledger.table, []
    sessions = {
        name: s for name, s in ledger.sessions.by_id.items() if s.record.kind is not SessionKind.WRITE
    }
    if ledger.moves.by_id.keys() != sessions.keys():
        wrong.append(f"moves are {set(ledger.moves.by_id)}, the sessions {set(sessions)}")
    if strange := ledger.moves.waiting.keys() - sessions.keys():
        wrong.append(f"moves {set(strange)} wait but are gone")
    moving: Counter[int] = Counter()
    for name, move in ledger.moves.by_id.items():
        if name in sessions and move.session is not sessions[name]:
            wrong.append(f"move {name} has another session than the table of sessions")
        record = move.session.record
        if len(move.ids) != len(record.keys):
            wrong.append(f"move {name} has {len(move.ids)} blocks for {len(record.keys)} keys")
        elif record.instance_id in ledger.instances:
            here = table.find(ledger.instances[record.instance_id].number, record.source)
            moving.update(here[here >= 0].tolist())
    marked = set(np.flatnonzero(table.moving).tolist())
    wrong += [f"block {block} moves {n} times" for block, n in moving.items() if n > 1]
    if marked != set(moving):
        wrong.append(f"blocks {marked} are marked as moving, the moves make {set(moving)}")
    return wrong


# --------------------------------------------------------------------------------------- blocks


def _blocks(ledger: Ledger, instance: Instance, index: Held) -> list[str]:
    """The block table says what the index says, and finds each block by its place."""
    table, wrong = ledger.table, []
    ids = table.of_instance(instance.number)
    keys, places = table.keys[ids].tolist(), table.places.get(ids)
    if instance.key_count != len(index.served):
        wrong.append(f"key_count {instance.key_count}, {len(index.served)} are SERVING")
    if len(set(keys)) < len(keys):
        wrong.append("two blocks of the table have the same key")
    ours = dict(zip(keys, _rows(places), strict=True))
    if ours != index.served:
        wrong.append(f"blocks differ: {_difference(ours, index.served)}")
        return wrong
    copied = ids[table.copied[ids]]
    copies = dict(zip(table.keys[copied].tolist(), _rows(table.copies.get(copied)), strict=True))
    if copies != index.copies:
        wrong.append(f"copies differ: {_difference(copies, index.copies)}")
        return wrong
    if not (table.find(instance.number, places) == ids).all():
        wrong.append("blocks are not found by their places")
    wrong += _slot_maps(ledger, instance, index)
    if not wrong:
        wrong += _facts(ledger, instance)
    return wrong


def _difference(ours: Served, theirs: Served) -> str:
    keys = [k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]
    return ", ".join(f"{k}: {ours.get(k)} but {theirs.get(k)} in the index" for k in sorted(keys)[:5])


def _slot_maps(ledger: Ledger, instance: Instance, index: Held) -> list[str]:
    """One map for each segment, with the first places of blocks and nothing else."""
    maps = {s: at for (number, s), at in ledger.table._at.items() if number == instance.number}
    slots = {s: segment.slots for s, segment in instance.segments.segments.items()}
    if {s: len(at) for s, at in maps.items()} != slots:
        return [f"slot maps are { ({s: len(at) for s, at in maps.items()}) }, the segments {slots}"]
    first = {(segment, slot) for segment, slot, _ in index.served.values()}
    mapped = {(s, slot) for s, at in maps.items() for slot in np.flatnonzero(at >= 0).tolist()}
    return [f"slots {mapped ^ first} are mapped wrongly"] if mapped != first else []


def _facts(ledger: Ledger, instance: Instance) -> list[str]:
    """Bytes and type of each block are those of its slot; so are a copy's bytes."""
    table, wrong = ledger.table, []
    ids = table.of_instance(instance.number)
    copied = ids[table.copied[ids]]
    nbytes, kinds = ledger.facts(instance, table.places.get(ids))
    if not ((nbytes == table.nbytes[ids]).all() and (kinds == table.kind[ids]).all()):
        wrong.append("bytes or types of blocks are not those of their slots")
    if not (ledger.facts(instance, table.copies.get(copied))[0] == table.nbytes[copied]).all():
        wrong.append("copies have other sizes than their blocks")
    return wrong


def _copies(ledger: Ledger) -> list[str]:
    """The queues of copies by type are the blocks that have one."""
    table = ledger.table
    expected: dict[StorageType, set[int]] = {}
    for instance in ledger.instances.values():
        ids = table.of_instance(instance.number)
        ids = ids[table.copied[ids]]
        _, kinds = ledger.facts(instance, table.copies.get(ids))
        for block, kind in zip(ids.tolist(), kinds.tolist(), strict=True):
            expected.setdefault(KINDS[kind], set()).add(block)
    kept = {kind: set(blocks) for kind, blocks in ledger.copies.items() if blocks}
    return [f"queues of copies are {kept}, the blocks make {expected}"] if kept != expected else []


def _order(ledger: Ledger, instance: Instance) -> list[str]:
    """The eviction order has the same blocks, each in the lane of its type, and holds those that are
    pinned or moving, once for either."""
    table, order, wrong = ledger.table, ledger.order, []
    ids = table.of_instance(instance.number)
    lanes = dict(zip(ids.tolist(), (instance.number * LANES + table.kind[ids]).tolist(), strict=True))
    ours = {block: lane for lane in instance.lanes for block in order.blocks_of(lane).tolist()}
    if ours != lanes:
        blocks = {b for b in ours.keys() | lanes.keys() if ours.get(b) != lanes.get(b)}
        wrong.append(f"the eviction order has other blocks or lanes than the table: ids {blocks}")
        return wrong
    counted = {lane: order.count([lane]) for lane in instance.lanes if order.count([lane])}
    if counted != (made := dict(Counter(lanes.values()))):
        wrong.append(f"the eviction order counts {counted} blocks by lane, there are {made}")
    holds = table.pinned[ids].astype(int) + table.moving[ids]
    if not (order._holds[ids] == holds).all():
        odd = ids[order._holds[ids] != holds]
        wrong.append(f"blocks {odd.tolist()} are held {order._holds[odd].tolist()} times")
    return wrong


def _pins(ledger: Ledger, instance: Instance, index: Held) -> list[str]:
    """Pins are those of the index, and mark exactly the blocks that they name."""
    table, wrong = ledger.table, []
    ours = {name: (set(pin.keys.tolist()), pin.until_s) for name, pin in instance.pins.items()}
    theirs = {name: (set(pin.keys.tolist()), pin.until_s) for name, pin in index.pins.items()}
    if ours != theirs:
        wrong.append(f"pins are {ours}, in the index {theirs}")
    named = Counter(key for keys, _ in ours.values() for key in keys)
    if instance.pinned != named:
        wrong.append(f"pinned keys are {instance.pinned}, the pins make {named}")
    ids = table.of_instance(instance.number)
    marked = set(table.keys[ids[table.pinned[ids]]].tolist())
    if marked != named.keys() & set(table.keys[ids].tolist()):
        wrong.append(f"blocks {marked} are marked as pinned, the pins name {set(named)}")
    return wrong
