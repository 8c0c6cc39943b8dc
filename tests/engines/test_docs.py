"""The blocks of docs/engines.md that need an engine, vLLM or transformers, run as they are written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcm_ray.cluster import Manager

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
BLOCKS = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S))


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_blocks_run(engine: str, running: Manager, smollm2: Path) -> None:
    environment = os.environ | {
        "KVCM_DATA_DIR": str(running.data_dir), "KVCM_URL": running.url, "MODEL": str(smollm2),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[engine]],
        capture_output=True, text=True, env=environment, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^(\d+) of (\d+) tokens were not computed$", done.stdout, re.M)
    (first, _), (second, prompt) = [(int(cached), int(tokens)) for cached, tokens in found]
    assert first == 0
    assert prompt > second > 0.9 * prompt
