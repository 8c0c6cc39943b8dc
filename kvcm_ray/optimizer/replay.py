"""A trace against a cache of so many blocks: how many blocks each request finds.

The policies are those of `kvcm_ray.core.eviction`, through the same `EvictionOrder` as in a live
group. For traces that are `chained` (all that are made of prefix keys) there are compiled replays of
lru, ttl and lfu that give the same hits for each request, hundreds of times faster. `lru_head_first`
is the order of the C++ optimizer of Tair KVCache, for comparison; no live group evicts like that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcm_ray.core.eviction import POLICIES as LIVE
from kvcm_ray.core.eviction import make_policy
from kvcm_ray.core.eviction.simulate import SimulatedCache
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, I64, READ, WRITE, Accesses, Flags
from kvcm_ray.optimizer.curve import positive

POLICIES = (*LIVE, "lru_head_first")
COMPILED = ("lru", "ttl", "lfu", "lru_head_first")


def replay(
    accesses: Accesses, policy: str, capacity: int, *, partial_first: bool = False, compiled: bool = True
) -> I32:
    """Hit blocks of each request: shape ``(n,)``, 0 for writes. Blocks do not expire.

    Args:
        capacity: in blocks, of all instances together.
        partial_first: tell the policy which prompts fill their last block only partly; blocks that
            were used once as such leave first.
        compiled: False asks for the live policy's own code even where there is a compiled replay.

    Raises:
        InvalidArgument: no such policy, or the capacity is not positive.
    """
    positive(capacity)
    if policy not in POLICIES:
        raise InvalidArgument(f"no policy {policy!r} to replay; there are {', '.join(POLICIES)}")
    partial = accesses.partial if partial_first else np.zeros_like(accesses.partial)
    if policy == "lru_head_first" or (compiled and accesses.chained and policy in COMPILED):
        return _compiled(accesses, policy, capacity, partial)
    return _live(accesses, policy, capacity, partial)


def _compiled(accesses: Accesses, policy: str, capacity: int, partial: Flags) -> I32:
    from kvcm_ray.optimizer.kernels import replay as kernels

    trace = accesses.blocks, accesses.offsets, accesses.ops
    if policy == "lru_head_first":
        return kernels.head_first(*trace, accesses.unique, capacity)
    return kernels.banded(*trace, partial, accesses.unique, capacity, policy == "lfu")


def _live(accesses: Accesses, policy: str, capacity: int, partial: Flags) -> I32:
    cache = SimulatedCache(make_policy(policy), capacity, accesses.keys)
    bounds = zip(accesses.offsets[:-1].tolist(), accesses.offsets[1:].tolist(), strict=True)
    requests = zip(bounds, accesses.ops.tolist(), partial.tolist(), strict=True)
    hits = [
        cache.serve(
            accesses.blocks[start:end].astype(np.int64),
            read=bool(op & READ),
            write=bool(op & WRITE),
            partial=flag,
        )
        for (start, end), op, flag in requests
    ]
    return np.array(hits, np.int32)


@dataclass(frozen=True, slots=True)
class Totals:
    """What look-ups found, in all or of some requests."""

    requests: int  #: look-ups, with or without a write
    accessed_blocks: int
    hit_blocks: int
    held_blocks: int  #: of those accessed, that the engine had already
    held_hit_blocks: int  #: of those hit; so ``hit_blocks - held_hit_blocks`` came from this cache only
    prompt_tokens: int
    hit_tokens: int

    @property
    def hit_ratio(self) -> float:
        return self.hit_blocks / max(1, self.accessed_blocks)

    @property
    def token_hit_ratio(self) -> float:
        return self.hit_tokens / max(1, self.prompt_tokens)


def hit_tokens(accesses: Accesses, hits: I32) -> I64:
    """(n,) prompt tokens in the hit blocks of each request: a partial last block counts what it has."""
    tokens = hits.astype(np.int64) * accesses.block_tokens
    return np.minimum(tokens, accesses.input_tokens) if accesses.input_tokens.any() else tokens


def totals(accesses: Accesses, hits: I32, only: Flags | None = None) -> Totals:
    """Sum up a replay.

    Args:
        hits: (n,) as `replay` gives them.
        only: (n,) which requests; for instance ``accesses.turns == 1``. All by default.
    """
    chosen = (accesses.ops & READ) > 0
    if only is not None:
        chosen &= only
    held = _held_before(accesses)
    starts, ends = accesses.offsets[:-1], accesses.offsets[1:]
    return Totals(
        requests=int(chosen.sum()),
        accessed_blocks=int(accesses.lengths[chosen].sum()),
        hit_blocks=int(hits[chosen].sum()),
        held_blocks=int((held[ends] - held[starts])[chosen].sum()),
        held_hit_blocks=int((held[starts + hits] - held[starts])[chosen].sum()),
        prompt_tokens=int(accesses.input_tokens[chosen].sum()),
        hit_tokens=int(hit_tokens(accesses, hits)[chosen].sum()),
    )


def _held_before(accesses: Accesses) -> I64:
    """(m + 1,) how many accesses before each were of blocks that the engine had."""
    before = np.zeros(len(accesses.blocks) + 1, np.int64)
    if len(accesses.held):
        np.cumsum(accesses.held, out=before[1:])
    return before
