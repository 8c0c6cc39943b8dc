"""The engine's cache as rows of bytes, and copying blocks out of it and into it.

A layer's tensor has a dimension of blocks, before or after one of keys and values, and bytes of one block
lie together; so a layer is one or two matrices of (blocks, bytes). Our block's part of a group is, for
each engine block in it, these rows of all its layers one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.connectors.vllm.layout import Layout, runs
from kvcm_ray.connectors.vllm.orders import BlockIds
from kvcm_ray.errors import Unsupported

Bytes = npt.NDArray[np.uint8]


def block_rows(tensor: Any, blocks: int) -> list[Any]:
    """Views of a layer's tensor with the shape (blocks, bytes of one), dtype uint8.

    Raises:
        Unsupported: the bytes of one block do not lie together.
    """
    import torch

    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    physical = tensor.permute(order)
    if physical.shape[0] % blocks == 0:
        parts = [physical]
    elif physical.dim() > 1 and physical.shape[1] % blocks == 0:
        parts = list(physical.unbind(0))  # keys of all blocks, then values of all blocks
    else:
        raise Unsupported(f"a cache of shape {tuple(tensor.shape)} has no dimension of {blocks} blocks")
    found = []
    for part in parts:
        whole = part.is_contiguous()
        if not part[0].is_contiguous() or (part.shape[0] != blocks and not whole):
            raise Unsupported(
                f"blocks of shape {tuple(tensor.shape)}, strides {tensor.stride()} are scattered"
            )
        found.append(part.view(blocks, -1).view(torch.uint8))
    return found


class GroupMemory:
    """The layers of one group on this worker.

    Args:
        layers: matrices of (engine blocks, bytes), all arrays or all tensors, dtype uint8.
        per_block: engine blocks in one of ours.
    """

    def __init__(self, layers: Sequence[Any], per_block: int) -> None:
        self._layers = list(layers)
        self._on_cpu = all(isinstance(rows, np.ndarray) for rows in self._layers)
        self._sizes = [int(rows.shape[1]) for rows in self._layers]
        self.bytes = per_block * sum(self._sizes)  #: of this group in one of our blocks
        self._per_block = per_block

    def gather(self, ids: BlockIds, out: Bytes) -> None:
        """Copy blocks out: `out` has a row of `bytes` for each row of `ids`."""
        self._copy(ids, out, out_of_cache=True)

    def scatter(self, ids: BlockIds, rows: Bytes) -> None:
        """Copy blocks in; those of id -1 are left alone."""
        self._copy(ids, rows, out_of_cache=False)

    def _copy(self, ids: BlockIds, rows: Bytes, *, out_of_cache: bool) -> None:
        flat = ids.reshape(-1)
        parts = rows.reshape(len(flat), self.bytes // self._per_block)
        copy = self._copy_arrays if self._on_cpu else self._copy_tensors
        copy(flat, parts, out_of_cache)

    def _copy_arrays(self, ids: npt.NDArray[np.int64], parts: Bytes, out_of_cache: bool) -> None:
        spans = [(a, b, int(ids[a])) for a, b in runs(ids)]
        at = 0
        for array, size in zip(self._layers, self._sizes, strict=True):
            column = parts[:, at : at + size]
            for begin, end, block in spans:
                cached = array[block : block + end - begin]
                if out_of_cache:
                    np.copyto(column[begin:end], cached)
                else:
                    np.copyto(cached, column[begin:end])
            at += size

    def _copy_tensors(self, ids: npt.NDArray[np.int64], parts: Bytes, out_of_cache: bool) -> None:
        """The same for memory that numpy cannot see (a GPU), one indexed copy a layer."""
        import torch

        wanted = np.flatnonzero(ids >= 0)
        at = 0
        for tensor, size in zip(self._layers, self._sizes, strict=True):
            where = torch.from_numpy(ids[wanted]).to(tensor.device)
            if out_of_cache:
                parts[wanted, at : at + size] = tensor[where].cpu().numpy()
            else:
                fresh = torch.from_numpy(np.ascontiguousarray(parts[wanted, at : at + size]))
                tensor[where] = fresh.to(tensor.device)
            at += size


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
        layers = [rows for tensor in tensors.values() for rows in block_rows(tensor, layout.engine_blocks)]
        if all(rows.device.type == "cpu" for rows in layers):
            layers = [rows.numpy() for rows in layers]
        specs[layout.spec_name(rank, number)] = GroupMemory(layers, group.per_block)
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
        found = self._free.pop(fitting[0]) if fitting else np.empty(size, np.uint8)
        self._out += len(found)
        return found

    def give(self, buffer: Bytes) -> None:
        """Give a taken buffer back."""
        with self._lock:
            self._out -= len(buffer)
            self._free.append(buffer)
            while self._free and sum(map(len, self._free)) + self._out > self._limit:
                self._free.pop(0)
