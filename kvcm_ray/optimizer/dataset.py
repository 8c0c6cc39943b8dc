"""Trace files to arrays, and back.

`load` reads a file of any known format (`formats`), plain or gzip, some megabytes at a time: beside the
arrays themselves it needs little memory. The parsed form is kept in ``.kvcm_cache/`` beside the file
and used as long as the file's size and time of change are the same; where it cannot be written, the
file is parsed each time. `read_batches` gives the records without keeping them.

A bad line is an error that names the file and the line; nothing is skipped silently.
"""

from __future__ import annotations

import gzip
import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import orjson

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, I64, REQUEST, Accesses, Flags, offsets_of, places
from kvcm_ray.optimizer.formats import HEADER, OPS, Batch, Format, Kvcm, format_of
from kvcm_ray.traces import BUNDLED, bundled
from kvcm_ray.traces.keys import mix64

CACHE_FOLDER = ".kvcm_cache"
_CACHE_VERSION = 1
_READ_BYTES = 4 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_ACCESSES_MAX = (1 << 31) - 1  #: ids and positions are 32-bit
_OP_NAMES = {op: name for name, op in OPS.items()}
_BAD_RECORD = (ValueError, KeyError, TypeError, OverflowError)


def load(path: str | Path, *, cache: bool = True) -> Accesses:
    """All of a trace. `path` is a file, or the name of a bundled trace if no such file exists.

    A block that a request names twice counts once. Requests are in the order of the file, those of an
    event log in the order in which they took effect.

    Raises:
        InvalidArgument: no such file, no known format, a malformed line, or more than 2**31 accesses
            (`sampling.sample_file` takes those).
        Unsupported: numba is not installed.
    """
    file = resolve(path)
    stamp = _stamp(file)
    if cache and (found := _cached(file, stamp)) is not None:
        return found
    accesses = _parse(file)
    if cache:
        with suppress(OSError):
            _keep(file, stamp, accesses)
    return accesses


def of_requests(
    requests: Sequence[Sequence[int]],
    *,
    block_tokens: int = 0,
    input_tokens: Sequence[int] | None = None,
    times_s: Sequence[float] | None = None,
    ops: Sequence[int] | None = None,
) -> Accesses:
    """A trace from the prefix keys of each request, in prefix order.

    Args:
        input_tokens: of each prompt; by default its blocks are full.
        times_s: of each request; by default a second apart.
        ops: `READ`, `WRITE` or `REQUEST`, which is the default.
    """
    n = len(requests)
    counts = np.array([len(keys) for keys in requests], np.int64)
    tokens = counts * block_tokens if input_tokens is None else np.array(input_tokens, np.int64)
    batch = Batch(
        keys=np.array([key for keys in requests for key in keys], np.int64),
        counts=counts,
        times_s=np.arange(n, dtype=np.float64) if times_s is None else np.array(times_s, np.float64),
        input_tokens=tokens,
        output_tokens=np.zeros(n, np.int64),
        partial=tokens < counts * block_tokens,
        ops=np.full(n, REQUEST, np.uint8) if ops is None else np.array(ops, np.uint8),
        turns=np.zeros(n, np.int64),
    )
    numbering, rows = Numbering(), _Rows()
    rows.form = Kvcm(HEADER | {"block_tokens": block_tokens})
    rows.add(batch, numbering)
    return rows.joined(numbering.finish())


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


def read_batches(file: Path) -> Iterator[tuple[Format, Batch]]:
    """The records of a trace, some thousand at a time, in the order in which they are decoded.

    Raises:
        InvalidArgument: as `load`.
    """
    form: Format | None = None
    number = 1
    with _open(file) as stream:
        while lines := stream.readlines(_READ_BYTES):
            try:
                records = [orjson.loads(line) for line in lines if not line.isspace()]
                if form is None and records:
                    form, header = format_of(records[0])
                    records = records[header:]
                if form is not None:
                    yield form, form.decode(records)
            except _BAD_RECORD as error:
                raise _bad_line(file, form, lines, number) from error
            number += len(lines)
    if form is None:
        raise InvalidArgument(f"the trace {file} is empty")
    yield form, form.rest()


def save(accesses: Accesses, path: str | Path) -> None:
    """Write a trace in our own format, gzip if the name ends in ``.gz``: keys only, no prompts.

    Raises:
        InvalidArgument: the file cannot be written.
    """
    file = Path(path)
    keys = keys_apart(accesses.keys[accesses.blocks], accesses.lengths, accesses.instances)
    try:
        with gzip.open(file, "wb", 6) if file.suffix == ".gz" else file.open("wb") as out:
            out.write(orjson.dumps(HEADER | {"block_tokens": accesses.block_tokens}) + b"\n")
            for request in range(accesses.requests):
                out.write(orjson.dumps(_record(accesses, request, keys)) + b"\n")
    except OSError as error:
        raise InvalidArgument(f"cannot write the trace {file}: {error}") from error


def _record(accesses: Accesses, request: int, keys: I64) -> dict[str, Any]:
    start, end = accesses.offsets[request], accesses.offsets[request + 1]
    record: dict[str, Any] = {
        "time_us": round(float(accesses.times_s[request]) * 1e6),
        "op": _OP_NAMES[int(accesses.ops[request])],
        "keys": keys[start:end].tolist(),
        "instance": accesses.instance_names[accesses.instances[request]],
        "class": accesses.class_names[accesses.classes[request]],
        "turn": int(accesses.turns[request]),
        "input_tokens": int(accesses.input_tokens[request]),
        "output_tokens": int(accesses.output_tokens[request]),
        "partial": bool(accesses.partial[request]),
    }
    if len(accesses.held):
        record["held"] = accesses.held[start:end].tolist()
    return record


# ------------------------------------------------------------------------------------- reading


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    try:
        with file.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP_MAGIC
            if packed:
                yield io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), 1 << 20)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidArgument(f"cannot read the trace {file}: {error}") from error


def _bad_line(file: Path, form: Format | None, lines: list[bytes], number: int) -> InvalidArgument:
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
        except _BAD_RECORD as error:
            cause = f"missing {error}" if isinstance(error, KeyError) else str(error)
            return InvalidArgument(f"{file}, line {at}: {cause}")
    raise AssertionError("lines that are bad together are bad one by one")


def _parse(file: Path) -> Accesses:
    numbering, rows = Numbering(), _Rows()
    for form, batch in read_batches(file):
        rows.form = form
        rows.add(batch, numbering)
        if numbering.accesses > _ACCESSES_MAX:
            raise InvalidArgument(f"the trace {file} has more than {_ACCESSES_MAX} accesses; sample it")
    return rows.joined(numbering.finish())


class Labels:
    """Names by number, in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, names: list[str], count: int) -> I32:
        """The number of each of `count` names; of none, the number of the empty name."""
        numbers = self._numbers
        if not names:
            return np.full(count, numbers.setdefault("", len(numbers)) if count else 0, np.int32)
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._numbers) or ("",)


class Numbering:
    """Dense ids of 64-bit keys; 13 to 23 bytes a key."""

    def __init__(self) -> None:
        from kvcm_ray.optimizer.kernels import load

        self._kernels = load
        self._table = np.full(1 << 12, -1, np.int32)
        self._known = np.zeros(1 << 11, np.int64)
        self._count = 0
        self.accesses = 0  #: numbered so far

    def number(self, keys: I64) -> I32:
        """The id of each key; new ones get the next."""
        self.accesses += len(keys)
        self._make_room(self._count + len(keys))
        ids, self._count = self._kernels.number(keys, self._table, self._known, self._count)
        return ids

    def finish(self) -> I64:
        """The keys by id. No more can be numbered."""
        self._table = self._table[:0]
        return self._known[: self._count].copy()

    def _make_room(self, count: int) -> None:
        if count > len(self._known):
            more = np.zeros(count + count // 2 - self._count, np.int64)
            self._known = np.concatenate([self._known[: self._count], more])
        if 4 * count > 3 * len(self._table):
            self._table = np.full(1 << (4 * count // 3).bit_length(), -1, np.int32)
            self._kernels.rebuild(self._table, self._known[: self._count])


def keys_apart(keys: I64, counts: I64, instances: I32) -> I64:
    """The keys (m,) of some requests (n,), those of different instances made different.

    Those of instance 0, which may be all, stay as they are. Done twice it undoes itself.
    """
    if not instances.any():
        return keys
    apart = mix64(instances.astype(np.uint64))
    apart[instances == 0] = 0
    return keys ^ np.repeat(apart, counts).view(np.int64)


class _Rows:
    """Batches with their labels and ids, to be joined at the end."""

    def __init__(self) -> None:
        self.form: Format | None = None
        self._instances, self._classes = Labels(), Labels()
        self._batches: list[Batch] = []
        self._blocks: list[I32] = []
        self._labels: list[tuple[I32, I32]] = []

    def add(self, batch: Batch, numbering: Numbering) -> None:
        instances = self._instances.number(batch.instances, len(batch.counts))
        classes = self._classes.number(batch.classes, len(batch.counts))
        self._labels.append((instances, classes))
        self._blocks.append(numbering.number(keys_apart(batch.keys, batch.counts, instances)))
        self._batches.append(replace(batch, keys=batch.keys[:0], instances=[], classes=[]))

    def joined(self, keys: I64) -> Accesses:
        """One `Accesses`, in the order of time if the format asks for that, without repeats."""
        form = self.form
        assert form is not None, "a trace has a format"
        counts = self._column("counts")
        blocks, held = np.concatenate(self._blocks), self._held()
        self._blocks.clear()
        rows = {
            name: self._column(name)
            for name in ("times_s", "input_tokens", "output_tokens", "partial", "ops", "turns")
        }
        rows["instances"] = np.concatenate([instances for instances, _ in self._labels])
        rows["classes"] = np.concatenate([classes for _, classes in self._labels])
        if not form.ordered:
            order = np.argsort(rows["times_s"], kind="stable")
            rows = {name: column[order] for name, column in rows.items()}
            at = _access_order(counts, order)
            counts, blocks, held = counts[order], blocks[at], held[at] if len(held) else held
        counts, blocks, held = _without_repeats(counts, blocks, held, len(keys))
        return _made(
            **rows, blocks=blocks, offsets=offsets_of(counts), held=held, keys=keys,
            instance_names=self._instances.names, class_names=self._classes.names,
            block_tokens=form.block_tokens,
        )  # fmt: skip

    def _column(self, name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(batch, name) for batch in self._batches])

    def _held(self) -> Flags:
        """Flags of all accesses, or none at all if no batch has any."""
        if not any(len(batch.held) for batch in self._batches):
            return np.zeros(0, np.bool_)
        return np.concatenate(
            [
                batch.held if len(batch.held) else np.zeros(len(blocks), np.bool_)
                for batch, blocks in zip(self._batches, self._blocks, strict=True)
            ]
        )


def _access_order(counts: I64, order: I64) -> I64:
    """Where each access was before its requests were put in this order."""
    starts = offsets_of(counts)[:-1][order]
    counts = counts[order]
    return np.repeat(starts, counts) + places(offsets_of(counts))


def _without_repeats(counts: I64, blocks: I32, held: Flags, unique: int) -> tuple[I64, I32, Flags]:
    from kvcm_ray.optimizer.kernels import load

    offsets = offsets_of(counts)
    first = load.first_in_request(blocks, offsets, unique)
    if first.all():
        return counts, blocks, held
    kept = np.append(0, np.cumsum(first))[offsets]
    return np.diff(kept), blocks[first], held[first] if len(held) else held


def _made(*, blocks: I32, offsets: I64, keys: I64, **others: Any) -> Accesses:
    from kvcm_ray.optimizer.kernels import load

    chained = bool(load.is_chained(blocks, offsets, len(keys)))
    return Accesses(blocks=blocks, offsets=offsets, keys=keys, chained=chained, **others)


# ------------------------------------------------------------------------------- the parsed form


def _stamp(file: Path) -> I64:
    """By which a parsed form is known to be of the file as it is now."""
    about = file.stat()
    return np.array([_CACHE_VERSION, about.st_size, about.st_mtime_ns], np.int64)


def _cache_file(file: Path) -> Path:
    return file.parent / CACHE_FOLDER / f"{file.name}.npz"


def _cached(file: Path, stamp: I64) -> Accesses | None:
    """The parsed form, unless there is none, it is of another state of the file, or it is damaged."""
    try:
        with np.load(_cache_file(file), allow_pickle=False) as parsed:
            if not np.array_equal(parsed["stamp"], stamp):
                return None
            arrays = {field.name: parsed[field.name] for field in fields(Accesses)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    for name in ("instance_names", "class_names"):
        arrays[name] = tuple(arrays[name].tolist())
    arrays["block_tokens"], arrays["chained"] = int(arrays["block_tokens"]), bool(arrays["chained"])
    return Accesses(**arrays)


def _keep(file: Path, stamp: I64, accesses: Accesses) -> None:
    """Whole or not at all: readers never see half a file."""
    target = _cache_file(file)
    target.parent.mkdir(exist_ok=True)
    (target.parent / ".gitignore").write_text("*\n")
    arrays: dict[str, Any] = {
        field.name: np.asarray(getattr(accesses, field.name)) for field in fields(Accesses)
    }
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, stamp=stamp, **arrays)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
