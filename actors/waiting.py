"""Writes that wait for room, first come first served.

A write that waits asks for room (`Want`), is tried again when room may have appeared, and gets the last
refusal when its time is over. Those behind leave room for those before, and so do writes that come
meanwhile. One whose caller is gone (its future is cancelled) is forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from itertools import takewhile

from kvcm_ray.core.events import Want
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.requests import Reply, StartWrite
from kvcm_ray.errors import KeyLimitReached, KvcmError, Unavailable

WRITES_MAX = 1_024

Answer = Reply | KvcmError
Submit = Callable[[Sequence[tuple[StartWrite, Want]], int], Sequence[Answer | None]]


@dataclass(slots=True)
class Waiting:
    """A write that waits until `deadline_ms` at most."""

    request: StartWrite
    deadline_ms: int
    future: Future[Answer]
    want: Want
    refusal: KvcmError | None = None  #: the last one; None before the first trial

    def answer(self, answer: Answer) -> None:
        with contextlib.suppress(InvalidStateError):  # its caller is gone
            self.future.set_result(answer)


class WaitingWrites:
    """The queue of a group. One thread."""

    def __init__(self) -> None:
        self._writes: list[Waiting] = []
        self._tried = 0  #: the first so many have been tried

    def __len__(self) -> int:
        return len(self._writes)

    def add(self, request: StartWrite, deadline_ms: int, future: Future[Answer]) -> None:
        """Let a write wait behind all others. It is refused at once if too many wait already."""
        self._forget_gone()
        want = Want(request.instance_id, 0, len(request.keys))  # until it is tried
        write = Waiting(request, deadline_ms, future, want)
        if len(self._writes) >= WRITES_MAX:
            write.answer(Unavailable(f"{WRITES_MAX} writes of the group wait for room already"))
            return
        self._writes.append(write)

    def wants(self) -> tuple[Want, ...]:
        """What they wait for, in order."""
        return tuple(write.want for write in self._writes)

    def ahead_bytes(self) -> int:
        """Room that other writes must leave."""
        return sum(write.want.nbytes for write in self._writes)

    def waits_for_keys(self) -> bool:
        """One of them waits for the number of blocks to go down, not for bytes."""
        return any(isinstance(write.refusal, KeyLimitReached) for write in self._writes)

    def next_ms(self) -> int | None:
        """When the time of one of them is over."""
        return min((write.deadline_ms for write in self._writes), default=None)

    def retry(
        self,
        submit: Callable[[Sequence[tuple[StartWrite, Want]], int], Sequence[Answer | None]],
        *,
        anew: bool,
    ) -> None:
        """Try all of them, or, unless `anew`, those that were not tried yet.

        Args:
            submit: `GroupEngine.submit_waiting`, given what to try and the bytes that go before it.
        """
        self._forget_gone()
        kept = [] if anew else self._writes[: self._tried]
        writes = self._writes[len(kept) :]
        if writes:
            ahead = sum(write.want.nbytes for write in kept)
            answers = submit([(write.request, write.want) for write in writes], ahead)
            kept += [w for w, answer in zip(writes, answers, strict=True) if _stays(w, answer)]
        self._writes, self._tried = kept, len(kept)

    def expire(self, now_ms: int) -> bool:
        """Answer those whose time is over with their last refusal; True if there were any."""
        late = [write for write in self._writes if write.deadline_ms <= now_ms]
        if not late:
            return False
        self._keep(lambda write: write.deadline_ms > now_ms)
        for write in late:
            write.answer(write.refusal or Unavailable("there was no time to make room"))
        return True

    def answer_all(self, answer: KvcmError) -> None:
        """Nobody will try them again."""
        writes, self._writes, self._tried = self._writes, [], 0
        for write in writes:
            write.answer(answer)

    def _forget_gone(self) -> None:
        self._keep(lambda write: not write.future.cancelled())

    def _keep(self, good: Callable[[Waiting], bool]) -> None:
        """Those behind one that goes are to be tried again: it is no longer before them."""
        front = sum(1 for _ in takewhile(good, self._writes))
        self._tried = min(self._tried, front)
        self._writes = [write for write in self._writes if good(write)]


def _stays(write: Waiting, answer: Answer | None) -> bool:
    """Whether the write waits on, after this answer; tells its caller if not."""
    if answer is None:
        return True
    if isinstance(answer, KvcmError):
        want = want_of(write.request.instance_id, answer)
        if want is not None:
            write.want, write.refusal = want, answer
            return True
    write.answer(answer)
    return False
