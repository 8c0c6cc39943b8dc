"""The block header: 64 bytes that prove what a slot holds.

One header a slot and spec, kept in a file of its own so that payloads stay aligned. A header says
which key, segment (``tag``), spec and slot it belongs to, which session wrote it (``generation``),
how long the payload is and what it hashes to. All zeros means that nothing was ever written; erasing
leaves a mark that names the erased generation, so that a block whose bytes were erased by mistake can
be told from one whose writer (a plain protocol client) never wrote a header. Both prove nothing: `blank`.

The payload's checksum is seeded with the block's key, generation and place. So it proves all of
them at once, even if the header is torn between an old and a new one, and `matching` needs no look
at the header's own CRC. Where no payload is read (fsck, rebuild, deletes) `valid` checks the CRC.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from kvcm_ray.core.requests import U32, Flags, Keys

HEADER_BYTES = 64
MAGIC = int.from_bytes(b"KVBH", "little")
ERASED_MAGIC = int.from_bytes(b"KVBE", "little")
VERSION = 1
CRC_OFFSET = 60  #: the CRC covers everything before it

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("flags", "<u2"),  #: none defined; zero
        ("key", "<i8"),
        ("tag", "<u8"),
        ("generation", "<u8"),
        ("length", "<u8"),  #: bytes of payload
        ("checksum", "<u8"),  #: `checksum` of the payload
        ("spec", "<u8"),
        ("slot", "<u4"),
        ("crc", "<u4"),  #: CRC-32 of the 60 bytes before
    ]
)
assert HEADER.itemsize == HEADER_BYTES

Headers = npt.NDArray[np.void]
Slots = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@functools.lru_cache(maxsize=4096)
def spec_id(spec_name: str) -> int:
    """Unsigned 64-bit identity of a spec name."""
    return int.from_bytes(hashlib.blake2b(spec_name.encode(), digest_size=8).digest(), "little")


_digest: Callable[[Any, int], int] = xxhash.xxh3_64_intdigest
#: Odd constants, so that a change of any part of an identity changes the seed.
_KEY, _GENERATION, _PLACE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_MASK = 2**64 - 1


def seeds(tag: int, spec_name: str, slots: Slots, keys: Keys, generations: U32) -> list[int]:
    """Seeds of the payload checksums of blocks."""
    place = np.uint64((tag * _PLACE ^ spec_id(spec_name)) & _MASK)
    mixed = np.asarray(keys, np.int64).astype(np.uint64) * np.uint64(_KEY)
    mixed ^= np.asarray(generations, np.uint64) * np.uint64(_GENERATION)
    mixed ^= np.asarray(slots, np.uint64) * np.uint64(_PLACE) ^ place
    found: list[int] = mixed.tolist()
    return found


def checksums(payloads: Iterable[Bytes], seeds: Iterable[int]) -> npt.NDArray[np.uint64]:
    """Seeded xxh3_64 of each payload. Releases the GIL while it hashes large ones."""
    return np.fromiter(map(_digest, payloads, seeds), np.uint64)


def build(
    tag: int,
    spec_name: str,
    slots: Slots,
    keys: Keys,
    generations: U32,
    size: int,
    checksums: npt.NDArray[np.uint64],
) -> Headers:
    """Headers of shape (n,), ready to be written."""
    rows: Headers = np.zeros(len(slots), HEADER)
    rows["magic"], rows["version"] = MAGIC, VERSION
    rows["key"], rows["generation"] = keys, generations
    rows["tag"], rows["spec"] = tag, spec_id(spec_name)
    rows["length"], rows["checksum"] = size, checksums
    rows["slot"] = slots
    rows["crc"] = _crcs(rows)
    return rows


def matching(
    rows: Headers,
    tag: int,
    spec_name: str,
    slots: Slots,
    keys: Keys,
    generations: U32,
    size: int,
) -> Flags:
    """Which headers claim exactly this key, generation, place and length."""
    flags: Flags = np.equal(rows["key"], keys) & np.equal(rows["generation"], generations)
    flags &= (rows["slot"] == slots) & (rows["tag"] == tag) & (rows["length"] == size)
    flags &= (rows["magic"] == MAGIC) & (rows["version"] == VERSION) & (rows["flags"] == 0)
    flags &= rows["spec"] == spec_id(spec_name)
    return flags


def valid(rows: Headers, tag: int, spec_name: str, slots: Slots) -> Flags:
    """Which headers are whole and belong to this segment, spec and slot."""
    flags: Flags = np.ones(len(rows), np.bool_)
    flags &= rows["slot"] == slots
    flags &= (rows["magic"] == MAGIC) & (rows["version"] == VERSION)
    flags &= (rows["tag"] == tag) & (rows["spec"] == spec_id(spec_name))
    if flags.any():
        flags[flags] = rows["crc"][flags] == _crcs(rows[flags])
    return flags


def empty(rows: Headers) -> Flags:
    """Which headers are all zeros."""
    return np.asarray(_words(rows).any(axis=1) == 0, np.bool_)


def erased(generations: npt.NDArray[Any]) -> Headers:
    """Marks of erased blocks."""
    rows: Headers = np.zeros(len(generations), HEADER)
    rows["magic"], rows["version"], rows["generation"] = ERASED_MAGIC, VERSION, generations
    return rows


def is_erased(rows: Headers) -> Flags:
    return np.asarray(rows["magic"] == ERASED_MAGIC, np.bool_)


def pledged(rows: Headers) -> Flags:
    """Which marks are pledges: of a writer that knows no keys, with the checksum of what it writes.

    Nobody reads a block by a pledge; it is sealed, once the key is known, if its bytes are there.
    """
    return np.asarray(is_erased(rows) & (rows["length"] > 0), np.bool_)


def blank(rows: Headers) -> Flags:
    """Which slots have no header: nothing written, erased, or pledged."""
    return empty(rows) | is_erased(rows)


def same(first: Headers, second: Headers) -> Flags:
    """Which headers are equal bit by bit."""
    return np.asarray((_words(first) == _words(second)).all(axis=1), np.bool_)


def _words(rows: Headers) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(rows).view(np.uint64).reshape(len(rows), HEADER_BYTES // 8)


def _crcs(rows: Headers) -> list[int]:
    data = rows.tobytes()
    ends = range(CRC_OFFSET, len(data), HEADER_BYTES)
    return [zlib.crc32(data[end - CRC_OFFSET : end]) for end in ends]
