"""The request router in a real Ray Serve, before replicas that say who they are (no engine).

In a child, whose Ray must not be that of the other tests. One Ray for all of it: starting one takes long.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import run_python

pytestmark = pytest.mark.ray

PROGRAM = """
    import asyncio, json, os, sys, time
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray import serve
    from kvcm_ray.connectors.serve_llm import router_config

    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000,
             log_to_driver=False)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    TEXT = "".join(chr(97 + number * number % 23) for number in range(4000))

    class Engine:
        async def __call__(self, request, wait_s=0.0):
            await asyncio.sleep(wait_s)
            return serve.get_replica_context().replica_id.unique_id

    # There is no manager in the data directory, and neither vLLM nor the tokenizer: that changes nothing.
    config = router_config(
        queue_chars=2048, kvcm_data_dir=sys.argv[1], instance_id="none", tokenizer="/nowhere")
    engine = serve.deployment(
        Engine, name="engine", num_replicas=3, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4,
        request_router_config=config)
    handle = serve.run(engine.bind(), name="engine", route_prefix=None)

    def ask(prompt, wait_s=0.0):
        return handle.remote({"prompt": prompt, "model": "m"}, wait_s)

    found, turns, replicas = {}, TEXT[:1500], []
    for turn in range(12):
        turns += f"turn {turn} " * 20
        replicas.append(ask(turns).result(timeout_s=30))
        time.sleep(0.1)  # Serve counts a request as running until a moment after its answer
    found["conversation"] = len(set(replicas))
    found["others"] = len({ask(f"{n} {TEXT}").result(timeout_s=30) for n in range(30)})

    # While the conversation's replica computes, a shorter match is not worth waiting for it; a longer one is.
    busy = ask(turns, 3.0)
    time.sleep(0.5)
    found["short goes elsewhere"] = ask(turns[:1500]).result(timeout_s=30) != replicas[-1]
    found["long waits"] = ask(turns).result(timeout_s=30) == busy.result(timeout_s=30) == replicas[-1]

    # What is no prompt, and what makes a decision fail, are routed as Serve does by default.
    class Broken:
        @property
        def messages(self):
            raise RuntimeError("broken")
        def __reduce__(self):
            return (dict, ())

    odd = [None, 7, {"prompt": None}, {"messages": [{"role": "user", "content": "short"}]}, Broken()]
    found["odd"] = [bool(handle.remote(one).result(timeout_s=30)) for one in odd]

    serve.shutdown()
    ray.shutdown()
    print(json.dumps(found))
"""


def test_prompts_go_where_their_prefix_is(tmp_path: Path) -> None:
    found = json.loads(run_python(PROGRAM, str(tmp_path), timeout_s=120).splitlines()[-1])
    assert found["conversation"] == 1
    assert found["others"] == 3
    assert found["short goes elsewhere"]
    assert found["long waits"]
    assert found["odd"] == [True] * 5
