"""Which prefixes are hit: a tree made, when somebody asks, of the look-ups of the last while.

A listener of the group's `Observer` keeps the keys that recent look-ups found, a bounded number. Sorted, the
look-ups that share a prefix are neighbours, so each node of the tree is a range of them and the number of
blocks that its first and last one share: work for what is kept, none for what the group holds.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from kvcm_ray.core.observed import Observed
from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InvalidArgument

LOOKUPS_MAX = 8_192
KEYS_MAX = 1 << 19  #: 4 MiB
DEPTH_MAX, LIMIT_MAX = 64, 1_000
DEPTH, LIMIT = 8, 100


@dataclass(slots=True)
class _LookUp:
    instance_id: str
    time_s: float
    keys: Keys  #: that were found, from the first block of the prompt on


@dataclass(slots=True)
class Node:
    """Blocks that follow one another and are always found together."""

    instance_id: str
    keys: Keys
    hits: int  #: look-ups that found all of them
    last_s: float  #: unix time of the last of these
    depth: int
    children: list[Node] = field(default_factory=list)
    left_out: int = 0  #: children that are not told


@dataclass(slots=True)
class _Range:
    """Look-ups, sorted, that share their first `begin` blocks, and where their node is to go."""

    looked: list[_LookUp]
    begin: int
    depth: int
    parent: Node | None


class HotPrefixes:
    """A listener of an `Observer`."""

    def __init__(self) -> None:
        self._recent: deque[_LookUp] = deque()
        self._keys = 0
        self._lock = threading.Lock()

    def feed(self, observed: Observed) -> None:
        """Keep what the look-ups among these requests found."""
        ends = offsets_of(observed.counts)
        with self._lock:
            for i in np.flatnonzero(~observed.writes & (observed.found > 0)).tolist():
                begin = int(ends[i])
                keys = observed.keys[begin : begin + int(observed.found[i])].copy()
                self._recent.append(_LookUp(observed.instance_ids[i], float(observed.times_s[i]), keys))
                self._keys += len(keys)
            while len(self._recent) > LOOKUPS_MAX or (self._keys > KEYS_MAX and len(self._recent) > 1):
                self._keys -= len(self._recent.popleft().keys)

    def tree(self, depth: int, limit: int) -> tuple[list[Node], int, float]:
        """Roots, the most hit first; how many look-ups they are of, and unix time of the first of these.

        Args:
            depth: levels of the tree. limit: nodes, the most hit ones.

        Raises:
            InvalidArgument: they are out of range.
        """
        if not 1 <= depth <= DEPTH_MAX or not 1 <= limit <= LIMIT_MAX:
            raise InvalidArgument(
                f"depth {depth} is not within 1..{DEPTH_MAX}, or limit {limit} not 1..{LIMIT_MAX}"
            )
        with self._lock:
            recent = list(self._recent)
        roots = _grow(recent, depth, limit)
        return roots, len(recent), min((one.time_s for one in recent), default=0.0)


def _grow(recent: list[_LookUp], depth: int, limit: int) -> list[Node]:
    """The tree from the root down, always at the range with the most look-ups, until there are enough
    nodes."""
    roots: list[Node] = []
    heap: list[tuple[int, int, _Range]] = []
    order = 0

    def push(found: list[_Range]) -> None:
        nonlocal order
        for one in found:
            heapq.heappush(heap, (-len(one.looked), order, one))
            order += 1

    by_instance: dict[str, list[_LookUp]] = {}
    for one in recent:
        by_instance.setdefault(one.instance_id, []).append(one)
    for looked in by_instance.values():
        # Big-endian with the sign turned sorts as text just as the numbers do.
        looked.sort(key=lambda one: (one.keys.view(np.uint64) ^ np.uint64(1 << 63)).astype(">u8").tobytes())
        push(_split(looked, 0, 0, None))
    while heap and limit > 0:
        _, _, at = heapq.heappop(heap)
        node = _node(at)
        (roots if at.parent is None else at.parent.children).append(node)
        limit -= 1
        longer = [one for one in at.looked if len(one.keys) > at.begin + len(node.keys)]
        ranges = _split(longer, at.begin + len(node.keys), at.depth + 1, node) if longer else []
        node.left_out = len(ranges)
        if at.parent is not None:
            at.parent.left_out -= 1
        if at.depth + 1 < depth:
            push(ranges)
    return roots


def _node(at: _Range) -> Node:
    first, last = at.looked[0].keys[at.begin :], at.looked[-1].keys[at.begin :]
    shortest = min(len(one.keys) for one in at.looked) - at.begin
    differs = np.flatnonzero(first[:shortest] != last[:shortest])
    shared = int(differs[0]) if len(differs) else shortest
    newest = max(one.time_s for one in at.looked)
    return Node(at.looked[0].instance_id, first[:shared], len(at.looked), newest, at.depth)


def _split(looked: list[_LookUp], begin: int, depth: int, parent: Node | None) -> list[_Range]:
    """One range for each key at `begin`; the look-ups are sorted and all longer than that."""
    keys = np.array([one.keys[begin] for one in looked], np.int64)
    cuts = [0, *(np.flatnonzero(np.diff(keys) != 0) + 1).tolist(), len(looked)]
    return [_Range(looked[a:b], begin, depth, parent) for a, b in pairwise(cuts)]


def to_json(node: Node, resident: dict[int, tuple[int, str, int]]) -> dict[str, Any]:
    """Plain JSON values. `resident`: by ``id`` of a node, its blocks that are there, storage and bytes."""
    there, storage, nbytes = resident[id(node)]
    return {
        "instance_id": node.instance_id,
        "first_key": str(node.keys[0]),
        "blocks": len(node.keys),
        "resident_blocks": there,
        "bytes": nbytes,
        "hits": node.hits,
        "last_hit_s": node.last_s,
        "storage": storage,
        "children": [to_json(child, resident) for child in node.children],
        "left_out": node.left_out,
    }


def walk(roots: list[Node]) -> list[Node]:
    """All nodes, parents first."""
    found, queue = [], list(roots)
    while queue:
        node = queue.pop()
        found.append(node)
        queue += node.children
    return found
