"""`kvcm bench engine` in its small form: a random model, few prompts, the keys that are promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.benchmarks.engine import PREFIX_TOKENS, run
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.testing.smollm2 import model_folder


def test_small() -> None:
    found = run(quick=True, prompts=20)
    print(found)
    assert found["engine"] == "vllm"
    assert found["prompts"] == 20
    assert found["outputs_identical"]
    assert found["second_outputs_identical"]
    assert found["outputs_distinct"] > 10, "outputs that are all alike would prove nothing"
    assert found["prompts_hit"] >= 12, "all rounds but the first find their prefixes"
    assert found["prefix_tokens"] == PREFIX_TOKENS
    # All full blocks of the prefix were loaded, and nothing else.
    assert found["recomputed_tokens"] == found["prompt_tokens"] - PREFIX_TOKENS // 32 * 32
    assert 0 < found["ttft_warm_s"] < found["ttft_cold_s"]
    assert found["load_ratio"] > 0
    assert found["lookup_cpu_p50_ms"] < 0.5
    assert found["lookup_cpu_p99_ms"] < 1.0


def test_models_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_folder("tiny", lambda: tmp_path / "made") == tmp_path / "made"
    assert model_folder(str(tmp_path), lambda: tmp_path / "made") == tmp_path
    with pytest.raises(InvalidArgument, match="no folder with a config"):
        model_folder(str(tmp_path / "none"), lambda: tmp_path)
