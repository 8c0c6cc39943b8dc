"""Block keys from tokens: the protocol's vectors, and properties that hold for all tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.core import hashing
from kvcm_ray.core.hashing import block_keys_from_tokens
from kvcm_ray.errors import InvalidArgument

VECTORS = [
    ([1], 1, [-7046029254386353130]),
    ([1, 2, 3, 4], 2, [-8366447769517741626, 455111481605203084]),
    (list(range(1, 10)), 4, [455111481605203084, 6902853672176602142]),
    (
        [100, 200, 300],
        1,
        [-7046029254386353031, -8366447769518081297, 8024479186332561338],
    ),
    ([-1, 0], 1, [-7046029254386353132, -8366447769517733414]),
    ([1, 2, 3], 4, []),
    ([], 1, []),
]

int64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(("tokens", "block_size", "keys"), VECTORS)
def test_vectors(tokens: list[int], block_size: int, keys: list[int]) -> None:
    assert block_keys_from_tokens(tokens, block_size).tolist() == keys
    assert block_keys_from_tokens(np.array(tokens, np.int64), block_size).tolist() == keys


@given(st.lists(int64, max_size=40), st.integers(1, 8))
def test_equals_signed_arithmetic(tokens: list[int], block_size: int) -> None:
    """Against the formula written with numpy's wrapping signed numbers."""
    expected, h = [], np.int64(0)
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for i, token in enumerate(tokens, 1):
            mixed = np.int64(token).view(np.uint64) + golden
            mixed += (h << np.int64(12)).view(np.uint64) + (h >> np.int64(32)).view(np.uint64)
            h = (h.view(np.uint64) ^ mixed).view(np.int64)
            if i % block_size == 0:
                expected.append(int(h))
    assert block_keys_from_tokens(tokens, block_size).tolist() == expected


@given(st.lists(int64, max_size=40), st.lists(int64, max_size=20), st.integers(1, 8))
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(
    tokens: list[int], more: list[int], block_size: int
) -> None:
    head = block_keys_from_tokens(tokens, block_size).tolist()
    assert block_keys_from_tokens(tokens + more, block_size).tolist()[: len(head)] == head


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_must_be_positive(block_size: int) -> None:
    with pytest.raises(InvalidArgument, match="block_size"):
        block_keys_from_tokens([1, 2], block_size)


def test_too_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "TOKENS_PER_CALL_MAX", 4)
    assert len(block_keys_from_tokens([1] * 4, 1)) == 4
    with pytest.raises(InvalidArgument, match="more than 4"):
        block_keys_from_tokens([1] * 5, 1)
