"""From hits to prefill FLOPs.

A token at position t of a prompt costs ``2 P`` FLOPs for the weights (a multiplication and an addition
for each of P parameters) and, in each of L layers, ``4 D t`` for attention: ``2 D t`` for the products
of its query with t keys, and as many for the weighted sum of t values, D being heads x head size. (See
Kaplan and others, "Scaling Laws for Neural Language Models", 2020, table 1, and Hoffmann and others,
"Training Compute-Optimal Large Language Models", 2022, appendix F.) Summed over the B tokens of block
d, positions ``d B`` to ``d B + B``:

    2 P B + 4 L D B (d B + B / 2)

and over the first T tokens of a prompt ``2 P T + 2 L D T**2``. A hit saves this; what it costs to read
the block instead is a matter of `economics`. Grouped-query attention makes keys smaller, not the
products fewer. For a mixture of experts, P is what one token uses. Where values have another head size
than keys (MLA), D is the mean of both widths; prefill makes whole keys and values from the latent.

Not in the formula: normalisations and softmax (a few percent at most), and that P counts the embedding,
which multiplies nothing, and the output layer, which prefill needs for one token only. Counting those two
makes the FLOPs of llama-3-70b 3 % too many, of llama-3-8b 13 %, of the smallest models over a quarter.

A prompt that hits as a whole still needs its last token computed, to have something to go on from; that
is left out, being one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import F64, I32, I64, Accesses
from kvcm_ray.optimizer.catalogue import Model
from kvcm_ray.optimizer.replay import prompt_tokens


def block_flops(model: Model, block_tokens: int, depths: npt.ArrayLike) -> F64:
    """FLOPs to prefill the block behind so many others, for each of `depths`, in their shape."""
    start = np.asarray(depths, np.float64) * block_tokens
    return prefix_flops(model, start + block_tokens) - prefix_flops(model, start)


def prefix_flops(model: Model, tokens: npt.ArrayLike) -> F64:
    """FLOPs to prefill the first so many tokens of a prompt, for each of `tokens`, in their shape."""
    count = np.asarray(tokens, np.float64)
    return np.asarray(count * (2 * model.parameters + 2 * model.layers * model.attention_width * count))


def known_tokens(accesses: Accesses) -> I64:
    """(n,) `replay.prompt_tokens` of a trace that allows to say what single prompts cost.

    Raises:
        InvalidArgument: the trace does not say how many tokens a block has, or holds a sample of blocks.
    """
    if not accesses.block_tokens:
        raise InvalidArgument(
            "the trace does not say how many tokens a block has",
            hint="Say it: dataclasses.replace(accesses, block_tokens=...), or --block-tokens.",
        )
    if accesses.sample_level:
        raise InvalidArgument("the trace holds a sample of its blocks: what single prompts cost is not known")
    return prompt_tokens(accesses)


def access_flops(model: Model, accesses: Accesses) -> F64:
    """(m,) what a hit of each access saves: `weights` of `curve.hit_curve`. A partial last block saves
    what it has.

    Raises:
        InvalidArgument: as `known_tokens`.
    """
    prompts = np.repeat(known_tokens(accesses), accesses.lengths)
    start = accesses.places.astype(np.int64) * accesses.block_tokens
    end = np.maximum(start, np.minimum(start + accesses.block_tokens, prompts))
    return prefix_flops(model, end) - prefix_flops(model, start)


@dataclass(frozen=True, slots=True)
class RequestFlops:
    """Of each of n requests. Blocks that its engine held already count nowhere: no cache has to give them."""

    needed: F64  #: (n,) FLOPs to prefill the prompt
    saved: F64  #: (n,) FLOPs of the hits
    blocks: I64  #: (n,) hit blocks, to be read


def request_flops(model: Model, accesses: Accesses, hits: I32) -> RequestFlops:
    """What each prompt costs and what its hits save; for writes of their own nothing means anything.

    Args:
        hits: (n,) leading hit blocks, as `replay` gives them.

    Raises:
        InvalidArgument: not as many hits as requests, more hits than blocks, or as `known_tokens`.
    """
    prompts, hits = known_tokens(accesses), np.asarray(hits)
    if hits.shape != prompts.shape or bool(((hits < 0) | (hits > accesses.lengths)).any()):
        raise InvalidArgument("hits are numbers of leading blocks, one for each request of the trace")
    needed = prefix_flops(model, prompts)
    if not accesses.held.any():
        found = np.minimum(hits.astype(np.int64) * accesses.block_tokens, prompts)
        return RequestFlops(needed, prefix_flops(model, found), hits.astype(np.int64))
    starts, ends = accesses.offsets[:-1], accesses.offsets[1:]
    flops = access_flops(model, accesses)
    held = _before(flops * accesses.held)
    saved, blocks = _before(flops * ~accesses.held), _before(~accesses.held)
    return RequestFlops(
        needed - (held[ends] - held[starts]),
        saved[starts + hits] - saved[starts],
        (blocks[starts + hits] - blocks[starts]).astype(np.int64),
    )


def _before(values: npt.NDArray[Any]) -> F64:
    """(m + 1,) the sum of those before each of m values, and of all."""
    return np.concatenate([np.zeros(1), np.cumsum(values, dtype=np.float64)])


def hits_by_depth(hits: npt.NDArray[np.integer]) -> I64:
    """From the hit blocks of each request (n,), how many requests hit the block at each depth: shape
    ``(max(hits),)``, sum ``sum(hits)``. A leading run of h hits the depths below h."""
    ended = np.bincount(hits, minlength=1)
    return (len(hits) - np.cumsum(ended))[:-1]
