"""A trace against a cache of so many blocks: how many blocks each request finds.

The policies are those of `kvcm_ray.core.eviction`, through the same `EvictionOrder` as in a live
group. For traces that are `chained` (all that are made of prefix keys) there are compiled replays that
give the same hits for each request, tens to hundreds of times faster. `lru_head_first` is the order of
the C++ optimizer of Tair KVCache, for comparison; no live group evicts like that.

Times count in whole microseconds. A request that the trace has behind a later one happens at the same
time as that: requests are served in the order of the trace.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.eviction import POLICIES as LIVE
from kvcm_ray.core.eviction import Policy, make_policy
from kvcm_ray.core.eviction.adaptive import Adaptive, AdaptiveSettings
from kvcm_ray.core.eviction.simulate import SimulatedCache
from kvcm_ray.core.ragged import elements_of, offsets_of
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import (
    F64,
    I32,
    I64,
    READ,
    REQUEST,
    WRITE,
    Accesses,
    Flags,
)
from kvcm_ray.optimizer.curve import positive

POLICIES = (*LIVE, "lru_head_first")

_S_MAX = 1e9  #: thirty years; more than that is a mistake in a unit


@dataclass(frozen=True, slots=True)
class _Cache:
    policy: str
    capacity: int
    ttl_us: int
    settings: AdaptiveSettings


def replay(
    accesses: Accesses,
    policy: str,
    capacity: int,
    *,
    partial_first: bool = False,
    ttl_s: float = 0,
    write_delay_s: float | npt.ArrayLike = 0,
    settings: AdaptiveSettings | None = None,
    compiled: bool = True,
) -> I32:
    """Hit blocks of each request: shape ``(n,)``, 0 for writes.

    Args:
        capacity: in blocks, of all instances together.
        partial_first: tell the policy which prompts fill their last block only partly; blocks that
            were used once as such leave first.
        ttl_s: what nobody touched for so long is gone, whatever the policy; 0 is for ever.
        write_delay_s: a number, or (n,): so long after its time the writing of a request is done (see
            `delayed`).
        settings: of the adaptive policy; those of production by default.
        compiled: False asks for the live policy's own code even where there is a compiled replay.

    Raises:
        InvalidArgument: no such policy, the capacity is not positive, or a time is negative.
    """
    check(policy, capacity, ttl_s)
    if np.any(write_delay_s):
        apart, at = delayed(accesses, write_delay_s)
        return replay(
            apart, policy, capacity, partial_first=partial_first, ttl_s=ttl_s, settings=settings,
            compiled=compiled,
        )[at]  # fmt: skip
    cache = _Cache(policy, capacity, round(ttl_s * 1e6), settings or AdaptiveSettings())
    partial = tails(accesses) if partial_first else np.zeros_like(accesses.partial)
    if policy == "lru_head_first" or (compiled and accesses.chained):
        return _compiled(accesses, cache, partial)
    return _live(accesses, cache, partial)


def check(policy: str, capacity: int, ttl_s: float) -> None:
    """Raises InvalidArgument for what `replay` would refuse."""
    positive(capacity)
    if policy not in POLICIES:
        raise InvalidArgument(f"no policy {policy!r} to replay; there are {', '.join(POLICIES)}")
    if not 0 <= ttl_s <= _S_MAX:
        raise InvalidArgument(f"a time to live is 0 (for ever) or some seconds, not {ttl_s}")


def tails(accesses: Accesses) -> Flags:
    """(n,) which prompts fill their last block only partly. One that other prompts go on from is whole,
    whatever is said of the length of its prompt: the key of a partial block is of its tokens alone."""
    last = accesses.offsets[1:][accesses.lengths > 0] - 1
    inner = np.ones(len(accesses.blocks), np.bool_)
    inner[last] = False
    whole = np.zeros(accesses.unique, np.bool_)
    whole[accesses.blocks[inner]] = True
    partial = accesses.partial & (accesses.lengths > 0)
    partial[accesses.lengths > 0] &= ~whole[accesses.blocks[last]]
    return partial


def delayed(accesses: Accesses, write_delay_s: float | npt.ArrayLike) -> tuple[Accesses, I64]:
    """(the same trace with look-ups and writes apart, (n,) where each request's look-up is in it).

    A request looks up at its time. Its write comes `write_delay_s` later, when its prefill is done: it
    puts in what is missing by then and touches the whole prompt. What is written at the time of a
    look-up is there for it. Requests with a delay of 0, look-ups and writes of their own stay as they are.

    Args:
        write_delay_s: a number or (n,).

    Raises:
        InvalidArgument: a delay is negative, or there are not as many as requests.
    """
    delay_us = _delays_us(accesses, write_delay_s)
    split = np.flatnonzero((delay_us > 0) & (accesses.ops == REQUEST))
    n, now_us = accesses.requests, times_us(accesses)
    rows = np.concatenate([np.arange(n), split])
    due_us = np.concatenate([now_us, now_us[split] + delay_us[split]])
    ops = np.concatenate([accesses.ops, np.full(len(split), WRITE, np.uint8)])
    ops[split] = READ
    order = np.lexsort((rows, np.arange(len(rows)) < n, due_us))
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    return _picked(accesses, rows[order], due_us[order] * 1e-6, ops[order]), at[:n]


def _delays_us(accesses: Accesses, write_delay_s: float | npt.ArrayLike) -> I64:
    given = np.asarray(write_delay_s, np.float64)
    if given.shape not in ((), (accesses.requests,)):
        raise InvalidArgument(
            f"{accesses.requests} requests need one write delay or as many, not {given.shape}"
        )
    if not ((given >= 0) & (given <= _S_MAX)).all():
        raise InvalidArgument("a write delay must be 0 or some seconds")
    return np.asarray(np.rint(np.broadcast_to(given, accesses.requests) * 1e6), np.int64)


def _picked(accesses: Accesses, rows: I64, times_s: F64, ops: npt.NDArray[np.uint8]) -> Accesses:
    """These requests, in this order; a row may come twice."""
    index = elements_of(accesses.offsets, rows)
    return replace(
        accesses,
        blocks=accesses.blocks[index],
        offsets=offsets_of(accesses.lengths[rows]),
        held=accesses.held[index] if len(accesses.held) else accesses.held,
        times_s=times_s,
        ops=ops,
        input_tokens=accesses.input_tokens[rows],
        output_tokens=accesses.output_tokens[rows],
        partial=accesses.partial[rows],
        turns=accesses.turns[rows],
        instances=accesses.instances[rows],
        classes=accesses.classes[rows],
    )


def times_us(accesses: Accesses) -> I64:
    """(n,) time of each request since the first, never decreasing."""
    if not accesses.requests:
        return np.zeros(0, np.int64)
    latest = np.maximum.accumulate(accesses.times_s)
    return np.asarray(np.rint((latest - latest[0]) * 1e6), np.int64)


def _compiled(accesses: Accesses, cache: _Cache, partial: Flags) -> I32:
    trace = accesses.blocks, accesses.offsets, accesses.ops
    size = accesses.unique, cache.capacity, cache.ttl_us
    times = times_us(accesses)
    if cache.policy == "adaptive":
        from kvcm_ray.optimizer.kernels.adaptive import adaptive

        return adaptive(*trace, partial, times, accesses.keys, *size, np.array(astuple(cache.settings)))
    from kvcm_ray.optimizer.kernels import replay as kernels

    if cache.policy == "lru_head_first":
        return kernels.head_first(*trace, times, *size)
    return kernels.banded(*trace, partial, times, *size, cache.policy == "lfu")


def _live(accesses: Accesses, cache: _Cache, partial: Flags) -> I32:
    policy: Policy = Adaptive(cache.settings) if cache.policy == "adaptive" else make_policy(cache.policy)
    simulated = SimulatedCache(policy, cache.capacity, accesses.keys, cache.ttl_us)
    bounds = zip(accesses.offsets[:-1].tolist(), accesses.offsets[1:].tolist(), strict=True)
    rows = zip(bounds, times_us(accesses).tolist(), accesses.ops.tolist(), partial.tolist(), strict=True)
    hits = [
        simulated.serve(
            accesses.blocks[start:end].astype(np.int64),
            now,
            read=bool(op & READ),
            write=bool(op & WRITE),
            partial=flag,
        )
        for (start, end), now, op, flag in rows
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
    prompt_tokens: int  #: see the functions of these names
    hit_tokens: int

    @property
    def hit_ratio(self) -> float:
        return self.hit_blocks / max(1, self.accessed_blocks)

    @property
    def token_hit_ratio(self) -> float:
        return self.hit_tokens / max(1, self.prompt_tokens)


def prompt_tokens(accesses: Accesses) -> I64:
    """(n,) length of each prompt, that of its blocks where the trace does not say; 0 for all if it does not
    say how many tokens a block has."""
    whole = accesses.lengths.astype(np.int64) * accesses.block_tokens
    return np.where((accesses.input_tokens > 0) & (whole > 0), accesses.input_tokens, whole)


def hit_tokens(accesses: Accesses, hits: I32) -> I64:
    """(n,) prompt tokens in the hit blocks of each request: a partial last block counts what it has."""
    return np.minimum(hits.astype(np.int64) * accesses.block_tokens, prompt_tokens(accesses))


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
        prompt_tokens=int(prompt_tokens(accesses)[chosen].sum()),
        hit_tokens=int(hit_tokens(accesses, hits)[chosen].sum()),
    )


def _held_before(accesses: Accesses) -> I64:
    """(m + 1,) how many accesses before each were of blocks that the engine had."""
    before = np.zeros(len(accesses.blocks) + 1, np.int64)
    if len(accesses.held):
        np.cumsum(accesses.held, out=before[1:])
    return before
