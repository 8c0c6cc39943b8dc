"""Callers' buffers: what is accepted, that nothing is copied, and what is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvcm_ray.client.buffers import by_spec, rows_of, select
from kvcm_ray.errors import InvalidArgument


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros((3, 8), np.uint8),
        lambda: np.zeros((3, 2, 2), np.float16),
        lambda: np.zeros(24, np.uint8),
        lambda: bytearray(24),
        lambda: memoryview(bytearray(24)),
        lambda: memoryview(bytearray(24)).cast("Q"),
    ],
)
def test_one_buffer_over_all_blocks_is_viewed(make: Any) -> None:
    buffer = make()
    rows = rows_of(buffer, 3, 8, writable=True)
    rows[2][7] = 9
    whole = buffer.reshape(-1).view(np.uint8) if isinstance(buffer, np.ndarray) else buffer
    assert bytes(memoryview(whole).cast("B"))[-1] == 9


def test_one_buffer_a_block_is_viewed() -> None:
    buffers = [bytearray(8), np.zeros(4, np.int16), memoryview(bytearray(8))]
    rows = rows_of(buffers, 3, 8, writable=True)
    for row in rows:
        row[:] = 5
    assert buffers[0] == bytes([5] * 8)
    assert buffers[1].tolist() == [0x0505] * 4


def test_bytes_may_be_written_from_but_not_into() -> None:
    assert rows_of(b"x" * 8, 1, 8, writable=False)[0][0] == ord("x")
    with pytest.raises(InvalidArgument, match="read-only"):
        rows_of(b"x" * 8, 1, 8, writable=True)
    frozen = np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(InvalidArgument, match="read-only"):
        rows_of(frozen, 1, 8, writable=True)


@pytest.mark.parametrize(
    ("buffers", "cause"),
    [
        (bytearray(23), "23 bytes where 24"),
        ([bytearray(8)] * 2, "2 buffers given for 3 blocks"),
        ([bytearray(8), bytearray(7), bytearray(8)], "buffer 1 has 7 bytes"),
        (np.zeros((3, 16), np.uint8)[:, :8], "not contiguous"),
        (memoryview(bytearray(48))[::2], "not contiguous"),
        (24, "int, not a buffer"),
        (None, "NoneType, not a buffer"),
        ("x" * 24, "str, not a buffer"),
    ],
)
def test_bad_buffers_are_named(buffers: Any, cause: str) -> None:
    with pytest.raises(InvalidArgument, match=cause):
        rows_of(buffers, 3, 8, writable=True)


def test_no_blocks_need_no_buffers() -> None:
    assert len(rows_of([], 0, 8, writable=True)) == 0
    assert len(rows_of(bytearray(0), 0, 8, writable=True)) == 0


def test_select_gives_views() -> None:
    whole = np.zeros((5, 4), np.uint8)
    for index in ([1, 2, 3], [0, 2, 4], [4]):
        for row in select(whole, np.array(index)):
            row[:] += 1
    assert whole[:, 0].tolist() == [1, 1, 2, 1, 2]
    assert len(select(whole, np.array([], np.intp))) == 0


def test_torch_tensors_are_viewed() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros((3, 4), dtype=torch.bfloat16)
    rows_of(tensor, 3, 8, writable=True)[1][:] = 0xFF
    assert tensor.view(torch.uint8)[1].tolist() == [0xFF] * 8
    with pytest.raises(InvalidArgument, match="not contiguous"):
        rows_of(torch.zeros((8, 3), dtype=torch.uint8).T, 3, 8, writable=True)


def test_which_spec_is_meant() -> None:
    assert by_spec(b"x", None, ["tp0"]) == {"tp0": b"x"}
    assert by_spec(b"x", "tp1", ["tp0", "tp1"]) == {"tp1": b"x"}
    assert by_spec({"tp1": b"x"}, None, ["tp0", "tp1"]) == {"tp1": b"x"}
    for buffers, spec in ((b"x", None), (b"x", "tp7"), ({"tp7": b"x"}, None), ({}, None)):
        with pytest.raises(InvalidArgument, match="tp0, tp1"):
            by_spec(buffers, spec, ["tp0", "tp1"])
    with pytest.raises(InvalidArgument, match="not both"):
        by_spec({"tp0": b"x"}, "tp0", ["tp0", "tp1"])
