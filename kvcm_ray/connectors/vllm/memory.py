"""The engine's cache of this worker, and copying blocks out of it and into it.

Each layer is some matrices of (engine blocks, bytes): see `kvcm_ray.connectors.paged`. Our block's part of a
group is, for each engine block in it, these rows of all its layers one after the other (``page_first``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.connectors.paged import PagedCache, host, planes_of
from kvcm_ray.connectors.paged.pinned import HostMemory
from kvcm_ray.connectors.vllm.layout import Layout
from kvcm_ray.connectors.vllm.orders import BlockIds
from kvcm_ray.errors import Unsupported

Bytes = npt.NDArray[np.uint8]


class GroupMemory:
    """The layers of one group on this worker.

    Args:
        matrices: of all layers, shape (engine blocks, bytes), all arrays or all tensors, dtype uint8.
        per_block: engine blocks in one of ours.
        of_layer: which of the matrices are a layer's; layers may share them.
    """

    def __init__(
        self, matrices: Sequence[Any], per_block: int, of_layer: Mapping[str, range] | None = None
    ) -> None:
        self._cache = PagedCache(matrices, per_block)
        self.bytes = self._cache.bytes  #: of this group in one of our blocks
        self.on_cpu = self._cache.on_host
        self.of_layer = dict(of_layer or {})

    @property
    def layers(self) -> list[range]:
        """The matrices of one layer after the other, in their order; each is in one of these."""
        spans = sorted(set(self.of_layer.values()), key=lambda span: span.start)
        return spans or [range(n, n + 1) for n in range(len(self._cache.planes))]

    def gather(self, ids: BlockIds, out: Bytes, matrices: range | None = None) -> None:
        """Copy blocks out: `out` has a row of `bytes` for each row of `ids`.

        With `matrices`, only the bytes of these. On a GPU, the engine's work has been waited for, and the
        bytes are there on return.
        """
        host.gather_to_host(self._cache, ids, out, matrices)

    def scatter(self, ids: BlockIds, rows: Bytes, matrices: range | None = None) -> None:
        """Copy blocks in; those of id -1 are left alone."""
        host.scatter_from_host(self._cache, ids, rows, matrices)


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """All groups on this worker, by spec name."""

    specs: dict[str, GroupMemory]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: group.bytes for name, group in self.specs.items()}


def worker_memory(layout: Layout, kv_caches: Mapping[str, Any], rank: str) -> WorkerMemory:
    """The memory of a worker's registered caches. Raises Unsupported."""
    specs = {}
    for number, group in enumerate(layout.groups):
        tensors: dict[int, Any] = {}
        for name in group.layers:
            if name in kv_caches:
                tensor = kv_caches[name]
                if not hasattr(tensor, "data_ptr"):
                    raise Unsupported(f"the cache of layer {name} is a {type(tensor).__name__}, not a tensor")
                tensors.setdefault(tensor.data_ptr(), tensor)  # layers may share one
        if not tensors:
            raise Unsupported(f"none of the layers of group {number} is on this worker")
        layers: list[Any] = []
        of_tensor = {}
        for pointer, tensor in tensors.items():
            rows = planes_of(tensor, layout.engine_blocks)
            of_tensor[pointer] = range(len(layers), len(layers) + len(rows))
            layers += rows
        named = {name: of_tensor[kv_caches[name].data_ptr()] for name in group.layers if name in kv_caches}
        if all(rows.device.type == "cpu" for rows in layers):
            layers = [rows.numpy() for rows in layers]
        specs[layout.spec_name(rank, number)] = GroupMemory(layers, group.per_block, named)
    return WorkerMemory(specs)


def shape_text(layout: Layout, kv_caches: Mapping[str, Any]) -> str:
    """The physical order of a worker's caches, for the instance's identity."""
    texts = []
    for group in layout.groups:
        kinds = set()
        for name in group.layers:
            if name in kv_caches:
                tensor = kv_caches[name]
                order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
                shape = ["B" if n % layout.engine_blocks == 0 else str(n) for n in tensor.shape]
                kinds.add(f"{tensor.dtype}:{order}:{shape}")
        texts.append("|".join(sorted(kinds)))
    return ";".join(texts)


class Staging:
    """Buffers for blocks on their way, reused: fresh pages would cost more than the copy.

    No more is handed out while `limit` bytes are out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._memory = HostMemory()
        self._out = 0
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Bytes | None:
        """A buffer of `size` bytes or more; None if too much is out already."""
        with self._lock:
            return None if self._out + size > self._limit else self._taken(size)

    def take_anyway(self, size: int) -> Bytes:
        """A buffer, however much is out: for loads, which are a piece each of a few threads."""
        with self._lock:
            return self._taken(size)

    def _taken(self, size: int) -> Bytes:
        fitting = [i for i, buffer in enumerate(self._free) if size <= len(buffer) <= 4 * size + 2**20]
        found = self._free.pop(fitting[0]) if fitting else self._memory.new(size)
        self._out += len(found)
        return found

    def give(self, buffer: Bytes) -> None:
        """Give a taken buffer back."""
        with self._lock:
            self._out -= len(buffer)
            self._free.append(buffer)
            while self._free and sum(map(len, self._free)) + self._out > self._limit:
                self._memory.drop(self._free.pop(0))
