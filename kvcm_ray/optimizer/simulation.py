"""A trace against groups with tiers: what each request finds and where, and what moves meanwhile.

Each group has the policy and the `EvictionOrder` of a live one, with a lane for each tier. New blocks
go to the first tier; a tier above its capacity demotes its coldest blocks to the next, the last one
drops its coldest leaves, and a group above its quota drops from its slowest tier. If what is below can
give no room, leaves of the tier above go instead. Blocks that are used further down come up again.
Groups that use one storage compete for it: the one that writes gives up blocks of its own, as its own
policy chooses. A storage that others fill is passed over.

Where this differs from a live group on purpose:

- Making room and moving take no time: blocks come in first, then what is too much leaves. So does a live
  group with water marks, in the background; without any it makes room first, as `replay` does, which for
  lfu, adaptive and partial blocks leads to slightly other hits.
- Every use brings a block to the first tier, before it counts as touched. A live group promotes what
  a look-up hit, later and as far as there is room.
- A live group that is not full leaves copies of promoted blocks below; blocks with a copy are demoted
  before others of the same batch. No copies here.
- Tiers are storages here. A live group takes storages of one type for one tier.
- Pins, leases, limits of keys, retiring instances and removed blocks are not in a trace.

Groups of lru and ttl are compiled (`kernels.tiers`) for traces that are `chained`; what each request
finds and moves is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from kvcm_ray.core.eviction import EvictionOrder, make_policy
from kvcm_ray.core.eviction.arrays import Ids
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import F64, I32, I64, READ, REQUEST, WRITE, Accesses, Flags
from kvcm_ray.optimizer.replay import prompt_tokens, tails, times_us
from kvcm_ray.optimizer.scenario import Group, Scenario, WriteDelay

COMPILED = ("lru", "ttl")

_EVICTED, _EXPIRED, _DEMOTED, _PROMOTED = range(4)
_NO_LIMIT = 1 << 62
_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of n requests, in a scenario with G groups and S storages. What a request's own write did counts
    as its, whenever that was."""

    scenario: Scenario
    groups: I32  #: (n,) number of the group of each request
    hits: I32  #: (n,) leading blocks that were present; 0 for writes
    tier_hits: I32  #: (n, S) the same by storage
    read: I64  #: (n, S) their bytes
    load_s: F64  #: (n,) time to read the hits, one storage after the other
    evicted: I32  #: (n,) blocks dropped to make room
    expired: I32  #: (n,) blocks of any group whose time to live was over
    demoted: I32  #: (n,) steps of blocks to slower tiers
    promoted: I32  #: (n,) steps to faster ones
    written: I64  #: (n, S) bytes: new ones, demoted and promoted ones
    occupancy: I64  #: (n, G, S) bytes, after the request's look-up
    write_delay_s: F64  #: (n,) from the request until its new blocks are visible


def simulate(accesses: Accesses, scenario: Scenario, *, compiled: bool = True) -> Outcome:
    """Serve the requests of a trace, in its order.

    Args:
        compiled: False asks for the live policies' own code even where there is a compiled form.

    Raises:
        InvalidArgument: no group has an instance of the trace, or the delay of writes goes by tokens
            and the trace does not say how many there are.
        Unsupported: numba is not installed.
    """
    plan = _Plan.of(accesses, scenario)
    results = _Results(accesses.requests, len(scenario.groups), len(scenario.storages))
    if compiled and _has_kernel(accesses, scenario):
        _compiled(plan, results)
    else:
        _Simulation(plan, results).run()
    reads = results.tier_hits * plan.sizes[:, None]
    speeds = np.array([storage.read_bytes_per_s or np.inf for storage in scenario.storages])
    latencies = np.array([storage.latency_s for storage in scenario.storages])
    counts = results.counts
    return Outcome(
        scenario=scenario,
        groups=plan.groups,
        hits=results.hits,
        tier_hits=results.tier_hits,
        read=reads,
        load_s=reads @ (1 / speeds) + (results.tier_hits > 0) @ latencies,
        evicted=counts[:, _EVICTED],
        expired=counts[:, _EXPIRED],
        demoted=counts[:, _DEMOTED],
        promoted=counts[:, _PROMOTED],
        written=results.written,
        occupancy=results.occupancy,
        write_delay_s=results.delays_us / 1e6,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """A trace and a scenario, by numbers."""

    accesses: Accesses
    scenario: Scenario
    groups: I32  #: (n,)
    sizes: I64  #: (n,) bytes of each block
    partial: Flags  #: (n,)
    now_us: I64  #: (n,)
    tokens: I64  #: (n,) of the prompt

    @staticmethod
    def of(accesses: Accesses, scenario: Scenario) -> _Plan:
        groups, sizes = scenario.number(accesses)
        if scenario.write_delay.seconds_per_missed_token and not accesses.block_tokens:
            raise InvalidArgument(
                "the trace does not say how many tokens a block has, by which write_delay goes",
                hint="Give write_delay.seconds instead.",
            )
        return _Plan(
            accesses=accesses,
            scenario=scenario,
            groups=groups[accesses.instances],
            sizes=sizes[accesses.instances],
            partial=tails(accesses) if scenario.partial_first else np.zeros_like(accesses.partial),
            now_us=times_us(accesses),
            tokens=prompt_tokens(accesses),
        )


class _Results:
    """Zeros that a simulation fills in; see `Outcome`."""

    def __init__(self, requests: int, groups: int, storages: int) -> None:
        self.hits = np.zeros(requests, np.int32)
        self.tier_hits = np.zeros((requests, storages), np.int32)
        self.counts = np.zeros((requests, 4), np.int32)
        self.written = np.zeros((requests, storages), np.int64)
        self.occupancy = np.zeros((requests, groups, storages), np.int64)
        self.delays_us = np.zeros(requests, np.int64)


# ------------------------------------------------------------------------------------ compiled


def _has_kernel(accesses: Accesses, scenario: Scenario) -> bool:
    return accesses.chained and all(group.policy in COMPILED for group in scenario.groups)


def _compiled(plan: _Plan, results: _Results) -> None:
    from kvcm_ray.optimizer.kernels import tiers

    accesses, scenario = plan.accesses, plan.scenario
    lanes, devices, groups = _tables(scenario)
    delay = scenario.write_delay
    table = np.zeros((accesses.requests, tiers.RESULTS + 2 * len(devices)), np.int64)
    tiers.lru(
        accesses.blocks, accesses.offsets, accesses.ops,
        np.stack([plan.groups, plan.sizes, plan.now_us, plan.tokens, plan.partial], axis=1).astype(np.int64),
        lanes, devices, groups, accesses.block_tokens,
        np.array([delay.seconds, delay.seconds_per_missed_token]) * 1e6,
        accesses.unique, table, results.occupancy,
    )  # fmt: skip
    results.hits[:] = table[:, tiers.HITS]
    results.counts[:] = table[:, [tiers.EVICTED, tiers.EXPIRED, tiers.DEMOTED, tiers.PROMOTED]]
    results.delays_us[:] = table[:, tiers.DELAY]
    results.tier_hits[:], results.written[:] = np.hsplit(table[:, tiers.RESULTS :], 2)


def _tables(scenario: Scenario) -> tuple[I64, I64, I64]:
    """Tiers by group, storages and groups, as the kernel wants them."""
    numbers = {storage.name: number for number, storage in enumerate(scenario.storages)}
    most = max(len(group.tiers) for group in scenario.groups)
    lanes: list[tuple[int, int, int]] = []
    for group in scenario.groups:
        lanes += [(numbers[tier.storage], tier.capacity_bytes or _NO_LIMIT, 0) for tier in group.tiers]
        lanes += [(_NOWHERE, 0, 0)] * (most - len(group.tiers))
    devices = [(storage.capacity_bytes or _NO_LIMIT, 0) for storage in scenario.storages]
    groups = [
        (group.quota_bytes or _NO_LIMIT, _ttl_us(group), group.block_bytes_max) for group in scenario.groups
    ]
    return np.array(lanes), np.array(devices), np.array(groups)


def _ttl_us(group: Group) -> int:
    return round(group.ttl_s * 1e6)


# ----------------------------------------------------------------------------- the live policies


class _Devices:
    """Bytes on each storage, of all groups."""

    def __init__(self, scenario: Scenario) -> None:
        self.numbers = {storage.name: number for number, storage in enumerate(scenario.storages)}
        self.capacities = [storage.capacity_bytes or _NO_LIMIT for storage in scenario.storages]
        self.stored = [0] * len(scenario.storages)


class _Simulation:
    def __init__(self, plan: _Plan, results: _Results) -> None:
        self._plan, self._results = plan, results
        devices = _Devices(plan.scenario)
        self._groups = [_Cache(group, plan, results, devices) for group in plan.scenario.groups]
        self._writes: list[tuple[int, int]] = []  #: heap of (when, of which request)

    def run(self) -> None:
        plan, results, writes = self._plan, self._results, self._writes
        rows = zip(plan.now_us.tolist(), plan.groups.tolist(), plan.accesses.ops.tolist(), strict=True)
        for request, (now_us, number, op) in enumerate(rows):
            while writes and writes[0][0] <= now_us:
                due_us, written = heappop(writes)
                self._serve(self._groups[plan.groups[written]], written, WRITE, due_us)
            group = self._groups[number]
            self._expire(request, now_us)
            delay_us = self._delay_us(group, request) if op == REQUEST else 0
            if delay_us:
                results.delays_us[request] = delay_us
                heappush(writes, (now_us + delay_us, request))
            self._serve(group, request, READ if delay_us else op, now_us)
            results.occupancy[request] = [each.held for each in self._groups]

    def _serve(self, group: _Cache, request: int, op: int, now_us: int) -> None:
        self._expire(request, now_us)
        group.serve(request, now_us, read=bool(op & READ), write=bool(op & WRITE))

    def _expire(self, request: int, now_us: int) -> None:
        for group in self._groups:
            group.expire(request, now_us)

    def _delay_us(self, group: _Cache, request: int) -> int:
        delay: WriteDelay = self._plan.scenario.write_delay
        if not delay:
            return 0
        hits = group.leading(request) * self._plan.accesses.block_tokens
        missed = max(int(self._plan.tokens[request]) - hits, 0)
        return int(np.rint(delay.seconds * 1e6 + delay.seconds_per_missed_token * 1e6 * missed))


class _Cache:
    """A group's blocks in an `EvictionOrder`, a lane for each tier. Their ids are those of the trace."""

    def __init__(self, group: Group, plan: _Plan, results: _Results, devices: _Devices) -> None:
        self._order = EvictionOrder(make_policy(group.policy))
        self._plan, self._results, self._devices = plan, results, devices
        self._storages = [devices.numbers[tier.storage] for tier in group.tiers]  #: by tier
        self._capacities = [tier.capacity_bytes or _NO_LIMIT for tier in group.tiers]
        self._quota = group.quota_bytes or _NO_LIMIT
        self._ttl_us = _ttl_us(group)
        self._block_bytes = [instance.block_bytes for instance in group.instances]
        self._tier = np.full(plan.accesses.unique, _NOWHERE, np.int64)
        self._sizes = np.zeros(plan.accesses.unique, np.int64)
        self.held = [0] * len(devices.stored)  #: bytes by storage

    # ------------------------------------------------------------------------------ requests

    def leading(self, request: int) -> int:
        """How many leading blocks of a request are present."""
        present = self._tier[self._blocks(request)] != _NOWHERE
        return len(present) if present.all() else int(present.argmin())

    def serve(self, request: int, now_us: int, *, read: bool, write: bool) -> None:
        blocks = self._blocks(request)
        present, found = self._tier[blocks] != _NOWHERE, self.leading(request)
        entry = self._first_tier(0, int(self._plan.sizes[request]))
        if read:
            self._results.hits[request] = found
            tiers = np.bincount(self._tier[blocks[:found]], minlength=len(self._storages))
            self._results.tier_hits[request, self._storages] = tiers
        used = blocks[present] if write else blocks[:found]
        self._shift(request, used[self._tier[used] > entry], entry)
        if read:
            self._order.touch(blocks[:found], self._keys(blocks[:found]), now_us)
        if write:
            self._renew(blocks, now_us)
        if write and entry != _NOWHERE:
            self._admit(request, blocks, entry, now_us)
        self._level(request, now_us)

    def expire(self, request: int, now_us: int) -> None:
        """Drop what nobody touched for the time to live."""
        lanes = range(len(self._storages))
        if self._ttl_us and (count := self._order.count(lanes)):
            ids = self._order.expired(lanes, now_us - self._ttl_us + 1, count, now_us)
            self._drop(request, ids, _EXPIRED)

    def _renew(self, blocks: Ids, now_us: int) -> None:
        """What is there of a prompt becomes most recent, its look-up having counted it."""
        there = blocks[self._tier[blocks] != _NOWHERE]
        self._order.touch(there, self._keys(there), now_us, used=False)

    def _admit(self, request: int, blocks: Ids, entry: int, now_us: int) -> None:
        present, found = self._tier[blocks] != _NOWHERE, self.leading(request)
        new = blocks[~present]
        if not len(new):
            return
        partial = bool(self._plan.partial[request]) and not present[-1]
        parent = int(blocks[found - 1]) if found else -1
        self._order.add(entry, new, self._keys(new), now_us, parent=parent, partial=partial)
        self._sizes[new] = self._plan.sizes[request]
        self._tier[new] = entry
        self._put(request, new, entry)
        self._renew(blocks[present], now_us)

    def _blocks(self, request: int) -> Ids:
        offsets = self._plan.accesses.offsets
        blocks: Ids = self._plan.accesses.blocks[offsets[request] : offsets[request + 1]].astype(np.int64)
        return blocks

    def _keys(self, blocks: Ids) -> I64:
        return self._plan.accesses.keys[blocks]

    # ---------------------------------------------------------------------------------- room

    def _spare(self, tier: int) -> int:
        """Bytes that may still come to a tier; negative if it has too many."""
        storage, devices = self._storages[tier], self._devices
        own = self._capacities[tier] - self.held[storage]
        return min(own, devices.capacities[storage] - devices.stored[storage])

    def _first_tier(self, start: int, nbytes: int) -> int:
        """The first tier from `start` on that could take a block if this group had nothing else there."""
        for tier in range(start, len(self._storages)):
            if self._spare(tier) + self.held[self._storages[tier]] >= nbytes:
                return tier
        return _NOWHERE

    def _level(self, request: int, now_us: int) -> None:
        """Down to the capacity of each tier, then to the quota."""
        for tier in range(len(self._storages)):
            while (over := -self._spare(tier)) > 0:
                taken = self._relieve(request, tier, over, now_us)
                assert taken or self._free_slowest(request, over, now_us), "nothing is held here"
        while (over := sum(self.held) - self._quota) > 0:
            assert self._free_slowest(request, over, now_us), "nothing is held here"

    def _relieve(self, request: int, tier: int, nbytes: int, now_us: int) -> int:
        """Take bytes out of a tier: demote its coldest blocks, or drop leaves; how many that were."""
        taken = 0
        while taken < nbytes:
            if self._first_tier(tier + 1, min(self._block_bytes)) == _NOWHERE:
                return taken + self._free(request, tier, nbytes - taken, now_us)
            ids = self._coldest(tier, nbytes - taken, now_us, leaves_only=False)
            if not len(ids):
                break
            ids, target = self._same_way(ids, tier)
            size = int(self._sizes[ids].sum())
            if target != _NOWHERE and (short := size - self._spare(target)) > 0:
                self._relieve(request, target, short, now_us)
            if target != _NOWHERE and self._spare(target) >= size:
                self._shift(request, ids[::-1], target)
                taken += size
            elif freed := self._free(request, tier, size, now_us):
                taken += freed
            else:
                break
        return taken

    def _same_way(self, ids: Ids, tier: int) -> tuple[Ids, int]:
        """Of these blocks, coldest first, the first ones that can go to one tier together; which."""
        sizes = self._sizes[ids]
        size = int(sizes[0])
        same = len(ids) if (sizes == size).all() else int((sizes == size).argmin())
        target = self._first_tier(tier + 1, size)
        if target == _NOWHERE:
            return ids[:same], target
        most = (self._spare(target) + self.held[self._storages[target]]) // size
        return ids[: min(same, most)], target

    def _free_slowest(self, request: int, nbytes: int, now_us: int) -> int:
        """Drop leaves of the slowest tier that has any; the bytes that makes."""
        tiers = reversed(range(len(self._storages)))
        return next((freed for tier in tiers if (freed := self._free(request, tier, nbytes, now_us))), 0)

    def _free(self, request: int, tier: int, nbytes: int, now_us: int) -> int:
        """Drop leaves of a tier, coldest first; the bytes that makes."""
        freed = 0
        while freed < nbytes:
            ids = self._coldest(tier, nbytes - freed, now_us, leaves_only=True)
            if not len(ids):
                break
            freed += int(self._sizes[ids].sum())
            self._drop(request, ids, _EVICTED)
        return freed

    def _coldest(self, tier: int, nbytes: int, now_us: int, *, leaves_only: bool) -> Ids:
        """Some of the coldest blocks of a tier, of no more than `nbytes` but for the last of them."""
        count = -(-nbytes // max(self._block_bytes))
        return self._order.victims((tier,), count, now_us, leaves_only=leaves_only)

    # -------------------------------------------------------------------------------- blocks

    def _drop(self, request: int, ids: Ids, why: int) -> None:
        if not len(ids):
            return
        self._take(ids)
        self._order.remove(ids, self._keys(ids), evicted=True)
        self._tier[ids] = _NOWHERE
        self._results.counts[request, why] += len(ids)

    def _shift(self, request: int, ids: Ids, tier: int) -> None:
        """To the tail of another tier; in prefix order, or hottest first."""
        if not len(ids):
            return
        self._take(ids)
        why = _PROMOTED if tier < self._tier[ids[0]] else _DEMOTED
        self._results.counts[request, why] += len(ids)
        self._tier[ids] = tier
        self._order.move(ids, tier)
        self._put(request, ids, tier)

    def _take(self, ids: Ids) -> None:
        for tier in np.unique(self._tier[ids]).tolist():
            self._count(tier, -int(self._sizes[ids[self._tier[ids] == tier]].sum()))

    def _put(self, request: int, ids: Ids, tier: int) -> None:
        nbytes = int(self._sizes[ids].sum())
        self._count(tier, nbytes)
        self._results.written[request, self._storages[tier]] += nbytes

    def _count(self, tier: int, nbytes: int) -> None:
        storage = self._storages[tier]
        self.held[storage] += nbytes
        self._devices.stored[storage] += nbytes
