"""The requests of a trace one by one, for a replay against a live manager.

`files` reads and `formats` decodes; here each record becomes a `TraceRequest`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.traces.batch import Batch
from kvcm_ray.traces.files import read_batches, resolve
from kvcm_ray.traces.formats import REQUEST
from kvcm_ray.traces.keys import I64, Labels, keys_apart


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    timestamp_s: float  #: as in the trace; only differences mean anything
    input_tokens: int
    output_tokens: int
    keys: I64  #: prefix keys of its prompt blocks
    partial_tail: bool = False  #: the prompt fills its last block only partly
    op: int = REQUEST  #: `READ`, `WRITE`, or both


def open_trace(path: str | Path, limit: int | None = None) -> Iterator[TraceRequest]:
    """Stream the requests of a trace file, at most `limit` of them.

    `path` is a file, or the name of a bundled trace if no such file exists. Keys of different instances
    are made different. Requests come in the order in which they took effect; see `files.read_batches`.

    Raises:
        InvalidArgument: the file is missing, is of no known format, or a line is malformed; then the
            good lines just before it may not have been given.
    """
    if limit is not None and limit < 0:
        raise InvalidArgument(f"limit must not be negative, got {limit}")
    return itertools.islice(_requests(resolve(path)), limit)


def _requests(file: Path) -> Iterator[TraceRequest]:
    instances = Labels()
    for _, batch in read_batches(file):
        yield from _of_batch(batch, instances)


def _of_batch(batch: Batch, instances: Labels) -> Iterator[TraceRequest]:
    numbers = instances.number(batch.instances, len(batch.counts))
    keys = keys_apart(batch.keys, batch.counts, numbers)
    bounds = itertools.pairwise(offsets_of(batch.counts).tolist())
    columns = (batch.times_s, batch.input_tokens, batch.output_tokens, batch.partial, batch.ops)
    rows = zip(bounds, *(column.tolist() for column in columns), strict=True)
    for (start, end), time_s, input_tokens, output_tokens, partial, op in rows:
        yield TraceRequest(time_s, input_tokens, output_tokens, keys[start:end], partial, op)
