"""Policies: which of two blocks that could leave does.

A policy sorts blocks into classes; within a class, the one touched longest ago leaves first. Between
the coldest blocks of two classes the lower *score* leaves first. So a policy is what it remembers of
a block, and one function of (class, position of the last touch). It is not asked to keep prefixes
closed: `EvictionOrder` lets no block go before its resident children.

Positions count touched blocks since the beginning; they stay far below 2**48.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvcm_ray.core.eviction.arrays import I64, U8, Ids, grown, size_for
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument

_FIRST_OUT = -(1 << 62)
_BAND = 1 << 48


class Policy(Protocol):
    """What `EvictionOrder` asks. `blocks` and `keys` are parallel, in prefix order, and distinct."""

    name: str
    classes: int  #: classes are ``0 .. classes - 1``

    def admitted(self, blocks: Ids, keys: Keys, partial_last: bool) -> U8:
        """The class of each new block; the last may be the partial last block of a prompt."""
        ...

    def touched(self, blocks: Ids, keys: Keys) -> U8:
        """The class of each block, now that it was used again."""
        ...

    def gone(self, blocks: Ids, keys: Keys, evicted: bool) -> None:
        """No longer resident: chosen by this policy if `evicted`, else removed on request."""
        ...

    def scores(self, klass: int, positions: I64) -> I64:
        """Of blocks of one class by position of their last touch; never decreases with it."""
        ...


class Lru:
    """Least recently used, leaves first. A partial last block that was never used again goes first:
    only the very same prompt could use it."""

    name = "lru"
    classes = 2

    def admitted(self, blocks: Ids, keys: Keys, partial_last: bool) -> U8:
        classes = np.ones(len(blocks), np.uint8)
        if partial_last:
            classes[-1] = 0
        return classes

    def touched(self, blocks: Ids, keys: Keys) -> U8:
        return np.ones(len(blocks), np.uint8)

    def gone(self, blocks: Ids, keys: Keys, evicted: bool) -> None:
        pass

    def scores(self, klass: int, positions: I64) -> I64:
        return positions if klass else positions + _FIRST_OUT


class Ttl(Lru):
    """The order of LRU. The age at which blocks expire is their owner's business (`expired`)."""

    name = "ttl"


class Lfu:
    """Least frequently used since admission, in bands of powers of two; LRU within a band.

    Not for changing loads: a block that was popular once stays. Band 0 is for partial last blocks.
    """

    name = "lfu"
    classes = 12
    _USES_MAX = (1 << 11) - 1

    def __init__(self) -> None:
        self._uses = np.zeros(0, np.uint16)

    def admitted(self, blocks: Ids, keys: Keys, partial_last: bool) -> U8:
        if (size := size_for(len(self._uses), blocks)) > len(self._uses):
            self._uses = grown(self._uses, size, 0)
        self._uses[blocks] = 1
        classes = np.ones(len(blocks), np.uint8)
        if partial_last:
            classes[-1] = 0
        return classes

    def touched(self, blocks: Ids, keys: Keys) -> U8:
        uses = np.minimum(self._uses[blocks] + 1, self._USES_MAX)
        self._uses[blocks] = uses
        return np.frexp(uses)[1].astype(np.uint8)

    def gone(self, blocks: Ids, keys: Keys, evicted: bool) -> None:
        pass

    def scores(self, klass: int, positions: I64) -> I64:
        return positions + klass * _BAND


POLICIES = ("lru", "lfu", "ttl", "adaptive")


def make_policy(name: str, **params: float) -> Policy:
    """A new policy object; each `EvictionOrder` needs its own.

    Raises:
        InvalidArgument: no such policy, or it has no such parameter.
    """
    from kvcm_ray.core.eviction.adaptive import Adaptive

    makers: dict[str, type[Policy]] = {"lru": Lru, "lfu": Lfu, "ttl": Ttl, "adaptive": Adaptive}
    if name not in makers:
        raise InvalidArgument(f"no eviction policy {name!r}; there are {', '.join(POLICIES)}")
    try:
        return makers[name](**params)
    except TypeError as error:
        given = ", ".join(params)
        raise InvalidArgument(f"eviction policy {name!r} has no parameter named {given}") from error
