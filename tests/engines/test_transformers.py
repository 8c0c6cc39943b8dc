"""A transformers model with its cache saved and restored by blocks: exact, partial, and harmless."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from kvcm_ray.client import Client, connect
from kvcm_ray.connectors.keys import salt_of
from kvcm_ray.connectors.transformers import ModelCache, fingerprint
from kvcm_ray.errors import InstanceMismatch, InvalidArgument, Unsupported
from kvcm_ray.testing.served import Served, served

BLOCK = 16


def make_model(seed: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> LlamaForCausalLM:
    """A random model whose outputs vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, initializer_range=0.15, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, 500, (length,), generator=generator).tolist()
    return found


def answer(model: Any, tokens: list[int], past: DynamicCache | None = None) -> list[int]:
    """Twelve greedy tokens."""
    ids = torch.tensor([tokens])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=past, max_new_tokens=12, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return list(out[0, len(tokens) :].tolist())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("transformers")) / "data") as found:
        yield found


@pytest.fixture
def client(manager: Served) -> Iterator[Client]:
    with connect(manager.url) as found:
        yield found


@pytest.fixture
def cache(client: Client, model: Any, request: pytest.FixtureRequest) -> ModelCache:
    return ModelCache(client, model, request.node.name)


def test_what_is_restored_is_bit_for_bit_what_was_saved(cache: ModelCache, model: Any) -> None:
    tokens = prompt(100)
    with torch.inference_mode():
        past = model(torch.tensor([tokens]), use_cache=True).past_key_values
    assert cache.save(tokens, past) == 6
    assert cache.save(tokens, past) == 0, "again is free"
    found = cache.load(tokens)
    assert found.tokens == cache.match_length(tokens) == 96
    for layer, original in zip(found.past.layers, past.layers, strict=True):
        assert torch.equal(layer.keys, original.keys[:, :, :96])
        assert torch.equal(layer.values, original.values[:, :, :96])


def test_the_answer_is_the_same_and_only_the_rest_is_computed(cache: ModelCache, model: Any) -> None:
    tokens = prompt(200)
    other = tokens[:150] + prompt(70, seed=1)
    expected, expected_other = answer(model, tokens), answer(model, other)
    assert len(set(expected)) > 3, "the check would be weak"
    cold = cache.prefill(tokens)
    assert (cold.from_cache, cold.stored) == (0, 12)
    warm = cache.prefill(tokens)
    assert (warm.from_cache, warm.stored) == (192, 0)
    assert torch.equal(cold.logits.argmax(), warm.logits.argmax())
    torch.testing.assert_close(cold.logits, warm.logits, rtol=1e-4, atol=1e-4)
    assert answer(model, tokens, cache.load(tokens).past) == expected
    partly = cache.prefill(other)
    assert (partly.from_cache, partly.stored) == (144, 4)
    assert partly.past.get_seq_length() == len(other)
    assert answer(model, other, cache.load(other).past) == expected_other


@pytest.mark.parametrize(("length", "found"), [(1, 0), (16, 0), (17, 16), (64, 48), (65, 64)])
def test_one_token_is_left_to_compute(cache: ModelCache, length: int, found: int) -> None:
    tokens = prompt(65)
    cache.prefill(tokens)
    again = cache.prefill(tokens[:length])
    assert again.from_cache == found
    assert again.past.get_seq_length() == length


def test_a_cache_that_goes_on_is_saved_with_the_answer(cache: ModelCache, model: Any) -> None:
    """The next turn of a conversation finds prompt and answer."""
    tokens = prompt(60)
    past = cache.prefill(tokens).past
    turn = [*tokens, *prompt(30, seed=2)]
    with torch.inference_mode():
        model(torch.tensor([turn[60:]]), past_key_values=past, use_cache=True)
    assert cache.save(turn, past) == 2
    assert cache.load([*turn, 5]).tokens == 80
    assert answer(model, turn, cache.load(turn).past) == answer(model, turn)


def test_blocks_that_are_gone_are_computed_again(cache: ModelCache, client: Client, model: Any) -> None:
    tokens = prompt(100)
    expected = answer(model, tokens)
    cache.prefill(tokens)
    instance = client.instance("test_blocks_that_are_gone_are_computed_again")
    instance.remove(cache.keys(tokens)[2:4])
    again = cache.prefill(tokens)
    assert (again.from_cache, again.stored) == (32, 2)
    assert cache.load(tokens).tokens == 96
    assert answer(model, tokens, cache.load(tokens).past) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_16_bits_are_exact_too(client: Client, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    cache = ModelCache(client, model, f"types-{dtype}")
    tokens = prompt(64)
    past = cache.prefill(tokens).past
    found = cache.load([*tokens, 1])
    assert found.tokens == 64
    assert found.past.layers[2].values.dtype == dtype
    assert torch.equal(found.past.layers[2].values, past.layers[2].values)


def test_fewer_bits_on_the_wire(client: Client, model: Any) -> None:
    exact = ModelCache(client, model, "bits-32")
    short = ModelCache(client, model, "bits-16", wire_dtype=torch.float16)
    sizes = [client.instance(name).specs["kv"] for name in ("bits-32", "bits-16")]
    assert sizes == [3 * 2 * 2 * BLOCK * 32 * 4, 3 * 2 * 2 * BLOCK * 32 * 2]
    tokens = prompt(96)
    full, half = exact.prefill(tokens).past, short.prefill(tokens).past
    assert torch.equal(full.layers[0].keys, half.layers[0].keys)
    found = short.load([*tokens, 1]).past.layers[0].keys
    assert found.dtype == torch.float32
    assert torch.equal(found, full.layers[0].keys.half().float())
    assert not torch.equal(found, full.layers[0].keys)


def test_other_weights_other_salts_other_blocks(client: Client, model: Any) -> None:
    tokens = prompt(64)
    ModelCache(client, model, "shared").prefill(tokens)
    assert ModelCache(client, model, "shared").match_length(tokens) == 64
    other = make_model(seed=2)
    assert fingerprint(other) != fingerprint(model) == fingerprint(make_model())
    assert ModelCache(client, other, "shared").match_length(tokens) == 0
    assert ModelCache(client, model, "shared", salt=salt_of(lora="a")).match_length(tokens) == 0


def test_tensors_and_lists_name_the_same(cache: ModelCache) -> None:
    tokens = prompt(40)
    keys = cache.keys(tokens).tolist()
    assert cache.keys(torch.tensor(tokens)).tolist() == cache.keys(torch.tensor([tokens])).tolist() == keys
    with pytest.raises(InvalidArgument, match="one prompt"):
        cache.keys(torch.tensor([tokens, tokens]))


def test_what_cannot_be_saved_is_refused(cache: ModelCache, client: Client, model: Any) -> None:
    tokens = prompt(40)
    with torch.inference_mode():
        short = model(torch.tensor([tokens[:30]]), use_cache=True).past_key_values
        batch = model(torch.tensor([tokens, tokens]), use_cache=True).past_key_values
    for past, cause in ((short, "for 40 tokens"), (batch, "one prompt"), (DynamicCache(), "0 layers")):
        with pytest.raises(InvalidArgument, match=cause):
            cache.save(tokens, past)
    from transformers import MistralConfig

    window = MistralConfig(num_hidden_layers=3, sliding_window=8)
    with pytest.raises(Unsupported, match="only full attention"):
        cache.save(tokens, DynamicCache(config=window))
    with pytest.raises(InvalidArgument, match="block_size"):
        ModelCache(client, model, "x", block_size=0)
    with pytest.raises(InstanceMismatch):
        ModelCache(client, model, cache._instance.instance_id, block_size=32)


def test_a_manager_that_is_away_is_a_miss(tmp_path: Path, model: Any) -> None:
    tokens = prompt(64)
    with served(tmp_path / "data") as manager:
        client = connect(manager.url)
        cache = ModelCache(client, model, "away")
        cache.prefill(tokens)
        assert cache.load(tokens).tokens == 48
    with client:
        alone = cache.prefill(tokens)
    assert (alone.from_cache, alone.stored) == (0, 0)
    assert alone.past.get_seq_length() == 64
