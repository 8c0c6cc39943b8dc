"""The ``locations`` of an answer: found here, written by its transport from pieces made once a segment.

`LocationEncoder` finds them, `Located` holds them, a `Form` writes them: `JSON` here, protobuf in
`grpc.locations`. A thousand locations cost a few dictionary look-ups and one join: everything around slot and
generation is constant within a segment and prepared as bytes, the numbers come from a table.
Segment ids are never reused within an instance, so pieces stay valid until the storage's
configuration changes.

    {"type":"ST_NFS","spec_size":1,"location_specs":[{"name":"tp0","uri":"file://...?blkid=
    SLOT &gen= GENERATION &size=1024"}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import InstanceInfo, LocationSpecInfo, Segment, StorageConfig
from kvcm_ray.core.requests import BlockLocations, Flags
from kvcm_ray.core.uri import uri_parts
from kvcm_ray.serve_app.messages import CacheLocation, LocationSpec
from kvcm_ray.serve_app.protojson import dumps, encode

Pieces = list[bytes]  #: text before the 1st slot, before the 1st generation, before the 2nd slot, ...
SegmentSource = Callable[[int], Segment | None]
Storages = Mapping[str, StorageConfig]

_NUMBERS = [b"%d" % n for n in range(1 << 14)]
_PIECES_MAX = 4096  #: remembered segment encodings of an instance


def runs(values: list[int]) -> list[tuple[int, int, int]]:
    """Stretches of equal values as ``(start, stop, value)``."""
    if not values:
        return []
    if values.count(values[0]) == len(values):
        return [(0, len(values), values[0])]
    array = np.array(values, np.int64)
    starts = [0, *(np.flatnonzero(array[1:] != array[:-1]) + 1).tolist()]
    return [(a, b, values[a]) for a, b in pairwise([*starts, len(values)])]


def usable_storages(storages: Storages) -> set[str]:
    return {name for name, storage in storages.items() if storage.is_available}


class Form(Protocol):
    """How a transport writes locations."""

    separator: bytes

    def prepare(self, segment: Segment, storage: StorageConfig, names: tuple[str, ...]) -> Any:
        """What all locations of a segment share; remembered."""

    def fill(
        self, prepared: Any, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint32]
    ) -> bytes:
        """These locations, with the separator between them."""

    def plain(self, location: CacheLocation) -> bytes: ...


class Stretch(NamedTuple):
    """Successive locations in one segment; without a segment: blocks that are not there."""

    length: int
    segment: Segment | None = None
    storage: StorageConfig | None = None
    slots: npt.NDArray[np.uint32] | None = None
    generations: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """The ``locations`` of an answer, which its transport writes."""

    encoder: LocationEncoder
    stretches: list[Stretch]
    spec_names: tuple[str, ...]  #: only these specs; empty = all

    def __len__(self) -> int:
        return sum(stretch.length for stretch in self.stretches)

    def encode(self, form: Form) -> bytes:
        """The locations, separated, in this form."""
        return form.separator.join([self._written(form, s) for s in self.stretches])

    def _written(self, form: Form, stretch: Stretch) -> bytes:
        if stretch.segment is None:
            empty = form.plain(self.encoder.placeholder(self.spec_names))
            return form.separator.join([empty] * stretch.length)
        assert stretch.storage is not None
        prepared = self.encoder.prepared(form, stretch.segment, stretch.storage, self.spec_names)
        return form.fill(prepared, stretch.slots, stretch.generations)  # type: ignore[arg-type]


class LocationEncoder:
    """What is known about locations of one instance (one registration of it)."""

    def __init__(self, info: InstanceInfo) -> None:
        self._info = info
        self._segments: dict[int, Segment] = {}
        self._prepared: dict[tuple[int, int, tuple[str, ...]], tuple[StorageConfig, Any]] = {}

    def usable(self, locations: BlockLocations, source: SegmentSource, storages: set[str]) -> Flags:
        """Which locations lie in a segment that we know, on one of these storages."""
        flags = np.ones(len(locations), np.bool_)
        for start, stop, segment_id in runs(locations.segment.tolist()):
            segment = self.segment(segment_id, source)
            flags[start:stop] = segment is not None and segment.storage in storages
        return flags

    def prefix(
        self,
        locations: BlockLocations,
        source: SegmentSource,
        storages: Storages,
        spec_names: tuple[str, ...] = (),
    ) -> Located:
        """The locations before the first that nobody can read."""
        stretches: list[Stretch] = []
        for start, stop, segment_id in runs(locations.segment.tolist()):
            segment = self.segment(segment_id, source)
            storage = storages.get(segment.storage) if segment else None
            if segment is None or storage is None or not storage.is_available:
                break
            stretches.append(_stretch(segment, storage, locations, start, stop))
        return Located(self, stretches, spec_names)

    def segment(self, segment_id: int, source: SegmentSource) -> Segment | None:
        """A segment by its number, remembered: a segment never changes."""
        known = self._segments.get(segment_id)
        if known is None:
            known = source(segment_id)
            if known is not None:
                if len(self._segments) >= _PIECES_MAX:
                    self._segments.clear()
                self._segments[segment_id] = known
        return known

    def all(
        self,
        locations: BlockLocations,
        present: Flags | None,
        source: SegmentSource,
        storages: Storages,
        spec_names: tuple[str, ...] = (),
    ) -> Located:
        """All of them; a placeholder where `present` is False."""
        segments = locations.segment.astype(np.int64)
        if present is not None:
            segments[~present] = -1
        stretches = []
        for start, stop, segment_id in runs(segments.tolist()):
            if segment_id < 0:
                stretches.append(Stretch(stop - start))
                continue
            segment = self.segment(segment_id, source)
            assert segment is not None, "callers ask `usable` first"
            stretches.append(_stretch(segment, storages[segment.storage], locations, start, stop))
        return Located(self, stretches, spec_names)

    def placeholder(self, spec_names: tuple[str, ...] = ()) -> CacheLocation:
        """The location of a block that is not there: every spec with an empty URI."""
        specs = chosen(self._info.location_spec_infos, spec_names)
        return CacheLocation(
            spec_size=len(self._info.location_spec_infos),
            location_specs=tuple(LocationSpec(spec.name) for spec in specs),
        )

    def prepared(
        self, form: Form, segment: Segment, storage: StorageConfig, spec_names: tuple[str, ...]
    ) -> Any:
        """What `form` prepared for a segment, as long as its storage is the same."""
        key = (id(form), segment.segment_id, spec_names)
        known = self._prepared.get(key)
        if known is None or (known[0] is not storage and known[0] != storage):
            if len(self._prepared) >= _PIECES_MAX:
                self._prepared.clear()
            known = self._prepared[key] = (storage, form.prepare(segment, storage, spec_names))
        return known[1]


def _stretch(
    segment: Segment, storage: StorageConfig, locations: BlockLocations, start: int, stop: int
) -> Stretch:
    slots, generations = locations.slot[start:stop], locations.generation[start:stop]
    return Stretch(stop - start, segment, storage, slots, generations)


def chosen(specs: tuple[LocationSpecInfo, ...], names: tuple[str, ...]) -> tuple[LocationSpecInfo, ...]:
    return tuple(s for s in specs if s.name in names) if names else specs


# ------------------------------------------------------------------------------------------- JSON


class _Json:
    """Locations as elements of a JSON array."""

    separator = b","

    def prepare(self, segment: Segment, storage: StorageConfig, names: tuple[str, ...]) -> Pieces:
        head = b'{"type":"%s","spec_size":%d,"location_specs":[' % (
            storage.storage_type.name.encode(),
            len(segment.specs),
        )
        pieces = [head]
        for spec in chosen(segment.specs, names):
            before, between, after = uri_parts(storage, segment, spec.name, spec.size)
            comma = b"," if len(pieces) > 1 else b""
            pieces[-1] += comma + b'{"name":' + dumps(spec.name) + b',"uri":"' + _inner(before)
            pieces += [_inner(between), _inner(after) + b'"}']
        pieces[-1] += b"]}"
        return pieces

    def fill(
        self, prepared: Pieces, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint32]
    ) -> bytes:
        return _fill(prepared, slots, generations)

    def plain(self, location: CacheLocation) -> bytes:
        return encode(location)


JSON: Form = _Json()


def _inner(text: str) -> bytes:
    """`text` as the inside of a JSON string."""
    return dumps(text)[1:-1]


def digits(numbers: npt.NDArray[np.uint32]) -> list[bytes]:
    """Numbers as decimal text."""
    values = numbers.tolist()
    if len(values) > 1 and max(values) < len(_NUMBERS):
        return list(itemgetter(*values)(_NUMBERS))
    return list(map(b"%d".__mod__, values))


def _fill(pieces: Pieces, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint32]) -> bytes:
    """``pieces`` with the numbers between them, once for each location, joined by commas."""
    count, columns = len(slots), len(pieces) - 1
    if not columns:
        return b",".join([pieces[0]] * count)
    slot_texts, generation_texts = digits(slots), digits(generations)
    row = [pieces[-1] + b"," + pieces[0], *pieces[1:-1]]  # the row before ends inside its successor
    cells: list[bytes] = [b""] * (count * columns * 2)
    for column, piece in enumerate(row):
        cells[2 * column :: 2 * columns] = [piece] * count
        cells[2 * column + 1 :: 2 * columns] = generation_texts if column % 2 else slot_texts
    cells[0] = pieces[0]
    cells.append(pieces[-1])
    return b"".join(cells)
