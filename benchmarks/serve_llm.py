"""Conversations with a Ray Serve LLM deployment: our router beside Serve's default, in one run.

    python -m kvcm_ray.benchmarks.serve_llm MODEL_FOLDER [--replicas 2] [--users 4] [--turns 5] [--json]

Needs an environment with an engine (`make setup-engines`) and a model with a chat template; each row starts a
Ray cluster, a manager inside it and the engines, which takes minutes on a CPU. Users talk at the same time;
each turn sends the whole conversation again. All rows get the same words. What is compared is the time to the
first token, and the tokens that engines computed, found themselves and loaded: these do not depend on how
busy the machine is. With ``--alone`` two more rows have no shared cache.

The router's own time is measured first, in this process, without an engine: `decisions`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.testing.engines import end_group

MODULE = "kvcm_ray.benchmarks.serve_llm"
MODEL_ID = "served"
START_S, ANSWER_S = 600.0, 300.0
SYSTEM_WORDS, TURN_WORDS, ANSWER_TOKENS = 250, 60, 12
THINK_S = 0.5  #: between an answer and the next question
SETTLE_S = 3.0  #: until the last figures are in Ray's metrics
TEXT = (
    "the cache holds blocks of keys and values that engines computed once and others may read again when a "
    "prompt begins with the same words so a document is read one time and asked many questions by many people"
)

#: column -> source of prompt tokens in vLLM's metrics, which Ray collects
COUNTED = {
    "computed_tokens": "local_compute",
    "own_tokens": "local_cache_hit",
    "loaded_tokens": "external_kv_transfer",
}


@dataclass(slots=True)
class Plan:
    replicas: int = 2
    users: int = 4
    turns: int = 5
    seed: int = 0


@dataclass(slots=True)
class Talk:
    """What the users of one row saw."""

    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    failed: int = 0


# ------------------------------------------------------------------------------------ the load


def talk(url: str, plan: Plan) -> Talk:
    """All users at the same time, each with a conversation of its own behind a common beginning."""
    result, lock = Talk(), threading.Lock()
    system = _words(np.random.default_rng(plan.seed), SYSTEM_WORDS)
    threads = [
        threading.Thread(target=_user, args=(url, plan, number, system, result, lock))
        for number in range(plan.users)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def _user(url: str, plan: Plan, number: int, system: str, result: Talk, lock: Any) -> None:
    chance = np.random.default_rng([plan.seed, number])
    messages = [{"role": "system", "content": system}]
    with httpx.Client(timeout=ANSWER_S) as client:
        for _ in range(plan.turns):
            messages.append({"role": "user", "content": _words(chance, TURN_WORDS)})
            try:
                ttft, total, answer = _ask(client, url, messages)
            except (httpx.HTTPError, ValueError, KeyError):
                with lock:
                    result.failed += 1
                return
            with lock:
                result.ttft_s.append(ttft)
                result.total_s.append(total)
            messages.append({"role": "assistant", "content": answer})
            time.sleep(THINK_S)


def _ask(client: httpx.Client, url: str, messages: Sequence[dict[str, str]]) -> tuple[float, float, str]:
    """Seconds to the first token and to the last, and the answer."""
    body = {
        "model": MODEL_ID, "messages": list(messages), "max_tokens": ANSWER_TOKENS, "temperature": 0,
        "stream": True,
    }  # fmt: skip
    begin, first, parts = time.perf_counter(), 0.0, []
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            choices = json.loads(data)["choices"]
            if text := (choices[0]["delta"].get("content") if choices else None):
                first = first or time.perf_counter()
                parts.append(text)
    end = time.perf_counter()
    if not parts:
        raise ValueError("an answer without text")
    return first - begin, end - begin, "".join(parts)


def _words(chance: np.random.Generator, count: int) -> str:
    words = TEXT.split()
    return " ".join(words[number] for number in chance.integers(0, len(words), count))


# ----------------------------------------------------------------------------------- the rows


def measure(model: str, plan: Plan, *, router: bool, cache: bool) -> dict[str, Any]:
    """One row: a cluster of its own, a conversation to warm it up, then the measured ones."""
    with deployed(model, plan.replicas, router=router, cache=cache) as (url, metrics_url):
        talk(url, Plan(plan.replicas, users=2 * plan.replicas, turns=1, seed=plan.seed + 1))
        time.sleep(SETTLE_S)
        before = counted(metrics_url)
        begin = time.monotonic()
        found = talk(url, plan)
        seconds = time.monotonic() - begin
        time.sleep(SETTLE_S)
        after = counted(metrics_url)
    row = {name: int(after[name] - before[name]) for name in COUNTED}
    ttft = np.array(found.ttft_s or [np.nan])
    return {
        "router": "kvcm" if router else "default",
        "shared_cache": cache,
        "requests": len(found.ttft_s),
        "failed": found.failed,
        "seconds": round(seconds, 1),
        "ttft_mean_s": round(float(ttft.mean()), 3),
        "ttft_p50_s": round(float(np.median(ttft)), 3),
        "ttft_p90_s": round(float(np.quantile(ttft, 0.9)), 3),
        **row,
    }


def counted(metrics_url: str) -> dict[str, float]:
    """The engines' counters, all replicas together."""
    text = httpx.get(metrics_url, timeout=10).text
    return {column: tokens_of(text, source) for column, source in COUNTED.items()}


def tokens_of(text: str, source: str) -> float:
    """Prompt tokens from that source, of all engines, in Prometheus' text form."""
    name, label = r"(?:ray_)?vllm_prompt_tokens_by_source(?:_total)?", f'source="{source}"'
    found = re.findall(rf"^{name}\{{(?:.*,)?{label}(?:,.*)?\}} ([0-9.e+]+)$", text, re.M)
    return sum(map(float, found))


@contextlib.contextmanager
def deployed(model: str, replicas: int, *, router: bool, cache: bool) -> Iterator[tuple[str, str]]:
    """URLs of the API and of the metrics of a deployment in a child process."""
    port, metrics_port = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="kvcm-serve-llm-") as folder:
        facts = {
            "model": model, "replicas": replicas, "router": router, "cache": cache, "port": port,
            "metrics_port": metrics_port, "data_dir": str(Path(folder) / "data"),
        }  # fmt: skip
        log = Path(folder) / "log"
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", MODULE, "--child", json.dumps(facts)],
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
            raise SystemExit(f"the deployment did not start; its log ends with\n{log.read_text()[-4000:]}")
        time.sleep(0.5)


def serve_child(facts: dict[str, Any]) -> None:
    """A Ray cluster with a manager inside and the deployment; ends with its stdin."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from kvcm_ray import cluster
    from kvcm_ray.connectors.serve_llm import router_config
    from kvcm_ray.connectors.serve_llm.deployment import (
        CPU_ENGINE,
        CPU_ENVIRONMENT,
        CPU_PLACEMENT,
        llm_arguments,
    )

    ray.init(
        address="local", num_cpus=8, include_dashboard=False, logging_level=logging.ERROR,
        _metrics_export_port=facts["metrics_port"],
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": facts["port"]})
    data_dir = facts["data_dir"]
    arguments = llm_arguments(
        MODEL_ID, facts["model"], data_dir=data_dir, instance_id="bench", replicas=facts["replicas"],
        router={} if facts["router"] else None, engine=CPU_ENGINE, environment=CPU_ENVIRONMENT,
    )  # fmt: skip
    manager = None
    if facts["cache"]:
        manager = cluster.up_inside(data_dir, ("shm:1GiB",), replicas=1)
    else:
        arguments["engine_kwargs"].pop("kv_transfer_config")
        if facts["router"]:  # it knows what it sent where, and nothing else
            arguments["deployment_config"]["request_router_config"] = router_config()
    config = LLMConfig(**arguments, placement_group_config=CPU_PLACEMENT, log_engine_metrics=True)
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/", blocking=False)
    Path(f"{data_dir}.ready").touch()
    sys.stdin.read()
    if manager is not None:
        cluster.down(data_dir, purge=True)
    serve.shutdown()
    ray.shutdown()


# ------------------------------------------------------------------------ the router's own time


def decisions(*, prompts: int = 400, chars: int = 8000, replicas: int = 8) -> dict[str, Any]:
    """Milliseconds of a decision about prompts of so many characters, half of them known to a router.

    The real router and the real index of a manager in this process; the replicas are only named, since no
    request is sent. Each known prompt has its keys learned, and half of them are in the shared cache.
    """
    from kvcm_ray.client import connect
    from kvcm_ray.testing.served import served

    with (
        tempfile.TemporaryDirectory(prefix="kvcm-routed-") as folder,
        served(Path(folder) / "data") as manager,
    ):
        keys = np.random.default_rng(0).integers(1, 2**62, (prompts, chars // 128), dtype=np.int64)
        with connect(manager.url) as client:
            cache = client.register("bench", block_size=32, specs={"tp0": 64})
            for row in keys[: prompts // 2]:
                cache.put(row[: len(row) // 2], np.zeros((len(row) // 2, 64), np.uint8))
        return asyncio.run(_decisions(str(manager.data_dir), keys, chars, replicas))


async def _decisions(data_dir: str, keys: Any, chars: int, replicas: int) -> dict[str, Any]:
    from kvcm_ray.connectors.serve_llm.prompts import prompt_of

    router, named = router_before(data_dir, replicas)
    chance, times, by_prefix = np.random.default_rng(1), [], 0
    requests = [{"prompt": "".join(map(chr, chance.integers(97, 123, chars))), "model": "m"} for _ in keys]
    for number, (request, row) in enumerate(zip(requests, keys, strict=True)):
        if number % 2 == 0:
            prompt = prompt_of([request])
            assert prompt is not None
            name = named[number % replicas].replica_id.to_full_id_str()
            router._table.served(prompt.hashes, name, time.monotonic())
            router._table.learned(prompt.hashes, row, range(1, len(row) + 1))
    metadata = SimpleNamespace(multiplexed_model_id="", internal_request_id="")
    for request in requests:
        context = SimpleNamespace(tried_same_node=True, tried_same_az=True, should_backoff=False)
        pending: Any = SimpleNamespace(args=[request], metadata=metadata, routing_context=context)
        begin = time.perf_counter()
        ranks = await router.choose_replicas(named, pending)
        times.append((time.perf_counter() - begin) * 1000)
        by_prefix += len(ranks) == 2
    router._learner.close()
    return {
        "prompts": len(times), "by_prefix": by_prefix, "chars": chars, "replicas": replicas,
        "p50_ms": round(float(np.median(times)), 3),
        "p99_ms": round(float(np.quantile(times, 0.99)), 3),
    }  # fmt: skip


def router_before(data_dir: str, replicas: int) -> tuple[Any, list[Any]]:
    """A router with the index open, and replicas that it may choose from."""
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

    from kvcm_ray.connectors.serve_llm.router import KVCMRequestRouter

    deployment = DeploymentID("engine", "bench")
    router = KVCMRequestRouter(
        deployment_id=deployment, handle_source=DeploymentHandleSource.REPLICA, self_node_id="here"
    )
    router.initialize_state(kvcm_data_dir=data_dir, instance_id="bench")
    ids = [ReplicaID(str(number), deployment) for number in range(replicas)]
    named = [SimpleNamespace(replica_id=name, node_id="here", max_ongoing_requests=8) for name in ids]
    router._replica_id_set = set(ids)
    assert router._shared is not None
    end = time.monotonic() + 10
    while router._shared.info is None and time.monotonic() < end:
        time.sleep(0.05)  # its thread opens it
    assert router._shared.info is not None, "the index was not opened"
    return router, named


# --------------------------------------------------------------------------------- the command


def run(model: str, plan: Plan, *, alone: bool = False, report: Any = lambda _: None) -> dict[str, Any]:
    rows = []
    for cache in (True, False) if alone else (True,):
        for router in (False, True):
            report(
                f"{'our' if router else 'the default'} router, {'one' if cache else 'no'} shared cache ..."
            )
            rows.append(measure(model, plan, router=router, cache=cache))
    return {"decision": decisions(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", help="a model's folder; without it only decisions are measured")
    for name in ("replicas", "users", "turns"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan(), name))
    parser.add_argument("--alone", action="store_true", help="two more rows, without a shared cache")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        serve_child(json.loads(given.child))
        return
    plan = Plan(given.replicas, given.users, given.turns)
    note = (lambda _: None) if given.json else (lambda text: print(text, file=sys.stderr, flush=True))
    found = (
        run(given.model, plan, alone=given.alone, report=note)
        if given.model
        else {"decision": decisions(), "rows": []}
    )
    if given.json:
        print(json.dumps(found))
        return
    print("decision:", found["decision"])
    for row in found["rows"]:
        print(row)


if __name__ == "__main__":
    main()
