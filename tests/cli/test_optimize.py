"""``kvcm optimize``: tables, JSON, files, and what it says of wrong usage. No manager runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.cli.capacities import Capacities, in_blocks
from kvcm_ray.testing.commands import Ran, run_command

ORACLE = {  # conversation: capacity -> hit blocks of lru, of lru_head_first, of the optimum
    1_000: (12_847, 12_831, 55_019),
    10_000: (61_046, 60_822, 105_710),
    50_000: (102_290, 102_290, 105_710),
}


Run = Callable[..., Ran]


@pytest.fixture
def optimize(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Ran:
        return run_command(capsys, ["optimize", *arguments])

    return run


def events(folder: Path) -> str:
    """A small log of look-ups and writes of their own: three keys written, then found twice."""
    shared: dict[str, Any] = {"source": "a"}
    look_up = shared | {"type": "GetCacheLocation", "keys": [1, 2, 3], "block_mask": 0}
    records = [
        look_up | {"trigger_time_us": 0},
        shared
        | {"type": "StartWriteCache", "keys": [1, 2, 3], "trigger_time_us": 10, "write_session_id": "w"},
        shared | {"type": "FinishWriteCache", "trigger_time_us": 20, "write_session_id": "w"},
        look_up | {"trigger_time_us": 30},
        look_up | {"trigger_time_us": 40},
    ]
    path = folder / "events.log"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


# ---------------------------------------------------------------------------------------- results


def test_json_has_the_oracle_values(optimize: Run) -> None:
    capacities = ",".join(map(str, ORACLE))
    ran = optimize("conversation", "--capacity", capacities, "--policy", "lru,lru_head_first", "--json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    found = ran.json
    assert (
        found["trace"].items()
        >= {"requests": 12_031, "accessed_blocks": 288_500, "unique_blocks": 182_790}.items()
    )
    hits = {(row["policy"], row["capacity_blocks"]): row["hit_blocks"] for row in found["rows"]}
    assert hits == {
        **{("lru", capacity): lru for capacity, (lru, _, _) in ORACLE.items()},
        **{("lru_head_first", capacity): head for capacity, (_, head, _) in ORACLE.items()},
    }
    assert [(row["capacity_blocks"], row["hit_blocks"]) for row in found["optimum"]] == [
        (capacity, optimum) for capacity, (_, _, optimum) in ORACLE.items()
    ]
    assert found["infinite_hit_blocks"] == 105_710
    row = found["rows"][0]
    assert row["hit_ratio"] == 12_847 / 288_500
    assert row["optimum_gap"] == pytest.approx((55_019 - 12_847) / 288_500)
    assert 0.04 < row["token_hit_ratio"] < 0.05
    assert found["knee"]["capacity_blocks"] in ORACLE


def test_defaults_are_forty_capacities_up_to_the_footprint(optimize: Run) -> None:
    rows = optimize("synthetic", "--policy", "lru", "--json").json["rows"]
    assert len(rows) == 40
    assert (rows[0]["capacity_blocks"], rows[-1]["capacity_blocks"]) == (43_924 // 64, 43_924)
    assert rows[-1]["hit_blocks"] == 77_953


def test_the_table(optimize: Run) -> None:
    ran = optimize("synthetic", "--capacity", "1000,10000", "--policy", "lru")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].startswith("synthetic: 3,993 requests, 121,877 blocks")
    assert lines[2].split() == [
        "policy",
        "blocks",
        "hit",
        "blocks",
        "hit",
        "ratio",
        "of",
        "tokens",
        "to",
        "optimum",
    ]
    assert lines[3].split()[:4] == ["lru", "1,000", "10,252", "8.41%"]
    assert "-19.3 pt" in lines[3]
    assert "knee" in lines[3] + lines[4]


def test_look_ups_and_writes_of_their_own(optimize: Run, tmp_path: Path) -> None:
    found = optimize(events(tmp_path), "--capacity", "2,3", "--policy", "lru,adaptive", "--json").json
    assert (found["trace"]["accessed_blocks"], found["infinite_hit_blocks"]) == (9, 6)
    hits = [row["hit_blocks"] for row in found["rows"] if row["policy"] == "lru"]
    assert hits == [4, 6], "2 of 3 blocks, twice"
    assert found["rows"][0]["token_hit_ratio"] is None, "the log does not say how long prompts are"


def test_where_they_are_apart_the_optimum_is_said_to_be_a_bound(optimize: Run, tmp_path: Path) -> None:
    arguments = ("--capacity", "2,3", "--policy", "lru")
    assert "only an upper bound" in optimize(events(tmp_path), *arguments).out
    assert optimize(events(tmp_path), *arguments, "--json").json["optimum_exact"] is False
    assert "upper bound" not in optimize("synthetic", *arguments).out
    assert optimize("synthetic", *arguments, "--json").json["optimum_exact"] is True


def test_hits_that_engines_held_are_told_apart(optimize: Run, tmp_path: Path) -> None:
    log = Path(events(tmp_path))
    log.write_text(log.read_text().replace('"block_mask": 0', '"block_mask": 1'))
    ran = optimize(str(log), "--capacity", "3", "--policy", "lru")
    assert "Engines held 3 of the blocks looked up already." in ran.out
    assert "2 were such: this cache alone gave 4." in ran.out
    assert optimize(str(log), "--capacity", "3", "--json").json["rows"][0]["held_hit_blocks"] == 2
    assert "held_hit_blocks" not in optimize("synthetic", "--capacity", "3", "--json").json["rows"][0]


def test_a_sample_is_near_and_says_so(optimize: Run) -> None:
    found = optimize("synthetic", "--rate", "0.125", "--capacity", "10000", "--json").json
    assert found["trace"]["sample_rate"] == 0.125
    assert found["rows"][0]["hit_ratio"] == pytest.approx(51_669 / 121_877, abs=0.01)
    assert found["optimum"] == []
    refused = optimize("synthetic", "--rate", "0.1", "--policy", "lfu")
    assert refused.code == 1
    assert "--policy lru" in refused.err


def test_files(optimize: Run, tmp_path: Path) -> None:
    ran = optimize(
        "synthetic", "--capacity", "1000..40000:5", "--policy", "lru", "--out", str(tmp_path / "o"), "--json"
    )
    assert ran.code == 0, ran.err
    found = ran.json
    assert {Path(name).name for name in found.pop("files")} >= {
        "report.html",
        "curve.csv",
        "hit_ratio.dark.svg",
    }
    assert json.loads((tmp_path / "o" / "result.json").read_text()) == found


def test_money_and_a_file_for_a_group(optimize: Run, tmp_path: Path) -> None:
    ran = optimize(
        "synthetic", "--capacity", "64GiB..1TiB:4", "--policy", "lru", "--model", "Qwen/Qwen3-8B",
        "--gpu", "l40s", "--gpu-price", "1.5", "--tier", "nvme", "--out", str(tmp_path), "--group", "chat",
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = ran.json
    money = found["money"]
    assert (money["model"], money["usd_per_gpu_hour"], money["gpus_per_replica"]) == ("qwen3-8b", 1.5, 1)
    rows = found["rows"]
    assert [row["capacity_blocks"] for row in rows] == [910, 2_293, 5_779, 14_563], "72 MiB a block"
    assert all(row["gpu_hours_saved"] > 0 > row["ttft_change_mean_s"] for row in rows)
    best = max(rows, key=lambda row: row["net_usd"])
    assert found["best"]["capacity_blocks"] == best["capacity_blocks"]
    update = json.loads((tmp_path / "group-chat.json").read_text())
    assert update["quota"] == best["capacity_blocks"] * 72 * 1024**2
    assert (tmp_path / "money.dark.svg").exists()


def test_sentences_say_what_was_assumed(optimize: Run) -> None:
    out = optimize("synthetic", "--policy", "lru", "--model", "llama-3-70b", "--target", "30%").out
    assert "llama-3-70b on 4 x h100 at 40% of the peak" in out
    assert "the cheapest that reaches 0.3" in out


def test_slow_loading_is_said(optimize: Run) -> None:
    arguments = ("synthetic", "--policy", "lru", "--capacity", "1000,5000,9000", "--model", "smollm2-135m")
    slow = optimize(*arguments, "--tier-read", "100MB/s").out
    assert "Loading from dram is mostly slower than recomputing: of the requests with hits, 100% at" in slow
    assert "slower than recomputing" not in optimize(*arguments, "--tier-read", "9TB/s").out


def test_hits_that_engines_held_are_not_slow_to_load(optimize: Run, tmp_path: Path) -> None:
    log = Path(events(tmp_path))
    log.write_text(log.read_text().replace('"block_mask": 0', '"block_mask": 3'))
    arguments = ("--policy", "lru", "--capacity", "3", "--model", "smollm2-135m", "--block-tokens", "16")
    out = optimize(str(log), *arguments).out
    assert "this cache alone gave 0." in out
    assert "slower than recomputing" not in out, "nothing is loaded"


def test_small_figures_are_not_rounded_to_nothing(optimize: Run) -> None:
    out = optimize("synthetic", "--policy", "lru", "--capacity", "9", "--model", "smollm2-135m").out
    assert " 0.00 " not in out
    assert " 0 ms" not in out


def test_a_knee_at_an_end_is_said_to_be_none(optimize: Run) -> None:
    assert "says little" in optimize("synthetic", "--policy", "lru", "--capacity", "1000").out
    assert "says little" not in optimize("synthetic", "--policy", "lru").out


def test_names_are_quoted_for_the_shell(optimize: Run, tmp_path: Path) -> None:
    out = tmp_path / "a report"
    arguments = ("--capacity", "9", "--policy", "lru", "--model", "llama-3-8b")
    ran = optimize("synthetic", *arguments, "--group", "a/b c", "--out", str(out))
    written = shlex.split(ran.out.splitlines()[-1])
    assert written[:4] == ["kvcm", "group", "update", "a/b c"]
    assert Path(written[-1]).is_file()


# ------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jsonl"], ["TRACE", "no trace file 'nowhere.jsonl'", "conversation, synthetic"]),
        (["synthetic", "--policy", "lru,fifo"], ["--policy", "no policy 'fifo'", "lru, "]),
        (["synthetic", "--capacity", "many"], ["--capacity", "'many' is not a capacity"]),
        (["synthetic", "--capacity", "9..3"], ["'9..3' ends before it begins"]),
        (["synthetic", "--capacity", "²"], ["'²' is not a capacity"]),
        (["synthetic", "--capacity", "9" * 23], ["more than any cache holds"]),
        (["synthetic", "--capacity", "9223372036854775807"], ["more than any cache holds"]),
        (["synthetic", "--capacity", "0"], ["at least one block"]),
        (["synthetic", "--capacity", "64GiB"], ["--capacity", "--model"]),
        (["synthetic", "--block-tokens", "16"], ["--block-tokens", "have 512 tokens"]),
        (["synthetic", "--group", "chat"], ["--out"]),
        (["synthetic", "--group", "chat", "--out", "o"], ["--group needs --model"]),
        (["synthetic", "--gpu", "h100"], ["--gpu needs --model"]),
        (["synthetic", "--budget", "3"], ["--budget needs --model"]),
        (["synthetic", "--model", "llama-3-70b", "--capacity", "1MiB"], ["less than one block"]),
        (["synthetic", "--rate", "2"], ["--rate", "not a fraction"]),
    ],
)  # fmt: skip
def test_wrong_usage(optimize: Run, arguments: list[str], words: list[str]) -> None:
    ran = optimize(*arguments)
    assert ran.code == 2, ran.err
    for word in words:
        assert word in ran.err
    assert "Traceback" not in ran.err


def test_a_folder_that_cannot_be_written_is_known_before_the_replays(
    optimize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    ran = optimize("nowhere.jsonl", "--out", str(tmp_path / "file" / "report"))
    assert ran.code == 1
    assert "cannot write the report" in ran.err
    monkeypatch.setattr("kvcm_ray.optimizer.report.files.find_spec", lambda name: None)
    assert "charts need matplotlib" in optimize("nowhere.jsonl", "--out", str(tmp_path / "report")).err


def test_unknown_names_come_with_those_that_are_near(optimize: Run) -> None:
    ran = optimize("synthetic", "--model", "lama-3-70b")
    assert ran.code == 1
    assert "no model 'lama-3-70b'; did you mean llama-3-70b" in ran.err
    assert "no tier 'tape'" in optimize("synthetic", "--model", "llama-3-70b", "--tier", "tape").err


def test_a_bad_line_is_named(optimize: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"hash_ids": "x"}) + "\n")
    ran = optimize(str(path))
    assert ran.code == 2
    assert "bad.jsonl, line 2" in ran.err
    assert optimize(str(path), "--json").json["error"]["code"] == "KVCM-A001"


def test_lists_of_capacities() -> None:
    read = Capacities().convert
    assert in_blocks(read("5,3,5", None, None), None) == [3, 5]
    assert in_blocks(read("1..1000:4", None, None), None) == [1, 10, 100, 1000]
    assert in_blocks(read("4KiB,10", None, None), 1024) == [4, 10]
    assert in_blocks(read("1MiB..4MiB:3", None, None), 1024) == [1024, 2048, 4096]
    assert len(in_blocks(read("1000..200000", None, None), None)) == 40
