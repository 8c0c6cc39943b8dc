"""``kvcm simulate``: with a file, and of a live group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvcm_ray
from kvcm_ray.cli.main import main
from kvcm_ray.testing.served import Served

Kvcm = Callable[..., Any]

EXAMPLE = str(Path(kvcm_ray.__file__).parents[1] / "examples" / "scenario.yaml")
SCENARIO = {
    "storages": [
        {"name": "dram", "kind": "shm", "price_gib_month": 1024, "read_bytes_per_s": 1024},
        {"name": "disk", "write_bytes_per_s": 1000},
    ],
    "groups": [
        {
            "name": "chat",
            "tiers": [{"storage": "dram", "capacity_blocks": 2}, "disk"],
            "quota_blocks": 4,
            "block_bytes": "1MiB",
        }
    ],
}


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    file = tmp_path / "scenario.json"
    file.write_text(json.dumps(SCENARIO))
    return str(file)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Of two prompts that share a block, and one that shares nothing; a second apart."""
    path = tmp_path / "trace.jsonl"
    prompts = [[1, 2, 3], [4], [1, 2, 3], [1, 9]]
    lines = [
        {"timestamp": 1000 * n, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for n, ids in enumerate(prompts)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_results_as_json(trace: str, scenario: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, scenario, "--by", "turn", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["trace"] == {"requests": 4, "accessed_blocks": 9, "unique_blocks": 5, "seconds": 3.0}
    assert (found["hit_blocks"], found["hit_ratio"]) == (4, pytest.approx(4 / 9))
    (chat,) = found["groups"]
    assert (chat["hit_blocks"], chat["evicted_blocks"], chat["peak_bytes"]) == (4, 1, 4 << 20)
    assert (chat["demoted_blocks"], chat["promoted_blocks"]) == (2 + 2 + 1, 2)
    dram, disk = found["storages"]
    assert (dram["hit_blocks"], disk["hit_blocks"], disk["capacity_bytes"]) == (2, 2, None)
    assert dram["price_month"] == pytest.approx(2)
    assert dram["read_busy"] == pytest.approx(2 * 1024 / 3)
    assert disk["write_busy"] == pytest.approx(disk["written_bytes"] / 1000 / 3)
    assert found["load_s"]["mean"] == pytest.approx(1024)
    assert [row["label"] for row in found["parts"]["turn"]] == [""]
    assert "disk would have to write" in err
    assert "dram would have to read" in err


def test_tables_for_people(scenario: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, scenario, "--by", "instance"]) == 0
    out = capsys.readouterr().out
    assert "4 blocks   44.44% of blocks" in out
    assert "4.0 MiB" in out
    assert any(line.split()[:3] == ["dram", "2.0", "MiB"] for line in out.splitlines())


def test_the_example_with_a_bundled_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "synthetic", EXAMPLE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["hit_blocks"] <= 77953
    assert found["write_delay_s"]["mean"] > 0
    assert sum(storage["hit_blocks"] for storage in found["storages"]) == found["hit_blocks"]


def test_a_live_group(kvcm: Kvcm, manager: Served, trace: str) -> None:
    missing = kvcm("simulate", trace, "--group", "default", "--json")
    assert missing.code == 1
    assert "has no instances" in missing.json["error"]["message"]
    made = kvcm(
        "instance",
        "create",
        "--group",
        "default",
        "--block-size",
        "512",
        "--spec",
        "tp0=1MiB",
        "i1",
        "--json",
    )
    assert made.code == 0, made.err
    ran = kvcm("simulate", trace, "--group", "default", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["groups"][0]["name"] == "default"
    assert ran.json["hit_blocks"] == 4


@pytest.mark.parametrize("arguments", [[], [EXAMPLE, "--group", "g"]])
def test_a_file_or_a_group(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "synthetic", *arguments]) == 2
    assert "either a SCENARIO file or --group" in capsys.readouterr().err


def test_what_is_wrong_is_said(tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**SCENARIO, "group": []}))
    assert main(["simulate", trace, str(file), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["error"] == "InvalidArgument"
    assert "did you mean 'groups'?" in error["message"]
