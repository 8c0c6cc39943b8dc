"""How an engine's blocks make up ours.

An engine has one or several *groups* of layers, each with its own table of blocks (full attention,
sliding windows). Our block is the smallest run of tokens that is a whole number of blocks in every
group; its part of one group on one rank is one location spec: ``tp0``, or ``tp0-g1`` where there are
several groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcm_ray.connectors.keys import Keys, keys_of_hashes
from kvcm_ray.connectors.vllm.orders import BlockIds
from kvcm_ray.errors import Unsupported

#: Kinds of cache whose blocks hold the keys and values of their tokens and nothing else.
_ATTENTION = {
    "FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "SlidingWindowMLASpec",
    "ChunkedLocalAttentionSpec", "UniformTypeKVCacheSpecs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    index: int  #: in the engine's block tables
    layers: tuple[str, ...]
    block_tokens: int
    per_block: int  #: engine blocks in one of ours
    window: int = 0  #: tokens before the next one that it needs to be computed; 0 = all


@dataclass(frozen=True, slots=True)
class Layout:
    block_tokens: int  #: of our block
    hash_tokens: int  #: that one of the engine's block hashes stands for
    groups: tuple[Group, ...]
    engine_blocks: int  #: in the worker's cache

    def spec_name(self, rank: str, group: int) -> str:
        """Name of the spec of the `group`-th of our groups on a rank."""
        return rank if len(self.groups) == 1 else f"{rank}-g{group}"

    def keys(self, hashes: Sequence[bytes], begin: int = 0) -> Keys:
        """Keys of our blocks from number `begin` on, as far as the request's block hashes go."""
        step = self.block_tokens // self.hash_tokens
        return keys_of_hashes(hashes[begin * step + step - 1 :: step])

    def ids(
        self, tables: Sequence[Sequence[int]], begin: int, end: int, *, after: int = 0, null: int = 0,
        groups: Sequence[int] | None = None,
    ) -> tuple[BlockIds, ...]:  # fmt: skip
        """Engine blocks of our blocks ``begin..end``, for each group (or those at the positions `groups`).

        Blocks of the first `after` tokens, null blocks and those beyond the table are -1.
        """
        found = []
        for group in self.groups if groups is None else [self.groups[i] for i in groups]:
            table = np.asarray(tables[group.index], np.int64)
            width = group.per_block
            ids = np.full((end - begin) * width, -1, np.int64)
            part = table[begin * width : end * width]
            ids[: len(part)] = np.where(part == null, -1, part)
            skipped = after // group.block_tokens - begin * width
            ids[: max(0, skipped)] = -1
            found.append(ids.reshape(end - begin, width))
        return tuple(found)


def layout_of(kv_cache_config: Any, block_size: int) -> Layout:
    """The layout of an engine's ``KVCacheConfig``.

    Raises:
        Unsupported: a kind of cache whose blocks are not just the keys and values of their tokens.
    """
    wanted = getattr(kv_cache_config, "prefix_cacheable_group_ids", None)
    every = range(len(kv_cache_config.kv_cache_groups))
    if wanted is not None and tuple(wanted) != tuple(every):
        raise Unsupported("some of the model's cache groups cannot be found by a prefix")
    for group in kv_cache_config.kv_cache_groups:
        for spec in _layer_specs(group.kv_cache_spec):
            if type(spec).__name__ not in _ATTENTION:
                raise Unsupported(f"caches of kind {type(spec).__name__} are not saved")
    if not every:
        raise Unsupported("the model has no attention cache")
    sizes = [int(group.kv_cache_spec.block_size) for group in kv_cache_config.kv_cache_groups]
    hash_tokens = int(getattr(kv_cache_config, "hash_block_size", None) or block_size)
    tokens = math.lcm(hash_tokens, *sizes)
    groups = tuple(
        Group(index, tuple(group.layer_names), size, tokens // size, _window(group.kv_cache_spec))
        for index, (group, size) in enumerate(zip(kv_cache_config.kv_cache_groups, sizes, strict=True))
    )
    return Layout(tokens, hash_tokens, groups, int(kv_cache_config.num_blocks))


def _layer_specs(spec: Any) -> list[Any]:
    inner = getattr(spec, "kv_cache_specs", None)
    return [spec] if inner is None else list(inner.values())


def _window(spec: Any) -> int:
    """Tokens that a group of sliding windows keeps before the next one; 0 for other groups."""
    first = _layer_specs(spec)[0]
    window = int(getattr(first, "sliding_window", None) or 0)
    if not window or not type(first).__name__.startswith("SlidingWindow"):
        return 0
    return window - 1 + int(getattr(first, "extra_retained_tokens", 0))
