"""Does the index say what the storages hold? Walks index -> bytes and bytes -> index.

Works beside a running manager: things that look wrong are looked at again after a moment, and only
what is still wrong (the same block, the same slot) is reported. Changes nothing.

* dangling: a SERVING block whose bytes are lost: file missing or short, another block's header, a
  damaged header, or the mark of having been erased. A block's copy in a slower tier counts like the
  block itself, and is also told apart.
* unverified: a SERVING block in a slot that no header was ever written to: plain protocol clients
  write none. Whether they wrote the bytes they acknowledged, nobody but them can say.
* orphan bytes: a header or payload in a slot that no run, copy, session or trash record names (what a
  demotion is writing belongs to a session), and segment directories that no index knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import InstanceInfo, Segment
from kvcm_ray.core.requests import BlockLocations, Flags, Keys
from kvcm_ray.errors import KvcmError, NotFound, SegmentMissing, StorageError, Unsupported
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import StorageAdapter, header, open_storage

SETTLE_S = 0.5
SNAPSHOT_TRIES = 5
NOTES_MAX = 100
DEEP_BYTES = 8 << 20  #: payload read at a time


@dataclass(slots=True)
class FsckReport:
    """What `check` found. `ok` is False for anything but unverified blocks and notes."""

    orphan_bytes: int = 0
    dangling_locations: int = 0
    dangling_copies: int = 0  #: those of them that are copies; their blocks can be read
    corrupt_records: int = 0
    counters_ok: bool = True
    unverified_locations: int = 0
    instances: int = 0
    blocks: int = 0  #: SERVING
    copies: int = 0  #: second locations of them
    notes: list[str] = field(default_factory=list)  #: at most `NOTES_MAX` sentences

    @property
    def ok(self) -> bool:
        found = self.orphan_bytes or self.dangling_locations or self.corrupt_records
        return not found and self.counters_ok

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self) | {"ok": self.ok}

    def note(self, text: str) -> None:
        if len(self.notes) < NOTES_MAX and text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class SuspectBlock:
    """A SERVING block whose bytes are not what the index says (or cannot be proved)."""

    key: int
    segment_id: int
    slot: int
    generation: int
    copy: bool = False  #: it is the block's second location


@dataclass(frozen=True, slots=True)
class SuspectSlot:
    """Bytes that nothing refers to."""

    segment_id: int
    spec: str
    slot: int
    generation: int  #: as its header says; 0 without one


@dataclass(slots=True)
class Findings:
    """One look at one instance."""

    blocks: int = 0
    copies: int = 0
    dangling: set[SuspectBlock] = field(default_factory=set)
    unverified: set[SuspectBlock] = field(default_factory=set)
    orphans: dict[SuspectSlot, int] = field(default_factory=dict)  #: bytes of each
    corrupt_records: int = 0
    counters: list[str] = field(default_factory=list)  #: contradictions, as sentences
    segments: set[tuple[str, str]] = field(default_factory=set)  #: (storage, path) that it owns
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.dangling or self.orphans or self.corrupt_records or self.counters)

    def still(self, later: Findings) -> Findings:
        """What was wrong now and is wrong later too; the rest as seen later."""
        return Findings(
            later.blocks,
            later.copies,
            self.dangling & later.dangling,
            later.unverified,
            {slot: size for slot, size in later.orphans.items() if slot in self.orphans},
            min(self.corrupt_records, later.corrupt_records),
            later.counters if self.counters else [],
            self.segments | later.segments,
            later.notes,
        )


@dataclass(slots=True)
class _Snapshot:
    """All that an index says about places."""

    segments: dict[int, Segment]
    keys: Keys  #: of all blocks, then of all copies
    serving: BlockLocations  #: aligned with `keys`
    blocks: int  #: how many of these are blocks
    others: list[BlockLocations]  #: of sessions and trash
    settled: bool  #: all from one commit


# ---------------------------------------------------------------------------------- the whole


def check(
    data_dir: str | os.PathLike[str],
    *,
    settle_s: float = SETTLE_S,
    deep: bool = False,
    done: Callable[[FsckReport], None] = lambda _: None,
) -> FsckReport:
    """Check everything of a data directory, beside its manager or without one.

    Args:
        deep: also read every payload and compare its checksum.
        done: called after each instance with the report so far.

    Raises:
        Unavailable: no manager was ever started there.
    """
    from kvcm_ray.actors.view import RegistryView

    view = RegistryView(data_dir)
    report = FsckReport()
    adapters: dict[str, StorageAdapter] = {}
    try:
        known: set[tuple[str, str]] = set()
        unreadable: set[str] = set()  #: uids of instances whose index cannot be read
        _open_adapters(view.storages(), adapters, report)
        for info in list(view.instances().values()):
            path = view.index_path(info)
            findings = _check_twice(path, adapters, info, settle_s, deep, report)
            if findings is None:
                unreadable.add(info.uid)
                continue
            _add(report, info, findings)
            done(report)
            known |= findings.segments
        _check_strangers(view, adapters, known, unreadable, settle_s, report)
    finally:
        for adapter in adapters.values():
            adapter.close()
        view.close()
    return report


def _open_adapters(
    configs: Mapping[str, Any], adapters: dict[str, StorageAdapter], report: FsckReport
) -> None:
    for name, config in configs.items():
        try:
            adapters[name] = open_storage(config)
        except (Unsupported, KvcmError) as error:
            report.note(f"storage {name} is not checked: {error.message}")


def _check_twice(
    path: Path,
    adapters: Mapping[str, StorageAdapter],
    info: InstanceInfo,
    settle_s: float,
    deep: bool,
    report: FsckReport,
) -> Findings | None:
    """Findings of an instance, the doubtful ones seen twice; None if its index cannot be read."""
    try:
        reader = IndexReader(path)
    except NotFound:
        report.note(f"instance {info.instance_id} has no index yet")
        return Findings()
    except KvcmError as error:
        report.corrupt_records += 1
        report.note(f"instance {info.instance_id}: {error.message}")
        return None
    try:
        first = check_instance(reader, adapters, info, deep=deep)
        if first.clean:
            return first
        time.sleep(settle_s)
        reader.refresh()
        return first.still(check_instance(reader, adapters, info, deep=deep))
    except KvcmError as error:
        report.corrupt_records += 1
        report.note(f"instance {info.instance_id}: {error.message}")
        return None
    finally:
        reader.close()


def _add(report: FsckReport, info: InstanceInfo, findings: Findings) -> None:
    report.instances += 1
    report.blocks += findings.blocks
    report.copies += findings.copies
    report.dangling_locations += len(findings.dangling)
    report.dangling_copies += sum(block.copy for block in findings.dangling)
    report.unverified_locations += len(findings.unverified)
    report.orphan_bytes += sum(findings.orphans.values())
    report.corrupt_records += findings.corrupt_records
    report.counters_ok &= not findings.counters
    lines = [f"dangling: {block}" for block in sorted(findings.dangling, key=str)[:10]]
    lines += [f"orphan: {slot}" for slot in sorted(findings.orphans, key=str)[:10]]
    for text in [*findings.notes, *findings.counters, *lines]:
        report.note(f"instance {info.instance_id}: {text}")


def _check_strangers(
    view: Any,
    adapters: Mapping[str, StorageAdapter],
    known: set[tuple[str, str]],
    unreadable: set[str],
    settle_s: float,
    report: FsckReport,
) -> None:
    """Segment directories that no index knows, seen twice."""

    def look() -> dict[tuple[str, str], tuple[int, str]]:
        found = {}
        for name, adapter in adapters.items():
            for segment in adapter.list_segments():
                owner = segment.owner
                if (name, segment.path) not in known and not (owner and owner.uid in unreadable):
                    whose = owner.instance_id if owner else "an unknown instance"
                    found[name, segment.path] = (segment.stored_bytes, whose)
        return found

    if not (strangers := look()):
        return
    time.sleep(settle_s)
    for info in list(view.instances().values()):  # segments made meanwhile
        try:
            reader = IndexReader(view.index_path(info))
        except KvcmError:
            continue
        known |= {(s.storage, s.path) for s in reader.segments().values()}
        reader.close()
    for (name, path), (size, whose) in look().items():
        if (name, path) in strangers:
            report.orphan_bytes += size
            report.note(f"storage {name}: no index knows {path} of {whose} ({size} bytes)")


# ------------------------------------------------------------------------------- one instance


def check_instance(
    reader: IndexReader,
    adapters: Mapping[str, StorageAdapter],
    info: InstanceInfo,
    *,
    deep: bool = False,
) -> Findings:
    """One look at one instance. Beside a running manager only what two looks agree on is certain.

    Raises:
        KvcmError: the index cannot be read at all.
    """
    snapshot = _take(reader)
    findings = Findings(snapshot.blocks, len(snapshot.keys) - snapshot.blocks)
    findings.segments = {(s.storage, s.path) for s in snapshot.segments.values()}
    _check_counters(reader, snapshot, findings)
    for segment_id in np.unique(snapshot.serving.segment).tolist():
        if segment_id not in snapshot.segments:
            of = snapshot.serving.segment == segment_id
            findings.notes.append(f"segment {segment_id} is not in the index")
            _suspect(findings.dangling, snapshot, np.flatnonzero(of))
    for segment in snapshot.segments.values():
        adapter = adapters.get(segment.storage)
        of = np.flatnonzero(snapshot.serving.segment == segment.segment_id)
        if adapter is None:
            findings.notes.append(f"storage {segment.storage} is not registered")
            _suspect(findings.dangling, snapshot, of)
            continue
        try:
            _check_segment(adapter, segment, snapshot, of, findings, deep)
        except StorageError as error:
            findings.notes.append(error.message)
            _suspect(findings.dangling, snapshot, of)
    return findings


def _take(reader: IndexReader) -> _Snapshot:
    """All places from one commit, or from nearly one if commits come too fast."""
    settled = False
    for _ in range(SNAPSHOT_TRIES):
        seq = reader.commit_seq()
        runs = list(reader.runs())
        copy_keys, copies = reader.all_copies()
        others = [session.locations for session in reader.sessions()]
        others += [trash.locations for trash in reader.trash()]
        segments = reader.segments()
        settled = reader.commit_seq() == seq
        if settled:
            break
    parts = [run.locations.take(run.alive) for run in runs]
    keys = [run.keys[run.alive] for run in runs]
    return _Snapshot(
        segments,
        np.concatenate([*keys, copy_keys]),
        BlockLocations.joined([*parts, copies]),
        sum(len(part) for part in parts),
        others,
        settled,
    )


def _check_counters(reader: IndexReader, snapshot: _Snapshot, findings: Findings) -> None:
    """Let the index check itself; then: no slot may be named by two records."""
    for text in reader.verify():
        if "damaged" in text or "cannot be read" in text:
            findings.notes.append(text)
            findings.corrupt_records += 1
        else:
            findings.counters.append(text)
    if not snapshot.settled:
        return
    # A session names a slot once for each time its key was given, so count it once.
    whole = [snapshot.serving, *(_unique(part) for part in snapshot.others)]
    places = _places(BlockLocations.joined(whole))
    twice = len(places) - len(np.unique(places))
    if twice:
        findings.counters.append(f"{twice} slots are named by two records")


def _places(locations: BlockLocations) -> npt.NDArray[np.uint64]:
    """Segment and slot as one number."""
    segments = locations.segment.astype(np.uint64) << np.uint64(32)
    return segments | locations.slot.astype(np.uint64)


def _unique(locations: BlockLocations) -> BlockLocations:
    _, index = np.unique(_places(locations), return_index=True)
    return locations.take(index)


def _suspect(into: set[SuspectBlock], snapshot: _Snapshot, which: npt.NDArray[np.intp]) -> None:
    where = snapshot.serving.take(which)
    rows = zip(
        snapshot.keys[which].tolist(),
        where.segment.tolist(),
        where.slot.tolist(),
        where.generation.tolist(),
        (which >= snapshot.blocks).tolist(),
        strict=True,
    )
    into.update(SuspectBlock(*row) for row in rows)


def _check_segment(
    adapter: StorageAdapter,
    segment: Segment,
    snapshot: _Snapshot,
    of: npt.NDArray[np.intp],
    findings: Findings,
    deep: bool,
) -> None:
    """`of` are the SERVING blocks, and copies of such, of the segment."""
    named = np.zeros(segment.slots, np.bool_)
    for locations in (snapshot.serving, *snapshot.others):
        here = locations.slot[locations.segment == segment.segment_id]
        named[here[here < segment.slots]] = True
    bad, doubtful = np.zeros(len(of), np.bool_), np.zeros(len(of), np.bool_)
    for spec in segment.specs:
        try:
            rows = adapter.raw_headers(segment, spec.name)
            written = adapter.written_slots(segment, spec.name)
        except SegmentMissing as error:
            findings.notes.append(error.message)
            bad[:] = True
            continue
        wrong, unsure = _judge(adapter, segment, spec.name, snapshot, of, rows, deep)
        bad |= wrong
        doubtful |= unsure
        _find_orphans(segment, spec.name, rows, written, named, findings)
    _suspect(findings.dangling, snapshot, of[bad])
    _suspect(findings.unverified, snapshot, of[doubtful & ~bad])


def _judge(
    adapter: StorageAdapter,
    segment: Segment,
    spec_name: str,
    snapshot: _Snapshot,
    of: npt.NDArray[np.intp],
    rows: header.Headers,
    deep: bool,
) -> tuple[Flags, Flags]:
    """(dangling, unverified) for each SERVING block of one spec."""
    where, keys = snapshot.serving.take(of), snapshot.keys[of]
    there = where.slot < len(rows)
    full = np.zeros(max(segment.slots, int(where.slot.max(initial=0)) + 1), header.HEADER)
    full[: len(rows)] = rows
    mine, slots = full[where.slot], where.slot.astype(np.int64)
    size = next(spec.size for spec in segment.specs if spec.name == spec_name)
    good = there & header.matching(mine, segment.tag, spec_name, slots, keys, where.generation, size)
    good &= header.valid(mine, segment.tag, spec_name, slots)
    erased = header.is_erased(mine) & (mine["generation"] == where.generation)
    unsure = there & header.blank(mine) & ~erased
    if deep:
        good[good] = _verified(adapter, segment, spec_name, where.take(good), keys[good], size)
    return ~good & ~unsure, unsure


def _verified(
    adapter: StorageAdapter,
    segment: Segment,
    spec_name: str,
    where: BlockLocations,
    keys: Keys,
    size: int,
) -> Flags:
    """Which blocks' payloads meet their checksums."""
    flags = np.zeros(len(keys), np.bool_)
    step = max(1, DEEP_BYTES // size)
    for begin in range(0, len(keys), step):
        part = slice(begin, begin + step)
        out = np.empty((len(keys[part]), size), np.uint8)
        flags[part] = adapter.read(
            segment, spec_name, where.slot[part], keys[part], where.generation[part], out
        )
    return flags


def _find_orphans(
    segment: Segment,
    spec_name: str,
    rows: header.Headers,
    written: Flags,
    named: Flags,
    findings: Findings,
) -> None:
    size = next(spec.size for spec in segment.specs if spec.name == spec_name)
    used = ~header.blank(rows)
    # All written may also mean that the storage cannot tell; then only headers count.
    if size % os.sysconf("SC_PAGE_SIZE") == 0 and not written.all():
        used |= written[: len(rows)]
    for slot in np.flatnonzero(used & ~named[: len(rows)]).tolist():
        generation = int(rows["generation"][slot])
        suspect = SuspectSlot(segment.segment_id, spec_name, slot, generation)
        findings.orphans[suspect] = size
