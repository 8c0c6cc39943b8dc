"""A storage with short ways to use it and to damage what it stores; for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvcm_ray.core.model import LocationSpecInfo, Segment, safe_name
from kvcm_ray.core.requests import U32, Flags, Keys
from kvcm_ray.storage_adapters import SegmentOwner, StorageAdapter
from kvcm_ray.storage_adapters.path_storage import PathStorage
from kvcm_ray.testing.memory_storage import MemoryStorage

OWNER = SegmentOwner("group", "instance", "0badcafe")


class Lab:
    """A storage and short ways to use and damage it."""

    def __init__(self, storage: StorageAdapter) -> None:
        self.storage = storage

    def segment(self, *sizes: int, slots: int = 16, number: int = 1) -> Segment:
        specs = tuple(LocationSpecInfo(f"tp{i}", size) for i, size in enumerate(sizes))
        segment = Segment(number, "s", f"instance/0badcafe-{number:06x}", specs, slots)
        self.storage.create_segment(segment, OWNER)
        return segment

    def write(
        self, segment: Segment, blocks: dict[int, bytes], generation: int = 1, spec: str = "tp0"
    ) -> None:
        """Blocks by slot; the key of slot s is 1000 + s."""
        slots, keys, generations = arrays(list(blocks), generation)
        self.storage.write(segment, spec, slots, keys, generations, list(blocks.values()))

    def read(
        self,
        segment: Segment,
        slots: list[int],
        generation: int = 1,
        spec: str = "tp0",
        keys: list[int] | None = None,
    ) -> list[bytes | None]:
        """Bytes of each slot, None for a miss."""
        size = next(s.size for s in segment.specs if s.name == spec)
        where, own, generations = arrays(slots, generation)
        wanted = own if keys is None else np.array(keys, np.int64)
        out = np.full((len(slots), size), 0xAA, np.uint8)
        flags: Flags = self.storage.read(segment, spec, where, wanted, generations, out)
        return [out[i].tobytes() if flag else None for i, flag in enumerate(flags)]

    def delete(self, segment: Segment, slots: list[int], generation: int = 1) -> int:
        where, _, generations = arrays(slots, generation)
        return self.storage.delete(segment, where, generations)

    # ------------------------------------------------------------------------------- damaging

    def file(self, segment: Segment, suffix: str, spec: str = "tp0") -> Path:
        assert isinstance(self.storage, PathStorage)
        return Path(self.storage.root) / segment.path / f"{safe_name(spec)}{suffix}"

    def flip_payload(self, segment: Segment, slot: int, bit: int) -> None:
        if isinstance(self.storage, MemoryStorage):
            self.storage.flip_payload(segment, "tp0", slot, bit)
        else:
            flip(self.file(segment, ".dat"), slot * segment.specs[0].size * 8 + bit)

    def flip_header(self, segment: Segment, slot: int, bit: int) -> None:
        if isinstance(self.storage, MemoryStorage):
            self.storage.flip_header(segment, "tp0", slot, bit)
        else:
            flip(self.file(segment, ".hdr"), slot * 64 * 8 + bit)

    def store_unsealed(self, segment: Segment, slot: int, payload: bytes) -> None:
        """As a plain protocol client does: no header."""
        if isinstance(self.storage, MemoryStorage):
            self.storage.store_unsealed(segment, "tp0", slot, payload)
            return
        with self.file(segment, ".dat").open("r+b") as file:
            file.seek(slot * len(payload))
            file.write(payload)


def arrays(slots: list[int], generation: int) -> tuple[U32, Keys, U32]:
    where = np.array(slots, np.uint32)
    return where, where.astype(np.int64) + 1000, np.full(len(slots), generation, np.uint32)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def block(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)
