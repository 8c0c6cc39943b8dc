"""A soak of making room: many writers against a small quota; a part of `kvcm bench reclaim`.

Each writer is a process that reads what it finds of some popular prompts, verifies every byte, and
writes the rest, as fast as it goes. Meanwhile the capacity report is read without a pause, and the
space that the storages really use. At the end everything must add up (`kvcm_ray.fsck`).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.benchmarks.children import children
from kvcm_ray.benchmarks.private import Control, private_manager
from kvcm_ray.client import connect
from kvcm_ray.traces import block_pattern, wrong_bytes
from kvcm_ray.traces.keys import keys_of_prefix_ids

MODULE = "kvcm_ray.benchmarks.soak"
WRITERS = 8
BLOCK_BYTES = 4096
TIERS = 8 << 20, 24 << 20  #: bytes of shared memory and of files
PROMPTS = 2_000
SHARED_BLOCKS, OWN_BLOCKS_MAX = 8, 120
FAMILY = 20  #: prompts that share their first blocks

Report = Callable[[str], None]


def run(
    seconds: float, report: Report, writers: int = WRITERS, tiers: tuple[int, int] = TIERS
) -> dict[str, Any]:
    """Returns ``{seconds, writers, quota_bytes, samples, bytes_above_quota, storage_bytes_above_quota,
    written_blocks, read_blocks, wrong_bytes, refused_puts, evicted_blocks, demoted_blocks,
    promoted_blocks, orphan_bytes, dangling_locations, corrupt_records}``.

    ``bytes_above_quota`` is the most that a capacity report said to be used and reserved above the
    group's quota or that of a tier (0 if never above); ``storage_bytes_above_quota`` is the same of
    the space allocated by the data files themselves, tier by tier.
    """
    from kvcm_ray import fsck

    quota = sum(tiers)
    with private_manager([f"shm:{tiers[0]}", f"file:{tiers[1]}"]) as manager:
        report(f"{writers} writers against {quota >> 20} MiB for {seconds:g} s")
        sampler = Sampler(manager, tiers)
        commands = [
            ["--data-dir", manager.data_dir, "--seed", n, "--seconds", seconds] for n in range(writers)
        ]
        with children(MODULE, commands) as running:
            sampler.start()
            running.tell("go")
            told = running.answers(seconds)
        sampler.stop()
        last = manager.wait_idle("default")
        time.sleep(0.5)  # what was dropped last may still be on its way to the storage
        checked = fsck.check(manager.data_dir)
    total: Counter[str] = Counter()
    for answer in told:
        total.update(answer)
    names = ("evicted_blocks", "demoted_blocks", "promoted_blocks", "failed_moves")
    return {
        "seconds": seconds,
        "writers": writers,
        "quota_bytes": quota,
        "samples": sampler.samples,
        "bytes_above_quota": sampler.above,
        "storage_samples": sampler.storage_samples,
        "storage_bytes_above_quota": sampler.storage_above,
        **total,
        **{name: last["reclaim"][name] for name in names},
        "orphan_bytes": checked.orphan_bytes,
        "dangling_locations": checked.dangling_locations,
        "corrupt_records": checked.corrupt_records,
        "notes": checked.notes,
    }


class Sampler:
    """Looks at the group and at its storages all the time, each from a thread of its own."""

    def __init__(self, manager: Control, tiers: tuple[int, int]) -> None:
        self._manager = manager
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self.samples = self.above = self.storage_samples = self.storage_above = 0
        self._roots = {Path(root): most for root, most in _roots(manager, tiers)}

    def start(self) -> None:
        for look in (self._look_at_group, self._look_at_storages):
            thread = threading.Thread(target=self._again, args=(look,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _again(self, look: Callable[[], None]) -> None:
        while not self._ended.is_set():
            look()

    def _look_at_group(self) -> None:
        report = self._manager.capacity("default")
        for part in (report, *report["tiers"]):
            if part["quota_bytes"]:
                used = part["used_bytes"] + part["reserved_bytes"]
                self.above = max(self.above, used - part["quota_bytes"])
        self.samples += 1

    def _look_at_storages(self) -> None:
        for root, most in self._roots.items():
            used = allocated(root)
            if used > most:
                # A walk is no snapshot: blocks that go from a file that was seen to one that was not are
                # counted twice. What is really too much is still there when one looks again.
                used = min(used, allocated(root), allocated(root))
            self.storage_above = max(self.storage_above, used - most)
        self.storage_samples += 1
        self._ended.wait(0.01)


def _roots(manager: Control, tiers: tuple[int, int]) -> Iterator[tuple[str, int]]:
    for storage in manager.call("listStorage")["storage"]:
        shared = storage.get("shm")
        yield (shared or storage["nfs"])["root_path"], tiers[0] if shared else tiers[1]


def allocated(root: Path) -> int:
    """Bytes of block data that the file system holds below `root`.

    Not ``st_blocks``: ext4 counts its own tree of extents in it, 44 KiB for a file with 3 000 holes.
    """
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".dat"):
                try:
                    total += _data(os.path.join(folder, name))
                except FileNotFoundError:
                    continue  # its segment was dropped a moment ago
    return total


def _data(path: str) -> int:
    """Bytes of a file that are not holes."""
    file = os.open(path, os.O_RDONLY)
    begin = end = total = 0
    try:
        while True:
            begin = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, begin, os.SEEK_HOLE)
            total += end - begin
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data behind this
            raise
        return total
    finally:
        os.close(file)


# ------------------------------------------------------------------------------------ one writer


def _writer(options: argparse.Namespace) -> dict[str, int]:
    chance = np.random.default_rng(options.seed)
    done = {"written_blocks": 0, "read_blocks": 0, "wrong_bytes": 0, "refused_puts": 0}
    with connect(options.data_dir, ray=True) as client:
        cache = client.register("soak", block_size=16, specs={"tp0": BLOCK_BYTES})
        print("ready", flush=True)
        sys.stdin.readline()
        until_s = time.monotonic() + options.seconds
        while time.monotonic() < until_s:
            keys = _prompt(int(PROMPTS * chance.random() ** 4), int(chance.integers(1, OWN_BLOCKS_MAX)))
            out = np.empty((len(keys), BLOCK_BYTES), np.uint8)
            good = cache.get(keys, out).flags
            done["read_blocks"] += int(good.sum())
            done["wrong_bytes"] += wrong_bytes(keys[good], out[good])
            if not good.all():
                put = cache.put(keys, block_pattern(keys, BLOCK_BYTES), timeout_s=10)
                done["written_blocks"] += int(put)
                done["refused_puts"] += put.error is not None
    return done


def _prompt(number: int, own_blocks: int) -> np.ndarray:
    """Keys of a prompt: some that its family shares, then its own."""
    shared = np.arange(SHARED_BLOCKS) + (number // FAMILY) * 1_000
    own = np.arange(own_blocks) + 1_000_000 + number * 1_000
    return keys_of_prefix_ids(np.concatenate([shared, own]).tolist())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    print(json.dumps(_writer(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
