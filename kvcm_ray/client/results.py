"""What calls of the client give back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.requests import BlockLocations, Flags, Keys
from kvcm_ray.core.uri import location_uri
from kvcm_ray.errors import KvcmError


def uris_of(blocks: Blocks, spec: str) -> list[str]:
    """Location URIs of one spec of `blocks`; "" where a block has none."""
    uris = []
    locations = blocks.locations
    for segment_id, slot, generation in zip(
        locations.segment.tolist(), locations.slot.tolist(), locations.generation.tolist(),
        strict=True,
    ):  # fmt: skip
        segment = blocks.segments.get(segment_id)
        sizes = {s.name: s.size for s in segment.specs} if segment else {}
        if segment is None or spec not in sizes or segment.storage not in blocks.storages:
            uris.append("")
            continue
        storage = blocks.storages[segment.storage]
        uris.append(location_uri(storage, segment, spec, sizes[spec], slot, generation))
    return uris


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of the asked keys that the cache holds."""

    length: int  #: blocks, counted from the first key
    blocks: Blocks  #: those blocks, in order
    error: KvcmError | None = None  #: why nothing could be looked up (length is 0 then), or leased
    leased_s: float = 0.0  #: these blocks are not reclaimed for so long; 0 = no such promise

    @property
    def locations(self) -> BlockLocations:
        return self.blocks.locations

    def uris(self, spec: str) -> list[str]:
        return uris_of(self.blocks, spec)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Which of the asked keys the cache holds, each for itself."""

    flags: Flags  #: one for each key
    blocks: Blocks  #: the found ones, in order

    def uris(self, spec: str) -> list[str]:
        return uris_of(self.blocks, spec)


class PutResult(int):
    """Blocks that this call stored; as a number, with the details beside it."""

    existed: int  #: blocks that were there already, so were not written
    flags: Flags  #: one for each key: in the cache after this call, as far as it knows
    error: KvcmError | None  #: why some are not

    def __new__(cls, stored: int, existed: int, flags: Flags, error: KvcmError | None) -> PutResult:
        self = super().__new__(cls, stored)
        self.existed, self.flags, self.error = existed, flags, error
        return self

    @staticmethod
    def nothing(count: int, error: KvcmError) -> PutResult:
        return PutResult(0, 0, np.zeros(count, np.bool_), error)


class GetResult(int):
    """Leading blocks whose verified bytes are in the buffers: a number, with details beside it."""

    flags: Flags  #: one for each key: its buffer holds its bytes
    error: KvcmError | None  #: what went wrong, if it was more than a miss

    def __new__(cls, flags: Flags, error: KvcmError | None) -> GetResult:
        leading = len(flags) if flags.all() else int(np.argmin(flags))
        self = super().__new__(cls, leading)
        self.flags, self.error = flags, error
        return self

    @staticmethod
    def nothing(count: int, error: KvcmError) -> GetResult:
        return GetResult(np.zeros(count, np.bool_), error)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """All that a process needs to write its part of a session's blocks; can be pickled.

    The scheduler of a tensor-parallel engine starts the session and sends the plan to its ranks;
    each calls `Instance.write` with its own spec, and one of them finishes the session.
    """

    session_id: str
    exists: Flags  #: one for each key of the request; True = nothing to write
    blocks: Blocks  #: those to be written, in request order
    deadline_s: float  #: CLOCK_MONOTONIC of this boot: no byte may be written after this

    @property
    def todo(self) -> npt.NDArray[np.intp]:
        """Positions, among the keys of the request, of `blocks`."""
        return np.flatnonzero(~self.exists)

    @property
    def keys(self) -> Keys:
        return self.blocks.keys

    def uris(self, spec: str) -> list[str]:
        return uris_of(self.blocks, spec)
