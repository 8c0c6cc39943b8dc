"""`kvcm bench data`: block bytes in and out of each kind of storage, with checksums and headers.

Beside each figure stands its floor, measured in the same rounds on a file of the same size in the
same place: one `np.copyto` from or to a memory map for shared memory, one plain `pwritev` or
`preadv` for files. Storage and floor take turns, and each figure is that of its best round, the
one that other work on the machine disturbed least; `ratio` divides the two, `ratio_median` is the
median of the ratios within the rounds. The space was written before: a first write also pays for
fresh pages (`first_put_gbps`). One process, as an engine would.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import LocationSpecInfo, NfsSpec, Segment, ShmSpec, StorageConfig
from kvcm_ray.storage_adapters import SegmentOwner, StorageAdapter, open_storage

BLOCK_BYTES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
TOTAL_BYTES = 64 << 20
ROUNDS = 30
QUICK_ROUNDS = 6
SHM_ROOT = "/dev/shm"

Bytes = npt.NDArray[np.uint8]
Move = Callable[[], None]


def run(
    *,
    quick: bool = False,
    storages: Sequence[str] = ("shm", "file"),
    block_bytes: Sequence[int] = BLOCK_BYTES,
    total_bytes: int = TOTAL_BYTES,
    file_root: str | None = None,
) -> dict[str, Any]:
    """Measure; takes some seconds and leaves nothing behind.

    Args:
        total_bytes: moved by each put and get.
        file_root: where the file storage is measured; the folder for temporary files by default.

    Returns:
        ``{"rows": [{storage, block_bytes, put_gbps, get_gbps, floor_put_gbps, floor_get_gbps,
        put_ratio, get_ratio, put_ratio_median, get_ratio_median, first_put_gbps}],
        "total_bytes", "rounds"}``; GB are 1e9 bytes.
    """
    rounds = QUICK_ROUNDS if quick else ROUNDS
    rows = []
    for kind in storages:
        with _folder(SHM_ROOT if kind == "shm" else file_root) as root:
            for size in block_bytes:
                rows.append(_measure(kind, root, size, max(1, total_bytes // size), rounds))
    return {"rows": rows, "total_bytes": total_bytes, "rounds": rounds}


@contextmanager
def _folder(parent: str | None) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="kvcm-bench-", dir=parent))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _measure(kind: str, root: Path, size: int, count: int, rounds: int) -> dict[str, Any]:
    config = StorageConfig(
        "bench",
        shm=ShmSpec(str(root)) if kind == "shm" else None,
        nfs=NfsSpec(str(root)) if kind == "file" else None,
    )
    segment = Segment(1, "bench", f"bench/{size}", (LocationSpecInfo("kv", size),), count)
    source = np.random.default_rng(size).integers(0, 256, (count, size), np.uint8)
    target = np.zeros_like(source)
    adapter = open_storage(config)
    adapter.create_segment(segment, SegmentOwner("bench", "bench", "0"))
    try:
        put, get = _moves(adapter, segment, source, target)
        begin = time.perf_counter()
        put()
        first = source.nbytes / 1e9 / (time.perf_counter() - begin)
        with _floor(kind, root / "floor", source, target) as (floor_put, floor_get):
            moves = {"put": put, "floor_put": floor_put, "get": get, "floor_get": floor_get}
            speeds = _take_turns(moves, source, target, rounds)
    finally:
        adapter.drop_segment(segment)
        adapter.close()
    row = {f"{name}_gbps": max(speeds[name]) for name in ("put", "get", "floor_put", "floor_get")}
    for name in ("put", "get"):
        row[f"{name}_ratio"] = row[f"{name}_gbps"] / row[f"floor_{name}_gbps"]
        pairs = zip(speeds[name], speeds[f"floor_{name}"], strict=True)
        row[f"{name}_ratio_median"] = statistics.median(own / floor for own, floor in pairs)
    return {"storage": kind, "block_bytes": size, **row, "first_put_gbps": first}


def _moves(adapter: StorageAdapter, segment: Segment, source: Bytes, target: Bytes) -> tuple[Move, Move]:
    slots = np.arange(segment.slots, dtype=np.uint32)
    keys = slots.astype(np.int64) * 7919
    generations = np.ones(segment.slots, np.uint32)

    def put() -> None:
        adapter.write(segment, "kv", slots, keys, generations, source)

    def get() -> None:
        hits = adapter.read(segment, "kv", slots, keys, generations, target)
        assert hits.all(), "the storage lost blocks"

    return put, get


@contextmanager
def _floor(kind: str, path: Path, source: Bytes, target: Bytes) -> Iterator[tuple[Move, Move]]:
    """The bare copies, on a file of their own whose pages are all there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _whole(os.pwritev(fd, [source], 0), source)
        if kind == "file":
            yield (
                lambda: _whole(os.pwritev(fd, [source], 0), source),
                lambda: _whole(os.preadv(fd, [target], 0), target),
            )
        else:
            mapped = np.frombuffer(mmap.mmap(fd, source.nbytes), np.uint8).reshape(source.shape)
            yield lambda: np.copyto(mapped, source), lambda: np.copyto(target, mapped)
    finally:
        os.close(fd)
        path.unlink()


def _whole(done: int, asked: Bytes) -> None:
    assert done == asked.nbytes, "the kernel moved only a part"


def _take_turns(moves: dict[str, Move], source: Bytes, target: Bytes, rounds: int) -> dict[str, list[float]]:
    """GB/s of every round after a first one that only warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in moves}
    for index in range(rounds + 1):
        for name, move in moves.items():
            begin = time.perf_counter()
            move()
            seconds = time.perf_counter() - begin
            if index > 0:
                speeds[name].append(source.nbytes / 1e9 / seconds)
        assert (target[-1] == source[-1]).all(), "other bytes came back"
    return speeds
