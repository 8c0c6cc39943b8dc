"""Pages of a cache anywhere, blocks in host memory.

For a cache in host memory this is `copying`. For one on a GPU, each thread that copies has a stream of its
own there, beside the engine's, so neither waits for the other's work: blocks are gathered into memory of the
device and travel from there in one run, or the other way round. The caller sees to it that the engine has
filled the pages, or has done with them (an event on the engine's stream, waited for by the copying thread).
When a function here returns, its copy is done.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcm_ray.connectors.paged.cache import PAGE_FIRST, Ids, PagedCache
from kvcm_ray.connectors.paged.copying import gather, scatter
from kvcm_ray.connectors.paged.pinned import Bytes

#: On the device at a time; large enough for the speed of the bus, small beside a cache.
DEVICE_BYTES = 32 * 1024 * 1024

_THREAD = threading.local()


def gather_to_host(cache: PagedCache, ids: Ids, out: Bytes, planes: range | None = None) -> None:
    """`gather` into host memory.

    Args:
        out: shape (blocks, bytes of a block), without gaps; best pinned. On a GPU the bytes of pages that are
            left out (-1) are anything.
        planes: only the bytes of these.
    """
    if cache.on_host:
        gather(cache if planes is None else cache.part(planes), ids, out)
        return
    compact, there = _compact(cache, planes, out)
    with _side_stream(cache.device) as (torch, stream):
        for part in _pieces(len(ids), compact.bytes):
            moved = torch.empty((len(ids[part]), compact.bytes), dtype=torch.uint8, device=cache.device)
            gather(compact, ids[part], moved)
            if there is None:
                torch.from_numpy(out[part]).copy_(moved, non_blocking=True)
            else:
                there[part] = moved.cpu().numpy().reshape(there[part].shape)
        stream.synchronize()


def scatter_from_host(cache: PagedCache, ids: Ids, blocks: Bytes, planes: range | None = None) -> None:
    """`scatter` from host memory; arguments as with `gather_to_host`."""
    if cache.on_host:
        scatter(cache if planes is None else cache.part(planes), ids, blocks)
        return
    compact, there = _compact(cache, planes, blocks)
    with _side_stream(cache.device) as (torch, stream):
        for part in _pieces(len(ids), compact.bytes):
            bytes_there = blocks[part] if there is None else np.ascontiguousarray(there[part])
            moved = torch.from_numpy(bytes_there).to(cache.device, non_blocking=True)
            scatter(compact, ids[part], moved.view(-1, compact.bytes))
            if there is not None:
                stream.synchronize()  # before `bytes_there` goes
        stream.synchronize()


def _compact(cache: PagedCache, planes: range | None, blocks: Bytes) -> tuple[PagedCache, Bytes | None]:
    """Some planes as a cache of smaller blocks, and where their bytes are: shape (blocks, pages or 1, bytes).

    None in its place: these are all planes.
    """
    if planes is None or len(planes) == len(cache.planes):
        return cache, None
    chosen = cache.planes[planes.start : planes.stop]
    compact = PagedCache([plane.rows for plane in chosen], cache.pages, cache.order)
    groups = cache.pages if cache.order == PAGE_FIRST else 1
    begin, size = chosen[0].begin, compact.bytes // groups
    return compact, blocks.reshape(len(blocks), groups, -1)[:, :, begin : begin + size]


def _pieces(count: int, size: int) -> Iterator[slice]:
    step = max(1, DEVICE_BYTES // size)
    for begin in range(0, count, step):
        yield slice(begin, min(count, begin + step))


@contextlib.contextmanager
def _side_stream(device: str) -> Iterator[tuple[Any, Any]]:
    """Torch, and this thread's stream on a device."""
    import torch  # type: ignore[import-not-found,unused-ignore]

    streams: dict[str, Any] = _THREAD.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(torch.device(device))
    with torch.cuda.stream(streams[device]):
        yield torch, streams[device]
