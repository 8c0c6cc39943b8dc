"""Erasing slots: the header goes first, then the bytes really go back to the file system.

A slot is erased if its header carries the generation that is asked for, or if it has no readable
header (its writer never got that far, or was a plain protocol client). Others are left alone.

On shared memory the slots are locked meanwhile, because a reader that copies out of a memory map
must not meet a hole. If a reader does not let go within a second (it may be stopped), the headers
still go, but the bytes stay until the slot is written again or its segment dropped.

Only whole pages can be given back. The kernel zeroes the part of a page that belongs to an erased
slot; once all of a page is zero it is punched too, which no reader can tell.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext

import numpy as np

from kvcm_ray.core.requests import U32, Flags
from kvcm_ray.storage_adapters import header, system
from kvcm_ray.storage_adapters.handles import Handle
from kvcm_ray.storage_adapters.header_io import load_headers, save_headers
from kvcm_ray.storage_adapters.ranges import Slots, runs

LOCK_WAIT_S = 1.0
PAGE = system.PAGE


def erase_slots(handle: Handle, where: Slots, generations: U32, locks: bool) -> int:
    """Erase slots of one spec (in any order); returns the bytes that its data file gave back.

    Raises:
        OSError.
    """
    order = np.argsort(where, kind="stable")
    where, generations = where[order], generations[order]
    before = os.fstat(handle.data).st_blocks
    deadline = time.monotonic() + LOCK_WAIT_S  # of the whole call: a stopped reader costs it once
    for begin, end in runs(where):
        first, count = _with_page_mates(handle, int(where[begin]), end - begin)
        patience = deadline - time.monotonic()
        held = handle.locked(first, count, exclusive=True, wait_s=patience)
        with held if locks else nullcontext(True) as alone:
            mine = _erase_headers(handle, where[begin:end], generations[begin:end])
            if alone:
                _punch(handle, where[begin:end][mine], locks)
    return max(0, before - os.fstat(handle.data).st_blocks) * 512


def _with_page_mates(handle: Handle, first: int, count: int) -> tuple[int, int]:
    """The slots and those that share a page with them: (first, count)."""
    size = handle.size
    begin = first * size // PAGE * PAGE // size
    end = _ceil(_ceil((first + count) * size, PAGE) * PAGE, size)
    return begin, min(end, handle.segment.slots) - begin


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _erase_headers(handle: Handle, where: Slots, generations: U32) -> Flags:
    """Erase the headers that may be erased; True for each slot that has none afterwards."""
    rows = load_headers(handle, where)
    whole = header.valid(rows, handle.segment.tag, handle.spec_name, where)
    mine: Flags = ~whole | (rows["generation"] == generations)
    dirty = mine & (~header.blank(rows) | header.pledged(rows))
    if dirty.any():
        save_headers(handle, where[dirty], header.erased(generations[dirty]))
    return mine


def _punch(handle: Handle, where: Slots, locks: bool) -> None:
    size = handle.size
    length = os.fstat(handle.data).st_size
    for begin, end in runs(where):
        start = int(where[begin]) * size
        stop = min(start + (end - begin) * size, length)
        if start >= stop or not system.punch(handle.data, start, stop - start):
            continue
        if not locks:
            continue
        for page in {start // PAGE, (stop - 1) // PAGE}:
            if page * PAGE < start or (page + 1) * PAGE > stop:
                _punch_if_zero(handle, page)


def _punch_if_zero(handle: Handle, page: int) -> None:
    """Give back a page that slots share, if that changes nothing that can be read."""
    if not system.has_data(handle.data, page * PAGE, PAGE):
        return
    content = np.zeros(PAGE, np.uint8)
    system.read_into(handle.data, [content], page * PAGE)
    if not content.any():
        system.punch(handle.data, page * PAGE, PAGE)
