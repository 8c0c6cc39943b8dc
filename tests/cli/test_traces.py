"""``kvcm trace``: recordings of a served group, and what is done with trace files."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.optimizer import load
from kvcm_ray.traces import READ, WRITE, open_trace

Kvcm = Callable[..., Any]


def mooncake(folder: Path, *prompts: list[int]) -> str:
    path = folder / "trace.jsonl"
    records = [
        {"timestamp": 1000 * n, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for n, ids in enumerate(prompts)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def until_recorded(kvcm: Kvcm, group: str, look_ups: int) -> None:
    """By URL the manager's replicas report look-ups a moment later."""
    until_s = time.monotonic() + 20
    while kvcm("trace", "list", group, "--json").json["recordings"][0]["look_ups"] < look_ups:
        assert time.monotonic() < until_s
        time.sleep(0.05)


def test_record_stop_list_and_replay_what_was_recorded(kvcm: Kvcm, tmp_path: Path) -> None:
    path = mooncake(tmp_path, [1, 2, 3], [1, 2, 4], [1, 2, 3])
    run = ("replay", path, "--via", "http", "--quota-blocks", "10", "--window", "1", "--json")
    kvcm(*run, "--limit", "0")
    group = "default-lru-10x4096"
    began = kvcm("trace", "record", group, "--json")
    assert began.code == 0, began.err
    again = kvcm("trace", "record", group)
    assert (again.code, "kvcm trace stop" in again.err, "[KVCM-C006]" in again.err) == (1, True, True)
    first = kvcm(*run).json
    until_recorded(kvcm, group, look_ups=3)
    assert "recording" in kvcm("trace", "list").out
    done = kvcm("trace", "stop", group, "--json").json
    assert (done["look_ups"], done["accessed_blocks"], done["hit_blocks"]) == (3, 9, first["hit_blocks"])
    requests = list(open_trace(done["file"]))
    assert [request.op for request in requests] == [READ, WRITE, READ, WRITE, READ]
    info = kvcm("trace", "info", done["file"], "--json").json
    assert (info["format"], info["look_ups"], info["writes"]) == ("kvcm", 3, 2)
    assert (info["accessed_blocks"], info["unique_blocks"], info["repeated_requests"]) == (9, 4, 1)
    assert info["recording"]["state"] == "stopped"
    assert "stopped, 0 requests missing" in kvcm("trace", "info", done["file"]).out
    replayed = kvcm("replay", done["file"], "--via", "http", "--instance", "again", "--json")
    assert replayed.code == 0, replayed.err
    assert (replayed.json["hit_blocks"], replayed.json["written_blocks"]) == (first["hit_blocks"], 4)
    assert replayed.json["wrong_bytes"] == 0
    assert kvcm("trace", "stop", group).code == 1


def test_what_is_recorded_may_be_limited(kvcm: Kvcm, tmp_path: Path) -> None:
    path = mooncake(tmp_path, [1, 2, 3], [4])
    for name in ("one", "two"):
        kvcm("replay", path, "--via", "http", "--instance", name, "--limit", "0", "--json")
    began = kvcm("trace", "record", "default", "--instance", "one", "--seconds", "1h", "--max-bytes", "1MiB",
                 "--sample-rate", "0.25", "--json").json  # fmt: skip
    assert (began["instance_id"], began["sample_level"]) == ("one", 2)
    for name in ("one", "two"):
        kvcm("replay", path, "--via", "http", "--instance", name, "--window", "1", "--json")
    until_recorded(kvcm, "default", look_ups=2)
    text = kvcm("trace", "stop", "default").out
    assert "2 look-ups of 4 blocks" in text
    assert load(began["file"]).sample_level == 2
    assert load(began["file"]).instance_names == ("one",)
    assert "one of 4 blocks" in kvcm("trace", "info", began["file"]).out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("record", "ghost"), 1, "ghost"),
        (("record", "default", "--instance", "ghost"), 1, "no instance 'ghost'"),
        (("record", "default", "--max-bytes", "10"), 1, "max_bytes must be at least"),
        (("record", "default", "--sample-rate", "0"), 2, "0"),
        (("record", "default", "--seconds", "soon"), 2, "not a time"),
        (("stop", "default"), 1, "[KVCM-N006]"),
        (("stop", "default"), 1, "kvcm trace list"),
        (("list", "ghost"), 1, "ghost"),
        (("info", "none.jsonl"), 1, "no trace file"),
        (("convert", "none.jsonl", "out"), 1, "no trace file"),
    ],
)
def test_what_cannot_be_done(kvcm: Kvcm, arguments: tuple[str, ...], code: int, told: str) -> None:
    ran = kvcm("trace", *arguments)
    assert ran.code == code
    assert told in ran.err


def test_what_is_in_a_bundled_trace(kvcm: Kvcm) -> None:
    info = kvcm("trace", "info", "conversation", "--json").json
    assert (info["format"], info["requests"], info["look_ups"], info["writes"]) == ("mooncake",) + (
        12_031,
    ) * 3
    assert (info["accessed_blocks"], info["unique_blocks"]) == (288_500, 182_790)
    assert info["recording"] is None
    assert 3500 < info["seconds"] < 3600
    text = kvcm("trace", "info", "conversation").out
    assert "512 tokens a block" in text
    assert "288500" in text


def test_convert(kvcm: Kvcm, tmp_path: Path) -> None:
    events = [
        {"type": "StartWriteCache", "trigger_time_us": 5, "source": "a", "write_session_id": "s",
         "keys": [1, 2]},
        {"type": "GetCacheLocation", "trigger_time_us": 10, "source": "a", "keys": [1, 2], "block_mask": 1},
        {"type": "FinishWriteCache", "trigger_time_us": 20, "source": "a", "write_session_id": "s"},
        {"type": "GetCacheLocation", "trigger_time_us": 30, "source": "b", "keys": [1, 2], "block_mask": 0},
    ]  # fmt: skip
    log, out = tmp_path / "events.log", tmp_path / "out.jsonl.gz"
    log.write_text("\n".join(map(json.dumps, events)))
    assert kvcm("trace", "convert", str(log), str(out), "--json").json["bytes"] == out.stat().st_size
    lines = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    assert lines == [
        {"format": "kvcm-trace", "version": 1, "block_tokens": 0},
        {"time_us": 10, "keys": [1, 2], "op": "read", "instance": "a", "held": 1},
        {"time_us": 20, "keys": [1, 2], "op": "write", "instance": "a"},
        {"time_us": 30, "keys": [1, 2], "op": "read", "instance": "b"},
    ]
    assert kvcm("trace", "convert", "synthetic", str(out)).code == 0
    assert load(out, cache=False).unique == load("synthetic").unique == 43_924
    assert kvcm("trace", "convert", str(out), str(out)).code == 0, "in place"
    assert load(out, cache=False).requests == 3_993
    kept = out.read_bytes()
    log.write_text(json.dumps(events[1]) + "\n{")
    bad = kvcm("trace", "convert", str(log), str(out))
    assert (bad.code, "line 2" in bad.err) == (1, True)
    assert out.read_bytes() == kept


def test_anonymize(kvcm: Kvcm, tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    records = [{"text": "The quick brown fox " * 10}, {"text": "The quick brown fox " * 10 + "jumps"}]
    log.write_text("\n".join(map(json.dumps, records)))
    ran = kvcm("trace", "anonymize", str(log), str(out), "--block-size", "8", "--unit", "words", "--json")
    assert ran.code == 0, ran.err
    assert "quick" not in out.read_text()
    accesses = load(out)
    assert (accesses.block_tokens, accesses.input_tokens.tolist()) == (8, [41, 41])
    assert accesses.lengths.tolist() == [6, 6]
    assert accesses.unique == 7
    log.write_text("{}")
    bad = kvcm("trace", "anonymize", str(log), str(out))
    assert (bad.code, "line 1" in bad.err) == (1, True)
    assert kvcm("trace", "anonymize", str(log), str(out), "--block-size", "0").code == 2
