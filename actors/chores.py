"""What a group has its reclaimers do: erasing trash and copying moves.

`hand_out` gives them what is due, `settle` commits what they reported since: everything in one commit.
Reports come from any thread and are only kept until then. All else here is the loop's thread.

A call that fails because its reclaimer died is not a failure of the storage: its trash is due again
after a pause, and its move is given to the reclaimer's next incarnation, once.
"""

from __future__ import annotations

import logging
import queue
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvcm_ray.actors.engine import GroupEngine, Moved
from kvcm_ray.actors.facts import Now
from kvcm_ray.core.events import Copied
from kvcm_ray.core.model import ReclaimerSettings
from kvcm_ray.core.records import SessionRecord

log = logging.getLogger(__name__)

TRASH_PER_CALL_MAX = 64
TRASH_PER_RECLAIMER_MAX = 128  #: records in hand
ERASURES_PER_RECLAIMER_MAX = 2  #: calls in flight; what is due meanwhile goes together in the next one
MOVES_PER_RECLAIMER_MAX = 4
MOVE_ATTEMPTS = 2
FAILED_PAUSE_MS = 100  #: before trying again what a commit failed for, on a full disk say

#: (ids that are erased, what went wrong with the others or "")
ErasureDone = Callable[[list[int], str], None]
#: (what became of each block, None if that is not known; then what went wrong or "")
MoveDone = Callable[[Copied | None, str], None]


class Pool(Protocol):
    """Reaches the reclaimers. `done` is called once, later, by any thread; also if one dies."""

    def erase(
        self, number: int, size: int, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        """Have reclaimer `number` of a pool of `size` erase trash records of an index."""

    def move(self, number: int, size: int, index_path: str, session_id: str, done: MoveDone) -> None:
        """Have it copy the blocks of a session."""


@dataclass(frozen=True, slots=True)
class _Erased:
    instance_id: str
    uid: str
    number: int
    asked: Sequence[int]
    erased: Sequence[int]
    problem: str


@dataclass(frozen=True, slots=True)
class _Copied:
    session: SessionRecord
    uid: str
    copied: Copied | None
    problem: str
    attempt: int


@dataclass(slots=True)
class _Flying:
    """Calls that are out: number of records, and sessions."""

    trash: int = 0
    moves: int = 0
    erasures: Counter[int] = field(default_factory=Counter)  #: calls, by number of the reclaimer


class Chores:
    """Chores of one group.

    Args:
        pool: reaches the reclaimers.
        wake: called by any thread when something was reported.
    """

    def __init__(self, engine: GroupEngine, pool: Pool, wake: Callable[[], None]) -> None:
        self._engine = engine
        self._pool = pool
        self._wake = wake
        self._settings = ReclaimerSettings()
        self._reports: queue.SimpleQueue[_Erased | _Copied] = queue.SimpleQueue()
        self._flying = _Flying()
        #: trash that is due and not sent yet, by (instance, uid)
        self._backlog: dict[tuple[str, str], list[int]] = {}
        self._after_ms = 0  #: nothing is handed out before this
        self.counters: Counter[str] = Counter()

    def configure(self, settings: ReclaimerSettings) -> None:
        """Calls to a pool of an earlier size fail by themselves."""
        self._settings = settings
        self._engine.set_paused(settings.paused)

    def next_ms(self) -> int | None:
        """When `hand_out` has something to do, as far as that is not told by `wake`."""
        times = []
        trash_ms = self._engine.state.next_trash_ms()
        if trash_ms is not None and self._trash_room() > 0 and not self._settings.paused:
            times.append(max(trash_ms, self._after_ms))
        if self._moves_room() > 0 and self._engine.state.next_move_due():
            times.append(self._after_ms)
        return min(times, default=None)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "reclaimers": self._settings.reclaimers,
            "trash_in_flight": self._flying.trash + sum(map(len, self._backlog.values())),
            "moves_in_flight": self._flying.moves,
        }

    # -------------------------------------------------------------------------------- hand out

    def hand_out(self) -> None:
        now = Now.read()
        if now.ms < self._after_ms or self._engine.fenced or self._settings.paused:
            return
        self._collect_trash(now)
        self._send_trash()
        if (room := self._moves_room()) > 0 and self._engine.state.next_move_due():
            for session in self._engine.due_moves(room):
                self._start_moving(session, 1)

    def _trash_room(self) -> int:
        held = self._flying.trash + sum(map(len, self._backlog.values()))
        return TRASH_PER_RECLAIMER_MAX * self._settings.reclaimers - held

    def _moves_room(self) -> int:
        return MOVES_PER_RECLAIMER_MAX * self._settings.reclaimers - self._flying.moves

    def _collect_trash(self, now: Now) -> None:
        if (room := self._trash_room()) > 0:
            for record in self._engine.due_trash(room, now):
                name = record.instance_id, self._engine.uid(record.instance_id)
                self._backlog.setdefault(name, []).append(record.trash_id)

    def _send_trash(self) -> None:
        size, backlog = self._settings.reclaimers, self._backlog
        self._backlog = {}
        for (instance_id, uid), ids in backlog.items():
            if self._engine.uid(instance_id) != uid:
                continue  # it was removed
            for number in range(size):
                own = [i for i in ids if i % size == number]
                while own and self._flying.erasures[number] < ERASURES_PER_RECLAIMER_MAX:
                    self._start_erasing(instance_id, number, own[:TRASH_PER_CALL_MAX])
                    del own[:TRASH_PER_CALL_MAX]
                if own:
                    self._backlog.setdefault((instance_id, uid), []).extend(own)

    def _start_erasing(self, instance_id: str, number: int, ids: list[int]) -> None:
        uid = self._engine.uid(instance_id)
        self._flying.trash += len(ids)
        self._flying.erasures[number] += 1

        def done(erased: list[int], problem: str) -> None:
            self._report(_Erased(instance_id, uid, number, ids, erased, problem))

        path = str(self._engine.index_path(instance_id))
        self._pool.erase(number, self._settings.reclaimers, path, ids, done)

    def _start_moving(self, session: SessionRecord, attempt: int) -> None:
        uid = self._engine.uid(session.instance_id)
        self._flying.moves += 1

        def done(copied: Copied | None, problem: str) -> None:
            self._report(_Copied(session, uid, copied, problem, attempt))

        size = self._settings.reclaimers
        number = zlib.crc32(session.session_id.encode()) % size
        path = str(self._engine.index_path(session.instance_id))
        self._pool.move(number, size, path, session.session_id, done)

    # ---------------------------------------------------------------------------------- settle

    def _report(self, report: _Erased | _Copied) -> None:
        self._reports.put(report)
        self._wake()

    def settle(self) -> bool:
        """Commit what was reported; True if that may have changed anything."""
        erased: dict[str, list[int]] = {}
        moved: list[Moved] = []
        while not self._reports.empty():
            report = self._reports.get()
            if isinstance(report, _Erased):
                self._take_erased(report, erased)
            else:
                self._take_copied(report, moved)
        if not erased and not moved:
            return False
        if self._engine.settle(erased, moved) is not None:
            self._after_ms = Now.read().ms + FAILED_PAUSE_MS  # all of it is due again at once
        self.counters["settlements"] += 1
        return True

    def _take_erased(self, report: _Erased, erased: dict[str, list[int]]) -> None:
        self._flying.trash -= len(report.asked)
        self._flying.erasures[report.number] -= 1
        if self._engine.uid(report.instance_id) != report.uid:
            return  # of an instance that was removed
        done = set(report.erased)
        failed = tuple(i for i in report.asked if i not in done)
        if report.problem:
            log.warning("%d trash records not erased: %s", len(failed), report.problem)
        if failed:
            self.counters["erase_failures"] += len(failed)
            self._engine.trash_failed(report.instance_id, failed)
        if done:
            self.counters["erased_records"] += len(done)
            erased.setdefault(report.instance_id, []).extend(report.erased)

    def _take_copied(self, report: _Copied, moved: list[Moved]) -> None:
        self._flying.moves -= 1
        session = report.session
        if self._engine.uid(session.instance_id) != report.uid:
            return
        if report.problem:
            log.warning("move %s: %s", session.session_id, report.problem)
            if report.attempt < MOVE_ATTEMPTS and Now.read().ms < session.deadline_ms:
                self._start_moving(session, report.attempt + 1)
                return
        self.counters["moves"] += 1
        moved.append(Moved(session.instance_id, session.session_id, report.copied))
