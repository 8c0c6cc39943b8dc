"""`kvcm bench paged`: pages of an engine's cache into blocks and back, beside plain copies of as many bytes.

On the CPU the plain copy is one `np.copyto` between two blocks of memory, and time is that which the copying
thread had the processor, so that other work on the machine counts less. On a GPU there are two: within the
device for gather and scatter, and over the bus, from and to pinned memory, for a whole save and load of
blocks (`host.gather_to_host`). Copies and plain ones take turns; a figure is that of the best round, the one
that other work on the machine disturbed least. A ratio is our speed by that of the plain copy: 1 is as fast.

Caches have the shapes of models that are served: what counts are the bytes that lie together.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcm_ray.connectors.paged import LAYER_FIRST, PAGE_FIRST, PagedCache, gather, host, scatter, way_of
from kvcm_ray.connectors.paged.cache import Ids
from kvcm_ray.connectors.paged.pinned import HostMemory
from kvcm_ray.errors import InvalidArgument, Unsupported

ROUNDS, QUICK_ROUNDS = 25, 4
CPU_BYTES, GPU_BYTES = 64 << 20, 1 << 30

Move = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a cache in 16-bit numbers, 16 tokens a page.

    Args:
        run: bytes of a page that lie together.
    """

    name: str
    planes: int
    run: int


SHAPES = (
    Shape("8B, keys and values joined", 32, 16 * 8 * 2 * 128 * 2),
    Shape("8B, keys and values apart", 64, 16 * 8 * 128 * 2),
    Shape("70B on 8 ranks, joined", 80, 16 * 2 * 128 * 2),
    Shape("MLA, 61 layers", 61, 16 * 576 * 2),
)
#: Order of bytes in a block, and pages in one.
BLOCKS = ((PAGE_FIRST, 1), (PAGE_FIRST, 4), (LAYER_FIRST, 4))


def run(
    *, quick: bool = False, device: str = "cpu", ways: Sequence[str] = (), total_bytes: int | None = None
) -> dict[str, Any]:
    """Measure; takes a minute or two.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        ways: to copy; the one that is chosen without a wish, and torch's if it is there, by default.
        total_bytes: moved by each copy; 64 MiB on the CPU, 1 GiB on a GPU by default.

    Returns:
        ``{"device", "total_bytes", "rounds", "rows": [{layout, order, pages, run_bytes, ids, way,
        copy_gbps, gather_gbps, scatter_gbps, gather_ratio, scatter_ratio}]}``, and on a GPU in each row also
        ``{h2d_gbps, d2h_gbps, load_gbps, save_gbps, load_ratio, save_ratio}``; GB are 1e9 bytes.

    Raises:
        Unsupported: no such device here.
    """
    name = _name(device)
    total = total_bytes or (CPU_BYTES if device == "cpu" else GPU_BYTES)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    torch = _torch()
    if torch is not None and device == "cpu":
        torch.set_num_threads(1)  # as the plain copy
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        for order, pages in BLOCKS:
            rows += _measure(shape, order, pages, device, ways, total, rounds)
    return {"device": name, "total_bytes": total, "rounds": rounds, "rows": rows}


def _name(device: str) -> str:
    if device == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    if not device.startswith("cuda"):
        raise InvalidArgument(f"there is no device {device!r}; give cpu, cuda or cuda:N")
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        raise Unsupported("no GPU here, or torch was built without CUDA: run this where vLLM runs on a GPU")
    return str(torch.cuda.get_device_name(device))


def _torch() -> Any | None:
    with suppress(ImportError):
        import torch  # type: ignore[import-not-found,unused-ignore]

        return torch
    return None


def _measure(
    shape: Shape, order: Any, pages: int, device: str, ways: Sequence[str], total: int, rounds: int
) -> list[dict[str, Any]]:
    blocks = max(1, total // (shape.planes * shape.run * pages))
    cache = _cache(shape, 2 * blocks * pages, pages, order, device)
    rows = []
    for kind in ("random", "run"):
        ids = _ids(kind, blocks, pages)
        for way in ways or _ways(cache):
            moves = _device_moves(cache, ids, way)
            if not cache.on_host and way == way_of(cache):
                moves |= _bus_moves(cache, ids)
            speeds = _take_turns(moves, blocks * cache.bytes, rounds, device)
            rows.append(
                {"layout": shape.name, "order": order, "pages": pages, "run_bytes": shape.run, "ids": kind}
                | {"way": way} | _row(speeds)
            )  # fmt: skip
    return rows


def _cache(shape: Shape, count: int, pages: int, order: Any, device: str) -> PagedCache:
    torch = _torch()
    if torch is None:
        return PagedCache([np.ones((count, shape.run), np.uint8) for _ in range(shape.planes)], pages, order)
    matrices = [torch.ones((count, shape.run), dtype=torch.uint8, device=device) for _ in range(shape.planes)]
    return PagedCache(matrices, pages, order)


def _ids(kind: str, blocks: int, pages: int) -> Ids:
    count = 2 * blocks * pages
    every = np.random.default_rng(0).permutation(count) if kind == "random" else np.arange(1, count)
    return every[: blocks * pages].astype(np.int64).reshape(blocks, pages)


def _ways(cache: PagedCache) -> list[str]:
    best = way_of(cache)
    return [best] if best == "torch" or _torch() is None else [best, "torch"]


def _device_moves(cache: PagedCache, ids: Ids, way: str) -> dict[str, Move]:
    """Gather, scatter and a plain copy, where the cache is."""
    if cache.on_host:
        out, other = np.ones((2, len(ids), cache.bytes), np.uint8)
        return {
            "copy": lambda: np.copyto(other, out),
            "gather": lambda: gather(cache, ids, out, way),
            "scatter": lambda: scatter(cache, ids, out, way),
        }
    torch = _torch()
    assert torch is not None, "a tensor is there"
    there, twin = torch.ones((2, len(ids), cache.bytes), dtype=torch.uint8, device=cache.device)
    return {
        "copy": lambda: twin.copy_(there),
        "gather": lambda: gather(cache, ids, there, way),
        "scatter": lambda: scatter(cache, ids, there, way),
    }


def _bus_moves(cache: PagedCache, ids: Ids) -> dict[str, Move]:
    """Whole saves and loads of blocks, and plain copies over the bus."""
    torch = _torch()
    assert torch is not None, "a tensor is there"
    buffer = HostMemory().new(len(ids) * cache.bytes).reshape(len(ids), cache.bytes)
    pinned, there = torch.from_numpy(buffer), torch.ones(buffer.shape, dtype=torch.uint8, device=cache.device)
    return {
        "d2h": lambda: pinned.copy_(there, non_blocking=True),
        "save": lambda: host.gather_to_host(cache, ids, buffer),
        "h2d": lambda: there.copy_(pinned, non_blocking=True),
        "load": lambda: host.scatter_from_host(cache, ids, buffer),
    }


def _take_turns(moves: dict[str, Move], size: int, rounds: int, device: str) -> dict[str, list[float]]:
    """GB/s of every round, after a first one that only warms up."""
    on_cpu = device == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    synchronize: Move = (lambda: None) if on_cpu else _torch().cuda.synchronize  # type: ignore
    speeds: dict[str, list[float]] = {name: [] for name in moves}
    for number in range(rounds + 1):
        for name, move in moves.items():
            synchronize()
            begin = clock()
            move()
            synchronize()
            if number:
                speeds[name].append(size / 1e9 / (clock() - begin))
    return speeds


FLOORS = {"gather": "copy", "scatter": "copy", "save": "d2h", "load": "h2d"}


def _row(speeds: dict[str, list[float]]) -> dict[str, float]:
    row = {f"{name}_gbps": max(found) for name, found in speeds.items()}
    for name, floor in FLOORS.items():
        if name in speeds:
            row[f"{name}_ratio"] = row[f"{name}_gbps"] / row[f"{floor}_gbps"]
            pairs = zip(speeds[name], speeds[floor], strict=True)
            row[f"{name}_ratio_median"] = statistics.median(own / plain for own, plain in pairs)
    return row
