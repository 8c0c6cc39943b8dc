"""Headers for blocks that a plain protocol client wrote.

Such a client stores payloads and no headers, so nothing proves what its slots hold, and our own
client would read them as misses. When it reports blocks as written, this process writes the missing
headers, with the checksum of the bytes that are there. Our own clients have written theirs: that is
seen without a lock and without a thread on shared memory, and in a thread elsewhere, because a file
system may hang. Sealing is an improvement, never a condition: whatever goes wrong, the finish goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import Segment, StorageConfig
from kvcm_ray.core.records import SessionRecord
from kvcm_ray.core.requests import U32, Flags, Keys
from kvcm_ray.errors import InvalidArgument, Unavailable
from kvcm_ray.index import IndexReader
from kvcm_ray.serve_app.locations import LocationEncoder
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

log = logging.getLogger(__name__)

SEAL_TIMEOUT_S = 10.0
LEASE_MARGIN_S = 0.2  #: of the session, left to the finish itself
FILES_KEPT_S = 10.0
THREADS = 4  #: for each storage
PIECE_BLOCKS_MIN = 64
PIECE_BYTES = 64 << 20  #: sealed between two looks at the clock


@dataclass(slots=True)
class _Storage:
    config: StorageConfig
    adapter: StorageAdapter
    pool: ThreadPoolExecutor
    stuck: int = 0  #: threads whose finish did not wait for them any longer
    letting_go: asyncio.TimerHandle | None = None

    async def run(self, job: Callable[[], None], timeout_s: float) -> None:
        """`job()` on a thread. A storage that holds all threads is left alone.

        Raises:
            Unavailable: not done within `timeout_s`.
        """
        if self.stuck >= THREADS:
            raise Unavailable(f"storage {self.config.global_unique_name!r} does not answer")
        waiter = asyncio.wrap_future(self.pool.submit(job))
        done, _ = await asyncio.wait({waiter}, timeout=timeout_s)
        if not done:
            self.stuck += 1
            waiter.add_done_callback(self._came_back)
            raise Unavailable(f"not done within {timeout_s:.3g} s")
        waiter.result()

    def _came_back(self, waiter: asyncio.Future[None]) -> None:
        self.stuck -= 1
        waiter.exception()  # seen

    def let_go(self) -> None:
        """Close its files: an open one would keep the bytes of a removed segment."""
        self.letting_go = None
        self.pool.submit(self.adapter.close)

    def close(self) -> None:
        if self.letting_go is not None:
            self.letting_go.cancel()
        self.pool.submit(self.adapter.close)
        self.pool.shutdown(wait=False)


@dataclass(frozen=True, slots=True)
class _Part:
    """Blocks of one session in one segment, seen as one of its specs."""

    segment: Segment
    spec: str
    slots: U32
    keys: Keys
    generations: U32

    def sealed(self, adapter: StorageAdapter) -> bool:
        flags = adapter.sealed(self.segment, self.spec, self.slots, self.keys, self.generations)
        return bool(flags.all())

    def seal(self, adapter: StorageAdapter, until_s: float) -> None:
        """Stops at `until_s` on the monotonic clock, between two pieces."""
        step = max(PIECE_BLOCKS_MIN, PIECE_BYTES // self.segment.slot_bytes)
        for first in range(0, len(self.slots), step):
            if time.monotonic() >= until_s:
                return
            part = slice(first, first + step)
            adapter.seal(self.segment, self.spec, self.slots[part], self.keys[part], self.generations[part])


class Sealer:
    """Opens storages on first use. For one event loop."""

    def __init__(self) -> None:
        self._storages: dict[str, _Storage] = {}

    async def seal(
        self,
        reader: IndexReader,
        encoder: LocationEncoder,
        storages: Mapping[str, StorageConfig],
        session_id: str,
        success: BlockMask,
    ) -> None:
        """See to it that the successful blocks of a session have headers; raises nothing."""
        try:
            record = reader.session(session_id)
            if record is None:
                return
            good = success.exactly(len(record.keys)) & ~record.removed
            now_s = time.monotonic()
            until_s = min(now_s + SEAL_TIMEOUT_S, record.deadline_ms / 1000 - LEASE_MARGIN_S)
            if until_s > now_s and good.any():
                for part in _parts(record, good, lambda n: encoder.segment(n, reader.segment)):
                    await self._seal(part, storages, until_s)
        except InvalidArgument:
            return  # a mask that does not fit: the group says so, as it does of an unknown session
        except Exception as error:
            log.warning("session %s: not all blocks got headers: %s", session_id, error)

    async def _seal(self, part: _Part, storages: Mapping[str, StorageConfig], until_s: float) -> None:
        config = storages.get(part.segment.storage)
        left_s = until_s - time.monotonic()
        if config is None or left_s <= 0:
            return
        storage = self._storage(config)

        def job() -> None:
            if not part.sealed(storage.adapter):
                part.seal(storage.adapter, until_s)

        if not (config.is_shared_memory and part.sealed(storage.adapter)):
            await storage.run(job, left_s)

    def _storage(self, config: StorageConfig) -> _Storage:
        name = config.global_unique_name
        known = self._storages.get(name)
        if known is None or known.config != config:
            if known is not None:
                known.close()
            pool = ThreadPoolExecutor(THREADS, f"seal-{name}")
            known = self._storages[name] = _Storage(config, open_storage(config), pool)
        if known.letting_go is None:
            loop = asyncio.get_running_loop()
            known.letting_go = loop.call_later(FILES_KEPT_S, known.let_go)
        return known

    def close(self) -> None:
        for storage in self._storages.values():
            storage.close()
        self._storages.clear()


def _parts(
    record: SessionRecord, good: Flags, segment_of: Callable[[int], Segment | None]
) -> Iterator[_Part]:
    where = record.locations
    for number in np.unique(where.segment[good]).tolist():
        segment = segment_of(number)
        if segment is None:
            continue
        index = np.flatnonzero(good & (where.segment == number))
        for spec in segment.specs:
            yield _Part(segment, spec.name, where.slot[index], record.keys[index], where.generation[index])
