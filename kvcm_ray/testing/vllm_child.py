"""A real vLLM engine on the CPU, driven by JSON lines: one command a line in, one answer a line out.

Started by `kvcm_ray.testing.engines.Engine` with the arguments of `vllm.LLM` as JSON. What vLLM prints
goes to stderr. `call` runs a named function on the engine itself, for what only its process can see.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any


def answer_stream() -> Any:
    """The real stdout; file descriptor 1 is stderr from here on, for the engine and its children."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens or 0,
            "finish": output.outputs[0].finish_reason,
            "ttft_s": _ttft(output),
            "seconds": seconds,
        }
        for output in outputs
    ]


def _ttft(output: Any) -> float | None:
    found = getattr(output.metrics, "first_token_latency", None)
    return None if found is None else float(found)


def metrics(llm: Any) -> dict[str, float]:
    """Counters by name; histograms by their count and sum."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        labels = {k: v for k, v in metric.labels.items() if k in ("source",)}
        name = metric.name + "".join(f"{{{k}={v}}}" for k, v in labels.items())
        if hasattr(metric, "value"):
            found[name] = found.get(name, 0.0) + float(metric.value)
        elif hasattr(metric, "sum"):
            found[name + "_sum"] = float(metric.sum)
            found[name + "_count"] = float(metric.count)
    return found


def main() -> None:
    stream = answer_stream()
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]))
    stream.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "generate":
            reply: Any = generate(llm, command["prompts"], command["max_tokens"])
        elif command["do"] == "metrics":
            reply = metrics(llm)
        elif command["do"] == "reset":
            reply = bool(llm.reset_prefix_cache())
        elif command["do"] == "call":
            module, _, name = command["function"].partition(":")
            reply = getattr(importlib.import_module(module), name)(llm, **command["arguments"])
        else:
            break
        stream.write(json.dumps(reply) + "\n")
    stream.write(json.dumps("bye") + "\n")


if __name__ == "__main__":
    main()
