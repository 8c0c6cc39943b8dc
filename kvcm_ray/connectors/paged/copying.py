"""Blocks out of pages and into them: one meaning, three ways.

* ``numpy``: host memory, arrays or tensors. Copies on the calling thread alone: torch would take the threads
  that the engine computes with, and copies *into* pages at indices at half the speed.
* ``torch``: tensors anywhere, one indexed copy a plane; for GPUs without Triton.
* ``triton``: a GPU, all planes in one launch; on CPU tensors only under Triton's interpreter, for tests.

Bytes are copied, or words of 8 where addresses and lengths allow, never numbers: not-a-number stays the same
one, and 8-bit floats need no support.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import math
import os
from typing import Any

import numpy as np

from kvcm_ray.connectors.paged.cache import Ids, PagedCache, address_of, device_of, stride_of
from kvcm_ray.errors import InvalidArgument, Unsupported

log = logging.getLogger(__name__)

WAYS = ("numpy", "torch", "triton")
WAY_VARIABLE = "KVCM_PAGED_COPY"  #: forces a way, to find out whether a kernel is at fault

#: Runs of pages longer than this on average are copied run by run: fewer, larger copies.
RUN_PAGES_MIN = 4


def gather(cache: PagedCache, ids: Ids, out: Any, way: str | None = None) -> None:
    """Copy pages into blocks.

    Args:
        ids: shape (blocks, pages of a block): which pages; for -1 the block's bytes are left alone.
        out: shape (blocks, bytes of a block), dtype uint8, an array or a tensor on the cache's device; rows
            may lie apart. On a GPU the copy is only queued, on the current stream.
        way: one of `WAYS`; the best for this memory by default.

    Raises:
        InvalidArgument: shapes that do not fit, a page that the cache does not have.
        Unsupported: a way that does not work here.
    """
    _copy(cache, ids, out, way, into_cache=False)


def scatter(cache: PagedCache, ids: Ids, blocks: Any, way: str | None = None) -> None:
    """Copy blocks into pages; arguments and errors as with `gather`, nothing is copied for -1.

    A page that is named twice holds one or the other afterwards.
    """
    _copy(cache, ids, blocks, way, into_cache=True)


def way_of(cache: PagedCache, way: str | None = None) -> str:
    """Which way a cache is copied: the one that is asked for, or named in KVCM_PAGED_COPY, or the best.

    Raises:
        Unsupported: it does not work for this cache.
    """
    asked = way or os.environ.get(WAY_VARIABLE) or None
    if asked is not None and asked not in WAYS:
        raise InvalidArgument(f"{asked!r} is no way to copy pages; there are {', '.join(WAYS)}")
    if asked is None:
        return "numpy" if cache.on_host else "triton" if _Kernel.works and has_triton() else "torch"
    if asked == "numpy" and not cache.on_host:
        raise Unsupported(f"numpy cannot reach a cache on {cache.device}")
    if asked == "triton" and not has_triton():
        raise Unsupported("pages can be copied by Triton only where it is installed: pip install triton")
    if asked == "triton" and cache.on_host and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("Triton copies pages on the CPU only with TRITON_INTERPRET=1, for tests")
    return asked


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _copy(cache: PagedCache, ids: Ids, blocks: Any, way: str | None, *, into_cache: bool) -> None:
    _check(cache, ids, blocks)
    chosen = way_of(cache, way)
    if not len(ids) or not cache.planes:
        return
    if chosen == "triton" and _triton(cache, ids, blocks, into_cache, forced=way is not None):
        return
    if chosen in ("torch", "triton"):
        _torch(cache, ids, blocks, into_cache)
    else:
        _numpy(cache, ids, blocks, into_cache)


def _check(cache: PagedCache, ids: Ids, blocks: Any) -> None:
    if ids.ndim != 2 or ids.shape[1] != cache.pages:
        raise InvalidArgument(f"pages of shape {ids.shape} given, {cache.pages} make a block")
    if tuple(blocks.shape) != (len(ids), cache.bytes):
        raise InvalidArgument(f"memory of shape {tuple(blocks.shape)} for {len(ids)} blocks of {cache.bytes}")
    if (blocks.strides[1] if isinstance(blocks, np.ndarray) else blocks.stride(1)) != 1:
        raise InvalidArgument("the bytes of a block must lie together")
    if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < cache.count:
        raise InvalidArgument(f"pages {ids.min()}..{ids.max()} of a cache that has {cache.count}")
    if device_of(blocks) != cache.device:
        raise InvalidArgument(f"blocks on {device_of(blocks)} for a cache on {cache.device}")


def word_bytes(cache: PagedCache, blocks: Any) -> int:
    """Up to which power of two everything in a copy is aligned, at most 16."""
    return math.gcd(cache.aligned, address_of(blocks), stride_of(blocks))


# -------------------------------------------------------------------------------------------- numpy


def _numpy(cache: PagedCache, ids: Ids, blocks: Any, into_cache: bool) -> None:
    copy = _numpy_scatter if into_cache else _numpy_gather
    planes = [(_array(plane.rows), plane.run) for plane in cache.planes]
    for pages, matrix, begins in cache.views(ids, _array(blocks)):
        columns = [matrix[:, at : at + run] for at, (_, run) in zip(begins, planes, strict=True)]
        copy([rows for rows, _ in planes], columns, pages)


def _numpy_gather(planes: list[Any], columns: list[Any], ids: Ids) -> None:
    """Page by page, unless they come in runs: an indexed read would make a copy on the way."""
    spans = runs(ids)
    if len(ids) >= RUN_PAGES_MIN * len(spans):
        for rows, column in zip(planes, columns, strict=True):
            for begin, end in spans:
                first = ids[begin]
                np.copyto(column[begin:end], rows[first : first + end - begin])
        return
    places = [(place, page) for place, page in enumerate(ids.tolist()) if page >= 0]
    for rows, column in zip(planes, columns, strict=True):
        for place, page in places:
            column[place] = rows[page]


def _numpy_scatter(planes: list[Any], columns: list[Any], ids: Ids) -> None:
    """All at once: an indexed write makes no copy on the way."""
    wanted = np.flatnonzero(ids >= 0)
    pages = ids if len(wanted) == len(ids) else ids[wanted]
    for rows, column in zip(planes, columns, strict=True):
        rows[pages] = column if pages is ids else column[wanted]


def runs(ids: Ids) -> list[tuple[int, int]]:
    """Positions ``begin..end`` of the runs of consecutive numbers, -1 left out."""
    if not len(ids):
        return []
    breaks = np.flatnonzero((np.diff(ids) != 1) | (ids[:-1] < 0) | (ids[1:] < 0)) + 1
    edges = [0, *breaks.tolist(), len(ids)]
    return [(a, b) for a, b in itertools.pairwise(edges) if ids[a] >= 0]


def _array(memory: Any) -> Any:
    return memory if isinstance(memory, np.ndarray) else memory.numpy()


# ------------------------------------------------------------------------------------------- triton


class _Kernel:
    works = True  #: in this process, as far as is known


def _triton(cache: PagedCache, ids: Ids, blocks: Any, into_cache: bool, *, forced: bool) -> bool:
    """False: the kernel cannot be made here (it is compiled at its first use), and nothing was copied."""
    try:
        from kvcm_ray.connectors.paged import kernels

        kernels.move(cache, ids, blocks, into_cache=into_cache)
    except Exception as error:
        if forced or WAY_VARIABLE in os.environ:
            raise
        _Kernel.works = False
        log.warning("pages are copied by torch, Triton's kernel does not work here: %s", error)
        return False
    return True


# -------------------------------------------------------------------------------------------- torch


def _torch(cache: PagedCache, ids: Ids, blocks: Any, into_cache: bool) -> None:
    import torch  # type: ignore[import-not-found,unused-ignore]

    blocks = _tensor(torch, blocks)
    width = min(8, word_bytes(cache, blocks))
    dtype = {8: torch.int64, 4: torch.int32}.get(width, torch.uint8)
    planes = [(_tensor(torch, plane.rows).view(dtype), plane.run) for plane in cache.planes]
    for pages, matrix, begins in cache.views(ids, blocks):
        index = _indices(torch, pages, cache.device)
        for (rows, run), at in zip(planes, begins, strict=True):
            _torch_column(torch, rows, index, matrix[:, at : at + run].view(dtype), into_cache)


def _tensor(torch: Any, memory: Any) -> Any:
    return torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory


def _indices(torch: Any, ids: Ids, device: str) -> tuple[Any, Any]:
    """Which pages, and which rows of a column they belong to; None: all, in order."""
    wanted = np.flatnonzero(ids >= 0)
    pages = torch.from_numpy(np.ascontiguousarray(ids[wanted])).to(device)
    return pages, None if len(wanted) == len(ids) else torch.from_numpy(wanted).to(device)


def _torch_column(torch: Any, rows: Any, index: tuple[Any, Any], column: Any, into_cache: bool) -> None:
    pages, places = index
    if into_cache:
        rows.index_copy_(0, pages, column if places is None else column.index_select(0, places))
    elif places is None:
        torch.index_select(rows, 0, pages, out=column)
    else:
        column.index_copy_(0, places, rows.index_select(0, pages))
