"""What a storage does for us: segments of fixed-size slots, with proof of what each slot holds.

The rules every storage keeps (one conformance suite checks them on all):

* ``read`` returns the very bytes that were written for (segment tag, spec, slot, key, generation),
  or says miss. A vanished, shortened, torn, overwritten or rotten slot is a miss, not an exception.
* ``write`` wrote all of its blocks, or raises. A full storage is `StorageFull`, never a signal.
* ``delete`` names (slot, generation); a slot that another session owns by now is left alone.
* Payload first, then header; header erased first, then payload. So a header is a proof, always.

Arrays are parallel, one element a block: ``uint32`` slots and generations, ``int64`` keys. Adapters
may be used by many threads at once. They know nothing of the index, of quotas or of Ray.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import Segment
from kvcm_ray.core.requests import U32, Flags, Keys
from kvcm_ray.errors import SegmentMissing
from kvcm_ray.storage_adapters import header

#: Anything with contiguous memory in this process: numpy array, memoryview, bytearray, bytes (only
#: to write), CPU torch tensor. Its length in bytes is the size of the spec.
Buffer = Any
#: One buffer a block. A C-contiguous numpy array of shape (blocks, bytes) is the fastest form.
Buffers = Sequence[Buffer] | npt.NDArray[Any]
Headers = header.Headers  #: structured array with `header.HEADER` fields


@dataclass(frozen=True, slots=True)
class SegmentOwner:
    """Who a segment was made for; kept beside its bytes, to know them without an index."""

    group: str
    instance_id: str
    uid: str


@dataclass(frozen=True, slots=True)
class FoundSegment:
    """A segment directory as found on a storage."""

    path: str  #: relative to the storage's root
    segment: Segment | None  #: None if its description is missing or unreadable
    owner: SegmentOwner | None
    stored_bytes: int  #: allocated bytes, as the file system counts them


class StorageAdapter(abc.ABC):
    """One storage of one `StorageConfig`, seen from this process."""

    name: str  #: `StorageConfig.global_unique_name`

    @abc.abstractmethod
    def create_segment(self, segment: Segment, owner: SegmentOwner) -> None:
        """Make an empty segment. Doing it again changes nothing (nor any byte within).

        Raises:
            AlreadyExists: another shape of segment is there.
            StorageFull, StorageIOError.
        """

    @abc.abstractmethod
    def drop_segment(self, segment: Segment) -> int:
        """Remove a segment with all its bytes; returns the bytes freed, 0 if it is gone already.

        Raises:
            StorageIOError.
        """

    @abc.abstractmethod
    def prepare(self, segment: Segment, first_slot: int, count: int) -> None:
        """Allocate the space of slots, so that writing them cannot fail for want of it.

        Raises:
            StorageFull: some of the slots may have been allocated; `delete` gives them back.
            SegmentMissing, StorageIOError.
        """

    @abc.abstractmethod
    def write(
        self,
        segment: Segment,
        spec_name: str,
        slots: U32,
        keys: Keys,
        generations: U32,
        buffers: Buffers,
    ) -> None:
        """Store one block in each slot: the payload, then its header.

        Raises:
            InvalidArgument: unequal lengths, a slot out of range, a buffer of another size.
            SessionNotFound: a slot carries a newer generation (the session expired and the slot was
                given to another one); nothing was written.
            SegmentMissing, StorageFull, StorageIOError: none of the blocks may be called written.
        """

    @abc.abstractmethod
    def read(
        self,
        segment: Segment,
        spec_name: str,
        slots: U32,
        keys: Keys,
        generations: U32,
        out: Buffers,
    ) -> Flags:
        """Fill `out`; True for each block whose bytes are verified, False for a miss.

        Buffers of misses have undefined content.

        Raises:
            InvalidArgument: unequal lengths, a buffer of another size or a read-only one.
        """

    @abc.abstractmethod
    def seal(self, segment: Segment, spec_name: str, slots: U32, keys: Keys, generations: U32) -> Flags:
        """Write headers for payloads that a plain protocol client stored without any.

        The checksum is that of the bytes present now. Only slots without a header are sealed.
        Returns True for each slot that carries a header of this key and generation afterwards,
        False if the slot is another's, was never written, or is missing.

        Raises:
            InvalidArgument, StorageFull, StorageIOError.
        """

    def sealed(self, segment: Segment, spec_name: str, slots: U32, keys: Keys, generations: U32) -> Flags:
        """Which slots carry a header of this key and generation; False for all if the segment is gone.

        Looks at headers only: quick, takes no lock, and says nothing about payloads.

        Raises:
            InvalidArgument, StorageIOError.
        """
        where = np.asarray(slots, np.int64)
        size = next(spec.size for spec in segment.specs if spec.name == spec_name)
        try:
            rows = self.raw_headers(segment, spec_name)
        except SegmentMissing:
            return np.zeros(len(where), np.bool_)
        found = where < len(rows)
        rows = rows[np.where(found, where, 0)] if len(rows) else np.zeros(len(where), header.HEADER)
        return found & header.matching(rows, segment.tag, spec_name, where, keys, generations, size)

    @abc.abstractmethod
    def delete(self, segment: Segment, slots: U32, generations: U32) -> int:
        """Erase headers, then payloads, of all specs; returns the payload bytes given back.

        A slot whose header carries another generation is left alone; one without a readable
        header is erased. Idempotent; a missing segment counts as erased.

        Raises:
            InvalidArgument: unequal lengths or a slot out of range.
            StorageIOError.
        """

    @abc.abstractmethod
    def raw_headers(self, segment: Segment, spec_name: str) -> Headers:
        """Headers as they are, of the slots 0, 1, ... that lie within the files.

        Fewer than the segment has slots if a file is too short.

        Raises:
            SegmentMissing, StorageIOError.
        """

    @abc.abstractmethod
    def written_slots(self, segment: Segment, spec_name: str) -> Flags:
        """Which slots have a payload, with or without a header: one flag for each slot.

        All True where the storage cannot tell holes from data, or slots share pages.

        Raises:
            SegmentMissing, StorageIOError.
        """

    def headers(self, segment: Segment, spec_name: str) -> Headers:
        """Valid headers of a segment in slot order, with the fields of `header.HEADER`.

        Headers with a wrong CRC, tag, spec or place are left out. Empty if the segment is gone.

        Raises:
            StorageIOError.
        """
        try:
            rows = self.raw_headers(segment, spec_name)
        except SegmentMissing:
            return np.zeros(0, header.HEADER)
        where = np.arange(len(rows), dtype=np.int64)
        return rows[header.valid(rows, segment.tag, spec_name, where)]

    @abc.abstractmethod
    def check_segment(self, segment: Segment) -> str:
        """ "What is wrong with the segment's files (missing, too short), or an empty string."""

    @abc.abstractmethod
    def list_segments(self) -> Iterator[FoundSegment]:
        """Every segment on this storage, whether an index knows it or not."""

    @abc.abstractmethod
    def stored_bytes(self, segment: Segment) -> int:
        """Bytes allocated for a segment, headers included; 0 if it is gone."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back file handles and mappings. The adapter can still be used afterwards."""
