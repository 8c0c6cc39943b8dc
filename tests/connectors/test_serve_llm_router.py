"""The router's decisions on a real index, before named replicas: nothing is sent (tests/ray sends)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcm_ray.benchmarks.serve_llm import SOURCES, total
from kvcm_ray.benchmarks.serve_llm_decisions import decisions
from kvcm_ray.client import connect
from kvcm_ray.connectors.serve_llm import learning
from kvcm_ray.connectors.serve_llm.deployment import CPU_ENGINE, llm_arguments
from kvcm_ray.connectors.serve_llm.prompts import Prompt, prompt_of
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.testing.served import Served, served

TEXT = "".join(chr(97 + number * number % 23) for number in range(5000))


class Named:
    """A replica as far as decisions look at it."""

    def __init__(self, number: int, node: str, deployment: Any) -> None:
        from ray.serve.request_router import ReplicaID

        self.replica_id = ReplicaID(str(number), deployment)
        self.node_id = node
        self.max_ongoing_requests = 100

    @property
    def name(self) -> str:
        return str(self.replica_id.to_full_id_str())


class Lab:
    """A router on node "here" and its replicas, with a clock of its own for none of it."""

    def __init__(self, nodes: list[str], **settings: Any) -> None:
        from ray.serve._private.common import DeploymentHandleSource, DeploymentID

        from kvcm_ray.connectors.serve_llm.router import KVCMRequestRouter

        deployment = DeploymentID("engine", "lab")
        self.router = KVCMRequestRouter(
            deployment_id=deployment, handle_source=DeploymentHandleSource.REPLICA, self_node_id="here"
        )
        self.router.initialize_state(**settings)
        self.replicas = [Named(number, node, deployment) for number, node in enumerate(nodes)]
        self.router._replica_id_set = {replica.replica_id for replica in self.replicas}

    def request(self, request: Any, name: str = "r") -> Any:
        context = SimpleNamespace(tried_same_node=True, tried_same_az=True, should_backoff=False)
        metadata = SimpleNamespace(multiplexed_model_id="", internal_request_id=name)
        return SimpleNamespace(args=[request], metadata=metadata, routing_context=context)

    def ranks(self, text: Any) -> list[list[int]]:
        """Numbers of the replicas in each rank."""
        given: Any = self.replicas
        request = self.request(text if not isinstance(text, str) else {"prompt": text, "model": "m"})
        ranks = asyncio.run(self.router.choose_replicas(given, request))
        return [[given.index(replica) for replica in rank] for rank in ranks]

    def sends(self, text: str, number: int, name: str) -> None:
        request = self.request({"prompt": text, "model": "m"}, name)
        self.router.on_request_routed(request, self.replicas[number].replica_id, None)

    def ends(self, number: int, name: str) -> None:
        self.router.on_request_completed(self.replicas[number].replica_id, name)


class TestOwnBlocks:
    def test_a_prompt_goes_where_its_prefix_went(self) -> None:
        lab = Lab(["here"] * 4)
        assert len(lab.ranks(TEXT)) == 1
        lab.sends(TEXT, 2, "a")
        lab.ends(2, "a")
        chosen, default = lab.ranks(TEXT + "more")
        assert (chosen, len(default)) == ([2], 2)

    def test_requests_that_run_weigh(self) -> None:
        lab = Lab(["here"] * 2)
        for number in range(4):
            lab.sends(TEXT, 1, f"r{number}")
        assert lab.ranks(TEXT)[0] == [0]
        for number in range(4):
            lab.ends(1, f"r{number}")
            lab.ends(1, f"r{number}")  # twice does no harm
        assert lab.ranks(TEXT)[0] == [1]

    def test_a_replica_that_died_has_nothing(self) -> None:
        lab = Lab(["here"] * 3)
        lab.sends(TEXT, 1, "a")
        lab.router.on_replica_actor_died(lab.replicas[1].replica_id)
        assert len(lab.ranks(TEXT)) == 1

    @pytest.mark.parametrize("odd", [None, 7, {"prompt": "short"}, {"messages": 5}])
    def test_without_a_prompt_two_at_random(self, odd: Any) -> None:
        (default,) = Lab(["here"] * 3).ranks(odd)
        assert len(set(default)) == 2

    def test_a_decision_that_fails_leaves_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lab = Lab(["here"] * 3)
        lab.sends(TEXT, 1, "a")
        monkeypatch.setattr(lab.router, "_table", None)
        assert len(lab.ranks(TEXT)) == 1
        lab.sends(TEXT, 1, "b")  # and telling it of requests does not raise either

    def test_one_replica_or_none_is_no_choice(self) -> None:
        assert Lab(["here"]).ranks(TEXT) == [[0]]
        assert Lab([]).ranks(TEXT) == []


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("manager") / "data") as found:
        with connect(found.url) as client:
            cache = client.register("shared", block_size=32, specs={"tp0": 64})
            cache.put(np.arange(1, 31, dtype=np.int64), np.zeros((30, 64), np.uint8))
        yield found


class TestSharedBlocks:
    def lab(self, manager: Served, nodes: list[str], blocks: int = 30) -> Lab:
        """Of TEXT's 39 pieces, so many have one block each in the shared cache."""
        lab = Lab(nodes, kvcm_data_dir=str(manager.data_dir), instance_id="shared")
        assert lab.router._shared is not None
        lab.router._shared._looked = 0.0
        lab.router._shared.open()
        prompt = prompt_of([{"prompt": TEXT, "model": "m"}])
        assert prompt is not None
        keys = np.concatenate([np.arange(1, blocks + 1), np.arange(1000, 1039 - blocks)]).astype(np.int64)
        lab.router._table.learned(prompt.hashes, keys, range(1, 40))
        return lab

    def test_the_node_that_holds_the_blocks(self, manager: Served) -> None:
        assert self.lab(manager, ["there", "here", "there"]).ranks(TEXT)[0] == [1]

    def test_replicas_of_that_node_are_equal_until_one_is_busy(self, manager: Served) -> None:
        lab = self.lab(manager, ["here", "here"])
        assert lab.ranks(TEXT)[0] == [0, 1]
        lab.sends("x" * 300, 0, "a")
        assert lab.ranks(TEXT)[0] == [1]

    def test_own_blocks_beyond_the_shared_ones_decide(self, manager: Served) -> None:
        lab = self.lab(manager, ["here", "there"], blocks=5)
        lab.sends(TEXT, 1, "a")
        lab.ends(1, "a")
        assert lab.ranks(TEXT)[0] == [1]

    def test_keys_that_are_not_there_count_for_nothing(self, manager: Served) -> None:
        assert len(self.lab(manager, ["here", "there"], blocks=0).ranks(TEXT)) == 1

    def test_a_budget_that_is_spent_skips_the_index(self, manager: Served) -> None:
        lab = self.lab(manager, ["there", "here"])
        lab.router._settings = type(lab.router._settings)(kvcm_data_dir="/d", instance_id="i", budget_ms=0.01)
        long = {"prompt": TEXT + "y" * 60_000, "model": "m"}
        assert len(lab.ranks(long)) == 1


class TestLearning:
    """With hashes of a scheme of the test; vLLM's own are compared in tests/engines."""

    def test_counts_of_full_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Hashes:
            def __init__(self, algorithm: str) -> None:
                pass

            def keys(self, tokens: Any, hash_tokens: int, block_tokens: int) -> Any:
                return np.arange(len(tokens) // block_tokens, dtype=np.int64)

        monkeypatch.setattr(learning, "BlockHashes", Hashes)
        lab = Lab(["here"] * 2)
        learner = learning.Learner(lab.router._settings, lab.router._table, None)  # type: ignore[arg-type]
        prompt = prompt_of([{"prompt": list(range(200)), "model": "m"}])
        assert prompt is not None
        learner.learn_now(prompt, 48)
        found = lab.router._table.find(prompt.hashes[:4], now=0)
        assert (len(found.keys), found.keys_pieces) == (128 // 48, 4)

    def test_special_prompts_are_not_learned(self) -> None:
        lab = Lab(["here"] * 2)
        learner = learning.Learner(lab.router._settings, lab.router._table, None)  # type: ignore[arg-type]
        learner.learn(Prompt(tokens=tuple(range(99)), is_special=True, hashes=[1, 2, 3]))
        assert learner._waiting.empty()
        for _ in range(learning.WAITING_MAX + 5):
            learner.learn(Prompt(tokens=tuple(range(99)), hashes=[1, 2, 3]))
        assert learner._waiting.full()


def test_decisions_are_quick() -> None:
    found = decisions(prompts=100)
    print(found)
    assert found["by_prefix"] == 50
    assert found["p50_ms"] < 1.0


def test_arguments_of_a_deployment() -> None:
    found = llm_arguments("m", "/model", data_dir="/d", instance_id="i", router={}, engine=CPU_ENGINE)
    connector = found["engine_kwargs"]["kv_transfer_config"]["kv_connector_extra_config"]
    router = found["deployment_config"]["request_router_config"]["request_router_kwargs"]
    for name in ("kvcm_data_dir", "instance_id"):
        assert connector[name] == router[name]
    plain = llm_arguments("m", "/model", data_dir="/d", instance_id="i")
    assert "request_router_config" not in plain["deployment_config"]
    with pytest.raises(InvalidArgument, match="bogus"):
        llm_arguments("m", "/model", data_dir="/d", instance_id="i", router={"bogus": 1})


def test_sums_of_metrics() -> None:
    name = "ray_vllm_prompt_tokens_by_source_total"
    text = (
        f'# TYPE {name} counter\n{name}{{engine="0",source="local_cache_hit"}} 5.0\n'
        f'{name}{{source="local_cache_hit",engine="1"}} 1e+02\n{name}{{source="local_compute"}} 7.0\n'
    )
    name = "vllm_prompt_tokens_by_source"
    found = {column: total(text, name, source=source) for column, source in SOURCES.items()}
    assert found == {"computed_tokens": 7, "own_tokens": 105, "loaded_tokens": 0}
