"""FLOPs by position, of blocks, requests and traces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import Model, hit_curve, load, of_requests, replay
from kvcm_ray.optimizer.replay import hit_tokens, prompt_tokens, totals
from kvcm_ray.optimizer.savings import (
    access_flops,
    block_flops,
    hits_by_depth,
    known_tokens,
    prefix_flops,
    request_flops,
)

LLAMA = Model(name="70b", parameters=70e9, layers=80, heads=64, kv_heads=8, head_size=128)


@pytest.mark.parametrize("depth", [0, 1, 7, 250])
def test_the_formula_of_a_block(depth: int) -> None:
    p, layers, width, b = 70e9, 80, 8192, 512
    expected = 2 * p * b + 4 * layers * width * b * (depth * b + b / 2)
    assert block_flops(LLAMA, b, depth) == pytest.approx(expected, rel=1e-12)


def test_it_is_the_sum_over_its_tokens() -> None:
    """Token t multiplies with t keys and sums t values; half a token each is the integral's share."""
    tokens = np.arange(3 * 16, 4 * 16) + 0.5
    by_token = (2 * LLAMA.parameters + 4 * LLAMA.layers * LLAMA.attention_width * tokens).sum()
    assert block_flops(LLAMA, 16, 3) == pytest.approx(by_token, rel=1e-12)
    assert block_flops(LLAMA, 16, np.arange(9)).sum() == pytest.approx(prefix_flops(LLAMA, 9 * 16), rel=1e-12)


def test_a_block_of_depth_adds_one_percent_for_a_70b_model() -> None:
    first, second = block_flops(LLAMA, 512, [0, 1])
    assert (second - first) / (2 * 70e9 * 512) == pytest.approx(0.0096, abs=5e-5)


def test_hits_by_depth() -> None:
    assert hits_by_depth(np.array([0, 3, 1, 3])).tolist() == [3, 2, 2]
    assert hits_by_depth(np.array([0, 0])).tolist() == []
    assert hits_by_depth(np.array([], np.int32)).tolist() == []


def test_requests_depths_and_the_weighted_curve_save_the_same() -> None:
    requests = [[1, 2, 3], [1, 2, 3], [1, 2, 4], [5], [1, 2, 3]]
    full = of_requests(requests, block_tokens=512)
    hits = replay(full, "lru", 4)
    by_request = prefix_flops(LLAMA, hit_tokens(full, hits)).sum()
    depths = hits_by_depth(hits)
    assert by_request == pytest.approx((depths * block_flops(LLAMA, 512, np.arange(len(depths)))).sum())
    assert by_request == pytest.approx(float(hit_curve(full, weights=access_flops(LLAMA, full)).at(4)))
    short = of_requests(requests, block_tokens=512, input_tokens=[1100, 1100, 1100, 100, 1100])
    hits = replay(short, "lru", 9)
    by_request = prefix_flops(LLAMA, hit_tokens(short, hits)).sum()
    assert by_request == pytest.approx(hit_curve(short, weights=access_flops(LLAMA, short)).infinite)


@settings(deadline=None)
@given(
    st.floats(1e6, 1e13), st.integers(1, 200), st.integers(1, 128), st.integers(1, 256),
    st.integers(1, 2048), st.integers(0, 5000),
)  # fmt: skip
def test_blocks_add_up_to_the_prefix_and_deeper_ones_cost_more(
    parameters: float, layers: int, heads: int, head_size: int, block_tokens: int, blocks: int
) -> None:
    model = Model(
        name="any", parameters=parameters, layers=layers, heads=heads, kv_heads=1, head_size=head_size
    )
    each = block_flops(model, block_tokens, np.arange(blocks))
    assert each.sum() == pytest.approx(prefix_flops(model, blocks * block_tokens), rel=1e-9)
    step = 4 * layers * heads * head_size * block_tokens**2
    rounding = 1e-12 * float(prefix_flops(model, blocks * block_tokens))
    assert np.abs(np.diff(each) - step).max(initial=0) <= rounding


def test_values_of_another_size_than_keys() -> None:
    """Queries and keys of 3 numbers, values of 1: a token multiplies with each of t keys (2 x 3) and sums
    t values (2 x 1), in 2 heads of 5 layers."""
    model = Model(name="m", parameters=100, layers=5, heads=2, kv_heads=2, head_size=3, value_head_size=1)
    assert block_flops(model, 1, 10) == pytest.approx(2 * 100 + 5 * 2 * (6 + 2) * 10.5)


# ------------------------------------------------------------------------------------ of requests

#: 2 P = 2 and 2 L D = 2, so that T tokens cost 2 T + 2 T ** 2.
TINY = Model(name="tiny", parameters=1, layers=1, heads=1, kv_heads=1, head_size=1)


def test_each_request_by_hand() -> None:
    trace = of_requests([[1, 2, 3], [1, 2, 3], [1, 2]], block_tokens=4, input_tokens=[10, 10, 0])
    assert prompt_tokens(trace).tolist() == [10, 10, 8], "full blocks where the trace does not say"
    found = request_flops(TINY, trace, np.array([0, 3, 1], np.int32))
    assert found.needed.tolist() == [220, 220, 144]
    assert found.saved.tolist() == [0, 220, 40], "the third block has 2 of its 4 tokens"
    assert found.blocks.tolist() == [0, 3, 1]
    assert access_flops(TINY, trace).tolist() == [40, 104, 76, 40, 104, 76, 40, 104]


def test_tokens_are_counted_alike_where_only_some_prompts_have_a_length() -> None:
    trace = of_requests([[1, 2, 3], [1, 2, 3], [1, 2]], block_tokens=4, input_tokens=[10, 10, 0])
    hits = replay(trace, "lru", 10)
    found = totals(trace, hits)
    assert hit_tokens(trace, hits).tolist() == [0, 10, 8]
    assert (found.prompt_tokens, found.hit_tokens, found.token_hit_ratio) == (28, 18, 18 / 28)
    by_hand = prefix_flops(TINY, hit_tokens(trace, hits))
    assert request_flops(TINY, trace, hits).saved.tolist() == by_hand.tolist()
    unknown = totals(replace(trace, block_tokens=0), hits)
    assert (unknown.prompt_tokens, unknown.hit_tokens) == (0, 0)


def test_what_the_engine_held_is_neither_needed_nor_saved() -> None:
    trace = of_requests([[1, 2, 3], [1, 2, 3]], block_tokens=4)
    trace = replace(trace, held=np.array([0, 0, 0, 1, 1, 0], bool))
    found = request_flops(TINY, trace, np.array([0, 3], np.int32))
    whole, head = 2 * 12 + 2 * 144, 144
    assert found.needed.tolist() == [whole, whole - head]
    assert found.saved.tolist() == [0, whole - head]
    assert found.blocks.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_a_real_trace_by_request_by_depth_and_by_curve(name: str, policy: str) -> None:
    """Three ways to the same sum: prefixes of requests, accesses one by one, and the weighted curve."""
    trace = load(name)
    hits = replay(trace, policy, 10_000)
    found = request_flops(LLAMA, trace, hits)
    hit = trace.places < np.repeat(hits, trace.lengths)
    assert found.saved.sum() == pytest.approx(access_flops(LLAMA, trace)[hit].sum(), rel=1e-9)
    assert (found.saved <= found.needed).all()
    full = hits_by_depth(hits) @ block_flops(LLAMA, trace.block_tokens, np.arange(hits.max()))
    assert found.saved.sum() <= full * (1 + 1e-12), "partial last blocks save less"
    if policy == "lru":
        curve = hit_curve(trace, weights=access_flops(LLAMA, trace))
        assert found.saved.sum() == pytest.approx(float(curve.at(10_000)), rel=1e-9)
    nothing = replace(trace, held=np.zeros(len(trace.blocks), bool))
    assert request_flops(LLAMA, nothing, hits).saved == pytest.approx(found.saved)
    held = replace(trace, held=trace.places == 0)
    first = block_flops(LLAMA, trace.block_tokens, 0)
    less = found.saved.sum() - request_flops(LLAMA, held, hits).saved.sum()
    assert less == pytest.approx(first * (hits > 0).sum(), rel=1e-2), "first blocks, few of them partial"


def test_refused() -> None:
    with pytest.raises(InvalidArgument, match="tokens a block"):
        access_flops(LLAMA, of_requests([[1]]))
    trace = of_requests([[1, 2], [1]], block_tokens=4)
    with pytest.raises(InvalidArgument, match="sample"):
        known_tokens(replace(trace, sample_level=1))
    for hits in ([1], [3, 0], [-1, 0]):
        with pytest.raises(InvalidArgument, match="hits are numbers"):
            request_flops(LLAMA, trace, np.array(hits, np.int32))
