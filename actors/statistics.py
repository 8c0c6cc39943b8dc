"""What a group counts: requests by outcome, blocks and bytes that came and went, how long it took.

The loop tells it every batch (`answered`) and what was committed beside requests (`noted`); that is plain
integers, a few hundred nanoseconds a request. Everything else is put together when somebody asks. Counters
begin at 0 with the actor; those of an instance that was removed stay in the group's sums.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvcm_ray.actors.engine import GroupEngine
from kvcm_ray.actors.histogram import Histogram
from kvcm_ray.actors.history import COUNTED, HELD, History, Sample
from kvcm_ray.actors.journal import Departed, Journal
from kvcm_ray.actors.perform import Noted
from kvcm_ray.core.effects import DropBlocks, DropSession, MoveBlocks, Why
from kvcm_ray.core.placement import tiers
from kvcm_ray.core.quota import Account
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.requests import (
    FinishWrite,
    RemoveBlocks,
    Removed,
    Reply,
    Request,
    StartWrite,
    Touch,
    TrimInstance,
    WriteFinished,
    WriteStarted,
)
from kvcm_ray.errors import (
    Conflict,
    InvalidArgument,
    KvcmError,
    LimitReached,
    NotFound,
    QuotaExceeded,
    StorageFull,
)
from kvcm_ray.index import IndexStats

log = logging.getLogger(__name__)

LOOKUPS_PER_S = 20  #: that become events; the others are counted only


@dataclass(slots=True)
class Counts:
    """Of one instance, since the start of the actor."""

    lookups: int = 0
    lookup_blocks: int = 0
    hit_blocks: int = 0
    writes: int = 0  #: sessions with something to write
    refused_writes: int = 0
    finished_writes: int = 0
    aborted_writes: int = 0  #: finished with nothing written
    expired_sessions: int = 0
    written_blocks: int = 0
    failed_blocks: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    removed_blocks: int = 0
    demoted_blocks: int = 0
    promoted_blocks: int = 0
    drained_blocks: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    written_bytes: int = 0

    def add(self, other: Counts) -> None:
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _NAMES}


_NAMES = tuple(field.name for field in fields(Counts))


@dataclass(slots=True)
class _Known:
    """An instance and its counts."""

    counts: Counts
    block_size: int  #: tokens of a block
    block_bytes: int


class Statistics:
    """
    Args:
        engine: whose state is told; read on the thread that calls.
        fenced: batches of other incarnations of this group that were refused, ever.
    """

    def __init__(
        self, engine: GroupEngine, fenced: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._fenced = fenced
        self._clock = clock
        self.started_s = clock()
        self.incarnation = int(self.started_s * 1000)
        self.calls = Histogram()  #: from a call's arrival to its answer
        self.reports = Histogram()  #: from a look-up to its report
        self.journal = Journal()
        self.departed = Departed()
        # What most alerts are about is there from the start, so that its first increase is seen.
        self.evicted_blocks: Counter[Why] = Counter({Why.QUOTA: 0})
        self.evicted_bytes: Counter[Why] = Counter({Why.QUOTA: 0})
        self.refusals: Counter[str] = Counter({QuotaExceeded.code: 0})  #: by code
        self.faults: Counter[str] = Counter()  #: by code
        self._instances: dict[str, _Known] = {}
        self._gone = Counts()  #: of instances that are gone
        self._gone_below: Counter[tuple[str, str]] = Counter()  #: by tier and unit
        self._second, self._lookups_left = 0, 0
        self.history = History(self.started_s, self._sample)
        self.journal.add(self.started_s, "incarnation", reason=f"started as {self.incarnation}")

    def now_s(self) -> float:
        """Unix time."""
        return self._clock()

    # ----------------------------------------------------------------------- told by the loop

    def tick(self) -> None:
        """Time passed; before anything that happens now is counted."""
        self.history.advance(self._clock())

    def answered(self, requests: Sequence[Request], answers: Iterable[Reply | KvcmError | None]) -> None:
        """What was asked and answered just now. Raises nothing."""
        now_s = self._clock()
        try:
            for request, answer in zip(requests, answers, strict=True):
                if isinstance(answer, KvcmError):
                    self._failed(request, answer, now_s)
                elif (note := _NOTES.get(type(request))) is not None and answer is not None:
                    note(self, request, answer, now_s)
        except Exception:
            log.exception("could not count %d requests", len(requests))

    def refused_late(self, request: StartWrite, refusal: KvcmError) -> None:
        """A write that waited for room got none."""
        self._refuse(request, refusal, self._clock())

    def noted(self, effects: Sequence[Noted]) -> None:
        """What was committed: blocks that went or moved, sessions that expired. Raises nothing."""
        now_s = self._clock()
        try:
            for effect in effects:
                if isinstance(effect, DropBlocks):
                    self._dropped(effect, now_s)
                elif isinstance(effect, MoveBlocks):
                    self._moved(effect, now_s)
                else:
                    self._expired(effect, now_s)
        except Exception:
            log.exception("could not note %d effects", len(effects))

    # ---------------------------------------------------------------------------- requests

    def _touch(self, request: Touch, _: Reply, now_s: float) -> None:
        known = self._of(request.instance_id)
        counts, hits = known.counts, len(request.keys)
        asked = max(request.lookups, hits)
        counts.lookups += 1
        counts.lookup_blocks += asked
        counts.hit_blocks += hits
        counts.lookup_tokens += asked * known.block_size
        counts.hit_tokens += hits * known.block_size
        if request.time_s > 0:
            self.reports.add(max(now_s - request.time_s, 0.0))
        if int(now_s) != self._second:
            self._second, self._lookups_left = int(now_s), LOOKUPS_PER_S
        if self._lookups_left > 0:
            self._lookups_left -= 1
            hit = f"{hits} of {asked} blocks"
            self.journal.add(now_s, "lookup", request.instance_id, hits, hits * known.block_bytes, "", hit)

    def _started(self, request: StartWrite, answer: WriteStarted, now_s: float) -> None:
        if not (blocks := len(answer.locations)):
            return
        known = self._of(request.instance_id)
        known.counts.writes += 1
        self.journal.add(
            now_s, "write_started", request.instance_id, blocks, blocks * known.block_bytes,
            answer.storage, "", answer.session_id,
        )  # fmt: skip

    def _finished(self, request: FinishWrite, answer: WriteFinished, now_s: float) -> None:
        if not answer.committed and not answer.dropped:
            return
        known = self._of(request.instance_id)
        counts, blocks = known.counts, answer.committed
        counts.written_blocks += blocks
        counts.written_bytes += blocks * known.block_bytes
        counts.failed_blocks += answer.dropped
        reason = f"{answer.dropped} failed" if answer.dropped else ""
        if blocks:
            counts.finished_writes += 1
        else:
            counts.aborted_writes += 1
        kind = "write_finished" if blocks else "write_aborted"
        nbytes, session_id = blocks * known.block_bytes, request.session_id
        self.journal.add(
            now_s, kind, request.instance_id, blocks or answer.dropped, nbytes, "", reason, session_id
        )

    def _removed(self, request: RemoveBlocks | TrimInstance, answer: Removed, now_s: float) -> None:
        known = self._of(request.instance_id)
        known.counts.removed_blocks += answer.blocks
        kind = "trimmed" if isinstance(request, TrimInstance) else "removed"
        nbytes = answer.blocks * known.block_bytes
        self.journal.add(now_s, kind, request.instance_id, answer.blocks, nbytes, "", "by request")

    def _failed(self, request: Request, error: KvcmError, now_s: float) -> None:
        if isinstance(request, StartWrite) and isinstance(error, LimitReached | StorageFull):
            if want_of(request.instance_id, error) is None:  # else it waits, or comes again to do so
                self._refuse(request, error, now_s)
        elif not isinstance(error, InvalidArgument | NotFound | Conflict | LimitReached):
            self.faults[error.code] += 1
            self.journal.add(now_s, "fault", request.instance_id, reason=f"{error.code}: {error.message}")

    def _refuse(self, request: StartWrite, error: KvcmError, now_s: float) -> None:
        if request.instance_id in self._engine.instances:
            self._of(request.instance_id).counts.refused_writes += 1
        self.refusals[error.code] += 1
        nbytes = int(error.details.get("asked_bytes", 0))
        reason = f"{error.code}: {error.message}"
        self.journal.add(now_s, "refused", request.instance_id, len(request.keys), nbytes, "", reason)

    # -------------------------------------------------------------------------------- effects

    def _dropped(self, effect: DropBlocks, now_s: float) -> None:
        name, blocks = effect.instance_id, len(effect.keys)
        self.departed.add(name, effect.keys, effect.nbytes, effect.why, effect.needed_bytes, now_s)
        if effect.why is Why.REMOVED:
            return
        counts = self._of(name).counts
        counts.evicted_blocks += blocks
        counts.evicted_bytes += effect.nbytes
        self.evicted_blocks[effect.why] += blocks
        self.evicted_bytes[effect.why] += effect.nbytes
        self.journal.add(now_s, "evicted", name, blocks, effect.nbytes, "", str(effect.why))

    def _moved(self, effect: MoveBlocks, now_s: float) -> None:
        counts, blocks, why = self._of(effect.instance_id).counts, len(effect.keys), str(effect.moved)
        setattr(counts, f"{why}_blocks", getattr(counts, f"{why}_blocks") + blocks)
        kind = "promoted" if why == "promoted" else "demoted"
        self.journal.add(now_s, kind, effect.instance_id, blocks, effect.nbytes, effect.storage, why)

    def _expired(self, effect: DropSession, now_s: float) -> None:
        known = self._of(effect.instance_id)
        known.counts.expired_sessions += 1
        nbytes = effect.blocks * known.block_bytes
        self.journal.add(
            now_s, "session_expired", effect.instance_id, effect.blocks, nbytes, "", "nobody finished it",
            effect.session_id,
        )  # fmt: skip

    def _of(self, instance_id: str) -> _Known:
        known = self._instances.get(instance_id)
        if known is None:
            info = self._engine.instances[instance_id]
            known = self._instances[instance_id] = _Known(Counts(), info.block_size, info.block_bytes)
        return known

    # ------------------------------------------------------------------------------- answers

    def events(self, after_id: int, limit: int) -> dict[str, Any]:
        """See `GroupService.events`."""
        return {**self.journal.after(after_id, limit), "incarnation": self.incarnation}

    def report(self, *, instances: bool = True) -> dict[str, Any]:
        """Plain JSON values. Without `instances` only the sums, and the last commit of each index."""
        self._forget_removed()
        state, total = self._engine.state, self._total()
        usage, index = state.usage(), self._engine.index_stats()
        return {
            "group": self._engine.group.name,
            "incarnation": self.incarnation,
            "started_s": self.started_s,
            "now_s": self._clock(),
            "gauges": self._gauges(usage, index),
            "counters": {
                **total.to_json(),
                "evicted_blocks_by_reason": {str(why): n for why, n in sorted(self.evicted_blocks.items())},
                "evicted_bytes_by_reason": {str(why): n for why, n in sorted(self.evicted_bytes.items())},
                "refused_writes_by_code": dict(sorted(self.refusals.items())),
                "faults_by_code": dict(sorted(self.faults.items())),
                "failed_moves": state.ledger.counters["failed_moves"],
                "corrupt_reads": self.evicted_blocks[Why.UNREADABLE],
                "fenced_writes": self._fenced(),
                "commits": sum(self._engine.commits.counts),
            },
            "histograms": {
                "call_duration_seconds": self.calls.to_json(),
                "commit_duration_seconds": self._engine.commits.to_json(),
                "report_delay_seconds": self.reports.to_json(),
            },
            "tiers": self._tiers(usage),
            "commit_seq": {name: stats.commit_seq for name, stats in index.items()},
            "instances": self._by_instance(usage, index) if instances else {},
        }

    def _gauges(self, usage: dict[str, Any], index: dict[str, IndexStats]) -> dict[str, Any]:
        names = ("used_bytes", "reserved_bytes", "pending_delete_bytes", "quota_bytes", "blocks", "sessions",
                 "writing_blocks", "trash_records", "pins")  # fmt: skip
        return {
            **{name: usage[name] for name in names},
            "writing_sessions": usage["sessions"] - usage["reclaim"]["moves_in_flight"],
            "moves_in_flight": usage["reclaim"]["moves_in_flight"],
            "promotions_waiting": usage["reclaim"]["promotions_waiting"],
            "paused": int(usage["reclaim"]["paused"]),
            "instances": len(usage["instances"]),
            "broken_instances": len(self._engine.broken),
            "epoch": max((stats.epoch for stats in index.values()), default=0),
            "map_used_ratio": max((stats.map_used_ratio for stats in index.values()), default=0.0),
            "index_bytes": sum(stats.bytes_on_disk for stats in index.values()),
        }

    def _tiers(self, usage: dict[str, Any]) -> dict[str, Any]:
        """By storage type, the fastest first; hits of the first are those that no other had."""
        ledger = self._engine.state.ledger
        order = [kind.name for kind in tiers(ledger.group, ledger.storages)]
        below = self._below()
        rows: dict[str, Any] = {}
        for kind in [*order, *sorted(usage["by_type"].keys() - set(order))]:
            row = usage["by_type"].get(kind) or {"quota_bytes": None, **_NOTHING}
            rows[kind] = {**row, "hit_blocks": 0, "hit_tokens": 0}
        total = self._total()
        for unit in ("blocks", "tokens"):
            for kind in rows:
                rows[kind][f"hit_{unit}"] = below[kind, unit]
            if order:
                slow = sum(below[kind, unit] for kind in rows if kind != order[0])
                rows[order[0]][f"hit_{unit}"] = getattr(total, f"hit_{unit}") - slow
        return rows

    def _below(self) -> Counter[tuple[str, str]]:
        """Hits by tier and unit, of all tiers but the first."""
        found: Counter[tuple[str, str]] = Counter()
        for (name, kind), blocks in self._engine.state.ledger.hits_below.items():
            size = self._instances[name].block_size if name in self._instances else 0
            found[kind.name, "blocks"] += blocks
            found[kind.name, "tokens"] += blocks * size
        return found + self._gone_below

    def _by_instance(self, usage: dict[str, Any], index: dict[str, IndexStats]) -> dict[str, Any]:
        nothing = Counts().to_json()
        rows = {}
        for name, row in usage["instances"].items():
            known, stats = self._instances.get(name), index.get(name)
            info = self._engine.instances[name]
            rows[name] = {
                **row,
                **(known.counts.to_json() if known else nothing),
                "block_size": info.block_size,
                "block_bytes": info.block_bytes,
                "used_bytes": self._engine.state.ledger.instances[name].serving_bytes,
                "commit_seq": stats.commit_seq if stats else 0,
                "epoch": stats.epoch if stats else 0,
            }
        return rows

    def _total(self) -> Counts:
        total = Counts()
        total.add(self._gone)
        for known in self._instances.values():
            total.add(known.counts)
        return total

    def _forget_removed(self) -> None:
        """Keep only the sums of instances that are gone."""
        hits = self._engine.state.ledger.hits_below
        for name in self._instances.keys() - self._engine.instances.keys():
            known = self._instances.pop(name)
            self._gone.add(known.counts)
            for owner, kind in [key for key in hits if key[0] == name]:
                blocks = hits.pop((owner, kind))
                self._gone_below[kind.name, "blocks"] += blocks
                self._gone_below[kind.name, "tokens"] += blocks * known.block_size

    def _sample(self) -> Sample:
        total, ledger = self._total(), self._engine.state.ledger
        account: Account = ledger.quota.total()
        held = {
            "used_bytes": account.used,
            "reserved_bytes": account.reserved,
            "pending_delete_bytes": account.pending,
            "quota_bytes": ledger.quota.capacity,
            "blocks": len(ledger.table),
            "sessions": len(ledger.sessions),
        }
        counted = [getattr(total, name) for name in COUNTED]
        return Sample(counted, [held[name] for name in HELD], self.calls.counts)


_NOTHING = {"used_bytes": 0, "reserved_bytes": 0, "pending_delete_bytes": 0}
_NOTES: dict[type, Callable[[Statistics, Any, Any, float], None]] = {
    Touch: Statistics._touch,
    StartWrite: Statistics._started,
    FinishWrite: Statistics._finished,
    RemoveBlocks: Statistics._removed,
    TrimInstance: Statistics._removed,
}
