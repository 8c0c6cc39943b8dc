"""Writes what a group is asked for into a trace file, while it is told to.

    <directory>/<group>-<utc time>.jsonl.gz        in our own format, see `kvcm_ray.traces.formats`

Look-ups and writes are separate records: keys only, no prompts. The file is a valid trace at any time, also
if the process is killed: a gzip member is added about once a second. It says at its end what it holds, how
many requests are missing because the disk was too slow for the traffic, and why it ends.

`feed` only queues; a thread of the recording does the rest. The queue, the file and, if asked, the time are
bounded. With a sample rate only so many of the blocks behind the first one of each prompt are written; which
ones is a property of the block (`kvcm_ray.core.levels`), so that reuse stays to be seen.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.core.levels import LEVEL_MAX, sampled
from kvcm_ray.core.model import safe_name
from kvcm_ray.core.observed import Observed
from kvcm_ray.core.order import selected
from kvcm_ray.core.ragged import offsets_of, places
from kvcm_ray.errors import InvalidArgument, RecordingNotFound, RecordingUnderWay, StorageIOError
from kvcm_ray.traces.batch import Batch
from kvcm_ray.traces.formats import READ, WRITE
from kvcm_ray.traces.keys import Flags
from kvcm_ray.traces.writing import TraceWriter, end_line, end_of, header, lines_of

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30  #: of a file, if nothing else is asked
MIN_BYTES = 1 << 16
END_BYTES = 1 << 10  #: kept free for the last line
FLUSH_S = 1.0
WAIT_S = 3600.0  #: the thread looks around at least so often
FLUSH_BYTES = 1 << 18  #: of text
PART_KEYS = 1 << 11  #: are turned into text at a time
QUEUE_KEYS_MAX = 1 << 21


@dataclass(frozen=True, slots=True)
class Options:
    """What to record."""

    instance_id: str = ""  #: only of this instance; "": of all
    seconds: float = 0.0  #: 0: until it is stopped
    max_bytes: int = MAX_BYTES
    sample_rate: float = 1.0  #: of blocks; the next power of two at or below is taken
    block_tokens: int = 0  #: tokens of a block, if all instances that are recorded agree; else 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """Raises `InvalidArgument` for an unknown name or a value that is out of range."""
        names = [field.name for field in fields(cls)]
        if unknown := options.keys() - set(names):
            raise InvalidArgument(f"no option {min(unknown)!r} of a recording; there are {', '.join(names)}")
        made = cls(**options)
        if not (math.isfinite(made.seconds) and made.seconds >= 0):
            raise InvalidArgument(f"seconds must not be negative, got {made.seconds}; 0 is without end")
        if made.max_bytes < MIN_BYTES:
            raise InvalidArgument(f"max_bytes must be at least {MIN_BYTES}, got {made.max_bytes}")
        if not 2.0**-LEVEL_MAX <= made.sample_rate <= 1:
            raise InvalidArgument(f"sample_rate must be above 0 and at most 1, got {made.sample_rate}")
        return made

    @property
    def level(self) -> int:
        return math.ceil(-math.log2(self.sample_rate))


@dataclass(slots=True)
class Tally:
    """What some requests were; blocks as they were asked for, not as they were sampled."""

    requests: int = 0
    look_ups: int = 0
    accessed_blocks: int = 0  #: by look-ups
    hit_blocks: int = 0  #: that they found
    writes: int = 0

    def add(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Recorder:
    """The recordings of a group, at most one at a time; a listener of an `Observer`.

    Args:
        directory: of the files; made when it is needed.
        group: name of the group.
        lost: how many requests got lost before they came here, so far.
    """

    def __init__(self, directory: Path, group: str, lost: Callable[[], int] = lambda: 0) -> None:
        self._directory = directory
        self._group = group
        self._lost = lost
        self._lock = threading.Lock()
        self._recording: _Recording | None = None

    def start(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a recording, described by `Options`; returns its report.

        Raises:
            RecordingUnderWay: there is one.
            InvalidArgument: see `Options.of`.
            StorageIOError: the file cannot be written.
        """
        made = Options.of(options)
        with self._lock:
            if self._recording is not None and not self._recording.ended:
                raise RecordingUnderWay(
                    f"group {self._group!r} is recorded already, into {self._recording.file}; "
                    "`kvcm trace stop` ends that"
                )
            self._recording = _Recording(self._new_file(), self._group, made, self._lost)
            return self._recording.report()

    def stop(self) -> dict[str, Any]:
        """End the recording; returns its report. One that had ended by itself is told of once.

        Raises:
            RecordingNotFound: there is none (any more: one ends with the group's process).
        """
        with self._lock:
            recording, self._recording = self._recording, None
        if recording is None:
            raise RecordingNotFound(
                f"group {self._group!r} is not recorded; if it was, its process has ended since, and "
                "`kvcm trace list` shows the file, whole up to then. `kvcm trace record` begins another"
            )
        recording.stop("stopped")
        return recording.report()

    def list(self) -> list[dict[str, Any]]:
        """The reports of all recordings of the group that are still there, the oldest first."""
        name = re.compile(re.escape(safe_name(self._group)) + r"-\d{8}T\d{6}Z(_\d+)?\.jsonl\.gz")
        with self._lock:
            current = self._recording
        try:
            found = sorted(file for file in self._directory.iterdir() if name.fullmatch(file.name))
        except OSError:
            found = []
        return [
            current.report() if current is not None and file == current.file else self._earlier(file)
            for file in found
        ]

    def feed(self, observed: Observed) -> None:
        recording = self._recording
        if recording is not None:
            recording.put(observed)

    def close(self) -> None:
        """End the recording, if there is one, because the group's process ends."""
        recording = self._recording
        if recording is not None:
            recording.stop("the group's process ended")

    def _new_file(self) -> Path:
        stem = f"{safe_name(self._group)}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        file, count = self._directory / f"{stem}.jsonl.gz", 1
        while os.path.exists(file):  # `Path.exists` raises where it may not look
            count += 1
            file = self._directory / f"{stem}_{count}.jsonl.gz"
        return file

    def _earlier(self, file: Path) -> dict[str, Any]:
        try:
            known = {"file": str(file), "group": self._group, "bytes": file.stat().st_size}
            return known | (end_of(file) or {"state": "cut off"})
        except OSError as error:
            return {"file": str(file), "group": self._group, "state": f"cannot be read: {error}"}


class _Recording:
    """One file and the thread that writes it."""

    def __init__(self, file: Path, group: str, options: Options, lost: Callable[[], int]) -> None:
        self.file = file
        self._group = group
        self._options = options
        self._lost, self._lost_before = lost, lost()
        self._lost_after: int | None = None
        self._queue: queue.SimpleQueue[Observed | None] = queue.SimpleQueue()
        self._put_keys = 0  #: only the feeding thread writes it
        self._taken_keys = 0  #: only ours
        self._dropped = 0  #: requests that found the queue full; only the feeding thread writes it
        self._written, self._pending, self._refused = Tally(), Tally(), Tally()
        self._begin_s, self._begin_time_s = time.monotonic(), time.time()
        self._from_s = self._begin_time_s  #: of what is wanted, by the clock of the requests
        self._end_s: float | None = None
        self._state = ""  #: why it ended
        self._asked = "stopped"  #: why, if it is ended by `stop`
        first = header(
            options.block_tokens, recording=True, group=group,
            **({"sample_level": options.level} if options.level else {}),
        )  # fmt: skip
        try:
            self._writer = _begun(file, first)
        except OSError as error:
            raise StorageIOError(f"cannot write the recording {file}: {error}") from error
        self._thread = threading.Thread(target=self._run, name=f"recording-{group}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return self._end_s is not None

    def put(self, observed: Observed) -> None:
        """From one thread at a time; never waits."""
        if self.ended:
            return
        if self._put_keys - self._taken_keys + len(observed.keys) > QUEUE_KEYS_MAX:
            self._dropped += len(observed.counts)
            return
        self._put_keys += len(observed.keys)
        self._queue.put(observed)

    def stop(self, why: str) -> None:
        """Waits until all that was put is in the file."""
        self._asked = why
        self._queue.put(None)
        self._thread.join()

    def report(self) -> dict[str, Any]:
        report = {"file": str(self.file), "group": self._group, "bytes": self._writer.bytes}
        return report | self._summary()

    def _summary(self) -> dict[str, Any]:
        end_s = time.monotonic() if self._end_s is None else self._end_s
        lost = (self._lost() if self._lost_after is None else self._lost_after) - self._lost_before
        return {
            "state": self._state or "recording",
            "began_s": round(self._begin_time_s, 3),
            "seconds": round(end_s - self._begin_s, 3),
            **asdict(self._written),
            "missing_requests": self._dropped + self._refused.requests + lost,
            "instance_id": self._options.instance_id,
            "sample_level": self._options.level,
        }

    # ------------------------------------------------------------------------------ our thread

    def _run(self) -> None:
        try:
            self._state = self._record()
            self._end_s = time.monotonic()
            self._lost_after = self._lost()
            self._writer.add(end_line(self._summary()))
            self._writer.flush()
        except Exception as error:
            log.exception("recording %s", self.file)
            self._refused.add(self._pending)
            self._state = f"failed: {error}"
        finally:
            self._end_s = self._end_s or time.monotonic()
            self._writer.close()

    def _record(self) -> str:
        """Returns why it ends."""
        due_s = time.monotonic() + FLUSH_S
        deadline_s = self._begin_s + self._options.seconds if self._options.seconds else math.inf
        while (now_s := time.monotonic()) < deadline_s:
            if now_s >= due_s:
                if not self._flush():
                    return "max_bytes"
                due_s = now_s + FLUSH_S
            wait_s = min(deadline_s, due_s if self._writer.pending else math.inf) - now_s
            try:
                observed = self._queue.get(timeout=min(wait_s, WAIT_S))
            except queue.Empty:
                continue
            if observed is None:
                return self._asked if self._flush() else "max_bytes"
            self._taken_keys += len(observed.keys)
            if not self._add(self._wanted(observed)):
                return "max_bytes"
        return "seconds" if self._flush() else "max_bytes"

    def _wanted(self, observed: Observed) -> Observed:
        """Since the recording began, and of the instance that was asked for."""
        rows = observed.times_s >= self._from_s
        if rows.any():
            self._from_s = -math.inf  # requests are in order; the clock may be set back later
        if self._options.instance_id:
            rows &= np.array([each == self._options.instance_id for each in observed.instance_ids], np.bool_)
        return selected(observed, np.flatnonzero(rows))

    def _add(self, observed: Observed) -> bool:
        """False if they do not all fit into the file any more."""
        text_max = min(FLUSH_BYTES, self._options.max_bytes // 8)
        rest = parts(observed)
        for part in rest:
            self._pending.add(tally(part))
            self._writer.add(lines_of(batch_of(part, self._options.level)))
            if self._writer.pending >= text_max and not self._flush():
                self._refused.requests += sum(len(later.counts) for later in rest)
                return False
        return True

    def _flush(self) -> bool:
        """False if it does not fit into the file any more."""
        done = self._writer.flush(self._options.max_bytes - END_BYTES)
        (self._written if done else self._refused).add(self._pending)
        self._pending = Tally()
        return done


def _begun(file: Path, first: bytes) -> TraceWriter:
    """A new file with its header, or none. Raises `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = TraceWriter(file, first, new=True)
    try:
        writer.flush()
    except OSError:
        writer.close()
        file.unlink()
        raise
    return writer


def parts(observed: Observed) -> Iterator[Observed]:
    """Some requests after the other, of about `PART_KEYS` keys together."""
    ends = np.cumsum(observed.counts)
    first = before = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, before + PART_KEYS, side="right")))
        yield selected(observed, np.arange(first, last))
        first, before = last, int(ends[last - 1])


def tally(observed: Observed) -> Tally:
    reads = ~observed.writes
    return Tally(
        requests=len(observed.counts),
        look_ups=int(reads.sum()),
        accessed_blocks=int(observed.counts[reads].sum()),
        hit_blocks=int(observed.found[reads].sum()),
        writes=int(observed.writes.sum()),
    )


def batch_of(observed: Observed, level: int = 0) -> Batch:
    """As rows of a trace; only blocks of this level of sampling or more."""
    offsets = offsets_of(observed.counts)
    keys, counts = observed.keys, observed.counts
    held: Flags = np.zeros(0, np.bool_)
    if observed.held.any():
        held = places(offsets) < np.repeat(observed.held, counts)
    if level:
        kept = np.zeros(len(keys), np.bool_)
        kept[sampled(keys, offsets, level)[0]] = True
        kept[offsets[:-1][counts > 0]] = True
        counts = np.diff(np.append(0, np.cumsum(kept))[offsets])
        keys, held = keys[kept], held[kept] if len(held) else held
    none = np.zeros(len(counts), np.int64)
    return Batch(
        keys=keys,
        counts=counts,
        times_s=observed.times_s,
        input_tokens=none,
        output_tokens=none,
        partial=observed.partial,
        ops=np.where(observed.writes, WRITE, READ).astype(np.uint8),
        turns=none,
        instances=list(observed.instance_ids),
        held=held,
    )
