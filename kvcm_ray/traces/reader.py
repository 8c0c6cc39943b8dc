"""Streaming readers of request traces; formats are told apart by the fields of the first record.

    mooncake       timestamp (ms), input_length, output_length, hash_ids (prefix ids of 512 tokens)
    qwen-bailian   chat_id, parent_chat_id, timestamp (s), ..., turn, hash_ids (ids of single blocks of
                   16 tokens)

Both are JSON lines, plain or gzip (told by content, not by name). Records keep the file's order. A
bad line is an error that names the file and the line; nothing is skipped silently.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import orjson

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.traces.keys import keys_of_block_ids, keys_of_prefix_ids

DATA = Path(__file__).parent / "data"
BUNDLED = {
    "conversation": "mooncake_conversation.jsonl.gz",
    "synthetic": "mooncake_synthetic.jsonl.gz",
}
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    timestamp_s: float  #: as in the trace; only differences mean anything
    input_tokens: int
    output_tokens: int
    keys: npt.NDArray[np.int64]  #: prefix keys of its prompt blocks
    partial_tail: bool = False  #: the prompt fills its last block only partly


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    seconds_per_tick: float
    block_tokens: int
    keys_of: Callable[[Sequence[int]], npt.NDArray[np.int64]]


MOONCAKE = _Format("mooncake", 1e-3, 512, keys_of_prefix_ids)
QWEN_BAILIAN = _Format("qwen-bailian", 1.0, 16, keys_of_block_ids)


def bundled(name: str) -> Path:
    """Path of a trace that comes with the package.

    Raises:
        InvalidArgument: no such name.
    """
    if name not in BUNDLED:
        raise InvalidArgument(f"no bundled trace {name!r}; there are {', '.join(BUNDLED)}")
    return DATA / BUNDLED[name]


def open_trace(path: str | Path, limit: int | None = None) -> Iterator[TraceRequest]:
    """Stream the requests of a trace file, at most `limit` of them.

    `path` is a file, or the name of a bundled trace if no such file exists.

    Raises:
        InvalidArgument: the file is missing, is of no known format, or a line is malformed.
    """
    if limit is not None and limit < 0:
        raise InvalidArgument(f"limit must not be negative, got {limit}")
    file = Path(path)
    if not file.exists():
        if str(path) not in BUNDLED:
            raise InvalidArgument(f"no trace file {str(file)!r}; bundled traces are {', '.join(BUNDLED)}")
        file = bundled(str(path))
    return itertools.islice(_requests(file), limit)


def _requests(file: Path) -> Iterator[TraceRequest]:
    kind: _Format | None = None
    with _lines(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
                kind = kind or _format_of(record)
                yield _request(kind, record)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                cause = f"missing {error}" if isinstance(error, KeyError) else str(error)
                raise InvalidArgument(f"{file}, line {number}: {cause}") from error


@contextmanager
def _lines(file: Path) -> Iterator[Iterator[bytes]]:
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
            yield iter(stream)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidArgument(f"cannot read the trace {file}: {error}") from error


def _format_of(record: Any) -> _Format:
    if isinstance(record, dict) and "hash_ids" in record:
        return QWEN_BAILIAN if "chat_id" in record else MOONCAKE
    fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"no known trace format (mooncake, qwen-bailian): it has {fields}")


def _request(kind: _Format, record: dict[str, Any]) -> TraceRequest:
    ids = record["hash_ids"]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError("hash_ids must be a list of integers")
    input_tokens = int(record["input_length"])
    return TraceRequest(
        timestamp_s=float(record["timestamp"]) * kind.seconds_per_tick,
        input_tokens=input_tokens,
        output_tokens=int(record["output_length"]),
        keys=kind.keys_of(ids),
        partial_tail=input_tokens < len(ids) * kind.block_tokens,
    )
