"""What a line of a trace file means. The format is told by the first record.

    mooncake        timestamp (ms), input_length, output_length, hash_ids (prefix ids of 512 tokens)
    qwen-bailian    chat_id, timestamp (s), input_length, output_length, type, turn, hash_ids (ids of
                    single blocks of 16 tokens, chained here)
    tair-events     GetCacheLocation, StartWriteCache and FinishWriteCache events with prefix keys
    kvcm            a header ``{"format": "kvcm-trace", "version": 1, "block_tokens": 16}``, then
                    records with time_us and keys (prefix keys), and if wanted: op (read, write,
                    request), instance, class, turn, input_tokens, output_tokens, partial,
                    held (first so many blocks, or a list of booleans). A recording of a live group has
                    ``"recording": true`` in its header, and at its end, if it was ended and not cut
                    off, one line ``{"end": {...}}`` with its totals. A header with ``"sample_level": k``
                    says that of the blocks behind each first one only one of 2**k in a row is here.

Records are decoded many at a time, column by column. A decoder raises ValueError, TypeError, KeyError
or OverflowError for a bad record; the caller finds out which line it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from kvcm_ray.core.levels import LEVEL_MAX
from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.traces.batch import Batch
from kvcm_ray.traces.keys import F64, I64, Flags, chain_keys, keys_of_prefix_ids

Record = dict[str, Any]
Chain = Callable[[I64, I64], I64]  #: prefix keys of block ids (m,) of requests at these offsets (n + 1,)

READ = 1  #: looks up, and uses what it finds
WRITE = 2  #: puts in what is missing
REQUEST = READ | WRITE  #: both, one right after the other

HEADER = {"format": "kvcm-trace", "version": 1}
OPS = {"read": READ, "write": WRITE, "request": REQUEST}
_TIME_MAX_S = 1e11  #: three thousand years
_BAD_MASK = "a block mask must be a number of blocks or a list of booleans"
_UNFINISHED_S = 0.1  #: a write without an end takes effect so long after its start


class Format(Protocol):
    """A decoder of one file; it may keep records back until it knows when they took effect."""

    name: str
    block_tokens: int  #: 0 if the format does not say
    ordered: bool  #: records come out in the order of their times, or of the file
    recording: bool  #: the file may end anywhere: it is being written, or its writer was killed
    sample_level: int  #: 0: all blocks are there
    end: Record | None  #: what a recording says at its end

    def decode(self, records: Sequence[Record]) -> Batch: ...

    def rest(self) -> Batch:
        """What was kept back."""
        ...


def format_of(first: Any, chain_ids: Chain = chain_keys) -> tuple[Format, bool]:
    """(a decoder, whether the first record is a header that holds no request).

    Args:
        chain_ids: how single block ids become prefix keys; a compiled way may be given.

    Raises:
        ValueError: no known format.
    """
    if isinstance(first, dict):
        if "hash_ids" in first:
            return (QwenBailian(chain_ids) if "chat_id" in first else Mooncake()), False
        if "trigger_time_us" in first:
            return TairEvents(), False
        if first.get("format") == HEADER["format"]:
            return Kvcm(first), True
    fields = ", ".join(first) if isinstance(first, dict) else type(first).__name__
    raise ValueError(f"no known trace format (mooncake, qwen-bailian, tair-events, kvcm): it has {fields}")


# ------------------------------------------------------------------------------------- columns


def _ints(values: Iterable[Any]) -> I64:
    """Whole numbers; `array` refuses all else, which numpy would convert."""
    return np.array(array("q", values), np.int64)


def _counts(values: Iterable[Any], name: str) -> I64:
    numbers = _ints(values)
    if len(numbers) and numbers.min() < 0:
        raise ValueError(f"{name} must not be negative")
    return numbers


def _times(values: Iterable[Any], tick_s: float) -> F64:
    """In seconds. Those that would not fit into whole microseconds are refused."""
    times_s: F64 = np.array(array("d", values), np.float64) * tick_s
    if len(times_s) and not np.abs(times_s).max() <= _TIME_MAX_S:
        raise ValueError(f"a time must be within {_TIME_MAX_S:g} s of 0")
    return times_s


def _lists(records: Sequence[Record], name: str) -> list[list[Any]]:
    lists = [record[name] for record in records]
    if not all(type(values) is list for values in lists):
        raise TypeError(f"{name} must be a list")
    return lists


def _flat(lists: list[list[Any]], name: str) -> tuple[I64, I64]:
    """(all their numbers, how many each has)."""
    try:
        return _ints(chain.from_iterable(lists)), np.array([len(values) for values in lists], np.int64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of 64-bit integers: {error}") from error


def _texts(records: Sequence[Record], name: str, default: str = "") -> list[str]:
    texts = [record.get(name, default) for record in records]
    if not all(type(text) is str for text in texts):
        raise TypeError(f"{name} must be a string")
    return texts


def _held(masks: Sequence[Any], counts: I64) -> Flags:
    """A mask is the number of blocks at the beginning, or a list of booleans; null is 0."""
    held = np.zeros(int(counts.sum()), np.bool_)
    if set(map(type, masks)) - {int, list, type(None)}:  # empty ones too: each line is judged alone
        raise TypeError(_BAD_MASK)
    if not any(masks):
        return held[:0]
    for mask, start, count in zip(masks, offsets_of(counts).tolist(), counts.tolist(), strict=False):
        if type(mask) is int:
            held[start : start + min(max(mask, 0), count)] = True
        elif mask is not None:
            if not all(type(bit) is bool for bit in mask):
                raise TypeError(_BAD_MASK)
            held[start : start + count][: len(mask)] = mask[:count]
    return held


# ------------------------------------------------------------------------------------- formats


class _Whole:
    """What is so of files that are no recordings."""

    recording, sample_level = False, 0
    end: Record | None = None


class Mooncake(_Whole):
    name, block_tokens, ordered = "mooncake", 512, True
    _tick_s = 1e-3

    def decode(self, records: Sequence[Record]) -> Batch:
        ids, counts = _flat(_lists(records, "hash_ids"), "hash_ids")
        input_tokens = _counts((record["input_length"] for record in records), "input_length")
        return Batch(
            keys=self._keys(ids, counts),
            counts=counts,
            times_s=_times((record["timestamp"] for record in records), self._tick_s),
            input_tokens=input_tokens,
            output_tokens=_counts((record["output_length"] for record in records), "output_length"),
            partial=input_tokens < counts * self.block_tokens,
            ops=np.full(len(records), REQUEST, np.uint8),
            turns=np.zeros(len(records), np.int64),
        )

    def rest(self) -> Batch:
        return self.decode([])

    def _keys(self, ids: I64, counts: I64) -> I64:
        return keys_of_prefix_ids(ids)


class QwenBailian(Mooncake):
    name, block_tokens = "qwen-bailian", 16
    _tick_s = 1.0

    def __init__(self, chain_ids: Chain) -> None:
        self._chain = chain_ids

    def decode(self, records: Sequence[Record]) -> Batch:
        batch = super().decode(records)
        batch.turns = _counts((record.get("turn", 0) for record in records), "turn")
        batch.classes = _texts(records, "type")
        return batch

    def _keys(self, ids: I64, counts: I64) -> I64:
        return self._chain(ids, offsets_of(counts))


class TairEvents(_Whole):
    """A write takes effect at its FinishWriteCache, all its keys; without one, 100 ms after its start.

    An end whose start the file does not have is passed over: the log begins in the middle of it. Every
    look-up counts as one of a prefix, whatever its query type.
    """

    name, block_tokens, ordered = "tair-events", 0, False

    def __init__(self) -> None:
        self._writing: dict[str, tuple[float, list[int], str]] = {}

    def decode(self, records: Sequence[Record]) -> Batch:
        events = [event for record in records if (event := self._event(record))]
        return self._batch(events)

    def rest(self) -> Batch:
        left = [
            (start_s + _UNFINISHED_S, keys, source, WRITE, 0)
            for start_s, keys, source in self._writing.values()
        ]
        self._writing.clear()
        return self._batch(left)

    def _event(self, record: Record) -> tuple[float, list[int], str, int, Any] | None:
        """(time, keys, instance, op, mask) of what takes effect now."""
        kind, source = record["type"], record["source"]
        if type(source) is not str:
            raise TypeError("source must be a string")
        time_s = float(_ints([record["trigger_time_us"]])[0]) * 1e-6
        if kind == "GetCacheLocation":
            return time_s, _lists([record], "keys")[0], source, READ, record.get("block_mask", 0)
        if kind == "StartWriteCache":
            keys = _lists([record], "keys")[0]
            _flat([keys], "keys")
            self._writing[record["write_session_id"]] = (time_s, keys, source)
            return None
        if kind != "FinishWriteCache":
            raise ValueError(f"no event type {kind!r}")
        started = self._writing.pop(record["write_session_id"], None)
        return (time_s, *started[1:], WRITE, 0) if started else None

    def _batch(self, events: Sequence[tuple[float, list[int], str, int, Any]]) -> Batch:
        keys, counts = _flat([event[1] for event in events], "keys")
        none = np.zeros(len(events), np.int64)
        return Batch(
            keys=keys,
            counts=counts,
            times_s=_times((event[0] for event in events), 1.0),
            input_tokens=none,
            output_tokens=none,
            partial=np.zeros(len(events), np.bool_),
            ops=np.array([event[3] for event in events], np.uint8),
            turns=none,
            instances=[event[2] for event in events],
            held=_held([event[4] for event in events], counts),
        )


class Kvcm:
    name, ordered = "kvcm", True

    def __init__(self, header: Record) -> None:
        if header.get("version") != HEADER["version"]:
            raise ValueError(f"version {header.get('version')!r} of the format is not known")
        self.block_tokens = int(_counts([header["block_tokens"]], "block_tokens")[0])
        self.sample_level = int(_counts([header.get("sample_level", 0)], "sample_level")[0])
        if self.sample_level > LEVEL_MAX:
            raise ValueError(f"sample_level must be at most {LEVEL_MAX}, not {self.sample_level}")
        self.recording = header.get("recording") is True
        self.end: Record | None = None

    def decode(self, records: Sequence[Record]) -> Batch:
        if self.end is not None and records:
            raise ValueError("the recording ended before this line")
        if records and "end" in records[-1]:
            batch, self.end = self._decode(records[:-1]), dict(records[-1]["end"])
            return batch
        return self._decode(records)

    def rest(self) -> Batch:
        return self._decode([])

    def _decode(self, records: Sequence[Record]) -> Batch:
        keys, counts = _flat(_lists(records, "keys"), "keys")
        partial = [record.get("partial", False) for record in records]
        if not all(type(flag) is bool for flag in partial):
            raise TypeError("partial must be true or false")
        ops = [record.get("op", "request") for record in records]
        if wrong := [op for op in ops if op not in OPS]:
            raise ValueError(f"op must be one of {', '.join(OPS)}, not {wrong[0]!r}")
        return Batch(
            keys=keys,
            counts=counts,
            times_s=_times((record["time_us"] for record in records), 1e-6),
            input_tokens=_counts((record.get("input_tokens", 0) for record in records), "input_tokens"),
            output_tokens=_counts((record.get("output_tokens", 0) for record in records), "output_tokens"),
            partial=np.array(partial, np.bool_),
            ops=np.array([OPS[op] for op in ops], np.uint8),
            turns=_counts((record.get("turn", 0) for record in records), "turn"),
            instances=_texts(records, "instance"),
            classes=_texts(records, "class"),
            held=_held([record.get("held", 0) for record in records], counts),
        )
