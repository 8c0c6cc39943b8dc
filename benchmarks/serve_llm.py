"""`kvcm bench serve-llm`: our router beside Serve's default, on real engines behind Ray Serve LLM.

Each row starts a Ray cluster, a manager inside it and the replicas, which takes a minute or two on a CPU;
then users talk (`benchmarks/serve_llm_load.py`), the same words in all rows. The engines' own caches are
bounded: two of them hold all conversations together, one alone does not. Compared are the prompt tokens that
engines computed, had themselves and loaded from the shared cache, which hardly depend on how busy the machine
is, and the times to the first token, which do. Two more rows have no shared cache: what the router is worth
alone.

The router's own time is measured first, without an engine: `benchmarks/serve_llm_decisions.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from kvcm_ray.benchmarks.serve_llm_decisions import decisions
from kvcm_ray.benchmarks.serve_llm_load import MODEL_ID, Plan, Talk, talk
from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.errors import Unsupported
from kvcm_ray.testing import smollm2
from kvcm_ray.testing.engines import end_group

MODULE = "kvcm_ray.benchmarks.serve_llm"
START_S = 600.0
SETTLE_S = 3.0  #: until the last figures are in Ray's metrics
METRICS_EVERY_MS = 500
BLOCK = 32

#: column -> source of prompt tokens in vLLM's metrics, which Ray collects
SOURCES = {
    "computed_tokens": "local_compute",
    "own_tokens": "local_cache_hit",
    "loaded_tokens": "external_kv_transfer",
}

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Deployment:
    """What a row deploys."""

    model: str
    router: bool = True  #: ours; False: Serve's own
    cache: bool = True  #: one that the replicas share
    replicas: int = 2
    engine_tokens: int = 6144  #: that an engine's own cache holds; at least a prompt of full length

    def __str__(self) -> str:
        name = "our" if self.router else "Serve's default"
        return f"{name} router, {self.replicas} replicas, {'one' if self.cache else 'no'} shared cache"


def run(
    *,
    model: str = "smollm2",
    plan: Plan | None = None,
    replicas: int = 2,
    rounds: int = 2,
    alone: bool = True,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Measure; about ten minutes on a CPU, and leaves nothing behind.

    Args:
        model: ``smollm2``; ``tiny``, random with its tokenizer; or a folder with a chat template.
        rounds: of talks in each row, with other words each. alone: also without a shared cache.

    Returns:
        ``{"model", "decision": {...}, "rows": [{"router", "shared_cache", "requests", "failed",
        "computed_tokens", "own_tokens", "loaded_tokens", "by_prefix", "busiest_share", "ttft_first_p50_s",
        "ttft_later_p50_s", "ttft_mean_s", "seconds"}]}``; tokens of prompts, times of all rounds.

    Raises:
        Unsupported: no engine in this environment.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Unsupported(
            "bench serve-llm runs real vLLM engines, and this environment has none",
            hint="Make one with `make setup-engines`, then run `.venv-engines/bin/kvcm bench serve-llm`.",
        )
    report("the router's own time ...")
    found: dict[str, Any] = {"model": model, "decision": decisions(), "rows": []}
    with tempfile.TemporaryDirectory(prefix="kvcm-model-") as scratch:
        folder = smollm2.model_folder(model, lambda: smollm2.tiny(Path(scratch) / "tiny"))
        for cache in (True, False) if alone else (True,):
            for router in (False, True):
                row = Deployment(str(folder), router, cache, replicas)
                report(f"{row} ...")
                found["rows"].append(measure(row, plan or Plan(), rounds))
    return found


def measure(deployment: Deployment, plan: Plan, rounds: int = 1) -> dict[str, Any]:
    """One row: a cluster of its own, a talk to warm it up, then the measured ones."""
    with deployed(deployment) as (url, metrics_url):
        warm = dataclasses.replace(
            plan, documents=2 * deployment.replicas, users=1, turns=1, seed=plan.seed + 1000
        )
        talk(url, warm)
        time.sleep(SETTLE_S)
        before, shares, begin = counted(metrics_url), computed_by_replica(metrics_url), time.monotonic()
        talks = [talk(url, dataclasses.replace(plan, seed=plan.seed + number)) for number in range(rounds)]
        seconds = time.monotonic() - begin
        time.sleep(SETTLE_S)
        after, busiest = counted(metrics_url), busiest_share(shares, computed_by_replica(metrics_url))
    tokens = {name: int(after[name] - before[name]) for name in before}
    return {
        "router": "kvcm" if deployment.router else "default", "shared_cache": deployment.cache,
        **_seen(talks), **tokens, "busiest_share": busiest, "seconds": round(seconds, 1),
    }  # fmt: skip


def _seen(talks: list[Talk]) -> dict[str, Any]:
    first = [second for one in talks for second in one.first_s]
    later = [second for one in talks for second in one.later_s]
    if not first or not later:
        raise RuntimeError(f"no user got an answer: {[one.error for one in talks]}")
    return {
        "requests": len(first) + len(later),
        "failed": sum(one.failed for one in talks),
        "ttft_first_p50_s": round(statistics.median(first), 3),
        "ttft_later_p50_s": round(statistics.median(later), 3),
        "ttft_mean_s": round(statistics.mean(first + later), 3),
    }


def counted(metrics_url: str) -> dict[str, float]:
    """The engines' counters and the routers' decisions by prefix, all processes together."""
    text = httpx.get(metrics_url, timeout=10).text
    found = {
        column: total(text, "vllm_prompt_tokens_by_source", source=source)
        for column, source in SOURCES.items()
    }
    return found | {"by_prefix": total(text, "kvcm_router_decisions", reason="prefix")}


def computed_by_replica(metrics_url: str) -> dict[str, float]:
    text = httpx.get(metrics_url, timeout=10).text
    series = r"^\S*prompt_tokens_by_source\S*\{(?=.*source=\"local_compute\").*ReplicaId=\"(\w+)\".*\} (\S+)$"
    return {replica: float(value) for replica, value in re.findall(series, text, re.M)}


def busiest_share(before: dict[str, float], after: dict[str, float]) -> float:
    """Of the tokens that were computed, the part of the replica that computed most."""
    computed = [value - before.get(replica, 0) for replica, value in after.items()]
    return round(max(computed) / max(1, sum(computed)), 2)


def total(text: str, name: str, **label: str) -> float:
    """Sum of a counter's series with that label, in Prometheus' text form as Ray gives it."""
    ((key, value),) = label.items()
    series = rf"^(?:ray_)?{name}(?:_total)?\{{(?:.*,)?{key}=\"{value}\"(?:,.*)?\}} ([0-9.e+]+)$"
    return sum(map(float, re.findall(series, text, re.M)))


# ---------------------------------------------------------------------------- the deployment


@contextlib.contextmanager
def deployed(deployment: Deployment) -> Iterator[tuple[str, str]]:
    """URLs of the API and of the metrics of a deployment in a child process."""
    port, metrics_port = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="kvcm-serve-llm-") as folder:
        facts = dataclasses.asdict(deployment) | {
            "port": port, "metrics_port": metrics_port, "data_dir": str(Path(folder) / "data"),
        }  # fmt: skip
        log = Path(folder) / "log"
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", MODULE, json.dumps(facts)],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            _await_ready(child, Path(f"{facts['data_dir']}.ready"), log)
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
        finally:
            assert child.stdin is not None
            child.stdin.close()
            end_group(child, 60)


def _await_ready(child: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    end = time.monotonic() + START_S
    while not ready.exists():
        if child.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the deployment did not start; its log ends with\n{log.read_text()[-4000:]}")
        time.sleep(0.5)


def serve_child(facts: Mapping[str, Any]) -> None:
    """A Ray cluster with a manager inside and the deployment; ends with its stdin."""
    import ray
    from ray import serve
    from ray.serve.llm import build_openai_app

    from kvcm_ray import cluster

    ray.init(
        address="local", num_cpus=8, include_dashboard=False, logging_level=logging.ERROR,
        _metrics_export_port=facts["metrics_port"],
        _system_config={"metrics_report_interval_ms": METRICS_EVERY_MS},
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": facts["port"]})
    data_dir = facts["data_dir"]
    manager = cluster.up_inside(data_dir, ("shm:4GiB",), replicas=1) if facts["cache"] else None
    app = build_openai_app({"llm_configs": [_config(facts)]})
    serve.run(app, name="llm", route_prefix="/", blocking=False)
    Path(f"{data_dir}.ready").touch()
    sys.stdin.read()
    if manager is not None:
        cluster.down(data_dir, purge=True)
    serve.shutdown()
    ray.shutdown()


def _config(facts: Mapping[str, Any]) -> Any:
    from ray.serve.llm import LLMConfig

    from kvcm_ray.connectors.serve_llm import router_config
    from kvcm_ray.connectors.serve_llm.deployment import (
        CPU_ENGINE,
        CPU_ENVIRONMENT,
        CPU_PLACEMENT,
        llm_arguments,
    )

    bounded = {"num_gpu_blocks_override": facts["engine_tokens"] // BLOCK}
    arguments = llm_arguments(
        MODEL_ID, facts["model"], data_dir=facts["data_dir"], instance_id="bench", replicas=facts["replicas"],
        router={} if facts["router"] else None, engine=CPU_ENGINE | bounded, environment=CPU_ENVIRONMENT,
    )  # fmt: skip
    if not facts["cache"]:
        arguments["engine_kwargs"].pop("kv_transfer_config")
        if facts["router"]:  # it knows what it sent where, and nothing else
            arguments["deployment_config"]["request_router_config"] = router_config()
    return LLMConfig(**arguments, placement_group_config=CPU_PLACEMENT, log_engine_metrics=True)


if __name__ == "__main__":
    serve_child(json.loads(sys.argv[1]))
