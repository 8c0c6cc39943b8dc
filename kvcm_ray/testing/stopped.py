"""A data directory as a stopped manager leaves it, and the ways in which it can be damaged; for tests.

Made of a real registry, real indexes and real files, without a manager: two instances of one group, with
blocks on a file storage, some with copies on a second one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvcm_ray.actors import paths
from kvcm_ray.actors.registry_store import RegistryStore
from kvcm_ray.core.model import (
    InstanceGroup,
    InstanceGroupQuota,
    InstanceInfo,
    LocationSpecInfo,
    NfsSpec,
    Segment,
    StorageConfig,
    segment_path,
)
from kvcm_ray.core.records import TrashRecord
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.index import IndexReader, IndexWriter, codec, environment
from kvcm_ray.storage_adapters import SegmentOwner, StorageAdapter
from kvcm_ray.storage_adapters.file import FileStorage
from kvcm_ray.testing.storage_lab import flip

SPECS = (LocationSpecInfo("tp0", 4096), LocationSpecInfo("tp1", 8192))
SLOTS = 24
BLOCKS = 16  #: in each of two segments
COPIES = 6
GENERATION = 7

Contents = dict[tuple[str, int], bytes]


def payload(key: int, spec: LocationSpecInfo) -> bytes:
    return random.Random(f"{key}-{spec.name}").randbytes(spec.size)


class Stopped:
    """The data directory."""

    def __init__(self, root: Path, instances: int = 2) -> None:
        self.root = root
        self.fast = FileStorage("fast", str(paths.tier_dir(root, "fast")))
        self.slow = FileStorage("slow", str(paths.tier_dir(root, "slow")))
        self.infos = [
            InstanceInfo(
                instance_group_name="g", instance_id=f"i{number}", block_size=16,
                location_spec_infos=SPECS, uid=f"0badcaf{number}",
            )
            for number in range(instances)
        ]  # fmt: skip
        storages = [StorageConfig(s.name, nfs=NfsSpec(str(s.root))) for s in (self.fast, self.slow)]
        group = InstanceGroup(
            name="g", storage_candidates=("fast", "slow"), quota=InstanceGroupQuota(1 << 24), version=1
        )
        store = RegistryStore(paths.registry_dir(root), write=True)
        store.write([*storages, group, *self.infos])
        store.close()
        for info in self.infos:
            self._fill(info)

    def index(self, info: InstanceInfo) -> Path:
        return paths.index_dir(self.root, info)

    @contextmanager
    def writing(self, info: InstanceInfo) -> Iterator[IndexWriter]:
        writer = IndexWriter(self.index(info), instance_tag=f"{info.instance_id}/{info.uid}")
        try:
            yield writer
        finally:
            writer.close()

    def segment(self, info: InstanceInfo, number: int, storage: StorageAdapter) -> Segment:
        path = segment_path(info.instance_id, info.uid, number)
        segment = Segment(number, storage.name, path, SPECS, SLOTS)
        storage.create_segment(segment, SegmentOwner("g", info.instance_id, info.uid))
        return segment

    def store(
        self, storage: StorageAdapter, segment: Segment, slots: list[int], keys: list[int], generation: int
    ) -> BlockLocations:
        where, generations = np.array(slots, np.uint32), np.full(len(slots), generation, np.uint32)
        for spec in SPECS:
            data = [payload(key, spec) for key in keys]
            storage.write(segment, spec.name, where, np.array(keys, np.int64), generations, data)
        return BlockLocations(np.full(len(slots), segment.segment_id, np.uint32), where, generations)

    def _fill(self, info: InstanceInfo) -> None:
        base = 1000 * (1 + int(info.uid[-1]))
        with self.writing(info) as writer:
            segments = [self.segment(info, 1, self.fast), self.segment(info, 2, self.fast),
                        self.segment(info, 3, self.slow)]  # fmt: skip
            with writer.begin() as batch:
                for segment in segments:
                    batch.put_segment(segment)
                batch.raise_counters(GENERATION + 100, 1, 4)
            for segment in segments[:2]:
                keys = [base + 100 * segment.segment_id + n for n in range(BLOCKS)]
                places = self.store(self.fast, segment, list(range(BLOCKS)), keys, GENERATION)
                with writer.begin() as batch:
                    batch.add_blocks(np.array(keys, np.int64), places, None, 5)
            keys = [base + 100 + n for n in range(COPIES)]
            copies = self.store(self.slow, segments[2], list(range(COPIES)), keys, GENERATION + 1)
            with writer.begin() as batch:
                batch.put_copies(np.array(keys, np.int64), copies)

    # -------------------------------------------------------------------------------- what is there

    def contents(self) -> Contents:
        """Every block that can be read, from its first place or its copy, with its bytes."""
        found: Contents = {}
        for info in self.infos:
            try:
                reader = IndexReader(self.index(info))
            except Exception:  # damaged on purpose: nothing can be read
                continue
            keys = [np.asarray(run.keys[run.alive]) for run in reader.runs()]
            for key in np.concatenate(keys).tolist() if keys else []:
                data = self._read(reader, key)
                if data is not None:
                    found[info.instance_id, key] = data
            reader.close()
        return found

    def _read(self, reader: IndexReader, key: int) -> bytes | None:
        wanted = np.array([key], np.int64)
        for look in (reader.lookup, reader.copies):
            hits, places = look(wanted)
            if not hits[0]:
                continue
            segment = reader.segment(int(places.segment[0]))
            data = self._payload(segment, key, places) if segment is not None else None
            if data is not None:
                return data
        return None

    def _payload(self, segment: Segment, key: int, places: BlockLocations) -> bytes | None:
        storage = self.fast if segment.storage == "fast" else self.slow
        parts = []
        for spec in SPECS:
            out = np.empty((1, spec.size), np.uint8)
            keys = np.array([key], np.int64)
            if not storage.read(segment, spec.name, places.slot, keys, places.generation, out)[0]:
                return None
            parts.append(out.tobytes())
        return b"".join(parts)

    # -------------------------------------------------------------------------------------- damage

    def file(
        self, info: InstanceInfo, number: int, suffix: str, storage: StorageAdapter | None = None
    ) -> Path:
        root = Path(str((storage or self.fast).root))
        return root / segment_path(info.instance_id, info.uid, number) / suffix

    def break_header(self, info: InstanceInfo, slot: int) -> None:
        flip(self.file(info, 1, "tp1.hdr"), (slot * 64 + 9) * 8)

    def rot(self, info: InstanceInfo, slot: int) -> None:
        """Of a payload, which only a deep look finds."""
        flip(self.file(info, 1, "tp0.dat"), (slot * 4096 + 5) * 8)

    def lose_segment(self, info: InstanceInfo, number: int = 2) -> None:
        path = segment_path(info.instance_id, info.uid, number)
        self.fast.drop_segment(Segment(number, "fast", path, SPECS, SLOTS))

    def leave_bytes(self, info: InstanceInfo, slot: int) -> None:
        """A slot that nothing names, written by a client that died."""
        segment = Segment(1, "fast", segment_path(info.instance_id, info.uid, 1), SPECS, SLOTS)
        self.store(self.fast, segment, [slot], [77], 99)

    def leave_segment(self, info: InstanceInfo, number: int = 9) -> Segment:
        """A segment that its index does not know."""
        segment = self.segment(info, number, self.fast)
        self.store(self.fast, segment, [0, 1], [5, 6], 3)
        return segment

    def leave_trash(self, info: InstanceInfo, slots: list[int]) -> None:
        """A trash record that names slots of SERVING blocks: at its turn it would erase them."""
        places = BlockLocations(
            np.ones(len(slots), np.uint32), np.array(slots, np.uint32),
            np.full(len(slots), GENERATION, np.uint32),
        )  # fmt: skip
        with self.writing(info) as writer, writer.begin() as batch:
            batch.put_trash(TrashRecord(batch.counters.next_trash_id, info.instance_id, 0, places))

    def break_run(self, info: InstanceInfo) -> None:
        """Garbage over one run, written behind the index's back."""
        with self.writing(info) as writer:
            shared = environment.acquire(self.index(info), environment.READ)
            with shared.env.begin(write=True) as txn:
                runs = writer._shared.tables.runs
                (key, record), *_ = list(txn.cursor(runs))
                txn.put(key, bytes(record[:-1]) + bytes([record[-1] ^ 1]), db=runs)
                assert codec.decode_run(txn.get(key, None, runs), 1) is None
            environment.release(shared)

    def truncate_index(self, info: InstanceInfo) -> None:
        with (self.index(info) / "data.mdb").open("r+b") as file:
            file.truncate(5000)
