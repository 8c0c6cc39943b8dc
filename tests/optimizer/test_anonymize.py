"""Logs of prompts become traces that tell nothing of the prompts but what is repeated."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.optimizer import load, replay
from kvcm_ray.optimizer.anonymize import Anonymizer, by_bytes, by_words, tokenizer
from kvcm_ray.traces import files, open_trace

SYSTEM = "You are a helpful assistant for the secret project Nightingale. "


def log(file: Path, *records: Any) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def keys(file: Path) -> list[list[int]]:
    return [request.keys.tolist() for request in open_trace(file)]


def test_prompts_that_begin_alike_share_the_blocks_they_share(tmp_path: Path) -> None:
    one, two = [*range(100)], [*range(50), *range(1000, 1050)]
    source = log(tmp_path / "log", {"token_ids": one}, {"prompt": two}, {"token_ids": one[:40]})
    Anonymizer(block_tokens=16).run(source, tmp_path / "out.jsonl.gz")
    first, second, third = keys(tmp_path / "out.jsonl.gz")
    assert (len(first), len(second), len(third)) == (7, 7, 3)
    assert first[:3] == second[:3]
    assert not set(first[3:]) & set(second[3:])
    assert third[:2] == first[:2]
    assert third[2] != first[2], "half a block is another one than the whole"
    accesses = load(tmp_path / "out.jsonl.gz")
    assert accesses.input_tokens.tolist() == [100, 100, 40]
    assert accesses.partial.tolist() == [True, True, True]
    assert (accesses.block_tokens, accesses.chained) == (16, True)
    assert replay(accesses, "lru", 100).tolist() == [0, 3, 2]


@pytest.mark.parametrize("cut", [by_bytes, by_words])
@pytest.mark.parametrize("field", ["text", "prompt", "messages"])
def test_nothing_of_the_text_is_left(tmp_path: Path, cut: Any, field: str) -> None:
    def record(question: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        return {field: messages if field == "messages" else SYSTEM + question, "class": "lawyers"}

    source = log(tmp_path / "log", record("Who is Alice?"), record("Who is Bob?"))
    out = tmp_path / "out.jsonl"
    Anonymizer(block_tokens=4, tokenize=cut).run(source, out)
    first, second = keys(out)
    shared = sum(a == b for a, b in zip(first, second, strict=False))
    assert 2 <= shared < len(second)
    text = out.read_text()
    for secret in ("Nightingale", "Alice", "helpful", "lawyers", "system"):
        assert secret not in text
    accesses = load(out)
    assert len(accesses.class_names) == 1
    assert accesses.class_names[0]


def test_the_same_text_has_other_keys_each_time_unless_a_salt_is_given(tmp_path: Path) -> None:
    source = log(tmp_path / "log", {"text": SYSTEM})
    found = []
    for salt in ("", "", "pepper", "pepper", "salt"):
        Anonymizer(salt=salt).run(source, tmp_path / "out")
        found.append(tuple(keys(tmp_path / "out")[0]))
    assert found[2] == found[3]
    assert len(set(found)) == 4


def test_models_and_instances_share_nothing(tmp_path: Path) -> None:
    records = [
        {"text": SYSTEM, "model": "a"},
        {"text": SYSTEM, "model": "b"},
        {"text": SYSTEM, "model": "a", "instance": "x"},
        {"text": SYSTEM, "model": "a"},
    ]
    Anonymizer().run(log(tmp_path / "log", *records), tmp_path / "out")
    accesses = load(tmp_path / "out")
    assert replay(accesses, "lru", 100).tolist() == [0, 0, 0, accesses.lengths[0]]
    assert len(accesses.instance_names) == 3


def test_times_begin_at_zero(tmp_path: Path) -> None:
    source = log(
        tmp_path / "log",
        {"text": "a", "timestamp": 1_700_000_000.5, "output_tokens": 7, "turn": 2},
        {"text": "b", "timestamp": 1_700_000_002},
    )
    Anonymizer().run(source, tmp_path / "out")
    accesses = load(tmp_path / "out")
    assert accesses.times_s.tolist() == [0.0, 1.5]
    assert (accesses.output_tokens.tolist(), accesses.turns.tolist()) == ([7, 0], [2, 0])
    Anonymizer(from_zero=False).run(source, tmp_path / "out")
    assert load(tmp_path / "out").times_s.tolist() == [1_700_000_000.5, 1_700_000_002]
    Anonymizer().run(log(tmp_path / "log", {"text": "a"}, {"text": "b"}), tmp_path / "out")
    assert load(tmp_path / "out").times_s.tolist() == [0, 1]


def test_words_and_bytes() -> None:
    assert by_words("  two words \n") == [b"  two", b" words", b" \n"]
    assert by_bytes("näh, no") == ["näh".encode(), b", no"]
    assert by_words("") == by_bytes("") == []


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ([1, 2], "JSON object"),
        ({"query": "x"}, "exactly one of token_ids, prompt, text, messages"),
        ({"text": "x", "prompt": "x"}, "exactly one"),
        ({"text": [1]}, "text must be text"),
        ({"token_ids": "abc"}, "token_ids must be a list of token ids"),
        ({"token_ids": [1.5]}, "token_ids must be"),
        ({"token_ids": [1 << 63]}, "int too big"),
        ({"messages": ["hello"]}, "messages must be"),
        ({"messages": [{"content": "x"}]}, "missing 'role'"),
        ({"messages": [{"role": "user", "content": ["x text"]}]}, "indices"),
        ({"messages": [{"role": "user", "content": 5}]}, "expected str"),
        ({"text": "x", "timestamp": "noon"}, "timestamp must be a number"),
        ({"text": "x", "output_tokens": -1}, "output_tokens must be"),
        ({"text": "x", "model": 5}, "model must be a string"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, record: Any, cause: str) -> None:
    source = log(tmp_path / "log", {"text": "good"}, record)
    out = tmp_path / "out"
    out.write_text("from before")
    with pytest.raises(InvalidArgument, match=f"log, line 2: .*{cause}"):
        Anonymizer().run(source, out)
    assert out.read_text() == "from before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "out"]


def test_files_that_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 100)
    out = tmp_path / "out"
    packed = gzip.compress(b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(500)))
    (tmp_path / "log.gz").write_bytes(packed)
    Anonymizer().run(tmp_path / "log.gz", out)
    assert len(keys(out)) == 500
    (tmp_path / "log.gz").write_bytes(packed[:-20])
    with pytest.raises(InvalidArgument, match="cut off"):
        Anonymizer().run(tmp_path / "log.gz", out)
    (tmp_path / "log").write_text("\n")
    with pytest.raises(InvalidArgument, match="empty"):
        Anonymizer().run(tmp_path / "log", out)
    with pytest.raises(InvalidArgument, match="cannot write"):
        Anonymizer().run(log(tmp_path / "log", {"text": "a"}), tmp_path / "none" / "out")
    with pytest.raises(InvalidArgument, match="at least one token"):
        Anonymizer(block_tokens=0)


def test_a_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    try:
        import tokenizers
    except ModuleNotFoundError:
        with pytest.raises(Unsupported, match="pip install tokenizers"):
            tokenizer(tmp_path / "tokenizer.json")
        return
    with pytest.raises(InvalidArgument, match="cannot read the tokenizer"):
        tokenizer(tmp_path / "tokenizer.json")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    cut = tokenizer(tmp_path / "tokenizer.json")
    assert [int.from_bytes(piece, "little") for piece in cut("a b a c")] == [0, 1, 0, 2]
