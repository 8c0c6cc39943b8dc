"""`kvcm bench engine`: what the cache is worth to a real engine, and what it costs it. vLLM's CPU build.

Two engines run side by side on one thread each, one with the connector and one without, and a manager of
their own. They are asked in turns, so that other work on the machine disturbs both alike; times are medians.

* the same outputs: random prefixes, each with several random endings, greedy; both engines must say the same;
* the second request with a prefix of 2000 tokens: tokens computed, time to the first token with and without;
* `load_ratio`: time of those loads, from their start until the engine may use the blocks, divided by that of
  copying the same bytes with numpy;
* the scheduler: see `benchmarks/engine_scheduler.py`.

The model is a random Llama made on the spot, or the real SmolLM2 (``--model smollm2``: prompts are pieces of
this package's own source), or a folder.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import Unsupported
from kvcm_ray.testing import smollm2
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.engines import Engine, engine, llama, wait_until

BLOCK = 32
PREFIX_TOKENS, ENDING_TOKENS = 2000, 32
ROUNDS = 5  #: of prompts with the same prefixes
OUTPUT_TOKENS = 8
LOOKUP_BLOCKS = 128
COPIED_BYTES = 256 << 20  #: more than caches of CPUs hold
TINY_TOKENS = 1024  #: the random model's vocabulary
HERE = "kvcm_ray.benchmarks.engine_scheduler"

Report = Callable[[str], None]
Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    prompts: int = 200
    pairs: int = 9  #: second requests
    lookups: int = 2000
    requests: int = 20  #: computed as a whole for the scheduler's figures


def run(
    *, model: str = "tiny", quick: bool = False, prompts: int | None = None, report: Report = lambda _: None
) -> dict[str, Any]:
    """Measure; about two minutes, ten with SmolLM2, and leaves nothing behind.

    Args:
        model: ``tiny``, ``smollm2`` or a folder with weights. prompts: whose outputs are compared.

    Returns:
        ``{"engine", "model", "versions"}`` and what `same_outputs`, `second_requests` and `scheduler_times`
        return.

    Raises:
        Unsupported: no engine in this environment.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Unsupported(
            "bench engine runs a real vLLM engine, and this environment has none",
            hint="Make one with `make setup-engines`, then run `.venv-engines/bin/kvcm bench engine`.",
        )
    plan = Plan() if model == "tiny" else Plan(pairs=5, requests=3)
    if quick:
        plan = Plan(prompts=40, pairs=3, lookups=500, requests=3)
    if prompts is not None:
        plan = dataclasses.replace(plan, prompts=prompts)
    with tempfile.TemporaryDirectory(prefix="kvcm-bench-engine-") as scratch:
        return _measure(Path(scratch), model, plan, report)


def _measure(scratch: Path, model: str, plan: Plan, report: Report) -> dict[str, Any]:
    folder = smollm2.model_folder(model, lambda: llama(scratch / "tiny"))
    random = RandomPrompts(None if model == "tiny" else folder)
    report("starting a manager and two engines ...")
    with manager(scratch / "data", ("shm:4GiB",)) as running:
        where = {"kvcm_data_dir": str(running.data_dir), "instance_id": "bench"}
        with (
            _engine(folder, scratch / "plain") as plain,
            _engine(folder, scratch / "cached", where) as cached,
        ):
            for one in (plain, cached):
                one.one(random.tokens(PREFIX_TOKENS), 2)  # a first run is slow for reasons of its own
            report(f"comparing the outputs of {plan.prompts} prompts ...")
            result = same_outputs(plain, cached, random.many(plan.prompts))
            report(f"second requests with a prefix of {PREFIX_TOKENS} tokens ...")
            result |= second_requests(plain, cached, random, plan.pairs)
        report(f"look-ups of {LOOKUP_BLOCKS} blocks that are not cached ...")
        with _variable("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), _engine(folder, scratch / "one", where) as one:
            result |= scheduler_times(one, random, plan)
    return {"engine": "vllm", "model": model, "versions": versions(), **result}


def _engine(folder: Path, log: Path, connector: dict[str, Any] | None = None) -> Any:
    length = (LOOKUP_BLOCKS + 1) * BLOCK
    return engine(folder, log, connector, max_model_len=length, max_num_batched_tokens=2048, block_size=BLOCK)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class RandomPrompts:
    """Random token ids, or, for a model that can read, random pieces of this package's source."""

    def __init__(self, tokenizer: Path | None, seed: int = 0) -> None:
        self._chance = np.random.default_rng(seed)
        self._text: npt.NDArray[np.int64] | None = None
        if tokenizer is not None:
            from transformers import AutoTokenizer

            sources = sorted(Path(__file__).resolve().parents[1].glob("kvcm_ray/**/*.py"))
            text = "\n".join(path.read_text() for path in sources)
            ids = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False)["input_ids"]
            self._text = np.array(ids)

    def tokens(self, count: int) -> Tokens:
        if self._text is None:
            drawn: Tokens = self._chance.integers(3, TINY_TOKENS, count).tolist()
            return drawn
        begin = int(self._chance.integers(0, len(self._text) - count))
        found: Tokens = self._text[begin : begin + count].tolist()
        return found

    def many(self, count: int) -> list[list[Tokens]]:
        """Prompts in rounds; each round has other endings to the same prefixes of random length."""
        prefixes = [self.tokens(int(self._chance.integers(40, 400))) for _ in range(-(-count // ROUNDS))]
        rounds = [
            [prefix + self.tokens(int(self._chance.integers(5, 90))) for prefix in prefixes]
            for _ in range(ROUNDS)
        ]
        rounds[-1] = rounds[-1][: len(prefixes) - (ROUNDS * len(prefixes) - count)]
        return rounds


# ------------------------------------------------------------------------------------ what is measured


def same_outputs(plain: Engine, cached: Engine, rounds: Sequence[list[Tokens]]) -> dict[str, Any]:
    """``{"prompts", "outputs_identical", "outputs_different", "outputs_distinct", "prompts_hit"}``."""
    different, hits, texts = 0, 0, set()
    for prompts in rounds:
        expected, got = plain.generate(prompts, OUTPUT_TOKENS), cached.generate(prompts, OUTPUT_TOKENS)
        different += sum(a["tokens"] != b["tokens"] for a, b in zip(expected, got, strict=True))
        texts |= {tuple(answer["tokens"]) for answer in expected}
        hits += sum(answer["cached"] > 0 for answer in got)
    return {
        "prompts": sum(map(len, rounds)), "outputs_identical": different == 0,
        "outputs_different": different, "outputs_distinct": len(texts), "prompts_hit": hits,
    }  # fmt: skip


def second_requests(plain: Engine, cached: Engine, random: RandomPrompts, pairs: int) -> dict[str, Any]:
    """Each pair: a prompt is stored, then both engines get another one with the same prefix.

    Returns:
        ``{"prefix_tokens", "prompt_tokens", "recomputed_tokens", "second_outputs_identical", "ttft_cold_s",
        "ttft_warm_s", "ttft_ratio", "load_ratio", "loaded_bytes", "load_s", "copy_s"}``; the most tokens
        that were computed, else medians. A load that failed counts as nothing loaded.
    """
    rows = [_second_request(plain, cached, random) for _ in range(pairs)]

    def median(name: str) -> float:
        return round(statistics.median(row[name] for row in rows), 6)

    return {
        "prefix_tokens": PREFIX_TOKENS,
        "prompt_tokens": PREFIX_TOKENS + ENDING_TOKENS,
        "recomputed_tokens": max(int(row["recomputed"]) for row in rows),
        "second_outputs_identical": all(row["same"] for row in rows),
        "ttft_cold_s": median("cold_s"),
        "ttft_warm_s": median("warm_s"),
        "ttft_ratio": round(statistics.median(row["cold_s"] / row["warm_s"] for row in rows), 2),
        "load_ratio": round(statistics.median(row["load_s"] / row["copy_s"] for row in rows), 2),
        "loaded_bytes": int(rows[0]["bytes"]),
        "load_s": median("load_s"),
        "copy_s": median("copy_s"),
    }


def _second_request(plain: Engine, cached: Engine, random: RandomPrompts) -> dict[str, Any]:
    prefix = random.tokens(PREFIX_TOKENS)
    first, second = prefix + random.tokens(ENDING_TOKENS), prefix + random.tokens(ENDING_TOKENS)
    cached.one(first, 2)
    full = len(first) // BLOCK * BLOCK
    wait_until(lambda: cached.one(first, 1)["cached"] == full, 60, "saving a prompt")
    without, before = plain.one(second), cached.metrics()
    got, after = cached.one(second), cached.metrics()
    delta = {name: after[f"vllm:kvcm_{name}"] - before[f"vllm:kvcm_{name}"] for name in
             ("loaded_bytes", "load_seconds_sum", "failed_loads")}  # fmt: skip
    computed = len(second) - got["cached"] if not delta["failed_loads"] else len(second)
    return {
        "recomputed": computed, "same": got["tokens"] == without["tokens"],
        "cold_s": without["ttft_s"], "warm_s": got["ttft_s"], "bytes": delta["loaded_bytes"],
        "load_s": delta["load_seconds_sum"], "copy_s": copy_seconds(int(delta["loaded_bytes"])),
    }  # fmt: skip


def copy_seconds(size: int) -> float:
    """Of copying so many bytes with numpy, on pages that are there and in no cache of the CPU; a median."""
    count = max(3, COPIED_BYTES // (2 * size))
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(count)]
    times = []
    for source, target in pairs:
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def scheduler_times(cached: Engine, random: RandomPrompts, plan: Plan) -> dict[str, Any]:
    """``lookup_p50_ms``, ``lookup_p99_ms``, ``scheduler_p50_ms``, ``scheduler_max_ms``, the same with
    ``cpu_`` in the name, and how many were timed."""
    looked = cached.call(f"{HERE}:lookups", count=plan.lookups, blocks=LOOKUP_BLOCKS)
    prompts = [random.tokens(LOOKUP_BLOCKS * BLOCK) for _ in range(plan.requests)]
    whole = cached.call(f"{HERE}:requests", prompts=prompts)
    return {
        "lookup_blocks": LOOKUP_BLOCKS,
        "lookups": plan.lookups,
        **_quantiles("lookup", looked, p50=0.5, p99=0.99),
        "scheduler_requests": plan.requests,
        **_quantiles("scheduler", whole, p50=0.5, max=1.0),
    }


def _quantiles(name: str, times: dict[str, list[float]], **wanted: float) -> dict[str, float]:
    """Milliseconds; CPU time has ``cpu_`` in its name."""
    return {
        f"{name}_{'cpu_' if clock == 'cpu' else ''}{label}_ms": round(
            float(np.quantile(times[clock], share)) * 1000, 4
        )
        for clock in ("wall", "cpu")
        for label, share in wanted.items()
    }


def versions() -> dict[str, str]:
    (vllm, *_) = importlib.metadata.packages_distributions()["vllm"]
    names = (vllm, "torch", "transformers", "numpy", "kvcm-ray")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
