"""From hits to prefill FLOPs, GPU-hours and money.

A token at position t of a prompt costs ``2 P`` FLOPs for the weights (a multiplication and an addition
for each of P parameters) and, in each of L layers, ``4 D t`` for attention: ``2 D t`` for the products
of its query with t keys, and as many for the weighted sum of t values, D being heads x head size. (See
Kaplan and others, "Scaling Laws for Neural Language Models", 2020, table 1, and Hoffmann and others,
"Training Compute-Optimal Large Language Models", 2022, appendix F.) Summed over the B tokens of block
d, positions ``d B`` to ``d B + B``:

    2 P B + 4 L D B (d B + B / 2)

and over the first T tokens of a prompt ``2 P T + 2 L D T**2``. A hit saves this; what it costs to read
the block instead is not in here. Grouped-query attention makes keys smaller, not the products fewer.
For a mixture of experts, P is what one token uses.

Catalogues hold published facts. Prices and utilisation are not among them: they are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer.accesses import F64, I64, Accesses


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only transformer with full attention in all layers."""

    name: str
    parameters: float  #: that a token uses
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    parameters_total: float = 0  #: of all experts; 0: the same

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_size

    def kv_bytes_per_token(self, value_bytes: float = 2) -> float:
        """Keys and values of all layers; `value_bytes` is 2 for bf16 and fp16, 1 for fp8."""
        return 2 * self.layers * self.kv_heads * self.head_size * value_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    peak_flops: float  #: FLOP/s, dense bf16 on tensor cores (data sheets often give twice that: sparse)
    memory_bytes: int
    memory_bytes_per_s: float


def _model(
    name: str, billions: float, layers: int, heads: int, kv_heads: int, head_size: int = 128, total: float = 0
) -> Model:
    return Model(
        name=name, parameters=billions * 1e9, layers=layers, heads=heads, kv_heads=kv_heads,
        head_size=head_size, parameters_total=(total or billions) * 1e9,
    )  # fmt: skip


#: From the model cards and configuration files that the makers publish with the weights.
MODELS = {
    model.name: model
    for model in (
        _model("llama-2-7b", 6.74, 32, 32, 32),
        _model("llama-3-8b", 8.03, 32, 32, 8),
        _model("llama-3-70b", 70.6, 80, 64, 8),
        _model("llama-3.1-405b", 405, 126, 128, 8),
        _model("mistral-7b", 7.24, 32, 32, 8),
        _model("mixtral-8x7b", 12.9, 32, 32, 8, total=46.7),
        _model("qwen2.5-7b", 7.61, 28, 28, 4),
        _model("qwen2.5-14b", 14.7, 48, 40, 8),
        _model("qwen2.5-32b", 32.5, 64, 40, 8),
        _model("qwen2.5-72b", 72.7, 80, 64, 8),
        _model("qwen3-8b", 8.2, 36, 32, 8),
        _model("qwen3-32b", 32.8, 64, 64, 8),
        _model("qwen3-30b-a3b", 3.3, 48, 32, 4, total=30.5),
    )
}


def _gpu(name: str, teraflops: float, gigabytes: int, gigabytes_per_s: float) -> Gpu:
    return Gpu(
        name=name, peak_flops=teraflops * 1e12, memory_bytes=gigabytes * 10**9,
        memory_bytes_per_s=gigabytes_per_s * 1e9,
    )  # fmt: skip


#: From the data sheets of NVIDIA; where those give figures with sparsity, half of it.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 989.5, 141, 4800),
        _gpu("h100", 989.5, 80, 3350),
        _gpu("h100-pcie", 756.5, 80, 2000),
        _gpu("a100-80gb", 312, 80, 2039),
        _gpu("a100-40gb", 312, 40, 1555),
        _gpu("l40s", 362, 48, 864),
        _gpu("l4", 121, 24, 300),
        _gpu("a10", 125, 24, 600),
    )
}


def block_flops(model: Model, block_tokens: int, depths: npt.ArrayLike) -> F64:
    """FLOPs to prefill the block behind so many others, for each of `depths`, in their shape."""
    start = np.asarray(depths, np.float64) * block_tokens
    return prefix_flops(model, start + block_tokens) - prefix_flops(model, start)


def prefix_flops(model: Model, tokens: npt.ArrayLike) -> F64:
    """FLOPs to prefill the first so many tokens of a prompt, for each of `tokens`, in their shape."""
    count = np.asarray(tokens, np.float64)
    return np.asarray(count * (2 * model.parameters + 2 * model.layers * model.attention_width * count))


def access_flops(model: Model, accesses: Accesses) -> F64:
    """(m,) what a hit of each access saves: `weights` of `curve.hit_curve`. A partial last block saves
    what it has.

    Raises:
        InvalidArgument: the trace does not say how many tokens a block has.
    """
    if not accesses.block_tokens:
        raise InvalidArgument("the trace does not say how many tokens a block has")
    start = accesses.places.astype(np.int64) * accesses.block_tokens
    end = start + accesses.block_tokens
    if accesses.input_tokens.any():
        end = np.maximum(start, np.minimum(end, np.repeat(accesses.input_tokens, accesses.lengths)))
    return prefix_flops(model, end) - prefix_flops(model, start)


def hits_by_depth(hits: npt.NDArray[np.integer]) -> I64:
    """From the hit blocks of each request (n,), how many requests hit the block at each depth: shape
    ``(max(hits),)``, sum ``sum(hits)``. A leading run of h hits the depths below h."""
    ended = np.bincount(hits, minlength=1)
    return (len(hits) - np.cumsum(ended))[:-1]


@dataclass(frozen=True, slots=True)
class Savings:
    """What hits save. Money is in whatever currency the price was given in."""

    flops: float
    flops_share: float  #: of what all prompts would cost without a cache; 0 if that is not known
    gpu_hours: float
    money: float


def savings(
    flops: float, gpu: Gpu, *, utilisation: float, price_per_hour: float, flops_all: float = 0
) -> Savings:
    """What so many saved FLOPs are worth.

    Args:
        flops: saved, from `prefix_flops`, or a `Curve` weighted with `access_flops`.
        utilisation: share of the peak that prefill reaches on this GPU, above 0 and at most 1; measure it.
        price_per_hour: of one GPU.
        flops_all: what all prompts would cost without a cache.

    Raises:
        InvalidArgument: a number is out of range.
    """
    if not 0 < utilisation <= 1:
        raise InvalidArgument(f"utilisation is above 0 and at most 1, got {utilisation}")
    if price_per_hour < 0 or flops < 0:
        raise InvalidArgument(f"price and FLOPs must not be negative, got {price_per_hour} and {flops}")
    hours = flops / (gpu.peak_flops * utilisation) / 3600
    share = float(flops / flops_all) if flops_all else 0.0
    return Savings(float(flops), share, float(hours), float(hours * price_per_hour))
