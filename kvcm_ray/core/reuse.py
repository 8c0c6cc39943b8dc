"""How much a group's look-ups would find with more room, or with less: an estimate made of the traffic.

It counts, for each look-up of a block, how many others were used since that block was used last: with room
for that many, leaf-first LRU has it. What is remembered are lists of blocks by last use, one for each
`levels` of sampling: the list of level k has the most recent ones of 1 / 2**k of all blocks. All lists are
about as long. So what was used lately is counted one by one, and what is twice as far back with half as many
samples: the relative error is the same at every capacity, and memory is bounded whatever the traffic.

- A list is complete down to its *floor*. A look-up counts in the finest list whose floor is not above the
  block's last use, with the weight of that list; blocks that are not in that list do not count.
- Where the traffic is more than `sampled_per_s`, the finest lists are given up. What is then known of
  only a part of the blocks is corrected by the number of all accesses, which is always exact.
- A look-up counts and touches what was ever written, and puts in nothing. A write puts in all of its blocks.
  Keys name prefixes, so whatever is known behind a block in its prompt, that block is known too.
- Older traffic counts less, half as much after each `half_life_s`.

Whoever needs a clock has it from the observed requests; nothing here reads one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.hashing import mix64
from kvcm_ray.core.levels import LEVEL_MAX, sampled, sampled_alone
from kvcm_ray.core.observed import Observed
from kvcm_ray.core.ranks import larger_before, weight_of_larger_before
from kvcm_ray.core.requests import Flags

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

PART_KEYS = 1 << 16  #: accesses that are worked on at a time
SET_BACK_S = 60.0  #: a clock that is so far behind what it showed was set back
WINDOW_S = 10.0  #: in which `sampled_per_s` must hold
BINS_PER_OCTAVE = 32  #: so distances are known to 2 %
_OCTAVES = 48
_BINS = BINS_PER_OCTAVE * _OCTAVES
_NEVER = 1 << 62


@dataclass(slots=True)
class Sums:
    """Of look-ups, in blocks, older ones counted less."""

    accessed: float = 0.0
    found: float = 0.0  #: that the group really had
    sampled: float = 0.0  #: what the sample makes of `accessed`
    unknown: float = 0.0  #: found, but last used before the estimate began

    def fade(self, factor: float) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) * factor)


@dataclass(slots=True)
class _Events:
    """Uses of sampled blocks, those of one request last to first: parallel arrays."""

    keys: U64
    levels: U8
    sizes: F64
    requests: I64  #: within the part; -1 for what was remembered before
    reads: Flags
    anchors: Flags  #: known to be written

    def take(self, index: I64 | Flags) -> _Events:
        return _Events(*(getattr(self, name)[index] for name in self.__slots__))

    @staticmethod
    def joined(first: _Events, second: _Events) -> _Events:
        names = _Events.__slots__
        return _Events(*(np.concatenate([getattr(first, n), getattr(second, n)]) for n in names))

    def __len__(self) -> int:
        return len(self.keys)


def _none() -> _Events:
    return _Events(*(np.zeros(0, of) for of in (np.uint64, np.uint8, float, np.int64, bool, bool)))


class ReuseEstimate:
    """The estimate of one group.

    Args:
        max_blocks: about how many blocks are remembered, of 35 bytes each. The lists share them: with
            4096 they have about 600 each when there were a million different blocks.
        half_life_s: seconds after which traffic counts half.
        sampled_per_s: uses of blocks a second that are looked at, on average over `WINDOW_S`.
    """

    def __init__(
        self, max_blocks: int = 16_384, *, half_life_s: float = 7_200.0, sampled_per_s: float = 32_768.0
    ) -> None:
        assert max_blocks >= 64, "fewer say nothing"
        self.level = 0  #: of the finest list
        self.requests = 0  #: look-ups
        self.accessed = 0  #: blocks of look-ups
        self.sums = Sums()
        self._max_blocks = max_blocks
        self.half_life_s = half_life_s
        self._sampled_per_s = sampled_per_s
        self._known, self._at = _none(), np.zeros(0, np.int64)  # by time of last use
        self._floors = np.zeros(LEVEL_MAX + 1, np.int64)  #: falling
        self._clock = 0  #: uses of sampled blocks so far
        self._hist = np.zeros(_BINS)
        self._sizes: Mapping[str, float] = {}
        self._unit = 0.0  #: bytes of what `_hist` counts in; 0: not known yet, blocks count as equal
        self._first_s = self._now_s = self._window_s = math.nan
        self._window = 0.0

    @property
    def tracked(self) -> int:
        """Blocks that are remembered."""
        return len(self._known)

    @property
    def seconds(self) -> float:
        """Between the first request and the last."""
        return 0.0 if math.isnan(self._first_s) else self._now_s - self._first_s

    @property
    def block_bytes(self) -> float:
        """Of an average block of those remembered; 0 as long as no sizes are known."""
        return self._unit * float(self._known.sizes.mean()) if len(self._known) else self._unit

    def footprint(self) -> float:
        """About how large all blocks together are that were seen, in what capacities are in."""
        whole = min(self._whole_list(), LEVEL_MAX)
        size = float(self._known.sizes[self._known.levels >= whole].sum())
        return size * 2.0**whole * (self._unit or 1.0)

    def weigh(self, block_bytes: Mapping[str, int]) -> None:
        """How large the blocks of each instance are.

        From now on; blocks of an instance that is not among them count as average ones.
        """
        if block_bytes and not self._unit:
            self._unit = sum(block_bytes.values()) / len(block_bytes)
        self._sizes = {name: size / self._unit for name, size in block_bytes.items() if size > 0}

    # ------------------------------------------------------------------------------- the estimate

    def hit_ratio(self, capacities: npt.ArrayLike) -> F64:
        """The share of looked-up blocks that caches of so many bytes would find (blocks, as long as
        sizes are not known), in the shape of `capacities`. Zeros before there was a look-up."""
        edges, ratios = self.curve()
        wanted = np.log2(np.maximum(np.asarray(capacities, np.float64), edges[0] / 2))
        found: F64 = np.interp(wanted, np.log2(edges), ratios, left=0.0)
        return found

    def curve(self) -> tuple[F64, F64]:
        """Capacities in bytes, increasing, and the hit ratio at each: the last is that of a cache that
        never drops anything."""
        edges = 2.0 ** (np.arange(_BINS) / BINS_PER_OCTAVE) * (self._unit or 1.0)
        lost = self.sums.accessed - self.sums.sampled
        hits = np.cumsum(self._hist) + lost
        return edges, np.clip(hits / max(self.sums.accessed - self.sums.unknown, 1e-300), 0.0, 1.0)

    def feed(self, observed: Observed) -> None:
        """Count requests that come after all before them."""
        offsets = np.zeros(len(observed.counts) + 1, np.int64)
        np.cumsum(observed.counts, out=offsets[1:])
        for start, stop in _parts(offsets):
            self._fade(observed.times_s[start:stop])
            self._count(observed, offsets, start, stop)

    def _fade(self, times_s: F64) -> None:
        latest_s = float(times_s.max())
        if math.isnan(self._first_s):
            self._first_s = self._window_s = float(times_s[0])
            self._now_s = latest_s
        if (back_s := self._now_s - latest_s) > SET_BACK_S:  # else nothing counts until it is there again
            self._first_s -= back_s
            self._window_s -= back_s
            self._now_s = latest_s
        factor = 2.0 ** (-max(latest_s - self._now_s, 0.0) / self.half_life_s)
        self._now_s = max(self._now_s, latest_s)
        self.sums.fade(factor)
        self._hist *= factor

    def _count(self, observed: Observed, offsets: I64, start: int, stop: int) -> None:
        reads = ~observed.writes[start:stop]
        counts = observed.counts[start:stop]
        age_s = np.maximum(self._now_s - observed.times_s[start:stop], 0.0)
        weights = np.where(reads, 2.0 ** (-age_s / self.half_life_s), 0.0)
        self.requests += int(reads.sum())
        self.accessed += int(counts[reads].sum())
        self.sums.accessed += float((weights * counts).sum())
        self.sums.found += float((weights * observed.found[start:stop]).sum())
        new = self._events(observed, offsets, start, stop)
        self.sums.sampled += float(weights[new.requests[new.reads]].sum()) * 2**self.level
        if len(new):
            self._use(new, weights)
        self._regulate(len(new))

    def _events(self, observed: Observed, offsets: I64, start: int, stop: int) -> _Events:
        """What is in the sample of some requests."""
        own = offsets[start : stop + 1] - offsets[start]
        keys = observed.keys[offsets[start] : offsets[stop]]
        at, level, request = self._drawn(keys, own)
        place = at - own[request]
        writes = observed.writes[start:stop][request]
        ids = observed.instance_ids[start:stop]
        return _Events(
            keys=mix64(keys[at].view(np.uint64) ^ _salts(ids)[request]),
            levels=level,
            sizes=self._sizes_of(ids)[request],
            requests=request,
            reads=~writes,
            anchors=writes | (place < observed.found[start:stop][request]),
        )

    def _drawn(self, keys: I64, offsets: I64) -> tuple[I64, U8, I64]:
        """Where, of which level and in which request; requests in order, each last to first."""
        behind, level = sampled(keys, offsets, self.level)
        heads = offsets[:-1][np.diff(offsets) > 0]
        heads, of_heads = sampled_alone(keys, heads, self.level)
        at = np.concatenate([behind, heads])
        level = np.concatenate([level, of_heads])
        request = np.searchsorted(offsets, at, side="right") - 1
        order = np.argsort(offsets[request] + offsets[request + 1] - at, kind="stable")
        return at[order], level[order], request[order]

    def _sizes_of(self, ids: Sequence[str]) -> F64:
        names = dict.fromkeys(ids)
        if len(names) == 1:
            return np.broadcast_to(self._sizes.get(ids[0], 1.0), len(ids))
        return np.fromiter((self._sizes.get(name, 1.0) for name in ids), np.float64, len(ids))

    def _use(self, new: _Events, weights: F64) -> None:
        """Count the look-ups among these events, and remember the last use of each block."""
        known = len(self._known)
        row = _Events.joined(self._known, new)
        at = np.concatenate([self._at, self._clock + np.arange(len(new))])
        self._clock += len(new)
        chains = _Chains.of(row)
        look_ups = known + np.flatnonzero(new.reads)
        self._count_hits(row, look_ups, at, chains, weights)
        self._count_unknown(row, look_ups, chains.before, weights)
        kept = np.flatnonzero(chains.last)
        self._known, self._at = row.take(kept), at[kept]
        self._known.requests[:], self._known.anchors[:] = -1, True
        self._forget()

    def _count_hits(self, row: _Events, look_ups: I64, at: I64, chains: _Chains, weights: F64) -> None:
        """Each look-up of what was used before, in the finest list that goes back so far."""
        queries = look_ups[chains.before[look_ups] >= 0]
        lists = np.searchsorted(-self._floors, -at[chains.before[queries]])  # floors fall
        fit = row.levels[queries] >= lists
        queries, lists = queries[fit], lists[fit]
        starts = np.searchsorted(row.requests, row.requests[queries])
        for level in np.unique(lists).tolist():
            some = lists == level
            among = chains.counts & (row.levels >= level)
            between = _between(row, chains.before, among, queries[some], starts[some])
            own = row.sizes[queries[some]]
            distances = (between + own / 2) * 2**level + own / 2
            self._add(distances, weights[row.requests[queries[some]]] * 2**level)

    def _count_unknown(self, row: _Events, look_ups: I64, before: I64, weights: F64) -> None:
        """What was there, but last used before the estimate began, is neither a hit nor a miss."""
        whole = self._whole_list()
        strange = row.anchors[look_ups] & (before[look_ups] < 0) & (row.levels[look_ups] >= whole)
        self.sums.unknown += float(weights[row.requests[look_ups[strange]]].sum()) * 2.0**whole

    def _whole_list(self) -> int:
        """The finest list that goes back to the beginning."""
        return int(np.searchsorted(-self._floors, 0))

    def _add(self, distances: F64, weights: F64) -> None:
        bins = np.ceil(np.log2(np.maximum(distances, 1.0)) * BINS_PER_OCTAVE - 1e-6).astype(np.int64)
        self._hist += np.bincount(np.minimum(bins, _BINS - 1), weights, _BINS)

    # --------------------------------------------------------------------------------- its bounds

    def _forget(self) -> None:
        """Shorter lists when more is remembered than memory allows, all of the same length."""
        self._keep(self._known.levels >= self.level)
        short = int((self._floors[self.level :] > 0).sum())  # those that do not go back to the beginning
        while self.tracked > self._max_blocks and short <= LEVEL_MAX + 1:
            self._shorten(int(self._max_blocks / (1 + short / 2)))
            short += 1

    def _shorten(self, length: int) -> None:
        newest_first = self._known.levels[::-1]
        for level in range(self.level, LEVEL_MAX + 1):
            members = np.flatnonzero(newest_first >= level)
            if len(members) <= length:
                break
            floor = self._at[len(self._at) - 1 - members[length - 1]]
            self._floors[level] = max(self._floors[level], floor)
        self._keep(self._at >= self._floors[self._known.levels])

    def _keep(self, which: Flags) -> None:
        if not which.all():
            self._known, self._at = self._known.take(which), self._at[which]

    def _regulate(self, events: int) -> None:
        """Coarser at once when there is too much to look at, finer after a quiet while."""
        elapsed_s = self._now_s - self._window_s
        budget = self._sampled_per_s * max(elapsed_s, WINDOW_S)
        self._window += events
        while self._window > budget and self.level < LEVEL_MAX:
            self._floors[self.level] = _NEVER
            self.level += 1
            self._window /= 2
        if elapsed_s >= WINDOW_S:
            if self._window < budget / 4 and self.level:
                self.level -= 1
                self._floors[self.level] = self._clock
            self._window, self._window_s = 0.0, self._now_s


@dataclass(frozen=True, slots=True)
class _Chains:
    """Uses of the same block, in a row of uses: for each of them."""

    before: I64  #: the use before that counts, or -1
    counts: Flags  #: the block was written before, as an anchor says, or is by this use
    last: Flags  #: of those that count

    @staticmethod
    def of(row: _Events) -> _Chains:
        """Only the upper bits of keys are compared: of a million, two agree in one of some hundred rows."""
        n = len(row)
        low = np.uint64((1 << n.bit_length()) - 1)
        packed = np.sort((row.keys & ~low) | np.arange(n, dtype=np.uint64))
        order = (packed & low).view(np.int64)
        packed &= ~low
        here = np.arange(n)
        first = np.ones(n, np.bool_)
        first[1:] = packed[1:] != packed[:-1]
        begins = np.maximum.accumulate(np.where(first, here, 0))
        alive = np.maximum.accumulate(np.where(row.anchors[order], here, -1)) >= begins
        previous = np.full(n, -1, np.int64)
        previous[1:] = np.where(first[1:] | ~alive[:-1], -1, order[:-1])
        before, counts, last = np.empty(n, np.int64), np.empty(n, np.bool_), np.empty(n, np.bool_)
        before[order], counts[order] = previous, alive
        last[order] = alive & np.append(first[1:], True)[:n]
        return _Chains(before, counts, last)


def _between(row: _Events, before: I64, among: Flags, queries: I64, starts: I64) -> F64:
    """How large all the blocks of a list are together that were used between the use before and the request
    that begins at `starts`, for each query.

    That is all uses in between, less those of blocks whose use before is in between as well.
    """
    again = np.flatnonzero(among & (before >= before[queries].min()))
    values, requests = before[again], row.requests[again]
    falls = (values[1:] < values[:-1]) & (requests[1:] == requests[:-1])
    if falls.any():  # so that none of the same request counts
        order = np.lexsort((values, requests))
        again, values = again[order], values[order]
    size = float(row.sizes[0])
    alike = bool((row.sizes == size).all())
    sizes = among.astype(np.float64) if alike else np.where(among, row.sizes, 0.0)
    of_each = np.zeros(len(before))
    of_each[again] = larger_before(values) if alike else weight_of_larger_before(values, sizes[again])
    sums = np.cumsum(sizes)
    uses = sums[starts] - sizes[starts] - sums[before[queries]]
    found: F64 = np.maximum(uses - of_each[queries], 0.0)
    return found * size if alike else found


def _parts(offsets: I64) -> Iterator[tuple[int, int]]:
    """Ranges of requests with about `PART_KEYS` keys each."""
    start, n = 0, len(offsets) - 1
    while start < n:
        stop = int(np.searchsorted(offsets, offsets[start] + PART_KEYS, side="right")) - 1
        stop = min(max(stop, start + 1), n)
        yield start, stop
        start = stop


def _salts(instance_ids: Sequence[str]) -> U64:
    """(n,) what sets the keys of each request's instance apart from equal keys of others."""
    of_name = {
        name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
        for name in dict.fromkeys(instance_ids)
    }
    if len(of_name) == 1:
        return np.broadcast_to(np.array([*of_name.values()], np.uint64), len(instance_ids))
    return np.fromiter(map(of_name.__getitem__, instance_ids), np.uint64, len(instance_ids))
