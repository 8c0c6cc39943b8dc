"""Some requests of a trace in a row, as columns: what decoders give and what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.core.ragged import elements_of, offsets_of
from kvcm_ray.traces.keys import F64, I64, U8, Flags


@dataclass(slots=True)
class Batch:
    """n requests with m accesses. Empty label lists mean: none given."""

    keys: I64  #: (m,) prefix keys, those of each request in the order of its prompt
    counts: I64  #: (n,)
    times_s: F64
    input_tokens: I64
    output_tokens: I64
    partial: Flags  #: the prompt fills its last block only partly
    ops: U8
    turns: I64
    instances: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    held: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))  #: (m,) or (0,)


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch (of at least one) in the same order."""
    labels: dict[str, list[str]] = {
        name: [label for batch in batches for label in getattr(batch, name) or [""] * len(batch.counts)]
        if any(getattr(batch, name) for batch in batches)
        else []
        for name in ("instances", "classes")
    }
    return Batch(
        keys=np.concatenate([batch.keys for batch in batches]),
        counts=np.concatenate([batch.counts for batch in batches]),
        times_s=np.concatenate([batch.times_s for batch in batches]),
        input_tokens=np.concatenate([batch.input_tokens for batch in batches]),
        output_tokens=np.concatenate([batch.output_tokens for batch in batches]),
        partial=np.concatenate([batch.partial for batch in batches]),
        ops=np.concatenate([batch.ops for batch in batches]),
        turns=np.concatenate([batch.turns for batch in batches]),
        instances=labels["instances"],
        classes=labels["classes"],
        held=joined_held([(batch.held, len(batch.keys)) for batch in batches]),
    )


def joined_held(parts: Sequence[tuple[Flags, int]]) -> Flags:
    """Flags of all accesses, given each batch's flags and accesses; none at all if no batch has any."""
    if not any(len(held) for held, _ in parts):
        return np.zeros(0, np.bool_)
    return np.concatenate([held if len(held) else np.zeros(count, np.bool_) for held, count in parts])


def by_time(batch: Batch) -> Batch:
    """In the order of the times; those of the same time stay in theirs."""
    order = np.argsort(batch.times_s, kind="stable")
    at = elements_of(offsets_of(batch.counts), order)
    return Batch(
        keys=batch.keys[at],
        counts=batch.counts[order],
        times_s=batch.times_s[order],
        input_tokens=batch.input_tokens[order],
        output_tokens=batch.output_tokens[order],
        partial=batch.partial[order],
        ops=batch.ops[order],
        turns=batch.turns[order],
        instances=[batch.instances[row] for row in order.tolist()] if batch.instances else [],
        classes=[batch.classes[row] for row in order.tolist()] if batch.classes else [],
        held=batch.held[at] if len(batch.held) else batch.held,
    )
