"""How long the router for Ray Serve LLM takes to decide, measured without an engine.

The real router and the real index of a manager in this process; the replicas are only named, since no
request is sent.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def decisions(*, prompts: int = 400, chars: int = 8000, replicas: int = 8) -> dict[str, Any]:
    """Milliseconds of a decision about prompts of so many characters, half of them known to a router.

    Each known prompt has its keys learned, and half of them are in the shared cache.
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
