"""``kvcm fsck --repair``: make index, bytes and counters agree again, with the manager stopped.

Nobody else may write meanwhile: the data directory's lock keeps managers from starting, and opening an
index as its writer takes the next epoch, which fences whoever wrote before. What is done is what a group
does when it starts (`actors.opening`, `IndexWriter.recover`), and then:

* a record that names slots of SERVING blocks is cut, so that nothing erases them later;
* a block without bytes is served from its copy if that is whole, else it is removed (it was a miss);
* bytes that nothing names are erased by slot and generation; segments that no index knows are dropped.

Bytes that any record names are never touched. Where a storage looks unmounted its blocks are left alone,
and so are segments of strangers below roots that another manager might share.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcm_ray import fsck
from kvcm_ray.actors import paths
from kvcm_ray.actors.opening import open_instance_index
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.model import Durability, InstanceInfo, Segment
from kvcm_ray.core.requests import U32, BlockLocations, Keys
from kvcm_ray.errors import InUse, KvcmError, NotFound, Unsupported
from kvcm_ray.fsck import SuspectBlock, SuspectSlot
from kvcm_ray.index import IndexReader, IndexWriter
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

Places = npt.NDArray[np.uint64]

ROUNDS_MAX = 4  #: taking a block out may leave bytes of its other specs, found in the next round


@dataclass(slots=True)
class Repairs:
    """What was done, or would be."""

    mended_indexes: int = 0  #: damaged records dropped, or contradictions between records ended
    rebuilt_indexes: int = 0  #: made again from block headers
    removed_blocks: int = 0  #: their bytes were lost before
    served_from_copy: int = 0
    dropped_copies: int = 0
    erased_bytes: int = 0
    dropped_segments: int = 0
    notes: list[str] = field(default_factory=list)  #: what was left alone, and why

    @property
    def anything(self) -> bool:
        return any(value for name, value in asdict(self).items() if name != "notes")

    def lines(self) -> list[str]:
        """In words."""
        words = {
            "mended_indexes": "indexes mended",
            "rebuilt_indexes": "indexes made again from block headers",
            "removed_blocks": "blocks without bytes taken out of the index",
            "served_from_copy": "blocks served from their copy",
            "dropped_copies": "copies without bytes forgotten",
            "erased_bytes": "bytes that nothing names erased",
            "dropped_segments": "segments that no index knows dropped",
        }
        return [f"{getattr(self, name)} {text}" for name, text in words.items() if getattr(self, name)]


@dataclass(slots=True)
class _Bench:
    """What a repair works on."""

    folder: Path
    view: RegistryView
    adapters: dict[str, StorageAdapter]
    away: frozenset[str]  #: storages that look unmounted
    do: bool
    deep: bool
    done: Repairs


def repair(
    data_dir: str | os.PathLike[str], *, do: bool = True, deep: bool = False, lost: Collection[str] = ()
) -> Repairs:
    """Repair a data directory whose manager is stopped; with `do` False only say what would be done.

    Args:
        deep: also read every payload; a block with a wrong checksum has lost its bytes.
        lost: names of storages that look unmounted and are gone for good: their blocks are given up.

    Raises:
        InUse: a manager runs on the data directory.
        Unavailable: no manager was ever started there.
        KvcmError: an index cannot be opened at all; what was done before stays.
    """
    folder = paths.resolve(data_dir)
    view = RegistryView(folder)
    try:
        with _alone(folder, do):
            adapters = _adapters(view)
            try:
                bench = _Bench(folder, view, adapters, _away(view, adapters) - set(lost), do, deep, Repairs())
                _all(bench)
            finally:
                for adapter in adapters.values():
                    adapter.close()
    finally:
        view.close()
    return bench.done


@contextmanager
def _alone(folder: Path, do: bool) -> Iterator[None]:
    """Own the data directory, as a manager would; a look alone only makes sure that none runs."""
    from kvcm_ray.cluster.facts import DataDirLock, read_owner
    from kvcm_ray.cluster.launch import clear_up_after

    if not do:
        owner = read_owner(folder)
        if owner is not None and owner.alive:
            raise InUse(
                f"a manager runs on {folder} (process {owner.pid})",
                hint=f"`kvcm down --data-dir {folder}` stops it; `kvcm fsck` alone works beside it.",
            )
        yield
        return
    lock = DataDirLock(folder)
    try:
        clear_up_after(folder)
        yield
    finally:
        lock.release()


def _adapters(view: RegistryView) -> dict[str, StorageAdapter]:
    found = {}
    for name, config in view.storages().items():
        try:
            found[name] = open_storage(config)
        except (Unsupported, KvcmError):
            continue
    return found


def _away(view: RegistryView, adapters: Mapping[str, StorageAdapter]) -> frozenset[str]:
    """Storages that cannot be opened, or of whose segments not one is there: unmounted, it seems.

    Shared memory cannot be unmounted; what is missing there is lost.
    """
    named: dict[str, list[Segment]] = {}
    for info in view.instances().values():
        try:
            reader = IndexReader(view.index_path(info))
        except KvcmError:
            continue
        for segment in reader.segments().values():
            named.setdefault(segment.storage, []).append(segment)
        reader.close()
    configs = view.storages()
    gone = set(named) - set(adapters)
    for name, segments in named.items():
        if name in gone or configs[name].root_path.startswith(f"{paths.SHM}/"):
            continue
        root = Path(configs[name].root_path)
        if not any((root / segment.path).is_dir() for segment in segments):
            gone.add(name)
    return frozenset(gone)


def _all(bench: _Bench) -> None:
    for name in sorted(bench.away):
        bench.done.notes.append(
            f"storage {name} is left alone: none of its segments is there, as if it were not mounted; "
            f"if it is gone for good, --lost {name} gives its blocks up"
        )
    known: set[tuple[str, str]] = set()
    unreadable: set[str] = set()
    for info in list(bench.view.instances().values()):
        segments = _instance(bench, info)
        if segments is None:
            unreadable.add(info.uid)
        else:
            known |= segments
    _strangers(bench, known, unreadable)


# ------------------------------------------------------------------------------- one instance


def _instance(bench: _Bench, info: InstanceInfo) -> set[tuple[str, str]] | None:
    """Repair one instance; returns its segments, None if only a rebuild would tell."""
    path = bench.view.index_path(info)
    readable = _readable(path)
    if readable is None:
        return set()
    if not bench.do:
        if not readable:
            bench.done.rebuilt_indexes += 1
            return None
        with _reading(path) as reader:
            plan = _plan(bench, reader, info, bench.deep)
        plan.count(bench.done)
        bench.done.mended_indexes += plan.contradicts
        return plan.places
    durability: Durability = bench.view.group(info.instance_group_name).durability
    present = {name: a for name, a in bench.adapters.items() if name not in bench.away}
    writer = open_instance_index(path, info, durability, present)
    try:
        bench.done.rebuilt_indexes += not readable
        return _mend(bench, info, writer, path)
    finally:
        writer.close()


def _readable(path: Path) -> bool | None:
    """None if there is no index yet."""
    try:
        IndexReader(path).close()
    except NotFound:
        return None
    except KvcmError:
        return False
    return True


@contextmanager
def _reading(path: Path) -> Iterator[IndexReader]:
    reader = IndexReader(path)
    try:
        yield reader
    finally:
        reader.close()


def _mend(bench: _Bench, info: InstanceInfo, writer: IndexWriter, path: Path) -> set[tuple[str, str]]:
    with _reading(path) as reader:
        bench.done.mended_indexes += _plan(bench, reader, info, deep=False).contradicts
    writer.recover()
    with _reading(path) as reader:
        _untangle(writer, reader)
    for number in range(ROUNDS_MAX):
        with _reading(path) as reader:
            plan = _plan(bench, reader, info, bench.deep and number == 0)
        if plan.empty:
            break
        plan.count(bench.done)
        _take_out(writer, plan)
        for segment, slots, generations in plan.erase:
            bench.adapters[segment.storage].delete(segment, slots, generations)
    _forget_segments(bench, writer, path)
    return plan.places


@dataclass(slots=True)
class _Plan:
    """What one look at an instance asks for."""

    remove: Keys  #: blocks
    spare: Keys  #: blocks that have a whole copy
    spare_at: BlockLocations  #: where those copies are
    forget: Keys  #: copies
    erase: list[tuple[Segment, U32, U32]]  #: slots and generations that nothing names
    erase_bytes: int
    contradicts: bool
    places: set[tuple[str, str]]  #: (storage, path) of all its segments

    @property
    def empty(self) -> bool:
        return not (len(self.remove) or len(self.spare) or len(self.forget) or self.erase)

    def count(self, done: Repairs) -> None:
        done.removed_blocks += len(self.remove)
        done.served_from_copy += len(self.spare)
        done.dropped_copies += len(self.forget)
        done.erased_bytes += self.erase_bytes


def _plan(bench: _Bench, reader: IndexReader, info: InstanceInfo, deep: bool) -> _Plan:
    found = fsck.check_instance(reader, bench.adapters, info, deep=deep)
    segments = reader.segments()
    away = {number for number, segment in segments.items() if segment.storage in bench.away}
    dangling = [block for block in found.dangling if block.segment_id not in away]
    bad = _keys(block.key for block in dangling if not block.copy)
    bad = np.union1d(bad, _doubtful_twice(found.unverified))
    forget = _keys(block.key for block in dangling if block.copy)
    copy_keys, copy_places = reader.all_copies()
    usable = ~np.isin(copy_keys, forget) & ~np.isin(copy_places.segment, list(away))
    spared = usable & np.isin(copy_keys, bad)
    spare = copy_keys[spared]
    return _Plan(
        remove=np.setdiff1d(bad, spare),
        spare=spare,
        spare_at=copy_places.take(spared),
        forget=forget,
        erase=_erasures(found.orphans, segments),
        erase_bytes=sum(found.orphans.values()),
        contradicts=bool(found.counters or found.corrupt_records),
        places=found.segments,
    )


def _keys(keys: Iterable[int]) -> Keys:
    return np.array(sorted(keys), np.int64)


def _doubtful_twice(unverified: Iterable[SuspectBlock]) -> Keys:
    """Blocks without a header whose slot another such block has too: nobody can say whose it is."""
    by_place: dict[tuple[int, int], list[int]] = {}
    for block in unverified:
        if not block.copy:
            by_place.setdefault((block.segment_id, block.slot), []).append(block.key)
    return _keys(key for keys in by_place.values() if len(keys) > 1 for key in keys)


def _erasures(
    orphans: Mapping[SuspectSlot, int], segments: Mapping[int, Segment]
) -> list[tuple[Segment, U32, U32]]:
    """By segment; a slot is named once for each generation that its headers have."""
    by_segment: dict[int, set[tuple[int, int]]] = {}
    for slot in orphans:
        by_segment.setdefault(slot.segment_id, set()).add((slot.slot, slot.generation & 0xFFFFFFFF))
    found = []
    for number, named in by_segment.items():
        columns = np.array(sorted(named), np.uint32).T
        found.append((segments[number], columns[0].copy(), columns[1].copy()))
    return found


def _take_out(writer: IndexWriter, plan: _Plan) -> None:
    with writer.begin() as batch:
        if len(plan.spare):
            batch.move_blocks(plan.spare, plan.spare_at)
        if len(gone := np.union1d(plan.spare, plan.forget)):
            batch.drop_copies(gone)
        if len(plan.remove):
            batch.remove_blocks(plan.remove)


def _places(locations: BlockLocations) -> Places:
    """Segment and slot as one number."""
    return locations.segment.astype(np.uint64) << np.uint64(32) | locations.slot.astype(np.uint64)


def _untangle(writer: IndexWriter, reader: IndexReader) -> None:
    """End what other records say of the slots of SERVING blocks; twice in the trash counts once."""
    blocks = BlockLocations.joined([run.locations.take(run.alive) for run in reader.runs()])
    serving = _places(blocks)
    copy_keys, copies = reader.all_copies()
    doubled = copy_keys[np.isin(_places(copies), serving)]
    taken = np.concatenate([serving, _places(copies)])
    with writer.begin() as batch:
        if len(doubled):
            batch.drop_copies(doubled)
        for session in reader.sessions():
            if np.isin(_places(session.locations), taken).any():
                batch.drop_session(session.session_id)
            else:
                taken = np.concatenate([taken, _places(session.locations)])
        for record in reader.trash():
            mine = _places(record.locations)
            good = ~np.isin(mine, taken)
            taken = np.concatenate([taken, mine])
            if good.all():
                continue
            if good.any():
                batch.put_trash(replace(record, locations=record.locations.take(good)))
            else:
                batch.drop_trash(record.trash_id)


def _forget_segments(bench: _Bench, writer: IndexWriter, path: Path) -> None:
    """Drop segments whose directory is gone and that nothing names."""
    configs = bench.view.storages()
    with _reading(path) as reader:
        parts = [run.locations.take(run.alive) for run in reader.runs()]
        parts += [reader.all_copies()[1], *(s.locations for s in reader.sessions())]
        parts += [record.locations for record in reader.trash()]
        named = set(np.unique(BlockLocations.joined(parts).segment).tolist())
        segments = reader.segments()
    for number, segment in segments.items():
        config = configs.get(segment.storage)
        if config is None or segment.storage in bench.away or number in named:
            continue
        if not (Path(config.root_path) / segment.path).is_dir():
            with writer.begin() as batch:
                batch.drop_segment(number)


# ------------------------------------------------------------------------------------ strangers


def _strangers(bench: _Bench, known: Collection[tuple[str, str]], unreadable: Collection[str]) -> None:
    """Segments that no index knows. Those of unregistered instances only where no other manager can be."""
    uids = {info.uid for info in bench.view.instances().values()}
    configs = bench.view.storages()
    for name, adapter in bench.adapters.items():
        if name in bench.away:
            continue
        private = _is_private(bench.folder, configs[name].root_path)
        for found in list(adapter.list_segments()):
            uid = found.owner.uid if found.owner else ""
            if (name, found.path) in known or uid in unreadable:
                continue
            if uid not in uids and not private:
                bench.done.notes.append(
                    f"storage {name}: {found.path} is left alone: it may be another manager's, since the "
                    f"storage is outside of {bench.folder}; if not, remove it by hand"
                )
                continue
            bench.done.dropped_segments += 1
            bench.done.erased_bytes += found.stored_bytes
            if bench.do:
                adapter.drop_segment(found.segment or Segment(0, name, found.path, (), 0))


def _is_private(folder: Path, root: str) -> bool:
    """Below the data directory, or its own part of shared memory."""
    place = Path(os.path.realpath(root))
    return place.is_relative_to(folder) or place.is_relative_to(paths.shm_dir(folder))
