"""Prefix and window matching against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.core.match import last_window, prefix_length
from kvcm_ray.errors import InvalidArgument

flags = st.lists(st.booleans(), max_size=24)


@given(flags)
def test_prefix_length(hits: list[bool]) -> None:
    expected = next((i for i, hit in enumerate(hits) if not hit), len(hits))
    assert prefix_length(np.array(hits, np.bool_)) == expected


@given(flags, st.integers(-2, 26))
def test_last_window(hits: list[bool], size: int) -> None:
    array = np.array(hits, np.bool_)
    if not 1 <= size <= len(hits):
        with pytest.raises(InvalidArgument, match="sw_size"):
            last_window(array, size)
        return
    starts = [i for i in range(len(hits) - size + 1) if all(hits[i : i + size])]
    assert last_window(array, size) == (starts[-1] if starts else None)
