"""What the index tests run in other processes: ``python children.py NAME ARGUMENTS...``."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from kvcm_ray.core.model import Durability
from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.errors import StorageFull
from kvcm_ray.index import IndexReader, IndexWriter

BATCH = 8


def batch_of(number: int) -> tuple[np.ndarray, BlockLocations]:
    """Blocks of the `number`-th commit; locations follow from keys."""
    keys = np.arange(number * BATCH + 1, (number + 1) * BATCH + 1, dtype=np.int64)
    column = keys.astype(np.uint32)
    return keys, BlockLocations(column * 0, column, column + 1)


def write(path: str, durability: str, acks: str, *, commits: int = 10**9) -> None:
    """Commits one batch after the other and says so in `acks` after each, until killed."""
    writer = IndexWriter(path, instance_tag="i-1", durability=Durability(durability))
    count = writer.stats().key_count
    assert count % BATCH == 0, count
    with open(acks, "ab", buffering=0) as told:
        for number in range(count // BATCH, count // BATCH + commits):
            keys, locations = batch_of(number)
            with writer.begin() as batch:
                parent = int(keys[0]) - 1 if number % 5 else None
                batch.add_blocks(keys, locations, parent, number)
                if number % 3 == 0:
                    batch.remember(str(number), b"x" * 300)
            told.write(b"%d\n" % number)


def read(path: str, seconds: str) -> None:
    """Looks up what a writer adds in order; prints how many look-ups, or what is wrong."""
    reader = IndexReader(path)
    keys = np.arange(1, 4001, dtype=np.int64)
    end, count, longest = time.monotonic() + float(seconds), 0, 0
    while time.monotonic() < end:
        found = reader.match(keys)
        assert found.length % BATCH == 0, f"half a commit: {found.length}"
        assert found.length >= longest, f"went back from {longest} to {found.length}"
        expected = keys[: found.length].astype(np.uint32)
        assert (found.locations.slot == expected).all()
        assert (found.locations.generation == expected + 1).all()
        longest, count = found.length, count + 1
    assert reader.corrupt_records == 0
    assert longest > 0
    print(count)


def stop_inside(path: str) -> None:
    """Stops itself inside a write transaction."""
    writer = IndexWriter(path, instance_tag="i-1", durability=Durability.PROCESS)
    with writer.begin():
        os.kill(os.getpid(), signal.SIGSTOP)


def disk_full(path: str) -> None:
    """Fills the index up to a file size limit; then everything else must still work."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.RLIM_INFINITY))
    writer = IndexWriter(path, instance_tag="i-1", durability=Durability.PROCESS)
    acknowledged = 0
    try:
        for number in range(100_000):
            keys, locations = batch_of(number)
            with writer.begin() as batch:
                batch.add_blocks(keys, locations, None, 0)
            acknowledged = number + 1
    except StorageFull:
        pass
    assert 100 < acknowledged < 100_000, acknowledged
    everything = np.arange(1, acknowledged * BATCH + 1, dtype=np.int64)
    reader = IndexReader(path)
    assert reader.match(everything).length == len(everything)
    for number in range(acknowledged // 2):
        with writer.begin() as batch:
            assert batch.remove_blocks(batch_of(number)[0]) == BATCH
    keys, locations = batch_of(0)
    with writer.begin() as batch:
        batch.add_blocks(keys, locations, None, 0)
    assert reader.match(keys).length == BATCH
    assert reader.verify() == []
    writer.close()
    reader.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    writer = IndexWriter(path, instance_tag="i-1", durability=Durability.PROCESS)
    assert writer.stats().key_count == (acknowledged - acknowledged // 2 + 1) * BATCH
    print(acknowledged)


def open_files(*paths: str) -> None:
    """Opens each folder and reads all of it; prints what happened, one word a folder."""
    for path in paths:
        try:
            reader = IndexReader(path)
            found = reader.match(np.arange(1, 401, dtype=np.int64))
            slots = found.locations.slot
            wrong = bool((slots != np.arange(1, found.length + 1)).any())
            writer = IndexWriter(Path(path), instance_tag="i-1", durability=Durability.PROCESS)
            writer.recover()
            print("WRONG" if wrong else found.length, flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
