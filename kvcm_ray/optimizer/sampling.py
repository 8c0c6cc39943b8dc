"""The curve of LRU from a sample of the blocks, for traces that are too large, or that do not end.

As in SHARDS (Waldspurger and others, FAST 2015) a block is in the sample or not whatever the request, by
a hash, and ranks among sampled blocks stand for as many more. Two things are made for prefixes here,
without which a tenth of the blocks misses the curve by several points:

- The first block of a prompt is always in the sample and stands for itself: it may be in every
  request, so that it must not be left to chance. The other accesses get the weight that makes them as
  many as they are known to be, the count correction.
- The blocks behind it are taken one of each ``1 / rate`` in a row. Neighbours in a prompt come and go
  together, so taking them by chance would only add noise. Which one is decided by a hash of the first
  of them, so that it is still a property of the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, I64, REQUEST, Accesses, Flags, offsets_of, places
from kvcm_ray.optimizer.curve import Curve
from kvcm_ray.optimizer.dataset import Labels, Numbering, keys_apart, read_batches, resolve
from kvcm_ray.traces.keys import mix64


@dataclass(frozen=True, slots=True)
class Sample:
    """k of the m accesses of n requests, of v different blocks."""

    blocks: I32  #: (k,) ``0 .. v - 1``
    offsets: I64  #: (n + 1,) into `blocks`
    places: I32  #: (k,) how many blocks come before each in its prompt, sampled or not
    sure: Flags  #: (v,) always in the sample: the first block of a prompt
    rate: float  #: of the others
    accessed: int  #: m


def sample(accesses: Accesses, rate: float, seed: int = 0) -> Sample:
    """The sample of a trace in memory; `rate` is the share of blocks to keep, above 0 and at most 1.

    Raises:
        InvalidArgument: no such rate, or the trace has look-ups without writes or the reverse.
    """
    if not accesses.whole:
        raise InvalidArgument("a trace with look-ups and writes of their own cannot be sampled; replay it")
    keys = accesses.keys[accesses.blocks]
    return _collected([(keys, accesses.offsets)], rate, seed)


def sample_file(path: str | Path, rate: float, seed: int = 0) -> Sample:
    """The sample of a trace file, which is streamed: in memory are only what is kept, and one offset
    for each request.

    Raises:
        InvalidArgument: as `sample` and `dataset.load`.
    """
    return _collected(_streamed(resolve(path)), rate, seed)


def sampled_curve(drawn: Sample, weights: npt.NDArray[np.float64] | None = None) -> Curve:
    """Estimated hits of leaf-first LRU at every capacity.

    Args:
        weights: (k,) what a hit of each access is worth; a block each by default.
    """
    from kvcm_ray.optimizer.kernels import curve

    distances = curve.sampled_distances(
        drawn.blocks, drawn.offsets, drawn.sure, 1 / drawn.rate, len(drawn.sure)
    )
    sure = drawn.sure[drawn.blocks]
    others = len(sure) - int(sure.sum())
    stands_for = np.where(sure, 1.0, (drawn.accessed - int(sure.sum())) / max(1, others))
    if weights is not None:
        stands_for *= weights
    hit = distances > 0
    steps, step = np.unique(distances[hit], return_inverse=True)
    return Curve(steps, np.cumsum(np.bincount(step, stands_for[hit])), float(stands_for.sum()))


def _streamed(file: Path) -> Iterator[tuple[I64, I64]]:
    instances = Labels()
    for _, batch in read_batches(file):
        if (batch.ops != REQUEST).any():
            raise InvalidArgument(f"{file} has look-ups and writes of their own; replay it")
        numbers = instances.number(batch.instances, len(batch.counts))
        yield keys_apart(batch.keys, batch.counts, numbers), offsets_of(batch.counts)


def _collected(batches: Iterator[tuple[I64, I64]] | list[tuple[I64, I64]], rate: float, seed: int) -> Sample:
    if not 0 < rate <= 1:
        raise InvalidArgument(f"a sampling rate is above 0 and at most 1, got {rate}")
    numbering, accessed = Numbering(), 0
    blocks, counts, at, first = [], [], [], []
    for keys, offsets in batches:
        place = places(offsets)
        kept = chosen(keys, offsets, rate, seed)
        accessed += len(keys)
        blocks.append(numbering.number(keys[kept]))
        counts.append(np.diff(np.append(0, np.cumsum(kept))[offsets]))
        at.append(place[kept])
        first.append(blocks[-1][at[-1] == 0])
    sure = np.zeros(len(numbering.finish()), np.bool_)
    sure[np.concatenate(first)] = True
    return Sample(
        np.concatenate(blocks), offsets_of(np.concatenate(counts)), np.concatenate(at), sure, rate, accessed
    )


def chosen(keys: I64, offsets: I64, rate: float, seed: int) -> Flags:
    """Which accesses are in the sample, given the keys of whole requests: shape ``(m,)``."""
    place = places(offsets)
    row = max(1, round(1 / rate))
    of_row = np.maximum(place - 1, 0) % row
    head = keys[np.arange(len(keys)) - of_row]
    salt = mix64(np.array([seed], np.int64).view(np.uint64))
    uniform = (mix64(head.view(np.uint64) ^ salt) >> np.uint64(11)) * 2.0**-53
    kept: Flags = (place == 0) | (np.floor(uniform / rate) == of_row)
    return kept
