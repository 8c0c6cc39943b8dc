"""The hottest paths of a trace as a tree: prompts that begin alike share nodes.

A node is a run of blocks that are always asked for together. What nearly all prompts begin with is the
trunk. Behind it (or from the first block, if there is none) the prompts part into paths; those by which
most blocks are looked up are shown, with all their branches that two look-ups or more take.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, I64, READ, Accesses

_TRUNK_SHARE = 0.9  #: of all look-ups that take a node of the trunk


@dataclass(slots=True)
class Node:
    """`blocks` blocks in a row, from place `start` of the prompt on."""

    start: int
    blocks: int
    requests: int  #: look-ups that asked for its first block
    accessed_blocks: int  #: of its own
    hit_blocks: int
    children: list[Node] = field(default_factory=list)  #: most requests first

    @property
    def hit_ratio(self) -> float:
        return self.hit_blocks / max(1, self.accessed_blocks)

    @property
    def end(self) -> int:
        """The place behind the last block of it and all below it."""
        return max([self.start + self.blocks, *(child.end for child in self.children)])


@dataclass(frozen=True, slots=True)
class Path:
    """A node where prompts part, and all look-ups that take it, wherever they go on."""

    node: Node
    instance: str  #: "" if the trace has only one
    accessed_blocks: int  #: from this node on
    hit_blocks: int

    @property
    def hit_ratio(self) -> float:
        return self.hit_blocks / max(1, self.accessed_blocks)


@dataclass(frozen=True, slots=True)
class Tree:
    requests: int  #: look-ups of the trace
    trunk: tuple[Node, ...]  #: in a row, without children; empty if prompts part at once
    paths: tuple[Path, ...]  #: most blocks looked up first
    paths_left: int  #: that are not shown
    requests_left: int  #: that take those, or end in the trunk


def hottest(accesses: Accesses, hits: I32, *, paths_max: int = 24, nodes_max: int = 2000) -> Tree:
    """The paths by which the most blocks are looked up.

    Args:
        hits: (n,) hit blocks of each request.

    Raises:
        InvalidArgument: the trace is not chained: a block comes after different ones.
    """
    if not accesses.chained:
        raise InvalidArgument("blocks of this trace come after different ones, so there is no tree of them")
    look_ups = _LookUps(accesses, hits)
    trunk, at = look_ups.trunk()
    first, blocks, found, instances = look_ups.parting(at)
    asked = np.bincount(first, minlength=accesses.unique)
    heat = np.bincount(first, blocks, accesses.unique)
    crown = np.flatnonzero(asked >= 2)
    crown = crown[np.argsort(-heat[crown], kind="stable")][:paths_max]
    nodes = look_ups.nodes(crown, nodes_max)
    hit = np.bincount(first, found, accesses.unique)
    named = len(accesses.instance_names) > 1
    owner = np.zeros(accesses.unique, np.int64)
    owner[first] = instances
    paths = tuple(
        Path(
            nodes[block], accesses.instance_names[owner[block]] if named else "", int(heat[block]),
            int(hit[block]),
        )
        for block in crown.tolist()
    )  # fmt: skip
    left = look_ups.count - int(asked[crown].sum())
    return Tree(look_ups.count, trunk, paths, int((asked > 0).sum()) - len(crown), left)


class _LookUps:
    """What is known of each block, by its id."""

    def __init__(self, accesses: Accesses, hits: I32) -> None:
        rows = np.flatnonzero((accesses.ops & READ) > 0)
        self.count = len(rows)
        self._accesses, self._rows, self._found = accesses, rows, hits[rows].astype(np.int64)
        of_read = np.repeat((accesses.ops & READ) > 0, accesses.lengths)
        blocks, places = accesses.blocks[of_read], accesses.places[of_read]
        found = places < np.repeat(self._found, accesses.lengths[rows])
        self._asked = np.bincount(blocks, minlength=accesses.unique)
        self._hit = np.bincount(blocks[found], minlength=accesses.unique)
        self._place = np.zeros(accesses.unique, np.int64)
        self._place[accesses.blocks] = accesses.places
        self._parent = _parents(accesses)
        self._head = _heads(self._parent, self._asked)
        self._length, self._accessed, self._hits = (
            np.bincount(self._head, counts, accesses.unique).astype(np.int64)
            for counts in (self._asked > 0, self._asked, self._hit)
        )

    def trunk(self) -> tuple[tuple[Node, ...], int]:
        """(nodes that nearly all look-ups take, how many blocks they have)."""
        common = np.flatnonzero(
            (self._head == np.arange(len(self._head))) & (self._asked >= max(2, _TRUNK_SHARE * self.count))
        )
        nodes = [self._node(block) for block in common[np.argsort(self._place[common])].tolist()]
        return tuple(nodes), sum(node.blocks for node in nodes)

    def parting(self, at: int) -> tuple[I64, I64, I64, I64]:
        """Of each look-up that goes on behind the trunk: its next block, how many blocks it has from
        there on, how many of these are hits, its instance."""
        accesses = self._accesses
        longer = accesses.lengths[self._rows] > at
        rows = self._rows[longer]
        first = accesses.blocks[accesses.offsets[rows] + at].astype(np.int64)
        hits = np.maximum(0, self._found[longer] - at)
        return first, accesses.lengths[rows] - at, hits, accesses.instances[rows].astype(np.int64)

    def nodes(self, crown: I64, nodes_max: int) -> dict[int, Node]:
        """Nodes by their first block: these, and their branches that two look-ups or more take."""
        heads = self._head == np.arange(len(self._head))
        shown = np.flatnonzero(heads & (self._asked >= 2))
        shown = shown[np.argsort(-self._asked[shown], kind="stable")]
        nodes = {block: self._node(block) for block in crown.tolist()}
        for block in shown.tolist():  # a parent has no fewer look-ups than its children, so it comes first
            above = nodes.get(int(self._head[self._parent[block]])) if self._parent[block] >= 0 else None
            if above is not None and block not in nodes and len(nodes) < nodes_max:
                nodes[block] = self._node(block)
                above.children.append(nodes[block])
        return nodes

    def _node(self, block: int) -> Node:
        return Node(
            int(self._place[block]), int(self._length[block]), int(self._asked[block]),
            int(self._accessed[block]), int(self._hits[block]),
        )  # fmt: skip


def _parents(accesses: Accesses) -> I64:
    """(u,) the block before each; -1 for the first of a prompt."""
    parent = np.full(accesses.unique, -1, np.int64)
    later = accesses.places[1:] > 0
    parent[accesses.blocks[1:][later]] = accesses.blocks[:-1][later]
    return parent


def _heads(parent: I64, asked: I64) -> I64:
    """(u,) the first block of the node that each belongs to."""
    has = np.flatnonzero(parent >= 0)
    children = np.bincount(parent[has], asked[has] > 0, minlength=len(parent))
    inner = has[(children[parent[has]] == 1) & (asked[has] == asked[parent[has]])]
    head = np.arange(len(parent))
    head[inner] = parent[inner]
    while not np.array_equal(further := head[head], head):
        head = further
    return head
