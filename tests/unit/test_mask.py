"""BlockMask: the lenient form of reads, the strict form of finishing, the form of answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.core.mask import BlockMask
from kvcm_ray.errors import InvalidArgument


@given(st.lists(st.booleans(), max_size=20))
def test_from_flags_says_what_it_was_given(flags: list[bool]) -> None:
    mask = BlockMask.from_flags(np.array(flags, np.bool_))
    assert mask.covers(len(flags)).tolist() == flags
    is_prefix = flags == sorted(flags, reverse=True)
    assert (mask.offset is not None) == is_prefix


@given(st.lists(st.booleans(), max_size=8), st.integers(0, 12))
def test_values_cover_leniently(values: list[bool], count: int) -> None:
    expected = (values + [False] * count)[:count]
    assert BlockMask(values=tuple(values)).covers(count).tolist() == expected


@pytest.mark.parametrize(("offset", "masked"), [(0, 0), (2, 2), (4, 4), (9, 4), (-1, 4)])
def test_offset_covers_leniently(offset: int, masked: int) -> None:
    assert BlockMask(offset=offset).covers(4).tolist() == [i < masked for i in range(4)]


def test_no_mask_covers_nothing() -> None:
    assert BlockMask().covers(3).tolist() == [False] * 3


@pytest.mark.parametrize(
    "mask",
    [BlockMask(offset=4), BlockMask(offset=-1), BlockMask(values=(True,)), BlockMask()],
)
def test_exactly_refuses_what_does_not_fit(mask: BlockMask) -> None:
    with pytest.raises(InvalidArgument, match="success_blocks"):
        mask.exactly(3)


def test_exactly() -> None:
    assert BlockMask(offset=2).exactly(3).tolist() == [True, True, False]
    assert BlockMask(values=(False, True)).exactly(2).tolist() == [False, True]
    assert BlockMask(offset=0).exactly(0).tolist() == []
    assert BlockMask().exactly(0).tolist() == []
