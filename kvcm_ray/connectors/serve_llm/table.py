"""What a router remembers of prompts: who served them last, and their keys in the shared cache.

One entry for each piece of each prompt, by the hash that names everything up to it. The number of entries
is bounded; the least recently used go first, the longer part of a prompt before the shorter. The event loop
and the learning thread share it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.core.requests import Keys

_NONE = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Entry:
    replicas: dict[str, float] = field(default_factory=dict)  #: when each of them served it last
    keys: Keys = field(default_factory=lambda: _NONE)  #: of a prompt that goes through here
    count: int = -1  #: of those, so many are full at the end of this piece; -1: not known


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of one prompt."""

    pieces: dict[str, int]  #: leading pieces that each replica has computed or loaded itself
    keys: Keys  #: of the leading blocks, as far as they are known
    keys_pieces: int  #: so many pieces `keys` goes

    @property
    def is_nothing(self) -> bool:
        return not self.pieces and not len(self.keys)


class PrefixTable:
    """Args: entries: that are kept at most. memory_s: a replica is thought to have a piece so long."""

    def __init__(self, entries: int, memory_s: float) -> None:
        self._most = entries
        self._memory_s = memory_s
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, hashes: Sequence[int], now: float) -> Found:
        """What is known of the prompt with these pieces, `now` in the seconds that `served` was given."""
        pieces: dict[str, int] = {}
        keys, keys_pieces, oldest = _NONE, 0, now - self._memory_s
        with self._lock:
            for number, name in enumerate(hashes, 1):
                entry = self._entries.get(name)
                if entry is None:
                    break
                for replica, served in entry.replicas.items():
                    if served >= oldest and pieces.get(replica, 0) == number - 1:
                        pieces[replica] = number
                if entry.count >= 0:
                    keys, keys_pieces = entry.keys[: entry.count], number
        return Found(pieces, keys, keys_pieces)

    def served(self, hashes: Sequence[int], replica: str, now: float) -> None:
        """A prompt went to this replica."""
        with self._lock:
            for name in reversed(hashes):  # so that the first pieces are the last to go
                self._entry(name).replicas[replica] = now
            self._shrink()

    def learned(self, hashes: Sequence[int], keys: Keys, counts: Sequence[int]) -> None:
        """The keys of a prompt's blocks, and how many of them are full at the end of each piece."""
        with self._lock:
            for name, count in reversed(list(zip(hashes, counts, strict=False))):
                entry = self._entry(name)
                entry.keys, entry.count = keys, count
            self._shrink()

    def forget(self, replica: str) -> None:
        """It is gone, and its blocks with it."""
        with self._lock:
            for entry in self._entries.values():
                entry.replicas.pop(replica, None)

    def _entry(self, name: int) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry()
        else:
            self._entries.move_to_end(name)
        return entry

    def _shrink(self) -> None:
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)
