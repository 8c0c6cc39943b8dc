"""The block header: its layout on disk, and what its checks catch."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from kvcm_ray.storage_adapters import header, ranges


def one(slot: int = 3, tag: int = 2**64 - 1) -> header.Headers:
    return header.build(
        tag, "tp0", np.array([slot]), np.array([-5]), np.array([9], np.uint32), 100,
        np.array([0x1122334455667788], np.uint64),
    )  # fmt: skip


def test_the_layout_is_fixed() -> None:
    """Written files outlive versions of this code."""
    raw = one().tobytes()
    assert len(raw) == header.HEADER_BYTES
    assert raw[:8] == b"KVBH" + bytes([1, 0, 0, 0])
    assert int.from_bytes(raw[8:16], "little", signed=True) == -5
    assert raw[16:24] == b"\xff" * 8
    assert int.from_bytes(raw[24:32], "little") == 9
    assert int.from_bytes(raw[32:40], "little") == 100
    assert int.from_bytes(raw[40:48], "little") == 0x1122334455667788
    assert int.from_bytes(raw[48:56], "little") == header.spec_id("tp0")
    assert int.from_bytes(raw[56:60], "little") == 3
    assert int.from_bytes(raw[60:64], "little") == zlib.crc32(raw[:60])


def test_the_crc_catches_every_flipped_bit() -> None:
    rows = one()
    assert header.valid(rows, 2**64 - 1, "tp0", np.array([3])).all()
    raw = rows.view(np.uint8)
    for bit in range(512):
        raw[bit // 8] ^= np.uint8(1 << bit % 8)
        assert not header.valid(rows, 2**64 - 1, "tp0", np.array([3])).any()
        raw[bit // 8] ^= np.uint8(1 << bit % 8)


@pytest.mark.parametrize(
    ("tag", "spec", "slot"), [(1, "tp0", 3), (2**64 - 1, "tp1", 3), (2**64 - 1, "tp0", 4)]
)
def test_a_header_from_elsewhere_is_not_valid(tag: int, spec: str, slot: int) -> None:
    assert not header.valid(one(), tag, spec, np.array([slot])).any()


def test_empty_and_same() -> None:
    rows = np.concatenate([one(), np.zeros(1, header.HEADER)])
    assert header.empty(rows).tolist() == [False, True]
    assert header.same(rows, rows).tolist() == [True, True]
    assert header.same(rows, rows[::-1].copy()).tolist() == [False, False]


def test_pieces_are_runs_of_wanted_slots() -> None:
    where = np.array([4, 5, 6, 9, 10, 3, 3], np.int64)
    found = [(p.begin, p.end, p.slot) for p in ranges.pieces(where, 100)]
    assert found == [(0, 3, 4), (3, 5, 9), (5, 6, 3), (6, 7, 3)]
    wanted = np.array([1, 0, 1, 1, 1, 0, 1], np.bool_)
    found = [(p.begin, p.end, p.slot) for p in ranges.pieces(where, 100, wanted)]
    assert found == [(0, 1, 4), (2, 3, 6), (3, 5, 9), (6, 7, 3)]
    assert ranges.pieces(np.zeros(0, np.int64), 100) == []
    long = ranges.pieces(np.arange(10), 300_000)
    assert [(p.begin, p.end) for p in long] == [(0, 3), (3, 6), (6, 9), (9, 10)]
