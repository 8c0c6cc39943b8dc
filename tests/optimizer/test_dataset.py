"""Trace files of every format become the same arrays, and what is wrong with one is said with its line."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.ragged import offsets_of
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import (
    READ,
    REQUEST,
    WRITE,
    Accesses,
    load,
    of_requests,
    replay,
    save,
    totals,
)
from kvcm_ray.optimizer.dataset import CACHE_FOLDER
from kvcm_ray.optimizer.kernels import load as kernels
from kvcm_ray.traces import files, open_trace
from kvcm_ray.traces.keys import chain_keys, keys_of_block_ids


def lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def mooncake(ids: list[int], input_length: int, at_ms: float = 0) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": input_length, "output_length": 7, "hash_ids": ids}


def bailian(ids: list[int], at_s: float, turn: int, kind: str = "text") -> dict[str, Any]:
    common = {"chat_id": 1, "parent_chat_id": -1, "timestamp": at_s, "input_length": 16 * len(ids) - 3}
    return {**common, "output_length": 9, "type": kind, "turn": turn, "hash_ids": ids}


def event(kind: str, at_us: int, session: str = "", source: str = "a", **more: Any) -> dict[str, Any]:
    return {"type": kind, "trigger_time_us": at_us, "source": source, "write_session_id": session, **more}


def same(one: Accesses, other: Accesses) -> None:
    for field in fields(Accesses):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def keys_by_request(accesses: Accesses) -> list[list[int]]:
    parts = np.split(accesses.keys[accesses.blocks], accesses.offsets[1:-1])
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_real_traces_are_read_as_by_the_streaming_reader(name: str) -> None:
    accesses = load(name, cache=False)
    requests = list(open_trace(name))
    assert keys_by_request(accesses) == [request.keys.tolist() for request in requests]
    assert accesses.input_tokens.tolist() == [request.input_tokens for request in requests]
    assert accesses.output_tokens.tolist() == [request.output_tokens for request in requests]
    assert accesses.times_s.tolist() == [request.timestamp_s for request in requests]
    assert accesses.partial.tolist() == [request.partial_tail for request in requests]
    assert accesses.chained
    assert accesses.whole
    assert accesses.block_tokens == 512


def test_counts_of_the_conversation() -> None:
    accesses = load("conversation")
    assert (accesses.requests, len(accesses.blocks), accesses.unique) == (12031, 288500, 182790)


def test_bailian_ids_are_chained(tmp_path: Path) -> None:
    ids = [[5, 6], [6, 5], [5, 6, 7]]
    records = [bailian(ids[0], 0.5, 1), bailian(ids[1], 61, 2, "file"), bailian(ids[2], 62.25, 1)]
    accesses = load(lines(tmp_path / "qwen.jsonl", records))
    assert keys_by_request(accesses) == [keys_of_block_ids(row).tolist() for row in ids]
    assert accesses.times_s.tolist() == [0.5, 61, 62.25]
    assert accesses.turns.tolist() == [1, 2, 1]
    assert [accesses.class_names[k] for k in accesses.classes] == ["text", "file", "text"]
    assert accesses.partial.all()
    assert replay(accesses, "lru", 9).tolist() == [0, 0, 2]


def test_tair_events(tmp_path: Path) -> None:
    """A write takes effect when it ends, or 100 ms after its start; masks come in two forms."""
    log = [
        event("FinishWriteCache", 5, "from before the log began"),
        event("GetCacheLocation", 10, keys=[1, 2, 3], block_mask=2),
        event("StartWriteCache", 20, "s", keys=[1, 2, 3]),
        event("StartWriteCache", 30, "never finished", keys=[1, 4]),
        event("GetCacheLocation", 40, keys=[1, 2, 3], block_mask=0),
        event("FinishWriteCache", 50, "s", success_block=0),
        event("GetCacheLocation", 60, keys=[1, 2, 3], block_mask=[True, False]),
        event("GetCacheLocation", 100_029, keys=[1, 4], block_mask=[]),
        event("GetCacheLocation", 100_031, keys=[1, 4], block_mask=9),
        event("GetCacheLocation", 100_032, source="b", keys=[1, 4], block_mask=0),
    ]
    accesses = load(lines(tmp_path / "events.log", log))
    assert accesses.ops.tolist() == [READ, READ, WRITE, READ, READ, WRITE, READ, READ]
    assert [accesses.instance_names[i] for i in accesses.instances] == [*"aaaaaaab"]
    for policy in ("lru", "lru_head_first"):
        hits = replay(accesses, policy, 10)
        assert hits.tolist() == [0, 0, 0, 3, 1, 0, 2, 0]
    found = totals(accesses, hits)
    assert (found.requests, found.accessed_blocks, found.hit_blocks) == (6, 15, 6)
    assert (found.held_blocks, found.held_hit_blocks) == (5, 3)


def test_our_own_format_round_trips(tmp_path: Path) -> None:
    log = [
        event("GetCacheLocation", 10, keys=[1, 2, 3], block_mask=2),
        event("StartWriteCache", 20, "s", keys=[1, 2, 3]),
        event("FinishWriteCache", 50, "s"),
        event("GetCacheLocation", 60, source="b", keys=[-1], block_mask=0),
    ]
    events = load(lines(tmp_path / "events.log", log))
    qwen = load(lines(tmp_path / "qwen.jsonl", [bailian([5, 6], 0.5, 1), bailian([5, 7], 9, 2, "image")]))
    for number, accesses in enumerate((events, qwen, load("synthetic").part(100, 300))):
        for suffix in (".jsonl", ".jsonl.gz"):
            file = tmp_path / f"own{number}{suffix}"
            save(accesses, file)
            again = load(file)
            assert np.allclose(again.times_s, accesses.times_s, atol=1e-6)
            assert keys_by_request(again) == keys_by_request(accesses)
            for name in ("ops", "partial", "input_tokens", "turns", "held", "instances"):
                assert np.array_equal(getattr(again, name), getattr(accesses, name)), name
            assert again.block_tokens == accesses.block_tokens


def test_fields_of_our_own_format(tmp_path: Path) -> None:
    header = {"format": "kvcm-trace", "version": 1, "block_tokens": 16}
    records = [
        header,
        {"time_us": 1_500_000, "keys": [3, 4]},
        {"time_us": 2e6, "keys": [3], "op": "read", "instance": "b", "class": "chat", "turn": 2, "held": 1},
    ]
    accesses = load(lines(tmp_path / "own.jsonl", records))
    assert accesses.times_s.tolist() == [1.5, 2]
    assert accesses.ops.tolist() == [REQUEST, READ]
    assert accesses.held.tolist() == [False, False, True]
    assert accesses.unique == 3, "an instance has its own blocks"
    assert accesses.instance_names == ("", "b")


def test_a_block_named_twice_by_a_request_counts_once(tmp_path: Path) -> None:
    accesses = load(lines(tmp_path / "twice.jsonl", [mooncake([1, 2, 1], 1536), mooncake([3], 512)]))
    assert accesses.lengths.tolist() == [2, 1]
    assert accesses.blocks.tolist() == [0, 1, 2]


GOOD = mooncake([0, 1], 1000)
BAD = [
    ('{"timestamp": 0,', "unexpected end"),
    ("[1, 2]", "list indices"),
    (json.dumps({**GOOD, "hash_ids": [1, 2.5]}), "64-bit integers"),
    (json.dumps({**GOOD, "hash_ids": [1, "2"]}), "64-bit integers"),
    (json.dumps({**GOOD, "hash_ids": [1 << 63]}), "64-bit integers"),
    (json.dumps({**GOOD, "hash_ids": 3}), "must be a list"),
    (json.dumps({**GOOD, "input_length": -1}), "must not be negative"),
    (json.dumps({**GOOD, "timestamp": "noon"}), "real number"),
    ('{"timestamp": 0, "input_length": 5, "output_length": 5}', "missing 'hash_ids'"),
]


@pytest.mark.parametrize(("line", "cause"), BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(tmp_path: Path, line: str, cause: str, packed: bool) -> None:
    file = tmp_path / "bad.jsonl"
    text = "\n".join([json.dumps(GOOD), "", json.dumps(GOOD), line, json.dumps(GOOD)]).encode()
    file.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(InvalidArgument, match=rf"bad\.jsonl, line 4: .*{cause}"):
        load(file)
    assert not (tmp_path / CACHE_FOLDER).exists()


def test_a_bad_line_far_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 1000)
    lines(tmp_path / "long.jsonl", [mooncake([i], 512) for i in range(500)])
    assert load(tmp_path / "long.jsonl").requests == 500
    lines(tmp_path / "bad.jsonl", [*(mooncake([i], 512) for i in range(500)), mooncake([0], -1)])
    with pytest.raises(InvalidArgument, match="line 501"):
        load(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (event("Other", 1), "no event type 'Other'"),
        (event("GetCacheLocation", 1, keys=[1], block_mask="x"), "block mask"),
        (event("GetCacheLocation", 1), "missing 'keys'"),
        (event("StartWriteCache", 1, "s", keys=[None]), "64-bit integers"),
        ({"format": "kvcm-trace", "version": 2}, "version 2"),
        ({"format": "kvcm-trace", "version": 1, "block_tokens": 1, "sample_level": 25}, "at most 24"),
        (mooncake([1], 512) | {"timestamp": 1e17}, "a time must be within 1e\\+11 s"),
        (event("GetCacheLocation", 2**63 - 1, keys=[1]), "a time must be within"),
        ({"some": 1, "thing": 2}, r"no known trace format .*some, thing"),
    ],
)
def test_bad_records_of_other_formats(tmp_path: Path, record: dict[str, Any], cause: str) -> None:
    with pytest.raises(InvalidArgument, match=f"line 1: .*{cause}"):
        load(lines(tmp_path / "bad.jsonl", [record]))


@pytest.mark.parametrize("mask", ["", {}, False])
def test_a_bad_line_is_found_whatever_the_others_have(tmp_path: Path, mask: Any) -> None:
    good = [event("GetCacheLocation", 1, keys=[1], block_mask=each) for each in ([True], 1, None, [])]
    assert load(lines(tmp_path / "good.jsonl", good)).held.tolist() == [True, True, False, False]
    bad = event("GetCacheLocation", 1, keys=[1], block_mask=mask)
    for records in ([*good, bad], [good[2], good[3], good[2], good[3], bad]):
        with pytest.raises(InvalidArgument, match="line 5: a block mask must be"):
            load(lines(tmp_path / "bad.jsonl", records))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="bundled traces are"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InvalidArgument, match="empty"):
        load(tmp_path / "empty.jsonl")
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    (tmp_path / "cut.gz").write_bytes(whole[:-9])
    with pytest.raises(InvalidArgument, match="cannot read"):
        load(tmp_path / "cut.gz")


def test_chains_are_the_same_compiled_or_not() -> None:
    draw = np.random.default_rng(0)
    for lengths in ([], [0], [3, 0, 1, 200, 7, 7], draw.integers(0, 30, 500).tolist()):
        offsets = offsets_of(np.array(lengths, np.int64))
        ids = draw.integers(-(2**63), 2**63 - 1, offsets[-1])
        assert np.array_equal(chain_keys(ids, offsets), kernels.chain(ids, offsets))


HEADER = {"format": "kvcm-trace", "version": 1, "block_tokens": 16}


def test_a_recording_may_be_cut_and_another_trace_may_not(tmp_path: Path) -> None:
    records = [{"time_us": n, "keys": [n, n + 1]} for n in range(200)]
    for more, fails in (({"recording": True}, False), ({}, True)):
        text = "".join(json.dumps(record) + "\n" for record in [HEADER | more, *records]).encode()
        packed = gzip.compress(text[:3000]) + gzip.compress(text[3000:])
        (tmp_path / "cut.gz").write_bytes(packed[:-40])
        if fails:
            with pytest.raises(InvalidArgument, match="cut off"):
                load(tmp_path / "cut.gz", cache=False)
        else:
            assert 50 < load(tmp_path / "cut.gz", cache=False).requests < 200
        (tmp_path / "bad.gz").write_bytes(packed[:200] + b"?" + packed[201:])
        with pytest.raises(InvalidArgument, match=r"cannot read|line \d+"):
            load(tmp_path / "bad.gz", cache=False)


def test_the_end_of_a_recording(tmp_path: Path) -> None:
    records = [
        HEADER | {"recording": True, "sample_level": 3},
        {"time_us": 1, "keys": [5]},
        {"end": {"a": 1}},
    ]
    file = lines(tmp_path / "own.jsonl", records)
    forms = [form for form, _ in files.read_batches(file)]
    assert forms[-1].end == {"a": 1}
    accesses = load(file)
    assert (accesses.requests, accesses.sample_level) == (1, 3)
    assert load(file).sample_level == 3, "from the parsed form"
    save(accesses, tmp_path / "again.jsonl")
    assert load(tmp_path / "again.jsonl").sample_level == 3
    for late in ({"time_us": 2, "keys": [6]}, HEADER, {"end": {}}):
        with pytest.raises(InvalidArgument, match="line 4: the recording ended before"):
            load(lines(tmp_path / "late.jsonl", [*records, late]))
    with pytest.raises(InvalidArgument, match="line 3"):
        load(lines(tmp_path / "late.jsonl", [*records[:2], {"end": 5}]))


def test_one_reader_for_arrays_and_for_a_replay(tmp_path: Path) -> None:
    log = [
        event("StartWriteCache", 20, "never finished", keys=[1, 4]),
        event("GetCacheLocation", 40, source="b", keys=[1, 4], block_mask=1),
        event("StartWriteCache", 50, "s", keys=[1]),
        event("FinishWriteCache", 60, "s"),
    ]
    file = lines(tmp_path / "events.log", log)
    accesses, requests = load(file), list(open_trace(file))
    assert keys_by_request(accesses) == [request.keys.tolist() for request in requests]
    assert accesses.ops.tolist() == [request.op for request in requests] == [READ, WRITE, WRITE]
    assert accesses.times_s.tolist() == [request.timestamp_s for request in requests]
    assert requests[0].keys.tolist() == [1, 4], "the first to be seen has its keys as they are"
    assert not set(requests[1].keys.tolist()) & {1, 4}, "blocks of different instances differ"
    assert [len(request.keys) for request in open_trace(file, 2)] == [2, 1]


# ------------------------------------------------------------------------------- the parsed form


def cached(file: Path) -> Path:
    return file.parent / CACHE_FOLDER / f"{file.name}.npz"


def test_the_parsed_form_is_used_while_the_file_is_the_same(tmp_path: Path) -> None:
    file = lines(tmp_path / "trace.jsonl", [bailian([5, 6], 0.5, 1), bailian([5], 1, 2)])
    first = load(file)
    assert (tmp_path / CACHE_FOLDER / ".gitignore").read_text() == "*\n"
    written = cached(file).stat().st_mtime_ns
    same(load(file), first)
    assert cached(file).stat().st_mtime_ns == written
    about = file.stat()
    text = file.read_text()
    file.write_text("x" * len(text))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    same(load(file), first)  # the file was not even looked into
    file.write_text(text.replace("0.5", "0.7"))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert load(file).times_s[0] == 0.7
    file.write_text(text + text)
    assert load(file).requests == 4


def test_a_damaged_parsed_form_is_made_anew(tmp_path: Path) -> None:
    file = lines(tmp_path / "trace.jsonl", [mooncake([1, 2], 1024)])
    first = load(file)
    whole = cached(file).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK" + whole[:50], b"\x00" * len(whole)):
        cached(file).write_bytes(damaged)
        same(load(file), first)
    assert len(list(cached(file).parent.iterdir())) == 2, "no half-written files are left"


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    file = lines(tmp_path / "trace.jsonl", [mooncake([1, 2], 1024)])
    (tmp_path / CACHE_FOLDER).write_text("a file where the folder would be")
    assert load(file).requests == load(file).requests == 1


# ------------------------------------------------------------------------------------- arrays


def test_a_part_is_a_trace_of_its_own() -> None:
    whole = load("synthetic")
    part = whole.part(500, 700)
    assert keys_by_request(part) == keys_by_request(whole)[500:700]
    assert part.unique == len({key for keys in keys_by_request(part) for key in keys})
    assert part.times_s.tolist() == whole.times_s[500:700].tolist()
    assert whole.part(0, 0).requests == 0
    with pytest.raises(InvalidArgument, match="requests"):
        whole.part(3, 2)


def test_places_and_many_keys() -> None:
    requests = [[*range(100 * i, 100 * i + i % 7)] for i in range(3000)]
    accesses = of_requests(requests, times_s=[0.0] * 3000)
    assert accesses.places.tolist() == [place for keys in requests for place in range(len(keys))]
    assert keys_by_request(accesses) == requests
    assert accesses.chained
