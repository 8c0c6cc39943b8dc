"""``kvcm explain`` on blocks of every fate, all of them real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.client import Client, connect
from kvcm_ray.testing.commands import Ran
from kvcm_ray.testing.served import Served

Kvcm = Callable[..., Ran]
BLOCK = 4096


@pytest.fixture
def client(manager: Served) -> Iterator[Client]:
    with closing(connect(manager.url)) as opened:
        yield opened


def data(keys: list[int]) -> np.ndarray:
    return np.ones((len(keys), BLOCK), np.uint8)


def asked(*keys: int) -> list[str]:
    return [word for key in keys for word in ("--key", str(key))]


def test_what_is_there(kvcm: Kvcm, client: Client) -> None:
    cache = client.register("there", block_size=16, specs={"tp0": BLOCK})
    cache.put([1, 2, 3, 4], data([1, 2, 3, 4]))
    assert kvcm("pin", "add", "there", "system", *asked(1, 2)).code == 0
    assert cache.match([1, 2, 3], lease_s=30).length == 3
    told = kvcm("explain", "there", *asked(1, 2, 3, 4)).out.splitlines()
    assert told[0] == "4 of 4 blocks are found from the first one on: 64 tokens need no prefill."
    assert told[2:] == ["1-2  on memory (pinned, leased)", "3  on memory (leased)", "4  on memory"]


def test_what_was_removed_and_what_never_came(kvcm: Kvcm, client: Client) -> None:
    cache = client.register("mixed", block_size=16, specs={"tp0": BLOCK})
    cache.put([1, 2, 3], data([1, 2, 3]))
    cache.remove([2])
    told = kvcm("explain", "mixed", *asked(1, 2, 3, 9)).out
    assert "1 of 4 blocks are found" in told
    assert re.search(r"The first miss is block 2: removed by request, \d+ s ago\.$", told, re.MULTILINE)
    assert "2  gone: removed by request\n3  on memory\n4  not known here" in told
    never = kvcm("explain", "mixed", *asked(9, 1)).out
    assert "The first miss is block 1: never written, or gone for longer than is remembered (" in never
    told_all = kvcm("explain", "mixed", *asked(1, 2), "--json").json
    assert [block["state"] for block in told_all["blocks"]] == ["serving", "absent"]
    assert (told_all["matched_blocks"], told_all["blocks"][1]["why"]) == (1, "removed")


def test_what_is_being_written(kvcm: Kvcm, client: Client) -> None:
    cache = client.register("busy", block_size=16, specs={"tp0": BLOCK})
    with cache.start_write([5, 6]) as session:
        told = kvcm("explain", "busy", *asked(5, 6)).out
    assert f"block 1: it is being written right now (session {session.session_id})" in told
    assert "1-2  being written to memory" in told


def test_what_the_quota_evicted(kvcm: Kvcm, client: Client) -> None:
    quota = 16 * BLOCK
    assert kvcm("group", "create", "small", "--quota", str(quota), "--storage", "files").code == 0
    cache = client.register("evicted", "small", block_size=16, specs={"tp0": BLOCK})
    for first in range(0, 64, 4):
        keys = list(range(first, first + 4))
        assert cache.put(keys, data(keys)) == 4
    found = kvcm("explain", "evicted", *asked(0, 1, 63), "--json").json["blocks"]
    assert (found[0]["state"], found[0]["why"]) == ("absent", "quota")
    assert found[2]["state"] == "serving"
    more = found[0]["more_bytes"]
    assert more % BLOCK == 0
    assert more >= 64 * BLOCK - quota, "with so much more the very first would still be there"
    told = kvcm("explain", "evicted", *asked(0, 1, 63)).out
    assert "block 1: evicted, because the group's quota had to make room, " in told
    assert f"ago; {more / 1024:.1f} KiB more would have kept it." in told


def test_tokens_are_hashed_as_the_protocol_does(kvcm: Kvcm, client: Client, tmp_path: Path) -> None:
    cache = client.register("tokens", block_size=16, specs={"tp0": BLOCK})
    prompt = list(range(100, 150))
    keys = cache.block_keys(prompt)
    cache.put(keys, np.ones((len(keys), BLOCK), np.uint8))
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    told = kvcm("explain", "tokens", "--tokens", str(tmp_path / "prompt.json")).out
    assert told.startswith("3 of 3 blocks are found from the first one on: 48 tokens")


def test_many_stretches_are_cut(kvcm: Kvcm, client: Client) -> None:
    cache = client.register("holes", block_size=16, specs={"tp0": BLOCK})
    keys = list(range(1, 101))
    cache.put(keys, data(keys))
    cache.remove(keys[::2])
    told = kvcm("explain", "holes", *asked(*keys)).out.splitlines()
    assert told[-1] == "... and 80 more stretches; --json tells all"


def test_refusals(kvcm: Kvcm) -> None:
    unknown = kvcm("explain", "nobody", "--key", "1", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (1, "KVCM-N003")
    assert kvcm("explain", "nobody").code == 2
    assert kvcm("explain", "nobody", "--key", "1", "--url", "http://127.0.0.1:9").code == 3
