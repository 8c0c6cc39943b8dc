"""The block key scheme of engines: fixed vectors, what must differ and what must not."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.connectors.keys import (
    hashes_of_tokens,
    keys_of_hashes,
    keys_of_hex,
    keys_of_tokens,
    salt_of,
)
from kvcm_ray.errors import InvalidArgument

hashes = st.lists(st.binary(min_size=8, max_size=40), max_size=20)
salts = st.integers(0, 2**64 - 1)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def test_vectors() -> None:
    """Stored blocks are found by these numbers: they never change."""
    assert keys_of_hashes([bytes(range(32)), b"\xff" * 32]).tolist() == [506097522914230528, -1]
    assert keys_of_hashes([bytes(range(8))], 1).tolist() == [506097522914230529]
    assert keys_of_tokens(range(8), 4).tolist() == [-42079164099662406, 4312484882846269697]
    assert keys_of_tokens(range(8), 4, 5, inputs={5: b"img"}).tolist() == [
        -42079164099662401, 6263931083118493126,
    ]  # fmt: skip
    assert salt_of(lora="a", tenant="b") == 497465829614295518


def test_the_same_in_another_process() -> None:
    code = (
        "from kvcm_ray.connectors.keys import *;"
        "print(keys_of_tokens(range(8), 4, salt_of(lora='a', tenant='b')).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(keys_of_tokens(range(8), 4, salt_of(lora="a", tenant="b")).tolist())


@given(hashes, salts)
def test_equals_the_definition(given_hashes: list[bytes], salt: int) -> None:
    expected = [
        struct.unpack("<q", struct.pack("<Q", int.from_bytes(value[:8], "little") ^ salt))[0]
        for value in given_hashes
    ]
    keys = keys_of_hashes(given_hashes, salt)
    assert (keys.dtype, keys.tolist()) == (np.int64, expected)
    assert keys_of_hex([value.hex() for value in given_hashes], salt).tolist() == expected
    assert keys_of_hex([value.hex().upper() for value in given_hashes], salt).tolist() == expected


@given(tokens, st.integers(1, 9), st.binary(max_size=32))
def test_token_hashes_equal_the_definition(given_tokens: list[int], size: int, seed: bytes) -> None:
    expected, parent = [], seed
    for block in range(len(given_tokens) // size):
        part = given_tokens[block * size : (block + 1) * size]
        parent = hashlib.sha256(parent + b"".join(struct.pack("<I", t) for t in part)).digest()
        expected.append(parent)
    assert hashes_of_tokens(given_tokens, size, seed=seed) == expected
    assert hashes_of_tokens(np.array(given_tokens, np.int64), size, seed=seed) == expected


@given(tokens, tokens, st.integers(1, 9), salts)
def test_keys_of_a_prefix_are_a_prefix(head: list[int], more: list[int], size: int, salt: int) -> None:
    short = keys_of_tokens(head, size, salt).tolist()
    assert keys_of_tokens(head + more, size, salt).tolist()[: len(short)] == short


def test_a_change_anywhere_changes_all_that_follows() -> None:
    prompt = list(range(64))
    keys = keys_of_tokens(prompt, 16)
    for at in (0, 17, 63):
        changed = keys_of_tokens([*prompt[:at], 999, *prompt[at + 1 :]], 16)
        assert (changed != keys).tolist() == [block >= at // 16 for block in range(4)]


def test_inputs_count_from_where_they_are() -> None:
    prompt = list(range(64))
    plain = keys_of_tokens(prompt, 16)
    cat = keys_of_tokens(prompt, 16, inputs={20: b"cat"})
    assert (cat != plain).tolist() == [False, True, True, True]
    others = [
        keys_of_tokens(prompt, 16, inputs=inputs).tolist()
        for inputs in ({20: b"dog"}, {21: b"cat"}, {20: b"cat", 21: b"dog"}, {20: b"ca", 21: b"t"})
    ]
    assert len({keys[1] for keys in [cat.tolist(), *others]}) == 5


def test_salts() -> None:
    assert salt_of() == salt_of(lora=None, tenant="") == 0
    assert salt_of(a="x", b="y") == salt_of(b="y", a="x")
    different = [
        salt_of(a="x"), salt_of(b="x"), salt_of(a="xb", b="y"), salt_of(a="x", by="b"), salt_of(a=b"x"),
        salt_of(a="1"), salt_of(a=1), salt_of(ab="x"), salt_of(a="x", b="y"), salt_of(a=0),
    ]  # fmt: skip
    assert len({*different, 0}) == len(different) + 1
    with pytest.raises(InvalidArgument, match="'a' is a list"):
        salt_of(a=["x"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: keys_of_hashes([b"1234567"]), "8 bytes"),
        (lambda: keys_of_hashes([b"123456789", b"1234567"]), "8 bytes"),
        (lambda: keys_of_hashes(["00" * 32]), "must be bytes"),
        (lambda: keys_of_hex(["0" * 15]), "hexadecimal"),
        (lambda: keys_of_hex(["0123456789abcde "]), "hexadecimal"),
        (lambda: keys_of_hex(["g" * 64]), "hexadecimal"),
        (lambda: keys_of_hex([b"0" * 64]), "hexadecimal"),
        (lambda: keys_of_hashes([b"12345678"], -1), "salt"),
        (lambda: keys_of_hashes([b"12345678"], 2**64), "salt"),
        (lambda: keys_of_tokens([1], 0), "block_size"),
        (lambda: keys_of_tokens([-1], 1), "token ids"),
        (lambda: keys_of_tokens([2**32], 1), "token ids"),
        (lambda: keys_of_tokens([1.5], 1), "integers"),
        (lambda: keys_of_tokens([[1], [2]], 1), "integers"),
        (lambda: keys_of_tokens([1], 1, inputs={1: b"x"}), "token 1 of 1"),
    ],
)
def test_wrong_arguments_are_named(call: object, cause: str) -> None:
    with pytest.raises(InvalidArgument, match=cause):
        call()  # type: ignore[operator]
