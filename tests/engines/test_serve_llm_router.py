"""The router's block keys are those of the engine's own hashes, and prompts go where their prefix is.

The last test is the small form of ``kvcm bench serve-llm``: two real replicas of a random model.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcm_ray.benchmarks.serve_llm import Deployment, measure
from kvcm_ray.benchmarks.serve_llm_decisions import router_before
from kvcm_ray.benchmarks.serve_llm_load import Plan
from kvcm_ray.client import connect
from kvcm_ray.connectors.serve_llm.learning import BlockHashes, Learner
from kvcm_ray.connectors.serve_llm.prompts import prompt_of
from kvcm_ray.connectors.serve_llm.settings import router_settings
from kvcm_ray.connectors.serve_llm.table import PrefixTable
from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.testing import smollm2 as weights
from kvcm_ray.testing.engines import tokens, wait_until
from kvcm_ray.testing.served import served

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text()[:9000]


def engine_keys(prompt: list[int], hash_tokens: int, block_tokens: int, algorithm: str) -> np.ndarray:
    """As the connector gets them: hashed by the engine's request, chosen by the connector's layout."""
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hashed = get_hash_fn_by_name(algorithm)
    init_none_hash(hashed)
    request = Request(
        request_id="r", prompt_token_ids=prompt, sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None, block_hasher=get_request_block_hasher(hash_tokens, hashed),
    )  # fmt: skip
    group = Group(0, ("layer",), block_tokens, 1)
    return Layout(block_tokens, hash_tokens, (group,), 8).keys(request.block_hashes)


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize(("hash_tokens", "block_tokens"), [(32, 32), (16, 48)])
def test_keys(algorithm: str, hash_tokens: int, block_tokens: int) -> None:
    prompt = tokens(1, 500)
    found = BlockHashes(algorithm).keys(prompt, hash_tokens, block_tokens)
    expected = engine_keys(prompt, hash_tokens, block_tokens, algorithm)
    assert len(found) == 500 // block_tokens
    assert (found == expected).all()


def test_keys_of_a_conversation(smollm2: Path) -> None:
    """Tokens as the engine's own template and tokenizer make them; counts never ahead of the text."""
    from transformers import AutoTokenizer

    table = PrefixTable(10_000, 60)
    learner = Learner(router_settings({"tokenizer": str(smollm2)}), table, None)  # type: ignore[arg-type]
    messages = [
        {"role": "system", "content": DOCUMENT[:3000]},
        {"role": "user", "content": DOCUMENT[3000:5000]},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": DOCUMENT[5000:9000]},
    ]
    prompt = prompt_of([{"messages": messages, "model": "m"}])
    assert prompt is not None
    learner.learn_now(prompt, 32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = engine_keys(tokenizer(text, add_special_tokens=False)["input_ids"], 32, 32, "sha256")
    found = table.find(prompt.hashes, now=0)
    assert found.keys_pieces == len(prompt.hashes)
    assert len(expected) - len(found.keys) <= 2  # the end of the last whole piece, 127 characters at most
    assert (found.keys == expected[: len(found.keys)]).all()

    other = [*messages[:3], {"role": "user", "content": DOCUMENT[5000:7000] + "Another end. " * 40}]
    again = prompt_of([{"messages": other, "model": "m"}])
    assert again is not None
    known = table.find(again.hashes, now=0)
    text = tokenizer.apply_chat_template(other, tokenize=False, add_generation_prompt=True)
    its_own = engine_keys(tokenizer(text, add_special_tokens=False)["input_ids"], 32, 32, "sha256")
    common = int(np.argmin(its_own[: len(expected)] == expected[: len(its_own)]))
    assert common - 2 <= len(known.keys) <= common


def test_a_router_finds_what_engines_saved(tmp_path: Path) -> None:
    """It learns a prompt as it is routed; the next one like it goes to the node of the shared cache."""
    prompt = tokens(2, 800)
    with served(tmp_path / "data") as manager, connect(manager.url) as client:
        cache = client.register("bench", block_size=32, specs={"tp0": 64})
        keys = engine_keys(prompt, 32, 32, "sha256")
        cache.put(keys, np.zeros((len(keys), 64), np.uint8))
        router, replicas = router_before(str(manager.data_dir), 3)
        replicas[0].node_id = replicas[2].node_id = "there"

        def ranks() -> list[list[Any]]:
            context = SimpleNamespace(tried_same_node=True, tried_same_az=True, should_backoff=False)
            metadata = SimpleNamespace(multiplexed_model_id="", internal_request_id="r")
            body = {"prompt": [*prompt, 5], "model": "m"}
            request: Any = SimpleNamespace(args=[body], metadata=metadata, routing_context=context)
            router.on_request_routed(request, replicas[0].replica_id, None)
            router.on_request_completed(replicas[0].replica_id, "r")
            router._table.forget(replicas[0].replica_id.to_full_id_str())  # its own blocks do not count
            found: list[list[Any]] = asyncio.run(router.choose_replicas(replicas, request))
            return found

        wait_until(lambda: ranks()[0] == [replicas[1]], 20, "a look-up in the shared cache")
        router._learner.close()


def test_two_replicas_compute_a_document_once(smollm2: Path, tmp_path: Path) -> None:
    """The users of a document follow the first of them, though all ask at once."""
    plan = Plan(documents=2, users=3, turns=2, document_words=600)
    found = measure(Deployment(str(weights.tiny(tmp_path / "tiny"))), plan)
    print(found)
    assert (found["requests"], found["failed"]) == (12, 0)
    assert found["by_prefix"] >= 8
    prompts = found["computed_tokens"] + found["own_tokens"] + found["loaded_tokens"]
    words = plan.documents * plan.document_words
    assert prompts > 6 * words, "every turn has its document"
    # Each document once, and what each turn adds; a document computed twice would be 600 more.
    assert found["computed_tokens"] < words + 12 * (plan.turn_words + plan.answer_tokens + 64) + 300
