"""Making room: one bounded step of everything that takes blocks away or moves them.

In this order: instances that retire give up what is over their share, blocks expire, instances go
down to their number of keys, tiers to their bytes (the slowest first, as the ones above it demote
into it), the group to its total, storages are drained, and hits in slow tiers are promoted.

A tier above the last one demotes. If the tier below is full, its coldest blocks go first and the
demotion happens in a later step, when their bytes are erased. Blocks that are dropped are leaves: no
block is left without the one before it. What waits for deletion counts as free here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcm_ray.core import limits
from kvcm_ray.core.blocks import Ids
from kvcm_ray.core.drain import drop_unused_segments, leaving
from kvcm_ray.core.effects import DropBlocks, DropCopies, Effect, Outcome, Why
from kvcm_ray.core.events import ReclaimEvent, Want
from kvcm_ray.core.holds import expire_pins
from kvcm_ray.core.ledger import KINDS, Ledger
from kvcm_ray.core.marks import step_blocks, ttl_ms
from kvcm_ray.core.model import StorageConfig, StorageType
from kvcm_ray.core.moves import start_move, use_copies
from kvcm_ray.core.placement import candidates, tiers
from kvcm_ray.core.pressure import (
    RETRY_MS,
    excess,
    excess_keys,
    held,
    keys,
    marks_due_ms,
    missing,
    shares_due_ms,
)
from kvcm_ray.core.quota import quota_type
from kvcm_ray.core.records import SessionKind
from kvcm_ray.core.requests import Flags
from kvcm_ray.core.retire import allowed_bytes
from kvcm_ray.errors import KvcmError, NoStorageAvailable

_COUNTERS = {Why.EXPIRED: "expired_blocks", Why.RETIRED: "retired_blocks"}  #: others: "evicted_blocks"

PIECES = 8  #: a drained storage leaves in so many, where there is no room for all at once


def want_of(instance_id: str, error: KvcmError) -> Want | None:
    """What a refused write waits for; None if waiting would not help."""
    details = error.details
    if not details.get("may_wait"):
        return None
    return Want(instance_id, int(details["asked_bytes"]), int(details["asked_blocks"]))


def reclaim(ledger: Ledger, event: ReclaimEvent) -> Outcome:
    """One step; without effects there was nothing to do, or nothing that could be done yet."""
    if ledger.plan.paused:
        return Outcome(None, [])
    step = Step(ledger, event)
    step.retire()
    step.expire()
    falling = ledger.plan.falling
    if step.marks_due():
        falling |= step.above()
    step.limit_keys()
    if event.wants or step.marks_due():
        step.level_tiers()
        step.level_total()
        step.last_resort()
    step.drain()
    step.promote()
    ledger.plan.retry_ms = None if step.effects else event.now_ms + RETRY_MS
    if step.effects or ledger.moves.by_id:
        falling &= step.above()
    else:
        falling.clear()  # what is left must stay for now
    return Outcome(None, step.effects)


class Step:
    """One `ReclaimEvent` being handled: its effects so far, and how many blocks it may still touch."""

    def __init__(self, ledger: Ledger, event: ReclaimEvent) -> None:
        self.ledger = ledger
        self.now_ms, self.now_s = event.now_ms, event.now_s
        self.wants = event.wants
        self.effects: list[Effect] = []
        self.why = Why.QUOTA  #: what room is made for just now
        self.needed = 0  #: bytes of it
        self.blocks = step_blocks(ledger.group, len(ledger.table))
        self.tiers = tiers(ledger.group, ledger.storages)

    # ----------------------------------------------------------------------------- what is to go

    def retire(self) -> None:
        """Instances that retire keep no more than their share; pins end when they say so."""
        plan = self.ledger.plan
        if self.now_ms < shares_due_ms(plan):
            return
        plan.shares_ms = self.now_ms
        self.effects += expire_pins(self.ledger, self.now_s)
        for instance in self.ledger.instances.values():
            allowed = allowed_bytes(instance.info, self.ledger.quota.capacity, self.now_s)
            over = 0 if allowed is None else instance.serving_bytes - allowed
            if over > 0:
                self.drop(self.coldest(instance.lanes, over, leaves_only=True), Why.RETIRED, over)
                if not self.blocks:
                    plan.shares_ms = None  # there is more to do at once

    def expire(self) -> None:
        """Drop blocks that nobody touched for the group's time to live."""
        ledger, plan, ttl = self.ledger, self.ledger.plan, ttl_ms(self.ledger.group)
        if not ttl or (plan.expiry_ms is not None and self.now_ms < plan.expiry_ms):
            return
        lanes = self.lanes()
        before_ms = self.now_ms - ttl + 1
        ids = ledger.order.expired(lanes, before_ms, self.blocks, self.now_ms)
        self.drop(ids, Why.EXPIRED)
        coldest = ledger.order.coldest_ms(lanes)
        due_ms = self.now_ms + ttl if coldest is None else coldest + ttl
        plan.expiry_ms = due_ms if due_ms > self.now_ms or len(ids) else self.now_ms + RETRY_MS

    def above(self) -> set[StorageType | str | None]:
        """What is above its high mark, or above its low one and falling."""
        ledger = self.ledger
        kinds: list[StorageType | None] = [None, *ledger.quota.capacities]
        above: set[StorageType | str | None] = {k for k in kinds if excess(ledger, k, self.tiers)}
        instances = ledger.instances.items()
        return above | {name for name, instance in instances if excess_keys(ledger, instance)}

    def limit_keys(self) -> None:
        """Instances above their marks of keys, or with writes that wait for keys."""
        limit = self.ledger.group.max_key_count
        if limit <= 0:
            return
        for name, instance in self.ledger.instances.items():
            asked = sum(want.blocks for want in self.wants if want.instance_id == name)
            over = keys(instance) + asked - limit if asked else 0
            over = max(over, excess_keys(self.ledger, instance) if self.marks_due() else 0)
            if over > 0:
                count = min(over, self.blocks)
                ids = self.ledger.order.victims(list(instance.lanes), count, self.now_ms)
                self.drop(ids, Why.KEYS)

    def level_tiers(self) -> None:
        """Tiers with a quota of their own, slowest first; writes wait for the first that suits."""
        self.why = Why.TIER
        for kind in reversed(self.tiers):
            over = excess(self.ledger, kind, self.tiers)
            if kind is self._wanted_tier():
                over = max(over, missing(self.ledger, kind, self._asked()))
            if over > 0:
                self.needed = over
                self.relieve(kind, over)
        for kind in self.ledger.quota.capacities.keys() - set(self.tiers):
            if (over := excess(self.ledger, kind, self.tiers)) > 0:
                self.needed = over
                self.free(kind, over)

    def level_total(self) -> None:
        """The group as a whole: the slowest tier's blocks go first."""
        ledger = self.ledger
        over = max(excess(ledger, None, self.tiers), missing(ledger, None, self._asked()))
        self.why, self.needed = Why.QUOTA, over
        for kind in self._slowest_first():
            if over <= 0 or not self.blocks:
                return
            before = held(ledger, None)
            self.free(kind, over)
            over -= before - held(ledger, None)

    def last_resort(self) -> None:
        """Writes wait, but what the last tier holds must stay, for blocks above that follow it."""
        for kind in self._writable():
            if self.effects or not self.wants or self._fits():
                return
            self.needed = self._asked()
            self.free(kind, self._asked())

    def _fits(self) -> bool:
        """Whether what waits will have room once all that is on its way out is gone."""
        if missing(self.ledger, None, self._asked()):
            return False
        return any(not missing(self.ledger, kind, self._asked()) for kind in self._writable())

    def marks_due(self) -> bool:
        """Whether it is time to look at the marks; true for the whole step then."""
        plan = self.ledger.plan
        if plan.marks_ms != self.now_ms and self.now_ms < marks_due_ms(self.ledger):
            return False
        plan.marks_ms = self.now_ms
        return True

    def _asked(self) -> int:
        return sum(want.nbytes for want in self.wants)

    def _wanted_tier(self) -> StorageType | None:
        """Where room is made for waiting writes: the last tier, whose blocks are the coldest."""
        return self._writable()[-1] if self.wants and self.tiers else None

    def _writable(self) -> list[StorageType]:
        """Tiers that take what waits: without those that failed lately, unless that leaves none."""
        return [kind for kind in self.tiers if self._storages([kind])] or self.tiers

    def _slowest_first(self) -> list[StorageType]:
        others = [kind for kind in KINDS if kind not in self.tiers]
        return others + self.tiers[::-1]

    # ------------------------------------------------------------------------------- how it goes

    def relieve(self, kind: StorageType, nbytes: int) -> None:
        """Take `nbytes` out of a tier: copies, then retiring blocks, then demotion or eviction."""
        nbytes -= self.drop_copies(kind, nbytes)
        nbytes -= self.drop_retiring(kind, nbytes)
        below = self.tiers[self.tiers.index(kind) + 1 :]
        if nbytes <= 0 or not self.blocks:
            return
        if not below:
            self.free(kind, nbytes)
            return
        ids = self.coldest(self.lanes(kind), nbytes, leaves_only=False)
        ids = self._use_copies(ids)
        readable = self._drop_unreadable(ids)
        if not len(readable):
            if len(ids) and not self.effects:  # they must stay, and others are behind them
                self.free(kind, nbytes)
            return
        ids = readable
        target = self._roomy(below, ids)
        if target is not None:
            self.move(ids, target, SessionKind.MOVE)
        elif not self._make_room(below, ids):
            self.free(kind, int(self.ledger.table.nbytes[ids].sum()))

    def free(self, kind: StorageType, nbytes: int) -> None:
        """Drop blocks of a tier, coldest first, until `nbytes` are gone."""
        nbytes -= self.drop_copies(kind, nbytes)
        nbytes -= self.drop_retiring(kind, nbytes)
        if nbytes > 0 and self.blocks:
            self.drop(self.coldest(self.lanes(kind), nbytes, leaves_only=True), self.why, self.needed)

    def drop_copies(self, kind: StorageType, nbytes: int) -> int:
        """Give up second locations of the type, oldest first; the bytes that makes."""
        table, queue = self.ledger.table, self.ledger.copies.get(kind, {})
        chosen: list[int] = []
        freed = 0
        for block in queue:
            if freed >= nbytes or len(chosen) >= self.blocks:
                break
            chosen.append(block)
            freed += int(table.nbytes[block])
        self._drop_copies(np.array(chosen, np.int64))
        return freed

    def _drop_copies(self, ids: Ids) -> None:
        table = self.ledger.table
        self.blocks -= len(ids)
        for instance, own in self.ledger.by_instance(ids) if len(ids) else ():
            name, at = instance.info.instance_id, table.copies.get(own)
            self.effects.append(DropCopies(name, table.keys[own]))
            instance.serving_bytes -= int(table.nbytes[own].sum())
            self.ledger.forget_copies(own)
            due_ms = self.ledger.due_after_readers(own, self.now_ms)
            self.effects += self.ledger.discard(instance, at, due_ms)

    def drop_retiring(self, kind: StorageType, nbytes: int) -> int:
        """Blocks of replaced instances go before all others."""
        lanes = [i.lane(kind) for i in self.ledger.instances.values() if i.info.retiring_since_s]
        if not lanes or nbytes <= 0 or not self.blocks:
            return 0
        ids = self.coldest(lanes, nbytes, leaves_only=True)
        freed = int(self.ledger.table.nbytes[ids].sum())
        self.drop(ids, Why.RETIRED, nbytes)
        return freed

    def coldest(self, lanes: Sequence[int], nbytes: int, *, leaves_only: bool) -> Ids:
        """The coldest blocks of these lanes that make `nbytes` together, as far as the step goes."""
        ledger = self.ledger
        serving = sum(instance.serving_bytes for instance in ledger.instances.values())
        mean = max(serving // max(len(ledger.table), 1), 1)
        count = min(self.blocks, nbytes * 5 // (mean * 4) + 8)
        ids = ledger.order.victims(list(lanes), count, self.now_ms, leaves_only=leaves_only)
        enough = int(np.searchsorted(np.cumsum(ledger.table.nbytes[ids]), nbytes)) + 1
        return ids[:enough]

    def drop(self, ids: Ids, why: Why, needed_bytes: int = 0) -> None:
        """SERVING -> DELETING."""
        ledger = self.ledger
        if not len(ids):
            return
        self.blocks -= len(ids)
        ledger.counters[_COUNTERS.get(why, "evicted_blocks")] += len(ids)
        for instance, own in ledger.by_instance(ids):
            name, keys = instance.info.instance_id, ledger.table.keys[own]
            copied = ledger.copied_keys(own)
            due_ms = ledger.due_after_readers(own, self.now_ms)
            before = instance.serving_bytes
            locations = ledger.forget(instance, own, evicted=True)
            if len(copied):
                self.effects.append(DropCopies(name, copied))
            freed = before - instance.serving_bytes
            self.effects.append(DropBlocks(name, keys, why, freed, needed_bytes))
            self.effects += ledger.discard(instance, locations, due_ms)

    def move(self, ids: Ids, target: StorageConfig, kind: SessionKind) -> None:
        """Have blocks copied to `target`, as many as reclaimers should have in hand."""
        ledger = self.ledger
        for instance, own in ledger.by_instance(ids):
            room = (limits.MOVES_IN_FLIGHT_MAX - len(ledger.moves.by_id)) * limits.MOVE_BLOCKS_MAX
            own = own[: max(room, 0)]
            if len(own):
                self.blocks -= len(own)
                self.effects += start_move(ledger, instance, own, target, kind, self.now_ms)

    def lanes(self, kind: StorageType | None = None) -> list[int]:
        """Lanes of all instances, of one type or of all."""
        instances = self.ledger.instances.values()
        if kind is not None:
            return [instance.lane(kind) for instance in instances]
        return [lane for instance in instances for lane in instance.lanes]

    def _use_copies(self, ids: Ids) -> Ids:
        """Demote those that have a copy further down at once; the others."""
        copied = self.ledger.table.copied[ids]
        own = ids[copied]
        self.blocks -= len(own)
        for instance, part in self.ledger.by_instance(own) if len(own) else ():
            self.effects += use_copies(self.ledger, instance, part, self.now_ms)
        return ids[~copied]

    def _roomy(self, kinds: Sequence[StorageType], ids: Ids) -> StorageConfig | None:
        """The first storage of these types that has room for the blocks."""
        nbytes = int(self.ledger.table.nbytes[ids].sum())
        for storage in self._storages(kinds):
            if self.ledger.quota.refusal(storage.storage_type, nbytes) is None:
                return storage
        return None

    def _make_room(self, kinds: Sequence[StorageType], ids: Ids) -> bool:
        """Begin to make room for the blocks in one of these tiers; False if none can give any."""
        self.why = Why.TIER
        nbytes = int(self.ledger.table.nbytes[ids].sum())
        for storage in self._storages(kinds):
            kind = quota_type(storage.storage_type)
            over = max(missing(self.ledger, kind, nbytes), missing(self.ledger, None, nbytes))
            if over <= 0:
                return True  # it is on its way
            before = len(self.effects)
            self.free(kind, over)
            if len(self.effects) > before:
                return True
        return False

    def _storages(self, kinds: Sequence[StorageType]) -> list[StorageConfig]:
        try:
            ranked = candidates(self.ledger.group, self.ledger.storages)
        except NoStorageAvailable:
            return []
        full = self.ledger.plan.full_until_ms
        return [
            storage
            for kind in kinds
            for storage in ranked
            if quota_type(storage.storage_type) is kind
            and full.get(storage.global_unique_name, 0) <= self.now_ms
        ]

    # --------------------------------------------------------------------------- drain, promote

    def drain(self) -> None:
        """Blocks leave storages that are drained, or that are registered no more."""
        ledger = self.ledger
        if not ledger.plan.draining or self.blocks <= 0:
            return
        found = leaving(ledger)
        ledger.plan.draining = bool(found)
        self.effects += drop_unused_segments(ledger, found)
        for part in found:
            self._drop_copies(part.copies(ledger)[: max(self.blocks, 0)])
            ids = part.blocks(ledger)
            ids = self._use_copies(ids[~ledger.table.moving[ids]][: max(self.blocks, 0)])
            if len(ids) and part.storage not in ledger.storages:
                self.drop(ids, Why.DRAINED)  # nobody can read them any more
            elif len(ids):
                self._move_away(ids)

    def _move_away(self, ids: Ids) -> None:
        """To a storage of the same type, or to the slowest tier that has room; hits promote them. If
        there is none, they go piece by piece: what has left is room for the next ones."""
        ids = self._drop_unreadable(ids)
        if not len(ids):
            return
        own = KINDS[self.ledger.table.kind[ids[0]]]
        kinds = [k for k in self.tiers if k is own] + [k for k in self.tiers[::-1] if k is not own]
        piece = ids[: min(max(len(ids) // PIECES, 1), limits.MOVE_BLOCKS_MAX)]
        for part in (ids, piece):
            if (target := self._roomy(kinds, part)) is not None:
                self.move(part, target, SessionKind.MOVE)
                return
        waits = self.tiers and not self._storages(kinds)  # for a storage that failed lately
        if not waits and not self._make_room(kinds, piece):
            self.drop(self.ledger.order.may_leave(ids, self.now_ms), Why.DRAINED)

    def _drop_unreadable(self, ids: Ids) -> Ids:
        """Those that cannot be copied leave as they are; the others."""
        unreadable = self.ledger.plan.unreadable
        lost = np.fromiter((block in unreadable for block in ids.tolist()), np.bool_, len(ids))
        self.drop(self.ledger.order.may_leave(ids[lost], self.now_ms), Why.UNREADABLE)
        return ids[~lost]

    def promote(self) -> None:
        """Copy blocks that were hit in a slow tier to the first one, as far as there is room."""
        ledger, plan = self.ledger, self.ledger.plan
        if not plan.promotions or not self.tiers or self.blocks <= 0:
            return
        if len(ledger.moves.by_id) >= limits.MOVES_IN_FLIGHT_MAX // 2:
            return
        first = self.tiers[0]
        waiting = np.fromiter(plan.promotions, np.int64, len(plan.promotions))
        most = min(limits.MOVE_BLOCKS_MAX, self.blocks)
        ids = waiting[_promotable(ledger, waiting, first)][:most]
        if not len(ids):
            plan.promotions.clear()
            return
        target = self._roomy([first], ids)
        if target is None:
            self._make_room_above(first, int(ledger.table.nbytes[ids].sum()))
            return
        for block in ids.tolist():
            del plan.promotions[block]
        self.move(ids, target, SessionKind.PROMOTE)

    def _make_room_above(self, first: StorageType, nbytes: int) -> None:
        """Colder blocks of the first tier go down; or the coldest go, if the total is what is full."""
        self.why, self.needed = Why.TIER, nbytes
        if (over := missing(self.ledger, first, nbytes)) > 0:
            self.relieve(first, over)
        elif (over := missing(self.ledger, None, nbytes)) > 0:
            self.free(self.tiers[-1], over)


def _promotable(ledger: Ledger, ids: Ids, first: StorageType) -> Flags:
    table = ledger.table
    retiring = [i.number for i in ledger.instances.values() if i.info.retiring_since_s]
    good = (table.instance[ids] >= 0) & (table.kind[ids] != first) & ~table.moving[ids]
    promotable: Flags = good & ~np.isin(table.instance[ids], retiring)
    return promotable
