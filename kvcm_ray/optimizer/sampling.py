"""The curve of LRU from a sample of the blocks, for traces that are too large, or that do not end.

As in SHARDS (Waldspurger and others, FAST 2015) a block is in the sample or not whatever the request, by
a hash, and ranks among sampled blocks stand for as many more. Two things are made for prefixes here,
without which a tenth of the blocks misses the curve by several points:

- The first block of a prompt is always in the sample and stands for itself: it may be in every
  request, so that it must not be left to chance. The other accesses get the weight that makes them as
  many as they are known to be, the count correction.
- The blocks behind it are taken one of each ``1 / rate`` in a row. Neighbours in a prompt come and go
  together, so taking them by chance would only add noise. See `kvcm_ray.core.levels`, by which the live
  manager samples too. Levels are powers of two; between two of them the finer level is thinned out by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.hashing import mix64
from kvcm_ray.core.levels import LEVEL_MAX, levels
from kvcm_ray.core.ragged import offsets_of, places
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, I64, READ, U8, Accesses, Flags
from kvcm_ray.optimizer.curve import Curve, looked_up
from kvcm_ray.optimizer.dataset import Numbering, read_batches
from kvcm_ray.traces.files import resolve
from kvcm_ray.traces.keys import Labels, keys_apart


@dataclass(frozen=True, slots=True)
class Sample:
    """k of the m accesses of n requests, of v different blocks."""

    blocks: I32  #: (k,) ``0 .. v - 1``
    offsets: I64  #: (n + 1,) into `blocks`
    ops: U8  #: (n,) `READ`, `WRITE` or both
    places: I32  #: (k,) how many blocks come before each in its prompt, sampled or not
    sure: Flags  #: (v,) always in the sample: the first block of a prompt
    rate: float  #: of the others
    accessed: int  #: how many of the m accesses look up


def sample(accesses: Accesses, rate: float, seed: int = 0) -> Sample:
    """The sample of a trace in memory.

    Args:
        rate: the share of blocks to keep, above 0 and at most 1.

    Raises:
        InvalidArgument: no such rate, or the trace is a sample itself: see `recorded_sample`.
    """
    _unsampled(accesses.sample_level)
    keys = accesses.keys[accesses.blocks]
    return _collected([(keys, accesses.offsets, accesses.ops)], rate, seed)


def sample_file(path: str | Path, rate: float, seed: int = 0) -> Sample:
    """The sample of a trace file, which is streamed: in memory are only what is kept, and one offset
    for each request.

    Raises:
        InvalidArgument: as `sample` and `dataset.load`.
    """
    return _collected(_streamed(resolve(path)), rate, seed)


def recorded_sample(accesses: Accesses) -> Sample:
    """A recording that was sampled when it was made. Where in its prompt a block was is not known any more
    (`places` are among what was recorded), and how many there were is estimated."""
    rate = 2.0**-accesses.sample_level
    place = accesses.places
    sure = np.zeros(accesses.unique, np.bool_)
    sure[accesses.blocks[place == 0]] = True
    certain = looked_up(accesses, sure[accesses.blocks].astype(np.float64))
    accessed = certain + (looked_up(accesses) - certain) / rate
    return Sample(accesses.blocks, accesses.offsets, accesses.ops, place, sure, rate, round(accessed))


def sampled_curve(drawn: Sample, weights: npt.NDArray[np.float64] | None = None) -> Curve:
    """Estimated hits of leaf-first LRU at every capacity.

    Args:
        weights: (k,) what a hit of each access is worth; a block each by default.
    """
    from kvcm_ray.optimizer.kernels import curve

    trace = drawn.blocks, drawn.offsets, drawn.ops
    distances = curve.sampled_distances(*trace, drawn.sure, 1 / drawn.rate, len(drawn.sure))
    stands_for = _stands_for(drawn)
    if weights is not None:
        stands_for *= weights
    hit = distances > 0
    steps, step = np.unique(distances[hit], return_inverse=True)
    return Curve(steps, np.cumsum(np.bincount(step, stands_for[hit])), float(stands_for.sum()))


def _stands_for(drawn: Sample) -> npt.NDArray[np.float64]:
    """(k,) how many look-ups each access stands for."""
    reads = np.repeat((drawn.ops & READ) > 0, np.diff(drawn.offsets))
    sure = drawn.sure[drawn.blocks]
    certain = int((sure & reads).sum())
    others = int(reads.sum()) - certain
    return np.where(sure, 1.0, (drawn.accessed - certain) / max(1, others)) * reads


def _unsampled(level: int) -> None:
    if level:
        raise InvalidArgument(
            f"this recording has only one of {1 << level} blocks in a row already",
            hint="Take it as it is, with recorded_sample(load(path)).",
        )


def _streamed(file: Path) -> Iterator[tuple[I64, I64, U8]]:
    instances = Labels()
    for form, batch in read_batches(file):
        _unsampled(form.sample_level)
        numbers = instances.number(batch.instances, len(batch.counts))
        yield keys_apart(batch.keys, batch.counts, numbers), offsets_of(batch.counts), batch.ops


def _collected(batches: Iterable[tuple[I64, I64, U8]], rate: float, seed: int) -> Sample:
    _check(rate)
    numbering, accessed = Numbering(), 0
    rows: list[tuple[I32, I64, U8, I32]] = []  # blocks, counts, ops, places
    first: list[I32] = []
    for keys, offsets, ops in batches:
        kept = chosen(keys, offsets, rate, seed)
        at = places(offsets)[kept]
        blocks = numbering.number(keys[kept])
        rows.append((blocks, np.diff(np.append(0, np.cumsum(kept))[offsets]), ops, at))
        first.append(blocks[at == 0])
        accessed += int(np.diff(offsets)[(ops & READ) > 0].sum())
    sure = np.zeros(len(numbering.finish()), np.bool_)
    sure[np.concatenate(first)] = True
    blocks, counts, ops, at = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Sample(blocks, offsets_of(counts), ops, at, sure, rate, accessed)


def chosen(keys: I64, offsets: I64, rate: float, seed: int) -> Flags:
    """Which accesses are in the sample, given the keys of whole requests: shape ``(m,)``."""
    level = math.ceil(-math.log2(rate)) - 1
    found = levels(keys, offsets, seed)
    kept: Flags = found > level
    if share := rate * 2.0 ** (level + 1) - 1:  # of those that are of this level
        finest = np.flatnonzero(found == level)
        salt = mix64(np.array([seed], np.int64).view(np.uint64))
        uniform = mix64(keys[finest].view(np.uint64) ^ salt) * 2.0**-64
        kept[finest] = uniform < share
    return kept


def _check(rate: float) -> None:
    if not 2.0**-LEVEL_MAX <= rate <= 1:
        raise InvalidArgument(f"a sampling rate is above 0 and at most 1, got {rate}")
