"""What a group's readers and writers do, handed to those who want to know, off the loop's thread.

The loop only appends (`note`). A thread of its own makes `Observed` batches of it, once a second or when
there is much, puts them in order (`InOrder`: look-ups are reported late) and gives them to the listeners.
When those are too slow for the traffic, requests are left out and counted; the loop never waits, and what
goes wrong here goes into the log.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvcm_ray.core.observed import Observed
from kvcm_ray.core.order import InOrder
from kvcm_ray.core.requests import Keys, Reply, Request, StartWrite, Touch, WriteStarted
from kvcm_ray.errors import KvcmError

log = logging.getLogger(__name__)

EVERY_S = 1.0
BATCH_KEYS = 1 << 16
PENDING_KEYS_MAX = 1 << 22
NOTE_KEYS = 16  #: what a request counts as besides its keys; about 500 bytes
LATE_MAX_S = 10.0  #: a reader's clock that is further behind ours than this is wrong


class Listener(Protocol):
    def feed(self, observed: Observed) -> None:
        """Called with one batch after the other, from one thread at a time."""
        ...


@dataclass(slots=True)
class _Note:
    instance_id: str
    time_s: float
    parts: tuple[Keys, ...]  #: of the prompt's keys
    write: bool
    partial: bool
    found: int
    held: int

    @property
    def keys(self) -> int:
        return sum(map(len, self.parts))


class Observer:
    """
    Args:
        listeners: who gets every batch.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._notes: deque[_Note] = deque()
        self._keys = 0  #: in notes that came, and their `NOTE_KEYS`; only the noting thread writes it
        self._taken = 0  #: of those, what was taken
        self.dropped = 0  #: requests that were left out
        self._some = threading.Event()  #: there is something to hand over
        self._much = threading.Event()  #: and it should not wait
        self._ended = threading.Event()
        self._order = InOrder()
        self._feeding = threading.Lock()
        self._thread: threading.Thread | None = None

    def note(self, requests: Sequence[Request], answers: Iterable[Reply | KvcmError | None]) -> None:
        """What was asked and answered just now; from the loop's thread. Raises nothing."""
        try:
            self._note(requests, answers)
        except Exception:  # for want of memory or threads, say: the loop goes on
            self.dropped += len(requests)
            log.exception("could not note what %d requests were", len(requests))

    def _note(self, requests: Sequence[Request], answers: Iterable[Reply | KvcmError | None]) -> None:
        now_s = time.time()
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, KvcmError):
                continue
            if isinstance(request, Touch):
                note = _look_up(request, now_s)
            elif isinstance(request, StartWrite) and isinstance(answer, WriteStarted):
                note = _write(request, answer, now_s)
            else:
                continue
            if note is not None:
                self._add(note)

    def flush(self, *, all_of_it: bool = False) -> None:
        """Hand over what was noted so far, and wait until the listeners have it; what is not older than
        `LATE_S` only if all is wanted, because look-ups of before may still be reported."""
        with self._feeding:
            now_s = math.inf if all_of_it else time.time()
            upto = self._keys  # else this would not end while more comes than listeners can take
            while self._notes and self._taken < upto:
                self._hand_over(self._order.feed(_batch(self._take()), now_s))
            self._hand_over(self._order.feed(None, now_s))

    def _hand_over(self, observed: Observed | None) -> None:
        if observed is None:
            return
        for listener in self._listeners:
            try:
                listener.feed(observed)
            except Exception:  # what one cannot take must not keep it from the others
                log.exception("%s could not take %d requests", listener, len(observed.counts))

    def stop(self) -> None:
        """End the thread; waits for it. What was noted is handed over. Raises nothing."""
        self._ended.set()
        self._some.set()
        self._much.set()
        if self._thread is not None:
            self._thread.join()
        self._try_flush(all_of_it=True)

    def _add(self, note: _Note) -> None:
        count = note.keys + NOTE_KEYS
        if self._keys - self._taken + count > PENDING_KEYS_MAX:
            self.dropped += 1
            return
        self._keys += count
        self._notes.append(note)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="observer", daemon=True)
            thread.start()
            self._thread = thread
        self._some.set()
        if self._keys - self._taken >= BATCH_KEYS:
            self._much.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._some.wait()
            self._much.wait(EVERY_S)
            self._some.clear()
            self._much.clear()
            self._try_flush()
            if self._order.holds:
                self._some.set()

    def _try_flush(self, *, all_of_it: bool = False) -> None:
        try:
            self.flush(all_of_it=all_of_it)
        except Exception:
            log.exception("could not hand over what was noted")

    def _take(self) -> list[_Note]:
        """About `BATCH_KEYS` of what was noted first."""
        notes: list[_Note] = []
        size = 0
        while self._notes and size < BATCH_KEYS:
            notes.append(self._notes.popleft())
            size += notes[-1].keys + NOTE_KEYS
        self._taken += size
        return notes


def _batch(notes: Sequence[_Note]) -> Observed:
    parts = [part for note in notes for part in note.parts]
    return Observed(
        instance_ids=[note.instance_id for note in notes],
        times_s=np.array([note.time_s for note in notes]),
        writes=np.array([note.write for note in notes], np.bool_),
        partial=np.array([note.partial for note in notes], np.bool_),
        found=np.array([note.found for note in notes], np.int64),
        counts=np.array([note.keys for note in notes], np.int64),
        keys=np.concatenate(parts) if parts else np.zeros(0, np.int64),
        held=np.array([note.held for note in notes], np.int64),
    )


def _look_up(touch: Touch, now_s: float) -> _Note | None:
    if touch.missed is None:
        return None
    held = touch.held if touch.held is not None else touch.keys[:0]
    parts = (held, touch.keys, touch.missed)
    found = len(held) + len(touch.keys)
    time_s = min(max(touch.time_s, now_s - LATE_MAX_S), now_s) if touch.time_s > 0 else now_s
    return _Note(touch.instance_id, time_s, parts, False, False, found, len(held))


def _write(request: StartWrite, answer: WriteStarted, now_s: float) -> _Note:
    there = int(np.count_nonzero(answer.exists))
    return _Note(request.instance_id, now_s, (request.keys,), True, request.partial_tail, there, 0)
