"""Copies the blocks of a move from one storage to another, verified on both ends.

Reading checks the header and the checksum of every block, and writing makes a new header with a new
checksum over the very bytes that were checked. Pieces of a few MiB go through one buffer, so a move
needs no memory of its own size.

Before each piece the session must still be there and its lease must not be over: once it is, its
slots may belong to somebody else. Copying a session again writes the same bytes to the same slots.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.actors.throttle import Throttle
from kvcm_ray.core.events import COPIED, NOT_COPIED, UNREADABLE, Copied
from kvcm_ray.core.model import Segment
from kvcm_ray.core.records import SessionRecord
from kvcm_ray.core.requests import BlockLocations, Flags
from kvcm_ray.errors import KvcmError, NoStorageAvailable
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import StorageAdapter

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks (places in the session) that are in one segment and go to one other."""

    index: Index
    source: Segment
    target: Segment


class Copier:
    """Copies for one reclaimer; not for several threads.

    Args:
        adapter: of a storage by name; None if it is not registered (any more).
        throttle: asked before every piece.
    """

    def __init__(self, adapter: Callable[[str], StorageAdapter | None], throttle: Throttle) -> None:
        self._adapter = adapter
        self._throttle = throttle
        self._buffer = np.empty(PIECE_BYTES, np.uint8)

    def copy(self, reader: IndexReader, session: SessionRecord) -> Copied:
        """COPIED for each block whose bytes, verified, are at its new place, UNREADABLE for those whose
        bytes are not there.

        NOT_COPIED for blocks that cannot be written, that were removed meanwhile, and for all that are
        left when the session ends, its lease is over or the pool is paused.
        """
        copied = np.full(len(session.keys), NOT_COPIED, np.uint8)
        if len(session.source) != len(session.keys):
            return copied  # a client's session: nothing of ours
        segments = reader.segments()
        until = session.deadline_ms / 1_000
        for piece in _pieces(session, segments):
            nbytes = len(piece.index) * piece.target.slot_bytes
            if not self._throttle.admit(nbytes, until) or not _is_open(reader, session):
                break
            try:
                done = self._copy(session, piece)
                copied[piece.index] = np.where(done, COPIED, UNREADABLE)
            except KvcmError as error:
                log.warning("move %s to %s: %s", session.session_id, piece.target.path, error)
        return copied

    def _copy(self, session: SessionRecord, piece: _Piece) -> Flags:
        source, target = self._adapter(piece.source.storage), self._adapter(piece.target.storage)
        done = np.ones(len(piece.index), np.bool_)
        if source is None or target is None:
            raise NoStorageAvailable(f"{piece.source.storage} or {piece.target.storage} is not registered")
        keys = session.keys[piece.index]
        old, new = session.source.take(piece.index), session.locations.take(piece.index)
        for spec in piece.target.specs:
            if not done.any():
                break
            out = self._room(len(piece.index), spec.size)
            read = source.read(piece.source, spec.name, old.slot, keys, old.generation, out)
            done &= read
            data = out if done.all() else out[done]
            to = new.take(done)
            target.write(piece.target, spec.name, to.slot, keys[done], to.generation, data)
        return done

    def _room(self, blocks: int, size: int) -> npt.NDArray[np.uint8]:
        if blocks * size > len(self._buffer):
            self._buffer = np.empty(blocks * size, np.uint8)
        return self._buffer[: blocks * size].reshape(blocks, size)


def _pieces(session: SessionRecord, segments: Mapping[int, Segment]) -> Iterator[_Piece]:
    """The blocks that are still to be copied, each piece in the order of the slots it is read from."""
    wanted = np.flatnonzero(~session.removed)
    for (source_id, target_id), index in _by_place(session.source, session.locations, wanted):
        source, target = segments.get(source_id), segments.get(target_id)
        if source is None or target is None or source.specs != target.specs:
            continue
        index = index[np.argsort(session.source.slot[index], kind="stable")]
        largest = max((spec.size for spec in target.specs), default=1)
        step = max(1, PIECE_BYTES // max(largest, 1))
        for begin in range(0, len(index), step):
            yield _Piece(index[begin : begin + step], source, target)


def _by_place(
    old: BlockLocations, new: BlockLocations, wanted: Index
) -> Iterator[tuple[tuple[int, int], Index]]:
    """((segment from, segment to), places) of the `wanted` places."""
    pairs = np.stack([old.segment[wanted], new.segment[wanted]], axis=1)
    distinct, which = np.unique(pairs, axis=0, return_inverse=True)
    for number, (source_id, target_id) in enumerate(distinct.tolist()):
        yield (source_id, target_id), wanted[which.reshape(-1) == number]


def _is_open(reader: IndexReader, session: SessionRecord) -> bool:
    """The session is in the index as it was, and its time is not over."""
    if time.monotonic() * 1_000 >= session.deadline_ms:
        return False
    found = reader.session(session.session_id)
    return found is not None and found.generation == session.generation
