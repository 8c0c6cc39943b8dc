"""Blocks on a kvcm-ray storage: read with proof, written so that a late writer can do no harm.

Reading: the slot's header names the block's key and generation. A manager gives a generation to one write
session, and a slot to one block of it, so a header with the generation of the URI is that of the block which
the manager meant; the storage's adapter then verifies the bytes against it.

Writing: a plain client does not know the key, so it cannot write a header; the manager seals the blocks when
they are reported as written. Until then a *pledge* lies in the header's place: to everybody else it is a mark
that proves nothing, like that of an erased block, but it names the generation that has the slot. So whoever
comes late, with an older generation, sees that and is refused; and if a pledge changed while its bytes were
being written, the write has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from kvcm_ray.connectors.py_client.config import Backend
from kvcm_ray.connectors.py_client.memory import Rows
from kvcm_ray.connectors.py_client.uris import Location
from kvcm_ray.core.model import Segment
from kvcm_ray.core.requests import U32
from kvcm_ray.errors import SegmentMissing, SessionNotFound
from kvcm_ray.storage_adapters import header, layout, system
from kvcm_ray.storage_adapters.handles import Handle, data_path
from kvcm_ray.storage_adapters.header import Headers
from kvcm_ray.storage_adapters.header_io import load_headers, save_headers

LOCK_WAIT_S = 1.0
SEGMENTS_MAX = 4096  #: remembered descriptions


class Segments:
    """Descriptions of the segments that URIs lead to, by data file. A segment never changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Segment, str]] = {}

    def find(self, backend: Backend, path: str) -> tuple[Segment, str]:
        """The segment and the spec of a data file. Raises SegmentMissing."""
        known = self._known.get(path)
        if known is not None:
            return known
        directory = Path(path).parent
        segment, _ = layout.read_description(directory)
        if segment is None or f"{backend.config.root_path}/{segment.path}" != str(directory):
            raise SegmentMissing(
                f"no segment of storage {backend.config.global_unique_name!r} at {directory}"
            )
        for spec in segment.specs:
            if str(data_path(directory, spec.name)) == path:
                with self._lock:
                    if len(self._known) >= SEGMENTS_MAX:
                        self._known.clear()
                    self._known[path] = segment, spec.name
                return segment, spec.name
        raise SegmentMissing(f"{segment.path} has no such spec: {path}")


def read(backend: Backend, segment: Segment, spec: str, places: Sequence[Location], out: Rows) -> bool:
    """Fill `out`, one row a block; True if every block is proved to be the one that its URI names.

    Raises:
        SegmentMissing, OSError, StorageError.
    """
    slots, generations = _numbers(places)
    where = slots.astype(np.int64)
    with closing(_open(backend, segment, spec)) as handle:
        keys = load_headers(handle, where)["key"].copy()
    flags = backend.adapter.read(segment, spec, slots, keys, generations, list(out))
    return bool(flags.all())


def write(backend: Backend, segment: Segment, spec: str, places: Sequence[Location], rows: Rows) -> None:
    """Store `rows`, one whole slot each, under pledges.

    Raises:
        SessionNotFound: the slots' session has ended; some of them may be a later one's.
        SegmentMissing, OSError.
    """
    slots, generations = _numbers(places)
    where = slots.astype(np.int64)
    with closing(_open(backend, segment, spec)) as handle:
        first, last = int(where.min()), int(where.max())
        handle.require(last + 1)
        with handle.locked(first, last - first + 1, wait_s=LOCK_WAIT_S):
            _refuse_late(handle, where, generations)
            pledges = _pledges(handle, where, generations, rows)
            save_headers(handle, where, pledges)
            for slot, row in zip(where.tolist(), rows, strict=True):
                system.write_from(handle.data, [row], slot * handle.size)
            if handle.unlinked or not header.same(load_headers(handle, where), pledges).all():
                raise SessionNotFound(f"slots of {segment.path} were taken back during the write")


def _open(backend: Backend, segment: Segment, spec: str) -> Handle:
    return Handle(Path(backend.config.root_path) / segment.path, segment, spec)


def _numbers(places: Sequence[Location]) -> tuple[U32, U32]:
    slots = np.array([place.slot for place in places], np.uint32)
    return slots, np.array([place.generation for place in places], np.uint32)


def _refuse_late(handle: Handle, where: header.Slots, generations: U32) -> None:
    """Only an older block's slot, or one that this session has pledged, may be written.

    Raises:
        SessionNotFound: a slot is a later session's, or this one's block is sealed or erased already.
    """
    rows = load_headers(handle, where)
    marks = header.is_erased(rows)
    pledged = marks & (rows["length"] > 0)
    ended = marks | header.valid(rows, handle.segment.tag, handle.spec_name, where)
    ended &= np.where(pledged, rows["generation"] > generations, rows["generation"] >= generations)
    if ended.any():
        text = f"slots of {handle.segment.path} are not to be written by this session any more"
        raise SessionNotFound(text)


def _pledges(handle: Handle, where: header.Slots, generations: U32, rows: Rows) -> Headers:
    """Marks with a length (an erased block's has none) and the checksum of the bytes, without a key."""
    no_keys = np.zeros(len(where), np.int64)
    seeds = header.seeds(handle.segment.tag, handle.spec_name, where, no_keys, generations)
    sums = header.checksums(rows, seeds)
    pledges = header.build(
        handle.segment.tag, handle.spec_name, where, no_keys, generations, handle.size, sums
    )
    pledges["magic"] = header.ERASED_MAGIC
    return pledges
