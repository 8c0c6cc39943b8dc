"""The layers that vLLM registers, as groups of blocks. How pages are copied is tested in `test_paged`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.connectors.vllm.memory import worker_memory
from kvcm_ray.errors import Unsupported

BLOCKS = 12


def test_layers_that_share_a_tensor_are_saved_once() -> None:
    layout = Layout(16, 16, (Group(0, ("a", "b", "c"), 16, 1),), BLOCKS)
    shared = torch.randn(BLOCKS, 16, 64)
    memory = worker_memory(layout, {"a": shared, "b": shared, "c": torch.randn(BLOCKS, 16, 64)}, "tp0")
    assert memory.sizes == {"tp0": 2 * 16 * 64 * 4}
    (group,) = memory.specs.values()
    assert group.layers == [range(1), range(1, 2)]
    assert group.of_layer == {"a": range(1), "b": range(1), "c": range(1, 2)}
    with pytest.raises(Unsupported, match="not a tensor"):
        worker_memory(layout, {"a": [shared]}, "tp0")


def test_blocks_of_a_group_come_back() -> None:
    torch.manual_seed(0)
    layout = Layout(32, 16, (Group(0, ("a", "b"), 16, 2),), BLOCKS)
    caches = {"a": torch.randn(2, BLOCKS, 16, 8), "b": torch.randn(BLOCKS, 16, 24).to(torch.bfloat16)}
    before = {name: tensor.clone() for name, tensor in caches.items()}
    (group,) = worker_memory(layout, caches, "tp0").specs.values()
    assert group.of_layer == {"a": range(2), "b": range(2, 3)}
    ids = np.array([[4, 5], [9, 1], [2, 3]], np.int64)
    out = np.empty((3, group.bytes), np.uint8)
    for span in group.layers:
        group.gather(ids, out, span)
    for tensor in caches.values():
        tensor.zero_()
    group.scatter(np.array([[4, 5], [9, -1], [2, 3]], np.int64), out)
    back = [2, 3, 4, 5, 9]
    gone = sorted(set(range(BLOCKS)) - set(back))
    assert torch.equal(caches["a"][:, back], before["a"][:, back])
    assert torch.equal(caches["b"][back], before["b"][back])
    assert not caches["a"][:, gone].any()
    assert not caches["b"][gone].any()
