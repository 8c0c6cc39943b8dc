"""A policy that finds out how much longer blocks that were used often are worth keeping.

Blocks are classed by how often they were used: once, 2-3 times, 4 times or more. The score is the
time of the last use, in touched blocks, plus the *stay* of the class. The stays follow from mistakes:
blocks that left are remembered for a while, and when the evicted blocks of a class come back more
often than the evicted ones that were used once, the stay of that class grows; if less often, it
shrinks. At the balance, whichever class gives up a block loses equally many hits. It is plain LRU
when all stays are 0, and close to LFU when they are long.

Partial last blocks that were used once leave first. A block that comes back while it is remembered
has its number of uses back. What is remembered is bounded by the number of resident blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.eviction.arrays import I64, U8, Ids, grown, size_for
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument

_FIRST_OUT = -(1 << 62)
_PARTIAL, _ONCE = 0, 1
_SCATTER = np.uint64(0x9E3779B97F4A7C15)
_USES_MAX = 4  #: the last class begins here; more uses make no difference
_CLASS_OF_USES: U8 = np.array([_ONCE, _ONCE, 2, 2, 3], np.uint8)


@dataclass(frozen=True, slots=True)
class AdaptiveSettings:
    """Numbers that no argument gives: the best of a grid on the first halves of two traces. What they give
    on the second halves is told by `kvcm bench optimizer`; see `kvcm_ray.optimizer.tuning`.

    Raises:
        InvalidArgument: one is out of range.
    """

    stay_first: float = 2.0  #: stay of the second class at the beginning; in units of resident blocks
    stay_max: float = 8.0
    period: float = 0.2  #: time between two adjustments, in the same unit
    step: float = 0.1  #: the most that a stay changes at once
    kept: float = 0.95  #: share of the counts that is carried over into the next period
    prior: float = 10.0  #: evictions that a class is credited with, at the rate of those used once
    remembered: float = 2.0  #: evicted blocks that are remembered at least, in the same unit

    def __post_init__(self) -> None:
        for field in fields(self):
            value, limits = getattr(self, field.name), _LIMITS.get(field.name, (0.0, 1e6))
            if not limits[0] <= value <= limits[1]:
                raise InvalidArgument(f"adaptive policy: {field.name} must be in {limits}, not {value}")


#: Smallest and largest values; 0 to a million for the others.
_LIMITS = {"period": (1e-6, 1e6), "kept": (0.0, 1.0), "prior": (1e-3, 1e6), "remembered": (1e-3, 64.0)}


class Adaptive:
    name = "adaptive"
    classes = 4

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        self._settings = settings = settings or AdaptiveSettings()
        self._uses: U8 = np.zeros(0, np.uint8)
        self._class: U8 = np.zeros(0, np.uint8)
        self._resident = 0
        self._memory = Memory()
        self._stay = np.array([0.0, 0.0, settings.stay_first, 2 * settings.stay_first])
        self._lead = [_FIRST_OUT, 0, 0, 0]  #: what is added to the position, for each class
        self._until_next = 0  #: touched blocks until the next adjustment
        self._evicted = np.zeros(self.classes)
        self._regretted = np.zeros(self.classes)

    def admitted(self, blocks: Ids, keys: Keys, partial_last: bool) -> U8:
        self._make_room(blocks)
        self._resident += len(blocks)
        uses, classes = self._memory.recall(keys)
        back = uses > 0
        self._regretted += np.bincount(classes[back], minlength=self.classes)
        # What a prefix has behind it was used at most as often as the prefix.
        uses = np.maximum.accumulate(uses[::-1])[::-1] + np.uint8(1)
        classes = self._classify(blocks, uses)
        if partial_last and not back[-1]:
            classes[-1] = self._class[blocks[-1]] = _PARTIAL
        return classes

    def touched(self, blocks: Ids, keys: Keys) -> U8:
        return self._classify(blocks, self._uses[blocks] + np.uint8(1))

    def gone(self, blocks: Ids, keys: Keys, evicted: bool) -> None:
        self._resident -= len(blocks)
        if not evicted:
            return
        classes = self._class[blocks]
        self._evicted += np.bincount(classes, minlength=self.classes)
        room = int(self._settings.remembered * (self._resident + len(blocks)))
        self._memory.keep(keys, self._uses[blocks], classes, room)

    def scores(self, klass: int, positions: I64) -> I64:
        return positions + self._lead[klass]

    def _classify(self, blocks: Ids, uses: U8) -> U8:
        uses = np.minimum(uses, np.uint8(_USES_MAX))
        classes = _CLASS_OF_USES[uses]
        self._uses[blocks] = uses
        self._class[blocks] = classes
        self._until_next -= len(blocks)
        if self._until_next <= 0:
            self._adjust()
        return classes

    def _adjust(self) -> None:
        settings, prior = self._settings, self._settings.prior
        self._until_next = max(64, int(settings.period * self._resident))
        once = (self._regretted[_ONCE] + 1) / (self._evicted[_ONCE] + prior)
        rates = (self._regretted + once * prior) / (self._evicted + prior)
        stay = 0.0
        for klass in range(_ONCE + 1, self.classes):
            # `math`, because the last bit of numpy's logarithm depends on the processor.
            step = settings.step * min(max(math.log2(rates[klass] / once), -1.0), 1.0)
            stay = max(stay, min(max(self._stay[klass] + step, 0.0), settings.stay_max))
            self._stay[klass] = stay
            self._lead[klass] = int(stay * self._resident)
        self._evicted *= settings.kept
        self._regretted *= settings.kept

    def _make_room(self, blocks: Ids) -> None:
        if (size := size_for(len(self._uses), blocks)) > len(self._uses):
            self._uses = grown(self._uses, size, 0)
            self._class = grown(self._class, size, 0)


class Memory:
    """Uses and class of blocks that were evicted, by key, in a table that forgets.

    Each key has one place; a newer key that needs it takes it. Ten bytes a place.
    """

    def __init__(self) -> None:
        self._bits = 6
        self._clear(self._bits)

    def keep(self, keys: Keys, uses: U8, classes: U8, room: int) -> None:
        """Remember these; `room` is how many keys the table should have places for, at least."""
        bits = max(6, room.bit_length())
        if bits > self._bits or bits < self._bits - 2:
            self._resize(bits)
        self._store(keys, uses, classes)

    def recall(self, keys: Keys) -> tuple[U8, U8]:
        """(uses, class) of each key, and forget them; uses are 0 for keys that are not known."""
        place = self._place(keys)
        known = self._keys[place] == keys
        uses = np.where(known, self._uses[place], np.uint8(0))
        self._uses[place[known]] = 0
        return uses, self._classes[place]

    def _store(self, keys: Keys, uses: U8, classes: U8) -> None:
        place = self._place(keys)
        self._keys[place] = keys
        self._uses[place] = uses
        self._classes[place] = classes

    def _place(self, keys: Keys) -> npt.NDArray[np.uint64]:
        return (keys.view(np.uint64) * _SCATTER) >> np.uint64(64 - self._bits)

    def _clear(self, bits: int) -> None:
        self._bits = bits
        self._keys: Keys = np.zeros(1 << bits, np.int64)
        self._uses: U8 = np.zeros(1 << bits, np.uint8)  #: 0 = nothing here
        self._classes: U8 = np.zeros(1 << bits, np.uint8)

    def _resize(self, bits: int) -> None:
        used = np.flatnonzero(self._uses)
        kept = self._keys[used], self._uses[used], self._classes[used]
        self._clear(bits)
        self._store(*kept)
