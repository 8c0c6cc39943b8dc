"""Writing traces in our own format (see `formats`): keys only, no prompts.

A gzip file is a row of members, one for each `flush`, each written by one call: what was flushed can be
read at any time, also when the writer was killed.
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.traces.batch import Batch
from kvcm_ray.traces.files import read_batches
from kvcm_ray.traces.formats import HEADER, OPS, REQUEST

_NAMES = {op: name for name, op in OPS.items()}
_FLUSH_BYTES = 1 << 20
_LEVEL = 1  #: of gzip; keys are random digits, more effort takes 6 times as long for 6 % of the size
_END_BYTES = 4096  #: where an end is looked for
_GZIP_MAGIC = b"\x1f\x8b\x08"
_WBITS = 16 + zlib.MAX_WBITS  #: with a gzip header


def header(block_tokens: int, **more: Any) -> bytes:
    """The first line of a trace."""
    return orjson.dumps(HEADER | {"block_tokens": block_tokens} | more) + b"\n"


def end_line(end: Mapping[str, Any]) -> bytes:
    """The last line of a recording that was ended. To be flushed alone, for `end_of`."""
    return orjson.dumps({"end": dict(end)}) + b"\n"


def end_of(file: Path) -> dict[str, Any] | None:
    """What the last member of a gzip file says, if it is an `end_line`. Raises `OSError`."""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _END_BYTES))
        tail = stream.read()
    at = len(tail)
    while (at := tail.rfind(_GZIP_MAGIC, 0, at)) >= 0:
        with suppress(zlib.error, ValueError, KeyError, TypeError):
            return dict(orjson.loads(zlib.decompress(tail[at:], _WBITS))["end"])
    return None


def lines_of(batch: Batch) -> bytes:
    """The records of these requests, one a line; what is as by default is left out."""
    bounds = offsets_of(batch.counts).tolist()
    times_us = np.rint(batch.times_s * 1e6).astype(np.int64).tolist()
    lines = []
    for row, more in enumerate(_others(batch)):
        record = {"time_us": times_us[row], "keys": batch.keys[bounds[row] : bounds[row + 1]], **more}
        lines.append(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _others(batch: Batch) -> list[dict[str, Any]]:
    """What a record has besides its time and keys."""
    records: list[dict[str, Any]] = [{} for _ in range(len(batch.counts))]
    for row, op in enumerate(batch.ops.tolist()):
        if op != REQUEST:
            records[row]["op"] = _NAMES[op]
    for name, labels in (("instance", batch.instances), ("class", batch.classes)):
        for row, label in enumerate(labels):
            if label:
                records[row][name] = label
    for name, column in (
        ("turn", batch.turns),
        ("input_tokens", batch.input_tokens),
        ("output_tokens", batch.output_tokens),
        ("partial", batch.partial),
    ):
        for row in np.flatnonzero(column).tolist():
            records[row][name] = column[row].item()
    if len(batch.held):
        _add_held(batch, records)
    return records


def _add_held(batch: Batch, records: list[dict[str, Any]]) -> None:
    for row, flags in enumerate(np.split(batch.held, np.cumsum(batch.counts)[:-1])):
        count = int(np.count_nonzero(flags))
        if count:
            records[row]["held"] = count if flags[:count].all() else flags.tolist()


class TraceWriter:
    """One file, new or emptied; gzip if its name ends in ``.gz``. What it raises is `OSError`.

    Args:
        first: the header.
        new: the file must not be there.
    """

    def __init__(self, file: Path, first: bytes, *, new: bool = False) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if new else os.O_TRUNC), 0o644)
        self._packed = file.suffix == ".gz"
        self._pieces: list[bytes] = [first]
        self.pending = len(first)  #: bytes of text that are not in the file yet
        self.bytes = 0  #: of the file

    def add(self, lines: bytes) -> None:
        """Whole lines. They are in the file after the next `flush`."""
        self._pieces.append(lines)
        self.pending += len(lines)

    def flush(self, bytes_max: int | None = None) -> bool:
        """Write what is pending; False if the file would get larger than `bytes_max`: then it is gone."""
        if not self.pending:
            return True
        data = b"".join(self._pieces)
        self._pieces, self.pending = [], 0
        if self._packed:
            packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WBITS)
            data = packer.compress(data) + packer.flush()
        if bytes_max is not None and self.bytes + len(data) > bytes_max:
            return False
        self._write(data)
        return True

    def close(self) -> None:
        """Nothing pending is written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        """All of it, or the file stays as it was."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self.bytes)
                os.lseek(self._fd, self.bytes, os.SEEK_SET)
            raise
        self.bytes += len(data)


def write_trace(path: str | Path, first: bytes, batches: Iterable[Batch]) -> None:
    """A whole trace file, or none: what was there before stays until all is written.

    Raises:
        InvalidArgument: the file cannot be written. What `batches` raises goes through.
    """
    file = Path(path)
    part = file.with_name(f".{secrets.token_hex(4)}-{file.name}")
    try:
        writer = TraceWriter(part, first)
        try:
            for batch in batches:
                writer.add(lines_of(batch))
                if writer.pending >= _FLUSH_BYTES:
                    writer.flush()
            writer.flush()
            os.replace(part, file)
        finally:
            writer.close()
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgument(f"cannot write the trace {file}: {error}") from error


def convert(source: Path, path: str | Path) -> None:
    """Any known format to ours, streamed.

    Raises:
        InvalidArgument: `source` is not a trace or has a bad line, or `path` cannot be written.
    """
    batches = read_batches(source)
    form, first = next(batches)
    more: Mapping[str, Any] = {"sample_level": form.sample_level} if form.sample_level else {}

    def rest() -> Iterable[Batch]:
        yield first
        for _, batch in batches:
            yield batch

    write_trace(path, header(form.block_tokens, **more), rest())
