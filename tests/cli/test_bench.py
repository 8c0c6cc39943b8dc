"""``kvcm bench capacity``, ``reclaim``, ``optimizer`` and replays in groups of so many blocks; small ones."""

from __future__ import annotations

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.benchmarks import capacity, foreground, huge, optimizer, reclaim, soak
from kvcm_ray.optimizer import load, replay
from kvcm_ray.traces import open_trace

Kvcm = Callable[..., Any]


def trace(folder: Path, *prompts: list[int], input_length: int = 512) -> str:
    path = folder / "trace.jsonl"
    lines = [
        {"timestamp": n, "input_length": input_length, "output_length": 1, "hash_ids": ids}
        for n, ids in enumerate(prompts)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def leaf_first_lru(trace: str, capacity: int, requests: int) -> int:
    """Hit blocks of the exact policy: each request touches its blocks last to first."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in open_trace(trace, requests):
        keys = request.keys.tolist()
        hits += next((n for n, key in enumerate(keys) if key not in held), len(keys))
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits


def test_the_yardstick_itself() -> None:
    assert leaf_first_lru("conversation", 5_000, 100_000) == 32_260


# ---------------------------------------------------------------------------------------- replay


def test_replay_in_a_group_of_its_own(kvcm: Kvcm, tmp_path: Path) -> None:
    path = trace(tmp_path, [1, 2, 3], [4], [1, 2, 3], [1])
    replay = ("replay", path, "--via", "http", "--quota-blocks", "3", "--window", "1")
    ran = kvcm(*replay, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["hit_blocks"] == 0 + 0 + 2 + 1, "4 took the place of 3"
    assert (ran.json["refused_blocks"], ran.json["wrong_bytes"]) == (0, 0)
    shown = kvcm("group", "show", "default-lru-3x4096", "--json").json
    assert int(shown["quota"]["capacity"]) == 3 * 4096
    assert kvcm(*replay, "--json").code == 0, "the group may exist"
    adaptive = kvcm(*replay, "--policy", "adaptive", "--json")
    assert adaptive.code == 0, adaptive.err
    strategy = kvcm("group", "show", "default-adaptive-3x4096", "--json").json["cache_config"]
    assert strategy["reclaim_strategy"]["reclaim_policy"] == "POLICY_ADAPTIVE"


def test_replay_of_a_partial_tail(kvcm: Kvcm, tmp_path: Path) -> None:
    path = trace(tmp_path, [1, 2], [3], [4], [1, 2], input_length=1000)
    replay = ("replay", path, "--via", "http", "--window", "1", "--quota-blocks", "3", "--json")
    told = kvcm(*replay, "--partial-tail", "--instance", "tail").json
    assert told["hit_blocks"] == 1, "2 went, a tail, though 3 and 4 are whole"
    assert kvcm(*replay, "--policy", "lfu", "--block-bytes", "0").code == 2
    assert kvcm("replay", path, "--policy", "lru").code == 2


def test_replay_of_a_prompt_that_never_fits(kvcm: Kvcm, tmp_path: Path) -> None:
    path = trace(tmp_path, [1, 2], [3, 4, 5, 6], [1, 2])
    ran = kvcm("replay", path, "--via", "http", "--quota-blocks", "3", "--block-bytes", "100",
               "--window", "1", "--json")  # fmt: skip
    assert ran.code == 1
    assert (ran.json["hit_blocks"], ran.json["refused_blocks"]) == (2, 4)
    assert "quota" in ran.json["first_error"]["message"]


# ------------------------------------------------------------------------------------ benchmarks


@pytest.mark.ray
def test_capacity_is_the_exact_policy() -> None:
    said: list[str] = []
    result = capacity.run(policies=["lru"], capacities=[300], requests=120, report=said.append)
    (row,) = result["rows"]
    assert (row["trace"], row["policy"], row["capacity_blocks"]) == ("conversation", "lru", 300)
    assert row["hit_blocks"] == leaf_first_lru("conversation", 300, 120) > 0
    assert (row["requests"], row["refused_blocks"], row["wrong_bytes"]) == (120, 0, 0)
    assert said == ["conversation, lru, 300 blocks", f"{row['hit_blocks']} hit blocks"]


def test_metadata_only() -> None:
    row = reclaim.metadata_row(5_000)
    assert (row["storage"], row["reclaimers"]) == ("metadata", 0)
    assert row["blocks"] == pytest.approx(4_950, abs=60)
    assert 0 < row["step_p50_us"] <= row["step_p99_us"]


def test_look_ups_are_told_apart_by_when_they_began() -> None:
    windows = [("idle", 0.0, 10.0), ("reclaiming", 20.0, 30.0), ("idle", 40.0, 50.0)]
    begins = np.arange(60.0)
    seconds = np.where((begins >= 20) & (begins < 30), 3e-5, 2e-5)
    seconds[15] = 1.0  # in no stretch
    found = foreground._lookup_figures(np.stack([begins, seconds], 1), windows, 7, 0)
    assert (found["lookup_p99_idle_us"], found["lookup_p99_reclaiming_us"]) == (20.0, 30.0)
    assert found["lookup_p99_ratio"] == 1.5
    assert found["lookups"] == {
        "keys": 128, "missed": 0, "blocks": 7, "stretches": 3, "idle": 20, "reclaiming": 10,
    }  # fmt: skip


@pytest.mark.ray
def test_a_short_soak_leaves_nothing_behind() -> None:
    result = soak.run(3.0, lambda _: None, writers=3, tiers=(1 << 20, 3 << 20))  # full at once
    zero = (
        "bytes_above_quota", "storage_bytes_above_quota", "wrong_bytes", "orphan_bytes",
        "dangling_locations", "corrupt_records",
    )  # fmt: skip
    assert {name: result[name] for name in zero} == dict.fromkeys(zero, 0), result
    assert result["evicted_blocks"] > 0
    assert result["written_blocks"] > result["quota_bytes"] // soak.BLOCK_BYTES, "it was full"
    assert min(result["samples"], result["storage_samples"]) > 10


@pytest.mark.heavy
@pytest.mark.ray
def test_reclaim(kvcm: Kvcm) -> None:
    ran = kvcm("bench", "reclaim", "--quick", "--reclaimers", "2", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert [row["storage"] for row in result["rows"]] == ["metadata", "shm", "file"]
    assert all(row["blocks_per_s"] > 0 for row in result["rows"])
    assert result["lookup_p99_idle_us"] > 0
    assert result["lookup_p99_reclaiming_us"] > 0
    assert result["lookups"]["missed"] == 0
    assert result["write_full_ratio"] > 0
    assert result["write_evicted_blocks"] >= result["write_full_blocks"] / 2


def test_a_number_that_is_not_the_known_one_is_told() -> None:
    traces = {name: load(name).part(0, 50) for name in optimizer.TRACES}
    rows = optimizer.oracle_rows(traces)
    assert len(rows) == 30
    assert not any(row["equal"] for row in rows), "these are not the whole traces"


def test_sampling_is_near_enough() -> None:
    for name in optimizer.TRACES:
        assert 0 < optimizer.sampled_error(load(name)) <= 0.01


def test_speed_of_the_optimizer() -> None:
    found = optimizer.speed(load("synthetic").part(0, 500), 1)
    assert found["sweep_points"] == 120
    assert found["sweep_vs_120_processes"] == pytest.approx(24 / found["sweep_s"])
    assert all(rate > 0 for rate in found["accesses_per_s"].values())


def test_a_huge_trace_in_small(tmp_path: Path) -> None:
    found = huge.run(30_000, report=lambda _: None)
    assert 30_000 <= found["huge_accesses"] < 300_000
    assert found["huge_file_bytes"] > 0
    assert found["huge_peak_rss_bytes"] < 1 << 30
    file = tmp_path / "huge.jsonl"
    assert huge.write(file, 30_000) == found["huge_requests"]
    accesses = load(file, cache=False)
    assert accesses.chained
    assert len(accesses.blocks) == found["huge_accesses"]
    assert replay(accesses, "lru", 1000).sum() > 0


@pytest.mark.heavy
def test_optimizer(kvcm: Kvcm) -> None:
    ran = kvcm("bench", "optimizer", "--quick", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["oracle_equal"] == ran.json["oracle_rows"] == 30
    assert 0 < ran.json["raw_to_charts_s"] < ran.json["first_run_s"]
    assert len(ran.json["second_halves"]) == 12
    assert max(ran.json["sampled_error"].values()) <= 0.01


def test_help_and_wrong_options(kvcm: Kvcm) -> None:
    shown = kvcm("bench", "--help").out
    assert "capacity" in shown
    assert "reclaim" in shown
    assert "optimizer" in shown
    assert kvcm("bench", "capacity", "--policy", "none").code == 2
    assert kvcm("bench", "reclaim", "--soak", "0").code == 2


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="here it would run")
@pytest.mark.parametrize("name", ["engine", "serve-llm"])
def test_engines_are_measured_in_their_own_environment(kvcm: Kvcm, name: str) -> None:
    ran = kvcm("bench", name, "--json")
    assert ran.code == 1
    assert ran.json["error"]["code"] == "KVCM-U002"
    assert "make setup-engines" in ran.json["error"]["hint"]
