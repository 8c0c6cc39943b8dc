"""A storage in a dictionary: the in-memory twin of the real ones, for tests and simulations.

It keeps the same promises (the conformance suite runs on it too) and can be told to misbehave:
``capacity_bytes`` makes it full, ``fail_next`` makes the n-th call from now raise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.core.model import Segment
from kvcm_ray.core.requests import U32, Flags, Keys
from kvcm_ray.errors import (
    AlreadyExists,
    InvalidArgument,
    KvcmError,
    SegmentMissing,
    SessionNotFound,
    StorageFull,
)
from kvcm_ray.storage_adapters import header
from kvcm_ray.storage_adapters.base import (
    Buffers,
    FoundSegment,
    Headers,
    SegmentOwner,
    StorageAdapter,
)
from kvcm_ray.storage_adapters.buffers import Views
from kvcm_ray.storage_adapters.handles import spec_size

Place = tuple[str, int]  #: (spec name, slot)


@dataclass(slots=True)
class _Files:
    """What a real storage keeps in the files of one segment."""

    segment: Segment
    owner: SegmentOwner
    payloads: dict[Place, bytes] = field(default_factory=dict)
    headers: dict[Place, Headers] = field(default_factory=dict)  #: arrays of one header
    prepared: set[Place] = field(default_factory=set)

    @property
    def stored_bytes(self) -> int:
        sizes = {spec.name: spec.size for spec in self.segment.specs}
        return sum(sizes[name] for name, _ in self.prepared | self.payloads.keys())


class MemoryStorage(StorageAdapter):
    """Segments in this object. Two objects share nothing."""

    def __init__(self, name: str = "memory", capacity_bytes: int | None = None) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._files: dict[str, _Files] = {}
        self._guard = threading.RLock()
        self._failure: tuple[int, KvcmError] | None = None

    # ----------------------------------------------------------------------------- misbehaving

    def fail_next(self, error: KvcmError, after_calls: int = 0) -> None:
        """Let the call after so many further ones raise `error`, once."""
        self._failure = (after_calls, error)

    def flip_payload(self, segment: Segment, spec_name: str, slot: int, bit: int) -> None:
        """Rot: change one bit of a stored payload."""
        payloads = self._files[segment.path].payloads
        content = bytearray(payloads[spec_name, slot])
        content[bit // 8] ^= 1 << bit % 8
        payloads[spec_name, slot] = bytes(content)

    def flip_header(self, segment: Segment, spec_name: str, slot: int, bit: int) -> None:
        """Rot: change one bit of a stored header."""
        row = self._files[segment.path].headers[spec_name, slot]
        row.view(np.uint8)[bit // 8] ^= np.uint8(1 << bit % 8)

    def store_unsealed(self, segment: Segment, spec_name: str, slot: int, payload: bytes) -> None:
        """What a plain protocol client does: a payload and no header."""
        self._files[segment.path].payloads[spec_name, slot] = payload

    def _call(self) -> None:
        if self._failure is None:
            return
        calls, error = self._failure
        if calls == 0:
            self._failure = None
            raise error
        self._failure = (calls - 1, error)

    # -------------------------------------------------------------------------- whole segments

    def create_segment(self, segment: Segment, owner: SegmentOwner) -> None:
        with self._guard:
            self._call()
            if segment.slots <= 0 or min((s.size for s in segment.specs), default=0) <= 0:
                raise InvalidArgument(f"segment {segment.path} has no room: {segment}")
            found = self._files.setdefault(segment.path, _Files(segment, owner))
            if found.segment != segment:
                raise AlreadyExists(f"{segment.path} holds another segment: {found.segment}")

    def drop_segment(self, segment: Segment) -> int:
        with self._guard:
            self._call()
            files = self._files.pop(segment.path, None)
            return files.stored_bytes if files else 0

    def prepare(self, segment: Segment, first_slot: int, count: int) -> None:
        with self._guard:
            self._call()
            if first_slot < 0 or count < 0 or first_slot + count > segment.slots:
                raise InvalidArgument(f"slots {first_slot}+{count} of {segment.slots}")
            files = self._open(segment)
            for slot in range(first_slot, first_slot + count):
                for spec in segment.specs:
                    self._occupy(files, (spec.name, slot))

    def check_segment(self, segment: Segment) -> str:
        found = self._files.get(segment.path)
        return "" if found and found.segment == segment else f"{segment.path} does not exist"

    def list_segments(self) -> Iterator[FoundSegment]:
        for path, files in sorted(self._files.items()):
            yield FoundSegment(path, files.segment, files.owner, files.stored_bytes)

    def stored_bytes(self, segment: Segment) -> int:
        files = self._files.get(segment.path)
        return files.stored_bytes if files else 0

    def close(self) -> None:
        """Nothing to give back: the bytes are the object."""

    def _open(self, segment: Segment) -> _Files:
        files = self._files.get(segment.path)
        if files is None:
            raise SegmentMissing(f"{segment.path} does not exist")
        return files

    def _occupy(self, files: _Files, place: Place) -> None:
        if place in files.prepared or place in files.payloads:
            return
        asked = spec_size(files.segment, place[0])
        if self.capacity_bytes is not None:
            free = self.capacity_bytes - sum(f.stored_bytes for f in self._files.values())
            if asked > free:
                raise StorageFull(
                    f"storage {self.name!r} is full: {files.segment.path} needs {asked} bytes, "
                    f"{free} are free",
                    path=files.segment.path, asked=asked, free=free,
                )  # fmt: skip
        files.prepared.add(place)

    # ---------------------------------------------------------------------------------- blocks

    def write(
        self,
        segment: Segment,
        spec_name: str,
        slots: U32,
        keys: Keys,
        generations: U32,
        buffers: Buffers,
    ) -> None:
        size = spec_size(segment, spec_name)
        views = Views(buffers, size, writable=False)
        _check(segment, slots, len(keys), len(generations), len(views))
        if len(slots) == 0:
            return
        with self._guard:
            self._call()
            files = self._open(segment)
            places = [(spec_name, int(slot)) for slot in slots]
            for place, generation in zip(places, generations.tolist(), strict=True):
                row = self._whole(files, place)
                if row is not None and int(row["generation"][0]) > generation:
                    raise SessionNotFound(f"slots of {segment.path} belong to a younger session")
            for place in places:
                self._occupy(files, place)
                files.headers.pop(place, None)
            for index, place in enumerate(places):
                files.payloads[place] = views.row(index).tobytes()
                self._prove(files, place, int(keys[index]), int(generations[index]))

    def _prove(self, files: _Files, place: Place, key: int, generation: int) -> None:
        payload = np.frombuffer(files.payloads[place], np.uint8)
        tag, identity = files.segment.tag, _identity(place[1], key, generation)
        sums = header.checksums([payload], header.seeds(tag, place[0], *identity))
        files.headers[place] = header.build(tag, place[0], *identity, len(payload), sums)

    def _whole(self, files: _Files, place: Place) -> Headers | None:
        row = files.headers.get(place)
        where = np.array([place[1]], np.int64)
        if row is None or not header.valid(row, files.segment.tag, place[0], where)[0]:
            return None
        return row

    def read(
        self,
        segment: Segment,
        spec_name: str,
        slots: U32,
        keys: Keys,
        generations: U32,
        out: Buffers,
    ) -> Flags:
        size = spec_size(segment, spec_name)
        views = Views(out, size, writable=True)
        _check(segment, slots, len(keys), len(generations), len(views))
        flags = np.zeros(len(slots), np.bool_)
        with self._guard:
            files = self._files.get(segment.path)
            for index, slot in enumerate(slots.tolist() if files else []):
                assert files is not None
                row = files.headers.get((spec_name, slot))
                payload = files.payloads.get((spec_name, slot))
                if row is None or payload is None:
                    continue
                identity = _identity(slot, int(keys[index]), int(generations[index]))
                content = np.frombuffer(payload, np.uint8)
                sums = header.checksums([content], header.seeds(segment.tag, spec_name, *identity))
                matches = header.matching(row, segment.tag, spec_name, *identity, size)
                flags[index] = matches[0] and row["checksum"][0] == sums[0]
                views.row(index)[:] = content
        return flags

    def seal(self, segment: Segment, spec_name: str, slots: U32, keys: Keys, generations: U32) -> Flags:
        _check(segment, slots, len(keys), len(generations))
        sealed = np.zeros(len(slots), np.bool_)
        with self._guard:
            files = self._files.get(segment.path)
            for index, slot in enumerate(slots.tolist() if files else []):
                assert files is not None
                place = (spec_name, slot)
                identity = _identity(slot, int(keys[index]), int(generations[index]))
                if place not in files.headers and place in files.payloads:
                    self._prove(files, place, int(keys[index]), int(generations[index]))
                if (row := files.headers.get(place)) is not None:
                    size = spec_size(segment, spec_name)
                    sealed[index] = header.matching(row, segment.tag, spec_name, *identity, size)[0]
        return sealed

    def delete(self, segment: Segment, slots: U32, generations: U32) -> int:
        _check(segment, slots, len(generations))
        with self._guard:
            self._call()
            files = self._files.get(segment.path)
            if files is None:
                return 0
            before = files.stored_bytes
            for slot, generation in zip(slots.tolist(), generations.tolist(), strict=True):
                for spec in segment.specs:
                    place = (spec.name, slot)
                    row = self._whole(files, place)
                    if row is not None and int(row["generation"][0]) != generation:
                        continue
                    files.headers.pop(place, None)
                    files.payloads.pop(place, None)
                    files.prepared.discard(place)
            return before - files.stored_bytes

    def raw_headers(self, segment: Segment, spec_name: str) -> Headers:
        with self._guard:
            files = self._open(segment)
            rows: Headers = np.zeros(segment.slots, header.HEADER)
            for (name, slot), row in files.headers.items():
                if name == spec_name:
                    rows[slot] = row[0]
            return rows

    def written_slots(self, segment: Segment, spec_name: str) -> Flags:
        with self._guard:
            files = self._open(segment)
            flags = np.zeros(segment.slots, np.bool_)
            flags[[slot for name, slot in files.payloads if name == spec_name]] = True
            return flags


def _identity(slot: int, key: int, generation: int) -> tuple[header.Slots, Keys, U32]:
    """Arrays of one element each."""
    where, keys = np.array([slot], np.int64), np.array([key], np.int64)
    return where, keys, np.array([generation], np.uint32)


def _check(segment: Segment, slots: U32, *lengths: int) -> None:
    if any(length != len(slots) for length in lengths):
        raise InvalidArgument(f"unequal lengths: {len(slots)} slots, {lengths}")
    if len(slots) and int(slots.max()) >= segment.slots:
        raise InvalidArgument(f"slot {int(slots.max())} of {segment.slots}")
