"""One Triton kernel for both directions: any number of planes, pages and blocks in one launch.

A program copies a part of one page of one plane. Where the planes are is a table on the device, made once a
cache; so layers need not belong to one tensor, and no pointer is an argument of its own. The kernel moves
words and knows no numbers.

Importing this needs Triton. With TRITON_INTERPRET=1 in the environment of the process (it is read when Triton
is imported) the same kernel runs on CPU tensors, slowly.
"""

from __future__ import annotations

from typing import Any

import torch  # type: ignore[import-not-found,unused-ignore]
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

from kvcm_ray.connectors.paged.cache import ALIGNED, Ids, PagedCache
from kvcm_ray.connectors.paged.copying import word_bytes

WORDS = 1024  #: copied by a program
FIELDS = 5  #: of a plane in the table


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def copy_pages(  # type: ignore[no-untyped-def,unused-ignore]  # Triton reads the annotations
    table, ids, blocks, block_words, pages, fields: tl.constexpr,
    words: tl.constexpr, aligned: tl.constexpr, into_cache: tl.constexpr,
) -> None:  # fmt: skip
    """Programs: (blocks * pages, planes, parts of the longest run). All lengths are in words of `blocks`.

    Args:
        table: int64, shape (planes, fields): address, words from page to page, words of a run, and where it
            is in a block: begin, and words from page to page there.
        ids: int64, shape (blocks, pages).
        aligned: whether everything is a multiple of 16 bytes, so that the widest loads may be used.
    """
    item = tl.program_id(0).to(tl.int64)
    plane = table + tl.program_id(1) * fields
    page = tl.load(ids + item)
    run = tl.where(page >= 0, tl.load(plane + 2), 0)
    offsets = tl.program_id(2) * words + tl.arange(0, words)
    if aligned:
        run = tl.multiple_of(run, 2)
    inside = offsets < run
    cached = tl.load(plane).to(tl.pointer_type(blocks.dtype.element_ty)) + page * tl.load(plane + 1)
    place = (item // pages) * block_words + tl.load(plane + 3) + (item % pages) * tl.load(plane + 4)
    stored = blocks + place
    if aligned:
        cached = tl.multiple_of(cached, 16)
        stored = tl.multiple_of(stored, 16)
    if into_cache:
        tl.store(cached + offsets, tl.load(stored + offsets, mask=inside), mask=inside)
    else:
        tl.store(stored + offsets, tl.load(cached + offsets, mask=inside), mask=inside)


def move(cache: PagedCache, ids: Ids, blocks: Any, *, into_cache: bool) -> None:
    """Queue a copy on the current stream. Arguments as in `copying`, and checked there."""
    if not isinstance(blocks, torch.Tensor):
        blocks = torch.from_numpy(blocks)
    common = word_bytes(cache, blocks)
    width = min(8, common) if common >= 4 else 1
    dtype = {8: torch.int64, 4: torch.int32}.get(width, torch.uint8)
    longest = max(plane.run for plane in cache.planes) // width
    grid = (ids.size, len(cache.planes), triton.cdiv(longest, WORDS))
    copy_pages[grid](
        _table(cache, width), torch.from_numpy(ids.copy()).to(cache.device, non_blocking=True),
        blocks.view(dtype), blocks.stride(0) // width, cache.pages, FIELDS, WORDS,
        common == ALIGNED, into_cache,
    )  # fmt: skip


def _table(cache: PagedCache, width: int) -> Any:
    """Kept with the cache, whose memory stays where it is."""
    if width not in cache.tables:
        lines = [
            [plane.address, *(n // width for n in (plane.stride, plane.run, plane.begin, plane.step))]
            for plane in cache.planes
        ]
        cache.tables[width] = torch.tensor(lines, dtype=torch.int64).to(cache.device)
    return cache.tables[width]
