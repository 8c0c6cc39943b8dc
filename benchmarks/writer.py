"""A client that writes prompts of new blocks in batches, as a program; see `children`.

One start_write and one finish_write a batch, with one batch or a window of batches in flight. Without
``--with-bytes`` no block bytes are written, so that the figure is the manager's alone. It writes for
``--seconds``, or ``--blocks`` blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.client import AsyncInstance, connect_async
from kvcm_ray.errors import KvcmError, QuotaExceeded

MODULE = "kvcm_ray.benchmarks.writer"
PROMPT_BATCHES = 8  #: batches of one chain, one after the other


@dataclass(slots=True)
class Writing:
    """The work of one client."""

    cache: AsyncInstance
    batch: int
    until_s: float  #: CLOCK_MONOTONIC
    blocks_left: float
    payload: np.ndarray | None  #: one row for each block of a batch; None = write no bytes
    blocks: int = 0  #: committed
    refused: int = 0  #: batches that found no room
    times: list[float] = field(default_factory=list)  #: seconds of each batch

    async def run(self) -> None:
        while self.goes_on():
            await self.prompt()

    def goes_on(self) -> bool:
        return self.blocks_left > 0 and time.monotonic() < self.until_s

    async def prompt(self) -> None:
        """Write the batches of one new prompt in order, as an engine that prefills in pieces does."""
        size = self.batch * PROMPT_BATCHES
        keys = np.random.default_rng().integers(-(2**63), 2**63, size, np.int64)
        for end in range(self.batch, size + 1, self.batch):
            self.blocks_left -= self.batch
            begin_s = time.perf_counter()
            try:
                await self.write(keys[end - self.batch : end])
            except QuotaExceeded:
                self.refused += 1
            self.times.append(time.perf_counter() - begin_s)
            if not self.goes_on():
                return

    async def write(self, keys: np.ndarray) -> None:
        session = await self.cache.start_write(keys)
        if self.payload is not None:
            await session.write(self.payload[: len(session.todo)])
        finished = await session.finish(True if self.payload is None else None)
        self.blocks += finished.committed  # not across the await: others add too


async def _client(options: argparse.Namespace) -> dict[str, Any]:
    async with await connect_async(options.data_dir) as client:
        size = options.block_bytes
        cache = await client.register(options.instance, options.group, block_size=16, specs={"tp0": size})
        payload = np.random.default_rng(1).integers(0, 256, (options.batch, size), np.uint8)
        warm_up = Writing(cache, options.batch, time.monotonic(), 1, None)
        await warm_up.prompt()  # wakes everything up
        print("ready", flush=True)
        sys.stdin.readline()
        begin_s = time.monotonic()
        work = Writing(
            cache, options.batch, begin_s + options.seconds, options.blocks,
            payload if options.with_bytes else None,
        )  # fmt: skip
        await asyncio.gather(*(work.run() for _ in range(options.window)))
        seconds = time.monotonic() - begin_s
        return {"blocks": work.blocks, "refused": work.refused, "seconds": seconds, "batch_s": work.times}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--instance", required=True)
    parser.add_argument("--group", default="default")
    parser.add_argument("--block-bytes", type=int, default=4096)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--blocks", type=float, default=float("inf"))
    parser.add_argument("--with-bytes", action="store_true")
    try:
        print(json.dumps(asyncio.run(_client(parser.parse_args()))))
    except KvcmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
