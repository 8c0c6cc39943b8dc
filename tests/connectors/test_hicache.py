"""Page keys, settings and prefix rules of the SGLang backend; real host pools are tested beside SGLang."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.connectors.hicache import page_keys, restorable, settings_of
from kvcm_ray.connectors.keys import hashes_of_tokens, keys_of_hashes, keys_of_tokens, salt_of
from kvcm_ray.errors import InvalidArgument


def test_page_names_are_block_hashes() -> None:
    names = [digest.hex() for digest in hashes_of_tokens(range(64), 16)]
    assert page_keys(names).tolist() == keys_of_tokens(range(64), 16).tolist()
    assert page_keys([]).tolist() == []


def test_what_stands_behind_the_hash_counts() -> None:
    digest = hashlib.sha256(b"page").digest()
    tails = [
        "",
        "_ukv1-0123456789abcdef_L0-4",
        "_ukv1-0123456789abcdef_L4-8",
        "_ukv1-0123456789abcdef_L0-4_H0",
    ]
    keys = page_keys([digest.hex() + tail for tail in tails]).tolist()
    assert len(set(keys)) == 4
    assert keys == [int(keys_of_hashes([digest], salt_of(tail=tail))[0]) for tail in tails]


@given(st.lists(st.text(max_size=80), unique=True, max_size=20))
def test_any_names_have_keys(names: list[str]) -> None:
    keys = page_keys(names)
    assert keys.dtype == np.int64
    assert len(set(keys.tolist())) == len(names)
    assert keys.tolist() == [int(page_keys([name])[0]) for name in names]


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 25))
def test_restorable_prefixes(flags: list[bool], trailing: int) -> None:
    expected = [
        length for length in range(1, len(flags) + 1) if all(flags[max(0, length - trailing) : length])
    ]
    assert restorable(np.array(flags, np.bool_), trailing).tolist() == expected


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"backend_name": "kvcm", "interface_v1": 1, "prefetch_threshold": 16}
    found = settings_of({**theirs, "kvcm_url": "http://m:1", "load_timeout_s": 2})
    assert (found.address, found.load_timeout_s, found.instance_group) == ("http://m:1", 2, "default")
    monkeypatch.setenv("KVCM_URL", "http://m:2")
    assert settings_of(theirs).address == "http://m:2"
    monkeypatch.setenv("KVCM_ADDRESS", "/data")
    assert settings_of(theirs).address == "/data"


@pytest.mark.parametrize(
    ("extra", "cause"),
    [
        ({"kvcm_url": "http://m:1", "kvcm_port": 3}, "kvcm_port"),
        ({"kvcm_url": 5}, "kvcm_url"),
        ({"kvcm_url": "http://m:1", "load_timeout_s": 0}, "load_timeout_s"),
        ({"kvcm_url": "http://m:1", "save_timeout_s": True}, "save_timeout_s"),
        ({"kvcm_url": "http://m:1", "kvcm_data_dir": "/d"}, "either"),
        ({}, "either"),
    ],
)
def test_wrong_settings_are_named(extra: dict[str, Any], cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCM_URL", raising=False)
    monkeypatch.delenv("KVCM_ADDRESS", raising=False)
    with pytest.raises(InvalidArgument, match=cause):
        settings_of(extra)
