"""`kvcm bench write`: blocks a second through start and finish, metadata only.

Every client is a process of its own that writes prompts of new blocks in batches: one start_write and
one finish_write a batch through the real group actor, with one batch or a window of batches in flight.
No block bytes are written, so that the figure is the manager's alone. Run as a program, this file is
such a client: it connects, says "ready", waits for a line, writes for a while and prints what it did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.client import AsyncInstance, connect_async
from kvcm_ray.errors import KvcmError, Unavailable

BATCH = 64
#: Batches a client keeps in flight: an engine saves several requests' blocks at the same time.
WINDOW = 16
CLIENTS = (1, 8)
SECONDS, QUICK_SECONDS = 5.0, 1.5
BLOCK_BYTES = 4096
QUOTA = "file:8TiB"  #: segments are sparse files: nothing is written to them here
READY_TIMEOUT_S = 60.0
PROMPT_BATCHES = 8  #: batches of one chain, one after the other


def run(
    *,
    quick: bool = False,
    clients: Sequence[int] = CLIENTS,
    batch: int = BATCH,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Start a manager in a temporary directory, measure it, remove it. Takes half a minute.

    Returns:
        ``{"rows": [{clients, window, batch, blocks_per_s, batch_p50_us, batch_p99_us}], "one_at_a_time":
        the same with one batch in flight, "index_bytes_per_block", "blocks"}``. A batch's time is start
        and finish together; bytes of the indexes (one for each row) are as allocated on disk, with
        the log and the reserve that each of them has.

    Raises:
        Unavailable: the manager or a client did not start.
    """
    time_s = seconds or (QUICK_SECONDS if quick else SECONDS)
    with _manager() as data_dir:
        rows = [_measure(data_dir, count, WINDOW, batch, time_s) for count in clients]
        singles = [_measure(data_dir, count, 1, batch, time_s) for count in clients]
        blocks, size = _index_size(data_dir)
    return {
        "rows": rows,
        "one_at_a_time": singles,
        "index_bytes_per_block": round(size / blocks, 1) if blocks else None,
        "blocks": blocks,
    }


@contextmanager
def _manager() -> Iterator[Path]:
    from kvcm_ray import cluster

    directory = Path(tempfile.mkdtemp(prefix="kvcm-bench-write-"))
    data_dir = directory / "data"
    try:
        cluster.up_detached(data_dir, 0, [QUOTA], replicas=1)
        yield data_dir
    finally:
        cluster.down(data_dir, purge=True)
        shutil.rmtree(directory, ignore_errors=True)


def _measure(data_dir: Path, clients: int, window: int, batch: int, seconds: float) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "kvcm_ray.benchmarks.write", "--data-dir", str(data_dir),
        "--instance", f"bench-write-{clients}-{window}", "--window", str(window),
        "--batch", str(batch), "--seconds", str(seconds),
    ]  # fmt: skip
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(clients)
    ]
    try:
        for child in children:
            if child.stdout is None or child.stdout.readline().strip() != "ready":
                raise Unavailable("a client of the benchmark did not start")
        for child in children:  # all of them before any is waited for: they run side by side
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        answers = [child.communicate(timeout=seconds + READY_TIMEOUT_S) for child in children]
        if any(child.returncode for child in children):
            raise Unavailable("a client of the benchmark failed; it said why on standard error")
        told = [json.loads(out) for out, _ in answers]
    finally:
        for child in children:
            child.kill()
            child.wait()
    times = np.concatenate([np.array(answer["batch_s"]) for answer in told])
    return {
        "clients": clients,
        "window": window,
        "batch": batch,
        "blocks_per_s": round(sum(answer["blocks"] / answer["seconds"] for answer in told)),
        "batch_p50_us": round(float(np.percentile(times, 50)) * 1e6),
        "batch_p99_us": round(float(np.percentile(times, 99)) * 1e6),
    }


def _index_size(data_dir: Path) -> tuple[int, int]:
    """Blocks and allocated bytes of all indexes."""
    from kvcm_ray.actors.view import RegistryView
    from kvcm_ray.index import IndexReader

    view = RegistryView(data_dir)
    blocks = size = 0
    for info in view.instances().values():
        path = view.index_path(info)
        reader = IndexReader(path)
        blocks += reader.key_count()
        size += (path / "data.mdb").stat().st_blocks * 512
        reader.close()
    view.close()
    return blocks, size


# ------------------------------------------------------------------------------------ one client


async def _client(options: argparse.Namespace) -> dict[str, Any]:
    async with await connect_async(options.data_dir) as client:
        cache = await client.register(options.instance, block_size=16, specs={"tp0": BLOCK_BYTES})
        await _write_prompt(cache, options.batch, time.monotonic(), [])  # wakes everything up
        print("ready", flush=True)
        sys.stdin.readline()
        times: list[float] = []
        begin_s = time.monotonic()
        until_s = begin_s + options.seconds
        writers = [_writer(cache, options.batch, until_s, times) for _ in range(options.window)]
        blocks = sum(await asyncio.gather(*writers))
        return {"blocks": blocks, "seconds": time.monotonic() - begin_s, "batch_s": times}


async def _writer(cache: AsyncInstance, batch: int, until_s: float, times: list[float]) -> int:
    blocks = 0
    while time.monotonic() < until_s:
        blocks += await _write_prompt(cache, batch, until_s, times)
    return blocks


async def _write_prompt(cache: AsyncInstance, batch: int, until_s: float, times: list[float]) -> int:
    """Write the batches of one new prompt in order, as an engine that prefills in pieces does."""
    size = batch * PROMPT_BATCHES
    keys = np.random.default_rng().integers(-(2**63), 2**63, size, np.int64)
    blocks = 0
    for start in range(0, size, batch):
        begin_s = time.perf_counter()
        session = await cache.start_write(keys[start : start + batch])
        blocks += (await session.finish(True)).committed
        times.append(time.perf_counter() - begin_s)
        if time.monotonic() >= until_s:
            break
    return blocks


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--instance", required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    try:
        print(json.dumps(asyncio.run(_client(parser.parse_args()))))
    except KvcmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
