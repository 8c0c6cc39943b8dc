"""Blocks of the cache layouts that vLLM has, out of tensors and back into them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.connectors.vllm.memory import GroupMemory, block_rows, worker_memory
from kvcm_ray.errors import Unsupported

BLOCKS = 12
SHAPES = {
    "heads before tokens": lambda: torch.randn(BLOCKS, 2, 16, 64),
    "tokens before heads": lambda: torch.randn(BLOCKS, 16, 2, 64).permute(0, 2, 1, 3),
    "keys and values outside": lambda: torch.randn(2, BLOCKS, 16, 2, 32),
    "keys and values inside": lambda: torch.randn(BLOCKS, 2, 16, 2, 32),
    "latent": lambda: torch.randn(BLOCKS, 16, 576),
    "16 bits": lambda: torch.randn(BLOCKS, 16, 2, 64).to(torch.bfloat16),
    "kernel blocks of a quarter": lambda: torch.randn(4 * BLOCKS, 2, 4, 64),
    "a padded pool": lambda: torch.randn(BLOCKS, 3 * 128)[:, :128].unflatten(1, (2, 64)),
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("way", ["arrays", "tensors"])
def test_blocks_come_back(shape: str, way: str) -> None:
    torch.manual_seed(0)
    layers = [SHAPES[shape]() for _ in range(3)]
    before = [layer.clone() for layer in layers]
    rows = [part for layer in layers for part in block_rows(layer, BLOCKS)]
    memory = GroupMemory([part.numpy() for part in rows] if way == "arrays" else rows, 2)
    ids = np.array([[4, 5], [9, 1], [2, 3]], np.int64)
    out = np.empty((3, memory.bytes), np.uint8)
    memory.gather(ids, out)
    assert memory.bytes == 2 * sum(layer.numel() * layer.element_size() for layer in layers) // BLOCKS
    for layer in layers:
        layer.zero_()
    memory.scatter(np.array([[4, 5], [9, -1], [2, 3]], np.int64), out)
    back = set(range(BLOCKS)) - {0, 1, 6, 7, 8, 10, 11}
    for layer, old in zip(layers, before, strict=True):
        for new_rows, old_rows in zip(block_rows(layer, BLOCKS), block_rows(old, BLOCKS), strict=True):
            for block in range(BLOCKS):
                expected = old_rows[block] if block in back else torch.zeros_like(old_rows[block])
                assert torch.equal(new_rows[block], expected), block


def test_other_shapes_are_refused() -> None:
    with pytest.raises(Unsupported, match="no dimension of 12 blocks"):
        block_rows(torch.randn(16, 64, BLOCKS), BLOCKS)


def test_layers_that_share_a_tensor_are_saved_once() -> None:
    layout = Layout(16, 16, (Group(0, ("a", "b", "c"), 16, 1),), BLOCKS)
    shared = torch.randn(BLOCKS, 16, 64)
    memory = worker_memory(layout, {"a": shared, "b": shared, "c": torch.randn(BLOCKS, 16, 64)}, "tp0")
    assert memory.sizes == {"tp0": 2 * 16 * 64 * 4}
    with pytest.raises(Unsupported, match="not a tensor"):
        worker_memory(layout, {"a": [shared]}, "tp0")
