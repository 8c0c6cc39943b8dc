"""What the connector costs a vLLM scheduler, timed in the engine's own process.

Called by `kvcm_ray.testing.vllm_child` for `benchmarks/engine.py`; the engine's core must run in that process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``). Two measurements, both of prompts of which nothing is cached:

* `lookups`: the look-up alone, by the real connector on real requests of the engine, without computing them;
* `requests`: all that the connector does in the scheduler while the engine computes a prompt: look-up, what
  is to be saved, every step's orders, the end.

Wall time and the CPU time of the scheduler's thread stand side by side: on a busy machine the first says what
others took, too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

BLOCK = 32
#: what vLLM's scheduler calls for each request or step
HOOKS = (
    "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
    "update_connector_output", "request_finished_all_groups", "get_external_cache_hit_sources",
    "get_kv_connector_stats", "has_pending_push_work", "take_events",
)  # fmt: skip


def lookups(llm: Any, *, count: int, blocks: int) -> dict[str, list[float]]:
    """Seconds of `count` look-ups of `blocks` unknown blocks: ``wall`` and ``cpu``."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    core = _core(llm)
    connector, chance = core.scheduler.connector, np.random.default_rng(11)
    found: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(count):
        request = Request(
            request_id=f"bench-{number}", prompt_token_ids=chance.integers(3, 999, blocks * BLOCK).tolist(),
            sampling_params=SamplingParams(max_tokens=1), pooling_params=None,
            block_hasher=core.request_block_hasher,
        )  # fmt: skip
        wall, cpu = time.perf_counter(), time.thread_time()
        tokens, _ = connector.get_num_new_matched_tokens(request, 0)
        found["cpu"].append(time.thread_time() - cpu)
        found["wall"].append(time.perf_counter() - wall)
        assert tokens == 0, "a random prompt was found in the cache"
        connector.request_finished_all_groups(request, ([],))
    return found


def requests(llm: Any, *, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Seconds of all hooks together for each of the prompts, computed one after the other."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    found: dict[str, list[float]] = {"wall": [], "cpu": []}
    with _timed(_core(llm).scheduler.connector) as spent:
        for prompt in prompts:
            before = dict(spent)
            llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            for name in found:
                found[name].append(spent[name] - before[name])
    return found


@contextmanager
def _timed(connector: Any) -> Iterator[dict[str, float]]:
    """Seconds in the connector's hooks, added up while this lasts."""
    spent = {"wall": 0.0, "cpu": 0.0}

    def timed(hook: Any) -> Any:
        @functools.wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return hook(*args, **kwargs)
            finally:
                spent["cpu"] += time.thread_time() - cpu
                spent["wall"] += time.perf_counter() - wall

        return call

    for name in HOOKS:
        setattr(connector, name, timed(getattr(connector, name)))
    try:
        yield spent
    finally:
        for name in HOOKS:
            delattr(connector, name)


def _core(llm: Any) -> Any:
    """The engine's core, if it is in this process."""
    return llm.llm_engine.engine_core.engine_core
