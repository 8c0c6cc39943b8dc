"""What a paged cache looks like in memory, and where each of its bytes is in a block.

A layer's tensor has a dimension of pages. Whatever else it has (keys and values in one tensor or two, heads
before tokens or after them, one latent vector a token), the bytes of one page are one or several runs of
memory, at the same distance from page to page. Each such run of all pages is a *plane*: a matrix of shape
(pages, bytes of the run), maybe with gaps between its rows.

===========================================  =====================================================  ==========
tensor of a layer, in the order of memory    engine                                                 planes
===========================================  =====================================================  ==========
(pages, heads, tokens, K|V), "HND"           vLLM LBHNC, its CPU build                              1
(pages, tokens, heads, K|V), "NHD"           vLLM LBNHC; slices of a pool (BLHNC, BLNHC) too        1
(pages, 2, tokens, heads, size)              keys and values joined within a page                   1
(2, pages, tokens, heads, size)              keys of all pages, then values                         2
(heads, pages, tokens, K|V)                  vLLM LHBNC                                             heads
(pages, heads, layers, tokens, K|V)          vLLM BHLNC, each layer a slice                         heads
(pages, tokens, latent)                      MLA                                                    1
===========================================  =====================================================  ==========

A block is made of a fixed number of pages of all planes, in one of two orders:

* ``page_first``: shape (pages, planes, run): a page is together. One block is the pages one after the other.
* ``layer_first``: shape (planes, pages, run): a layer is together, so that it can be moved alone in one run.

With one page a block the two are the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvcm_ray.errors import InvalidArgument, Unsupported

Order = Literal["page_first", "layer_first"]
PAGE_FIRST: Order = "page_first"
LAYER_FIRST: Order = "layer_first"

ALIGNED = 16  #: bytes that the widest loads of a GPU take at once
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plane:
    """One run of every page.

    Args:
        rows: shape (pages, bytes), dtype uint8, the bytes of a row together; an array or a tensor.
        begin, step: bytes in a block: where the first page's run is, and from one page's to the next one's.
    """

    rows: Any
    begin: int
    step: int

    @property
    def run(self) -> int:
        return int(self.rows.shape[1])

    @property
    def address(self) -> int:
        return address_of(self.rows)

    @property
    def stride(self) -> int:
        """Bytes from one page to the next one."""
        return stride_of(self.rows)


class PagedCache:
    """Planes, and how their pages make blocks.

    Args:
        matrices: of the planes, in the order of a block: shape (pages, bytes), dtype uint8, all arrays, or
            all tensors of one device.
        pages: of the cache in one block.
        order: of the bytes in a block.

    Raises:
        InvalidArgument: no planes, or matrices that do not fit together.
    """

    def __init__(self, matrices: Sequence[Any], pages: int = 1, order: Order = PAGE_FIRST) -> None:
        if order not in (PAGE_FIRST, LAYER_FIRST):
            raise InvalidArgument(f"blocks are {PAGE_FIRST} or {LAYER_FIRST}, not {order!r}")
        self.count: int = _same("numbers of pages", (len(rows) for rows in matrices))
        self.device: str = _same("devices", map(device_of, matrices))
        self.pages, self.order = pages, order
        self.page_bytes = sum(int(rows.shape[1]) for rows in matrices)
        self.bytes = pages * self.page_bytes  #: of a block
        self.planes = tuple(_placed(matrices, pages, order, self.page_bytes))
        self.tables: dict[int, Any] = {}  #: of `kernels`
        self._parts: dict[range, PagedCache] = {}

    @property
    def on_host(self) -> bool:
        return self.device == "cpu"

    @cached_property
    def aligned(self) -> int:
        """The largest power of two, up to `ALIGNED`, that all addresses and lengths are multiples of."""
        sizes = [n for plane in self.planes for n in (plane.address, plane.stride, plane.run)]
        places = [n for plane in self.planes for n in (plane.begin, plane.step)]
        return math.gcd(ALIGNED, *sizes, *places)

    def part(self, planes: range) -> PagedCache:
        """The same blocks, of which only the bytes of these planes are copied."""
        found = self._parts.get(planes)
        if found is None:
            found = copy.copy(self)
            found.__dict__.pop("aligned", None)
            found.planes = self.planes[planes.start : planes.stop]
            found.tables, found._parts = {}, {}
            self._parts[planes] = found
        return found

    def views(self, ids: Ids, blocks: Any) -> Iterator[tuple[Ids, Any, list[int]]]:
        """`blocks`, shape (blocks, bytes), as matrices with a row for each page.

        With each come the pages of its rows, and where in a row the bytes of the planes begin.
        """
        begins = [plane.begin for plane in self.planes]
        dense = len(blocks) < 2 or stride_of(blocks) == self.bytes
        if self.pages == 1 or (self.order == PAGE_FIRST and dense):
            yield ids.reshape(-1), blocks.reshape(ids.size, self.page_bytes), begins
            return
        for page in range(self.pages):
            shifts = [plane.begin + page * plane.step for plane in self.planes]
            yield ids[:, page], blocks, shifts


def planes_of(tensor: Any, pages: int) -> list[Any]:
    """A layer's tensor as matrices of shape (pages, bytes of a run), dtype uint8; nothing is copied.

    Raises:
        Unsupported: there is no dimension of `pages`, outermost in memory or within one other, or single
            numbers of a page lie apart.
    """
    import torch  # type: ignore[import-not-found,unused-ignore]  # a tensor was given, so it is there

    order = sorted(range(tensor.dim()), key=lambda d: (tensor.shape[d] == 1, -tensor.stride(d)))
    physical = tensor.permute(order)
    at = _page_dimension(physical.shape, pages)
    if at is None:
        raise Unsupported(f"a cache of shape {tuple(tensor.shape)} has no dimension of {pages} blocks")
    split = physical.unflatten(at, (pages, -1)).movedim(at, 0)
    inner, size = split.dim(), 1
    while inner > 1 and (split.shape[inner - 1] == 1 or split.stride(inner - 1) == size):
        inner -= 1
        size *= split.shape[inner]
    if size == 1 and math.prod(split.shape[1:]) > 1:
        raise Unsupported(f"blocks of shape {tuple(tensor.shape)}, strides {tensor.stride()} are scattered")
    return [
        split[(slice(None), *index)].reshape(pages, size).view(torch.uint8)
        for index in np.ndindex(*split.shape[1:inner])
    ]


def _page_dimension(shape: Sequence[int], pages: int) -> int | None:
    """Kernels may cut an engine's page into several, so a multiple will do."""
    outer = range(min(2, len(shape)))
    exact = [at for at in outer if shape[at] == pages]
    return next(iter(exact + [at for at in outer if shape[at] % pages == 0]), None)


def _placed(matrices: Sequence[Any], pages: int, order: Order, page_bytes: int) -> Iterator[Plane]:
    at = 0
    for rows in matrices:
        run = int(rows.shape[1])
        begin, step = (at, page_bytes) if order == PAGE_FIRST else (at * pages, run)
        yield Plane(rows, begin, step)
        at += run


def _same(what: str, values: Iterable[Any]) -> Any:
    found = set(values)
    if len(found) != 1:
        text = ", ".join(sorted(map(str, found))) or "none"
        raise InvalidArgument(f"the planes of a paged cache have different {what}: {text}")
    return found.pop()


def device_of(memory: Any) -> str:
    return "cpu" if isinstance(memory, np.ndarray) else str(memory.device)


def address_of(rows: Any) -> int:
    return int(rows.ctypes.data if isinstance(rows, np.ndarray) else rows.data_ptr())


def stride_of(rows: Any) -> int:
    """Bytes from one row to the next one; dtype uint8."""
    return int(rows.strides[0] if isinstance(rows, np.ndarray) else rows.stride(0))
