"""The connector in an engine behind Ray Serve LLM, which is in another Ray than the manager."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from kvcm_ray.cluster import Manager
from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.testing.engines import end_group, wait_until

START_S = 240.0
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text()[:6000]


@contextlib.contextmanager
def served(model: Path, settings: dict[str, str], log: Path) -> Iterator[tuple[str, str]]:
    """URLs of the API and of the metrics."""
    port, metrics_port = free_ports(2)
    arguments = [str(model), json.dumps(settings), str(port), str(metrics_port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcm_ray.testing.serve_llm_child", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert any(line.strip() == "ready" for line in process.stdout), log.read_text()[-3000:]
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
        finally:
            assert process.stdin is not None
            process.stdin.close()
            end_group(process, 60)


def complete(url: str, prompt: str) -> tuple[str, float]:
    begin = time.monotonic()
    body = {"model": "served", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"], time.monotonic() - begin


def loaded_blocks(url: str) -> float:
    """From Ray's own metrics, which the engine's go to."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    found = re.findall(r"^ray_vllm_kvcm_loaded_blocks(?:_total)?\{.*\} ([0-9.e+]+)$", text, re.M)
    return sum(map(float, found))


def test_prompts_over_openai_http(running: Manager, smollm2: Path, tmp_path: Path) -> None:
    settings = {"kvcm_data_dir": str(running.data_dir), "instance_id": "served"}
    with served(smollm2, settings, tmp_path / "log") as (url, metrics):
        cold, _ = complete(url, DOCUMENT)
        time.sleep(1)
        warm, seconds = complete(url, DOCUMENT)
        assert warm == cold
        wait_until(lambda: loaded_blocks(metrics) >= 1200 // 32, 30, "a load of the document")
        print(f"warm request: {seconds:.2f} s")
