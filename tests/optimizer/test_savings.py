"""FLOPs by position, the catalogues, and money."""

from __future__ import annotations

import numpy as np
import pytest

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import GPUS, MODELS, Model, hit_curve, of_requests, replay, savings
from kvcm_ray.optimizer.replay import hit_tokens
from kvcm_ray.optimizer.savings import access_flops, block_flops, hits_by_depth, prefix_flops

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


def test_hours_and_money() -> None:
    one = savings(3.6e18, GPUS["a100-80gb"], utilisation=0.5, price_per_hour=2.0, flops_all=7.2e18)
    assert one.gpu_hours == pytest.approx(3.6e18 / 156e12 / 3600)
    assert one.money == pytest.approx(2 * one.gpu_hours)
    assert one.flops_share == 0.5


def test_catalogues_are_plausible() -> None:
    assert MODELS["llama-3-70b"].attention_width == 8192
    assert MODELS["llama-3-8b"].kv_bytes_per_token() == 128 * 1024
    assert MODELS["llama-3-70b"].kv_bytes_per_token(1) == 160 * 1024
    for name, model in MODELS.items():
        assert name == model.name
        assert model.heads % model.kv_heads == 0
        assert 1e9 < model.parameters <= model.parameters_total
    for name, gpu in GPUS.items():
        assert name == gpu.name
        assert 1e14 < gpu.peak_flops < 1e15


def test_refused() -> None:
    gpu = GPUS["h100"]
    for arguments in ({"utilisation": 0.0}, {"utilisation": 1.1}, {"price_per_hour": -1.0}):
        with pytest.raises(InvalidArgument):
            savings(1.0, gpu, **{"utilisation": 0.5, "price_per_hour": 1.0, **arguments})
    with pytest.raises(InvalidArgument, match="tokens a block"):
        access_flops(LLAMA, of_requests([[1]]))
