"""Trace files: where they are, and their records, some megabytes at a time.

Files are JSON lines, plain or gzip (told by content, not by name). A bad line is an error that names the
file and the line; nothing is skipped silently. A gzip file that ends too early is an error too, unless it
is a recording of a live group, which may still be under way: it ends with its last whole line.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.traces.batch import Batch, by_time, joined
from kvcm_ray.traces.formats import Chain, Format, format_of
from kvcm_ray.traces.keys import chain_keys

DATA = Path(__file__).parent / "data"
BUNDLED = {
    "conversation": "mooncake_conversation.jsonl.gz",
    "synthetic": "mooncake_synthetic.jsonl.gz",
}
READ_BYTES = 4 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_PACKED_BYTES = 256 << 10
BAD_RECORD = (ValueError, KeyError, TypeError, OverflowError)


def bundled(name: str) -> Path:
    """Path of a trace that comes with the package.

    Raises:
        InvalidArgument: no such name.
    """
    if name not in BUNDLED:
        raise InvalidArgument(f"no bundled trace {name!r}; there are {', '.join(BUNDLED)}")
    return DATA / BUNDLED[name]


def resolve(path: str | Path) -> Path:
    """The file that `path` names: a file, or a bundled trace.

    Raises:
        InvalidArgument: there is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    if str(path) not in BUNDLED:
        raise InvalidArgument(f"no trace file {str(file)!r}; bundled traces are {', '.join(BUNDLED)}")
    return bundled(str(path))


def read_batches(file: Path, chain_ids: Chain = chain_keys) -> Iterator[tuple[Format, Batch]]:
    """The requests of a trace, some thousand at a time, in the order in which they took effect.

    The events of a log that is not in that order are sorted first, all of them in memory.

    Args:
        chain_ids: see `format_of`.

    Raises:
        InvalidArgument: no known format, a malformed line, an empty or a damaged file.
    """
    late: list[Batch] = []
    for form, batch in _decoded(file, chain_ids):
        if form.ordered:
            yield form, batch
        else:
            late.append(batch)
    if late:
        yield form, by_time(joined(late))


def _decoded(file: Path, chain_ids: Chain) -> Iterator[tuple[Format, Batch]]:
    form: Format | None = None
    number = 1
    with open_lines(file) as stream:
        while lines := stream.read(READ_BYTES):
            known = form
            try:
                records = [orjson.loads(line) for line in lines if not line.isspace()]
                if form is None and records:
                    form, header = format_of(records[0], chain_ids)
                    records = records[header:]
                batch = form.decode(records) if form is not None else None
            except BAD_RECORD as error:
                raise _find_bad_line(file, known, lines, number) from error
            if form is not None and batch is not None:
                yield form, batch
            number += len(lines)
        if stream.cut and not (form is not None and form.recording):
            raise cut_off(file)
    if form is None:
        raise InvalidArgument(f"the trace {file} is empty")
    yield form, form.rest()


def _find_bad_line(file: Path, form: Format | None, lines: list[bytes], number: int) -> InvalidArgument:
    """Which of these lines, the first of which has this number, is bad, and why."""
    for at, line in enumerate(lines, number):
        if line.isspace():
            continue
        try:
            record = orjson.loads(line)
            header = False
            if form is None:
                form, header = format_of(record)
            if not header:
                form.decode([record])
        except BAD_RECORD as error:
            return bad_line(file, at, error)
    raise AssertionError("lines that are bad together are bad one by one")


def bad_line(file: Path, number: int, error: Exception) -> InvalidArgument:
    cause = f"missing {error}" if isinstance(error, KeyError) else str(error)
    return InvalidArgument(f"{file}, line {number}: {cause}")


def cut_off(file: Path) -> InvalidArgument:
    return InvalidArgument(f"cannot read the trace {file}: it is cut off in the middle")


class Lines:
    """Whole lines of a plain or gzip file."""

    def __init__(self, raw: IO[bytes], members: GzipMembers | None) -> None:
        self._stream = io.BufferedReader(members, 1 << 20) if members else raw
        self._members = members

    @property
    def cut(self) -> bool:
        """The file ended in the middle of a gzip member."""
        return self._members is not None and self._members.cut

    def read(self, count: int) -> list[bytes]:
        """Lines of about so many bytes together; none at the end."""
        lines = self._stream.readlines(count)
        if self.cut and lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        return lines


@contextmanager
def open_lines(file: Path) -> Iterator[Lines]:
    """Raises:
    InvalidArgument: the file cannot be read, there or within.
    """
    try:
        with file.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP_MAGIC
            yield Lines(raw, GzipMembers(raw) if packed else None)
    except (OSError, zlib.error) as error:
        raise InvalidArgument(f"cannot read the trace {file}: {error}") from error


class GzipMembers(io.RawIOBase):
    """What gzip members one behind the other hold. Ends at the end of the file, also within a member:
    then `cut` is set, and what could be read of it was given. Raises `zlib.error` for a damaged one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._packed = b""
        self._begin()
        self.cut = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            packed = self._packed or self._raw.read(_PACKED_BYTES)
            plain = self._member.decompress(packed, len(buffer))
            if not packed and not plain:
                self.cut = self._begun
                return 0
            self._begun |= bool(packed)
            self._packed = self._member.unconsumed_tail
            if self._member.eof:
                self._packed = self._member.unused_data.lstrip(b"\0")
                self._begin()
            if plain:
                buffer[: len(plain)] = plain
                return len(plain)

    def _begin(self) -> None:
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._begun = False
