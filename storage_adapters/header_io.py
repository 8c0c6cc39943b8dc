"""Reading and writing the header files, few system calls for many slots."""

from __future__ import annotations

import numpy as np

from kvcm_ray.storage_adapters import header, ranges, system
from kvcm_ray.storage_adapters.handles import Handle
from kvcm_ray.storage_adapters.header import Headers
from kvcm_ray.storage_adapters.ranges import Slots


def load_headers(handle: Handle, where: Slots) -> Headers:
    """Headers of slots; those beyond the end of the file read as empty."""
    rows = np.zeros(len(where), header.HEADER)
    for piece in ranges.header_pieces(where):
        span = np.zeros(piece.span, header.HEADER)
        view = span.view(np.uint8)
        system.read_into(handle.header, [view], piece.slot * header.HEADER_BYTES)
        rows[piece.begin : piece.end] = span[where[piece.begin : piece.end] - piece.slot]
    return rows


def save_headers(handle: Handle, where: Slots, rows: Headers) -> None:
    for piece in ranges.pieces(where, header.HEADER_BYTES):
        part = rows[piece.begin : piece.end].view(np.uint8)
        system.write_from(handle.header, [part], piece.slot * header.HEADER_BYTES)
