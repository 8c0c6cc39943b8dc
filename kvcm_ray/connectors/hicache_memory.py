"""Where the bytes of pages are: pieces of a host pool's memory, or flat pages.

All forms give the client rows to read or write, one a page and spec, and make the same block of a page: that
of the pool's flat pages, K before V. Direct memory is the pool's own; the others pass through a buffer.
"""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.connectors.py_client.memory import Bytes, view
from kvcm_ray.errors import InvalidArgument

Bools = npt.NDArray[np.bool_]
Index = npt.NDArray[np.intp]
Rows = dict[str, Any]  #: by spec: one buffer a page

DIRECT_PIECES_MAX = 2  #: pieces of a page that are specs of their own
PAGE = "page"  #: the only spec of other pools


@dataclass(frozen=True, slots=True)
class Layout:
    """How the pieces of a page in a pool's memory make a block.

    ``order[i]`` is the piece that lies i-th in a block: that of the pool's flat pages, K before V.
    """

    sizes: tuple[int, ...]  #: bytes of the pieces, in the pool's order
    order: tuple[int, ...]

    @classmethod
    def of(cls, pool: Any, page_indices: Any) -> Layout | None:
        """From one page; None for a pool that has flat pages only."""
        try:
            _, sizes = pool.get_page_buffer_meta(page_indices)
        except (AttributeError, NotImplementedError, ValueError):
            return None
        order = tuple(range(len(sizes)))
        if pool.layout == "layer_first" and len(sizes) == 2 * pool.layer_num:  # K and V of each layer
            order = order[::2] + order[1::2]
        return cls(tuple(int(size) for size in sizes), order)

    @property
    def direct(self) -> bool:
        return len(self.sizes) <= DIRECT_PIECES_MAX

    @property
    def specs(self) -> dict[str, int]:
        if self.direct:
            return {f"part{number}": size for number, size in enumerate(self.sizes)}
        return {PAGE: sum(self.sizes)}


class Memory(abc.ABC):
    """The pages of one call."""

    @abc.abstractmethod
    def rows(self, wanted: Index, *, filled: bool = False) -> Rows:
        """Buffers for these pages; `filled` with what they hold, to be written."""

    def loaded(self, pages: Index, rows: Rows, at: Index) -> None:  # noqa: B027
        """Of what `rows` gave, the rows `at` were read; they belong to these pages."""


class _Direct(Memory):
    """At most two pieces a page, each a row of its own spec."""

    def __init__(self, layout: Layout, pool: Any, indices: Any, step: int) -> None:
        self._layout = layout
        self._pieces, _ = pool.get_page_buffer_meta(indices)
        self._owner = pool

    def rows(self, wanted: Index, *, filled: bool = False) -> Rows:
        sizes, pages = self._layout.sizes, wanted.tolist()
        return {
            spec: [view(self._pieces[page * len(sizes) + part], sizes[part]) for page in pages]
            for part, spec in enumerate(self._layout.specs)
        }


class _Staged(Memory):
    """Many pieces a page, gathered and scattered."""

    def __init__(self, layout: Layout, pool: Any, indices: Any, step: int) -> None:
        self._layout = layout
        self._pieces, _ = pool.get_page_buffer_meta(indices)
        self._owner = pool

    def rows(self, wanted: Index, *, filled: bool = False) -> Rows:
        rows: Bytes = np.empty((len(wanted), sum(self._layout.sizes)), np.uint8)
        if filled:
            for row, page in zip(rows, wanted.tolist(), strict=True):
                for address, at, size in self._places(page, row):
                    ctypes.memmove(at, address, size)
        return {PAGE: rows}

    def loaded(self, pages: Index, rows: Rows, at: Index) -> None:
        for page, number in zip(pages.tolist(), at.tolist(), strict=True):
            for address, place, size in self._places(page, rows[PAGE][number]):
                ctypes.memmove(address, place, size)

    def _places(self, page: int, row: Bytes) -> list[tuple[int, int, int]]:
        """For each piece: its address in the pool, its address in the row, its size."""
        sizes, at, found = self._layout.sizes, row.ctypes.data, []
        for part in self._layout.order:
            found.append((self._pieces[page * len(sizes) + part], at, sizes[part]))
            at += sizes[part]
        return found


class _Flat(Memory):
    """Flat pages that the caller has: tensors, cut into the specs in their order."""

    def __init__(self, specs: Mapping[str, int], pages: Sequence[Any]) -> None:
        self._specs, self._pages = specs, pages

    def rows(self, wanted: Index, *, filled: bool = False) -> Rows:
        found: Rows = {spec: [] for spec in self._specs}
        for page in wanted.tolist():
            tensor, at = self._pages[page].contiguous(), 0
            whole = view(tensor.data_ptr(), tensor.nbytes)
            if len(whole) != sum(self._specs.values()):
                expected = sum(self._specs.values())
                raise InvalidArgument(f"a flat page of {len(whole)} bytes, expected {expected}")
            for spec, size in self._specs.items():
                found[spec].append(whole[at : at + size])
                at += size
        return found


class _WholePages(_Flat):
    """Pages of a pool that gives no addresses: flat copies, set when they were read."""

    def __init__(self, pool: Any, indices: Any, step: int) -> None:
        self._pool, self._starts = pool, indices[::step].tolist()
        flat = [pool.get_dummy_flat_data_page() for _ in self._starts]
        super().__init__({PAGE: flat[0].nbytes}, flat)

    def rows(self, wanted: Index, *, filled: bool = False) -> Rows:
        if filled:
            for page in wanted.tolist():
                self._pages[page].copy_(self._pool.get_data_page(self._starts[page], flat=True))
        return super().rows(wanted)

    def loaded(self, pages: Index, rows: Rows, at: Index) -> None:
        for page in pages.tolist():
            self._pool.set_from_flat_data_page(self._starts[page], self._pages[page])


def memory_of(layout: Layout | None, pool: Any, indices: Any, step: int) -> Memory:
    """The pages of a pool that `indices` name, `step` indices a page."""
    if layout is None:
        return _WholePages(pool, indices, step)
    return (_Direct if layout.direct else _Staged)(layout, pool, indices, step)


def flat_memory(specs: Mapping[str, int], pages: Sequence[Any]) -> Memory:
    return _Flat(specs, pages)
