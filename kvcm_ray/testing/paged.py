"""Random paged caches, and what must hold of every way to copy them; for tests of the GPU path on the CPU.

``python -m kvcm_ray.testing.paged CASES WAY...`` checks so many cases and prints one JSON object; Triton's
interpreter needs a process of its own, since it is switched on where Triton is imported. Needs torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvcm_ray.connectors.paged import LAYER_FIRST, PAGE_FIRST, PagedCache, gather, planes_of, scatter
from kvcm_ray.connectors.paged.cache import Ids

Tensor = Any
#: Layers of so many pages, tokens, heads and numbers, in the order of memory that engines have.
KINDS: dict[str, Callable[[int, int, int, int, int], list[tuple[int, ...]]]] = {
    "HND": lambda layers, b, n, h, c: [(b, h, n, 2 * c)] * layers,
    "NHD": lambda layers, b, n, h, c: [(b, n, h, 2 * c)] * layers,
    "joined": lambda layers, b, n, h, c: [(b, 2, n, h, c)] * layers,
    "separate": lambda layers, b, n, h, c: [(2, b, n, h, c)] * layers,
    "two tensors": lambda layers, b, n, h, c: [(b, n, h, c), (b, n, h, 3 * c)] * layers,
    "latent": lambda layers, b, n, h, c: [(b, n, 9 * c)] * layers,
    "heads outside": lambda layers, b, n, h, c: [(h, b, n, 2 * c)] * layers,
    "kernel pages": lambda layers, b, n, h, c: [(3 * b, h, n, c)] * layers,
}
POOLS = ("pool of layers", "pool of heads")
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8,
)  # fmt: skip


@dataclass(slots=True)
class Case:
    text: str
    tensors: list[Tensor]  #: whole, with everything between the pages
    cache: PagedCache
    ids: Ids
    stride: int  #: bytes from block to block


def case(seed: int) -> Case:
    """A cache of random shape with random bytes, and some of its pages."""
    random = np.random.default_rng(seed)
    kind = [*KINDS, *POOLS][seed % (len(KINDS) + len(POOLS))]
    dtype = DTYPES[int(random.integers(len(DTYPES)))]
    count, layers, tokens, heads = (int(n) for n in random.integers((7, 1, 1, 2), (40, 5, 9, 5)))
    numbers = int(random.choice([1, 3, 4, 8, 12, 16, 64]))
    tensors, views = _tensors(kind, layers, count, tokens, heads, numbers, dtype, random)
    matrices = [rows for view in views for rows in planes_of(view, count)]
    pages = int(random.integers(1, 4))
    order = (PAGE_FIRST, LAYER_FIRST)[int(random.integers(2))]
    cache = PagedCache(matrices, pages, order)
    blocks = int(random.integers(1, count // pages + 1))
    ids = random.permutation(count)[: blocks * pages].astype(np.int64)
    if random.random() < 0.5:
        ids.sort()  # runs
    if random.random() < 0.5:
        ids[random.random(len(ids)) < 0.3] = -1
    stride = cache.bytes + int(random.choice([0, 0, 1, 4, 8, 16]))
    text = f"seed {seed}: {kind}, {dtype}, {len(matrices)} planes, {pages} pages, {order}, stride {stride}"
    return Case(text, tensors, cache, ids.reshape(blocks, pages), stride)


def _tensors(
    kind: str, layers: int, count: int, tokens: int, heads: int, numbers: int, dtype: Any,
    random: np.random.Generator,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Whole tensors, and those of each layer, which may be slices."""

    def filled(*shape: int) -> Tensor:
        width = torch.empty(0, dtype=dtype).element_size()
        size = int(np.prod(shape)) * width
        return torch.from_numpy(random.integers(0, 256, size, np.uint8)).view(dtype).reshape(shape)

    if kind in KINDS:
        found = [filled(*shape) for shape in KINDS[kind](layers, count, tokens, heads, numbers)]
        return found, found
    if kind == "pool of layers":
        pool = filled(count, layers + 1, heads, tokens, numbers)
        return [pool], [pool[:, layer] for layer in range(layers)]
    pool = filled(count, heads, layers + 1, tokens, numbers)
    return [pool], [pool[:, :, layer] for layer in range(layers)]


def check(one: Case, way: str) -> None:
    """Blocks hold what plain loops say, bytes around them are left alone, and pages come back from them.

    Raises:
        AssertionError: naming the case.
    """
    cache, ids = one.cache, one.ids
    memory = torch.full((len(ids), one.stride), 0xA5, dtype=torch.uint8)
    expected = plain(one, memory.numpy().copy())
    gather(cache, ids, memory[:, : cache.bytes], way)
    assert np.array_equal(memory.numpy(), expected), f"{one.text}: gathered otherwise by {way}"
    before = [_bytes(tensor).clone() for tensor in one.tensors]
    wanted = np.unique(ids[ids >= 0])
    for plane in cache.planes:
        plane.rows[wanted] ^= 0xFF
    scatter(cache, ids, memory[:, : cache.bytes], way)
    for tensor, old in zip(one.tensors, before, strict=True):
        assert torch.equal(_bytes(tensor), old), f"{one.text}: pages do not come back by {way}"
    assert np.array_equal(memory.numpy(), expected), f"{one.text}: {way} wrote to blocks"


def plain(one: Case, memory: np.ndarray) -> np.ndarray:
    """The blocks by plain loops, from the description of the orders."""
    cache = one.cache
    planes = [plane.rows.numpy() for plane in cache.planes]
    for block, pages in enumerate(one.ids.tolist()):
        at = 0
        spots = [(rows, page) for page in pages for rows in planes]
        if cache.order == LAYER_FIRST:
            spots = [(rows, page) for rows in planes for page in pages]
        for rows, page in spots:
            if page >= 0:
                memory[block, at : at + rows.shape[1]] = rows[page]
            at += rows.shape[1]
    return memory


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def main(arguments: Sequence[str]) -> None:
    cases, ways = int(arguments[0]), arguments[1:]
    for seed in range(cases):
        for way in ways:
            check(case(seed), way)
    print(json.dumps({"cases": cases, "ways": ways}))


if __name__ == "__main__":
    main(sys.argv[1:])
