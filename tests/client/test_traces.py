"""Trace readers, key mapping and block contents. Pure; the bundled traces have known totals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.traces import block_pattern, bundled, open_trace, wrong_bytes
from kvcm_ray.traces.keys import keys_of_block_ids, keys_of_prefix_ids


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def mooncake(ids: list[int], timestamp: int = 0) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": 700, "output_length": 3, "hash_ids": ids}


@pytest.mark.parametrize(
    ("name", "totals"),
    [
        ("conversation", (12_031, 288_500, 105_710, 182_790)),
        ("synthetic", (3_993, 121_877, 77_953, 43_924)),
    ],
)
def test_bundled_traces_have_the_published_totals(name: str, totals: tuple[int, ...]) -> None:
    requests = accessed = hits = 0
    seen: set[int] = set()
    for request in open_trace(name):
        keys = request.keys.tolist()
        requests, accessed = requests + 1, accessed + len(keys)
        hits += next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(keys)
    assert (requests, accessed, hits, len(seen)) == totals


def test_mooncake_fields_and_units(tmp_path: Path) -> None:
    (request,) = open_trace(write(tmp_path / "t", mooncake([5, 9], timestamp=1500)))
    assert (request.timestamp_s, request.input_tokens, request.output_tokens) == (1.5, 700, 3)
    assert request.keys.dtype == np.int64
    assert request.keys.tolist() == keys_of_prefix_ids([5, 9]).tolist()


def test_qwen_ids_are_chained(tmp_path: Path) -> None:
    record = {
        "chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 521,
        "output_length": 132, "type": "text", "turn": 2, "hash_ids": [1, 2, 1],
    }  # fmt: skip
    (request,) = open_trace(write(tmp_path / "t", record))
    assert request.timestamp_s == 61.114
    first, second, third = request.keys.tolist()
    assert first != third, "the same block at another place is another prefix"
    assert keys_of_block_ids([1, 2]).tolist() == [first, second]
    assert keys_of_block_ids([2, 2]).tolist()[1] != second


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", mooncake([1]), mooncake([2]))
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [r.keys.tolist() for r in open_trace(packed)] == [r.keys.tolist() for r in open_trace(plain)]


def test_limit_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("\n" + json.dumps(mooncake([1])) + "\n\n" + json.dumps(mooncake([])) + "\n")
    assert [len(r.keys) for r in open_trace(path)] == [1, 0]
    assert len(list(open_trace(path, limit=1))) == 1
    assert list(open_trace(path, limit=0)) == []


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "line 2"),
        (json.dumps({"timestamp": 0, "input_length": 1, "output_length": 1}), "hash_ids"),
        (json.dumps(mooncake([1, "2"])), "list of 64-bit integers"),  # type: ignore[list-item]
        (json.dumps(mooncake([2**63])), "line 2"),
        (json.dumps({**mooncake([1]), "timestamp": "soon"}), "line 2"),
        ("[1]", "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, cause: str) -> None:
    path = tmp_path / "t"
    path.write_text(json.dumps(mooncake([1])) + "\n" + line + "\n")
    with pytest.raises(InvalidArgument, match=cause):
        list(open_trace(path))


def test_unknown_format_missing_file_and_damaged_gzip(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no known trace format"):
        list(open_trace(write(tmp_path / "t", {"type": "GetCacheLocation", "keys": [1]})))
    with pytest.raises(InvalidArgument, match="no trace file"):
        open_trace(tmp_path / "none")
    damaged = tmp_path / "t.gz"
    whole = bundled("synthetic").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArgument, match="cannot read"):
        list(open_trace(damaged))
    damaged.write_bytes(whole[:1000] + bytes(1000) + whole[2000:])
    with pytest.raises(InvalidArgument):
        list(open_trace(damaged))


def test_keys_of_prefix_ids_are_a_bijection() -> None:
    keys = keys_of_prefix_ids(list(range(200_000)))
    assert len(np.unique(keys)) == 200_000
    assert keys_of_prefix_ids([-1, 0, 2**63 - 1]).dtype == np.int64


@pytest.mark.parametrize("block_bytes", [1, 7, 8, 4096, 4099])
def test_patterns_tell_blocks_apart_at_every_word(block_bytes: int) -> None:
    keys = keys_of_prefix_ids([0, 1, 2])
    blocks = block_pattern(keys, block_bytes)
    assert blocks.shape == (3, block_bytes)
    assert blocks.flags.c_contiguous
    assert wrong_bytes(keys, blocks) == 0
    words = block_bytes // 8
    if words:
        as_words = np.ascontiguousarray(blocks[:, : words * 8]).view(np.uint64)
        assert (as_words[0] != as_words[1]).all()
        assert len(np.unique(as_words[0])) == words


def test_every_wrong_byte_is_counted() -> None:
    keys = keys_of_prefix_ids([0, 1])
    blocks = block_pattern(keys, 64)
    blocks[1, 3] ^= 1
    blocks[0, 60] ^= 0x80
    assert wrong_bytes(keys, blocks) == 2
    assert wrong_bytes(keys, block_pattern(keys[::-1], 64)) > 100, "swapped blocks are wrong"
