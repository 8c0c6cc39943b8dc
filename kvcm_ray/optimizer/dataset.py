"""Trace files to arrays, and back.

`load` reads a file of any known format (`formats`), plain or gzip, some megabytes at a time: beside the
arrays themselves it needs little memory. The parsed form is kept in ``.kvcm_cache/`` beside the file
and used as long as the file's size and time of change are the same; where it cannot be written, the
file is parsed each time. `read_batches` gives the records without keeping them.

A bad line is an error that names the file and the line; nothing is skipped silently.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import I32, I64, REQUEST, Accesses, Flags
from kvcm_ray.traces import files, writing
from kvcm_ray.traces.batch import Batch, joined_held
from kvcm_ray.traces.files import resolve
from kvcm_ray.traces.formats import HEADER, Format, Kvcm
from kvcm_ray.traces.keys import Labels, keys_apart

CACHE_FOLDER = ".kvcm_cache"
_CACHE_VERSION = 2
_ACCESSES_MAX = (1 << 31) - 1  #: ids and positions are 32-bit
_SAVE_REQUESTS = 1024  #: that are turned into text at once


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


def read_batches(file: Path) -> Iterator[tuple[Format, Batch]]:
    """The records of a trace, some thousand at a time; see `traces.files.read_batches`.

    Raises:
        InvalidArgument: as `load`.
    """
    from kvcm_ray.optimizer.kernels import load

    return files.read_batches(file, load.chain)


def save(accesses: Accesses, path: str | Path) -> None:
    """Write a trace in our own format, gzip if the name ends in ``.gz``: keys only, no prompts.

    Raises:
        InvalidArgument: the file cannot be written.
    """
    more = {"sample_level": accesses.sample_level} if accesses.sample_level else {}
    first = writing.header(accesses.block_tokens, **more)
    writing.write_trace(path, first, _batches(accesses))


def _batches(accesses: Accesses) -> Iterator[Batch]:
    keys = keys_apart(accesses.keys[accesses.blocks], accesses.lengths, accesses.instances)
    for start in range(0, accesses.requests, _SAVE_REQUESTS):
        rows = slice(start, start + _SAVE_REQUESTS)
        of = slice(*accesses.offsets[rows.start : rows.stop + 1][[0, -1]].tolist())
        yield Batch(
            keys=keys[of],
            counts=accesses.lengths[rows],
            times_s=accesses.times_s[rows],
            input_tokens=accesses.input_tokens[rows],
            output_tokens=accesses.output_tokens[rows],
            partial=accesses.partial[rows],
            ops=accesses.ops[rows],
            turns=accesses.turns[rows],
            instances=[accesses.instance_names[i] for i in accesses.instances[rows].tolist()],
            classes=[accesses.class_names[i] for i in accesses.classes[rows].tolist()],
            held=accesses.held[of],
        )


def _parse(file: Path) -> Accesses:
    numbering, rows = Numbering(), _Rows()
    for form, batch in read_batches(file):
        rows.form = form
        rows.add(batch, numbering)
        if numbering.accesses > _ACCESSES_MAX:
            raise InvalidArgument(f"the trace {file} has more than {_ACCESSES_MAX} accesses; sample it")
    return rows.joined(numbering.finish())


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
        """One `Accesses`, without repeats within a request."""
        form = self.form
        assert form is not None, "a trace has a format"
        counts = self._column("counts")
        held = joined_held(
            [(batch.held, len(blocks)) for batch, blocks in zip(self._batches, self._blocks, strict=True)]
        )
        blocks = np.concatenate(self._blocks)
        self._blocks.clear()
        rows = {
            name: self._column(name)
            for name in ("times_s", "input_tokens", "output_tokens", "partial", "ops", "turns")
        }
        rows["instances"] = np.concatenate([instances for instances, _ in self._labels])
        rows["classes"] = np.concatenate([classes for _, classes in self._labels])
        counts, blocks, held = _without_repeats(counts, blocks, held, len(keys))
        return _made(
            **rows, blocks=blocks, offsets=offsets_of(counts), held=held, keys=keys,
            instance_names=self._instances.names, class_names=self._classes.names,
            block_tokens=form.block_tokens, sample_level=form.sample_level,
        )  # fmt: skip

    def _column(self, name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(batch, name) for batch in self._batches])


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
    for name in ("block_tokens", "sample_level"):
        arrays[name] = int(arrays[name])
    arrays["chained"] = bool(arrays["chained"])
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
