"""The look-up benchmark runs, answers what scripts rely on, and runs beat a flat table."""

from __future__ import annotations

import json
from pathlib import Path

from kvcm_ray.benchmarks.lookup import run
from kvcm_ray.benchmarks.pingpong import pingpong_us


def test_lookup(tmp_path: Path) -> None:
    said: list[str] = []
    result = run(blocks=20_000, keys=(16, 1024), queries=40, folder=tmp_path, report=said.append)
    assert json.loads(json.dumps(result)) == result
    assert result["blocks"] == 20_000
    assert result["pingpong_p50_us"] > 0
    assert [row["keys"] for row in result["rows"]] == [16, 1024]
    for row in result["rows"]:
        assert 0 < row["match_only_p50_us"] <= row["p50_us"] <= row["p99_us"]
    assert result["rows"][1]["flat_lmdb_p50_us"] > 5 * result["rows"][1]["p50_us"]
    assert 30 < result["index_bytes_per_block"] < 200
    assert said
    assert list(tmp_path.iterdir()) == []


def test_pingpong_times_each_round() -> None:
    times = pingpong_us(50)
    assert len(times) == 50
    assert (times > 1).all()
