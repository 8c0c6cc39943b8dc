"""What look-ups and writes notice of reclaiming; a part of `kvcm bench reclaim`.

Look-ups: a process of its own looks 128 keys up again and again, as an engine does, while 500 000 other
blocks of its group are reclaimed. The reclaiming is paused and resumed all the time (`ReclaimerSettings`),
so that idle and reclaiming stretches take turns on the same index in the same seconds. The moments after
each change are left out.

Writes: the same clients write the same blocks into an empty instance and into a full group, where
each block written is a block evicted; in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.benchmarks import writer
from kvcm_ray.benchmarks.children import children, run_children
from kvcm_ray.benchmarks.private import EXACT, Control, private_manager
from kvcm_ray.client import Instance, connect

MODULE = "kvcm_ray.benchmarks.foreground"
KEYS = 128
COLD_BLOCKS, QUICK_COLD_BLOCKS = 500_000, 100_000
HOT_PROMPTS = 64
SMALL_BLOCK_BYTES = 64
PAUSE_S = 0.0005  #: between two look-ups
STRETCH_S, SETTLE_S = 0.2, 0.05
STRETCHES_MIN, STRETCHES_MAX = 6, 200

WRITE_CLIENTS = 2
WRITE_BLOCK_BYTES = 4096
WRITE_QUOTA_BYTES = 256 << 20
#: What is evicted stays for so long. A full cache takes no more in that time than its marks keep free.
WRITE_DELAY_MS = 100
WRITE_S, QUICK_WRITE_S = 4.0, 2.0
WRITE_ROUNDS, QUICK_WRITE_ROUNDS = 3, 1

Report = Callable[[str], None]


# ------------------------------------------------------------------------------------ look-ups


def lookups(quick: bool, report: Report) -> dict[str, Any]:
    """Returns ``{lookup_p50_idle_us, lookup_p99_idle_us, lookup_p50_reclaiming_us,
    lookup_p99_reclaiming_us, lookup_p99_ratio, lookups: {keys, idle, reclaiming, missed, blocks,
    stretches}}``; the counts are of look-ups, `blocks` of blocks reclaimed meanwhile."""
    cold = QUICK_COLD_BLOCKS if quick else COLD_BLOCKS
    with private_manager(["shm:4GiB"]) as manager:
        group = "lookups"
        manager.create_group(group, 2 << 30, ["shm_01"], **EXACT)
        report(f"writing {cold} blocks")
        _write_cold(manager, group, cold)
        report("looking up while they are reclaimed")
        target = manager.data_dir.parent / "lookups.npy"
        command = ["--data-dir", manager.data_dir, "--group", group, "--out", target]
        with children(MODULE, [command]) as asking:
            hot = manager.capacity(group)["blocks"] - cold
            asking.tell("go")
            windows, blocks = _in_turns(manager, group, max(hot, cold // 50) * SMALL_BLOCK_BYTES)
            asking.tell("stop")
            missed = asking.answers(10)[0]["missed"]
        return _lookup_figures(np.load(target), windows, blocks, missed)


def _write_cold(manager: Control, group: str, blocks: int) -> None:
    command = [
        "--data-dir", manager.data_dir, "--instance", "cold", "--group", group, "--with-bytes",
        "--block-bytes", SMALL_BLOCK_BYTES, "--batch", KEYS, "--blocks", blocks // 2,
    ]  # fmt: skip
    run_children(writer.MODULE, [command] * 2, 300)


def _in_turns(manager: Control, group: str, small: int) -> tuple[list[tuple[str, float, float]], int]:
    """Cut the quota, then pause and resume until it is reached; (state, begin, end) of the stretches."""
    windows: list[tuple[str, float, float]] = []
    manager.reclaimer(paused=True)
    before = manager.capacity(group)["blocks"]
    manager.set_quota(group, small)
    for _ in range(STRETCHES_MAX):
        windows.append(("idle", *_stretch()))
        manager.reclaimer(paused=False)
        windows.append(("reclaiming", *_stretch()))
        manager.reclaimer(paused=True)
        now = manager.capacity(group)
        if now["used_bytes"] <= small:
            windows.pop()  # it was idle for a part of that
            if len(windows) >= STRETCHES_MIN:
                break
    manager.reclaimer(paused=False)
    return windows, before - manager.capacity(group)["blocks"]


def _stretch() -> tuple[float, float]:
    time.sleep(SETTLE_S)
    begin_s = time.monotonic()
    time.sleep(STRETCH_S)
    return begin_s, time.monotonic()


def _lookup_figures(
    times: np.ndarray, windows: list[tuple[str, float, float]], blocks: int, missed: int
) -> dict[str, Any]:
    """`times`: one row a look-up: CLOCK_MONOTONIC at its begin, and its seconds."""
    found: dict[str, Any] = {}
    counts: dict[str, Any] = {"keys": KEYS, "missed": missed, "blocks": blocks, "stretches": len(windows)}
    for state in ("idle", "reclaiming"):
        parts = [
            times[(times[:, 0] >= begin) & (times[:, 0] < end), 1]
            for name, begin, end in windows
            if name == state
        ]
        taken = np.concatenate(parts) if parts else np.zeros(0)
        counts[state] = len(taken)
        for percent in (50, 99):
            name = f"lookup_p{percent}_{state}_us"
            found[name] = round(float(np.percentile(taken, percent)) * 1e6, 1) if len(taken) else None
    idle, busy = found["lookup_p99_idle_us"], found["lookup_p99_reclaiming_us"]
    ratio = round(busy / idle, 2) if idle and busy else None
    return {**found, "lookup_p99_ratio": ratio, "lookups": counts}


def _asking(options: argparse.Namespace) -> dict[str, Any]:
    with connect(options.data_dir, ray=True) as client:
        cache = client.register("hot", options.group, block_size=16, specs={"tp0": SMALL_BLOCK_BYTES})
        prompts = np.random.default_rng(7).integers(-(2**62), 2**62, (HOT_PROMPTS, KEYS))
        for keys in prompts:
            cache.put(keys, np.zeros((KEYS, SMALL_BLOCK_BYTES), np.uint8))
        print("ready", flush=True)
        sys.stdin.readline()
        stop = threading.Event()

        def listen() -> None:
            sys.stdin.readline()
            stop.set()

        threading.Thread(target=listen, daemon=True).start()
        times, missed = _ask_until(stop, cache, prompts)
        np.save(options.out, np.array(times))
        return {"missed": missed}


def _ask_until(stop: threading.Event, cache: Instance, prompts: np.ndarray) -> tuple[list[Any], int]:
    times = []
    missed = 0
    number = 0
    while not stop.is_set():
        keys = prompts[number % len(prompts)]
        number += 1
        begin_s = time.monotonic()
        start = time.perf_counter()
        length = cache.match(keys).length
        times.append((begin_s, time.perf_counter() - start))
        missed += length < len(keys)
        time.sleep(PAUSE_S)
    return times, missed


# -------------------------------------------------------------------------------------- writes


def writes(quick: bool, report: Report) -> dict[str, Any]:
    """Returns ``{write_full_ratio, write_empty_blocks_per_s, write_full_blocks_per_s, the same three
    with "_metadata" at the end, write_evicted_blocks, write_full_blocks, write_refused_batches}``.

    The marks are those of the default group, the delay before deleting is `WRITE_DELAY_MS`. Without
    "_metadata" the clients write the blocks' bytes to shared memory too.
    """
    seconds, rounds = (QUICK_WRITE_S, QUICK_WRITE_ROUNDS) if quick else (WRITE_S, WRITE_ROUNDS)
    result: dict[str, Any] = {}
    for suffix, tier, with_bytes in (("", "shm:8GiB", True), ("_metadata", "file:8TiB", False)):
        with private_manager([tier]) as manager:
            report("writes into a full cache and an empty one" + suffix.replace("_", ", "))
            result |= {
                name + suffix: value for name, value in _compare(manager, with_bytes, seconds, rounds).items()
            }
    return result


def _compare(manager: Control, with_bytes: bool, seconds: float, rounds: int) -> dict[str, Any]:
    storage = manager.group("default")["storage_candidates"]
    manager.create_group("full", WRITE_QUOTA_BYTES, storage, delay_before_delete_ms=WRITE_DELAY_MS)
    blocks = 1.2 * WRITE_QUOTA_BYTES / WRITE_BLOCK_BYTES
    _write(manager, "full", "full", with_bytes, ["--blocks", blocks / WRITE_CLIENTS], 120)
    manager.wait_idle("full")
    empty: list[Any] = []
    full: list[Any] = []
    by_state = {"empty": empty, "full": full}
    begun = manager.capacity("full")["reclaim"]["evicted_blocks"]
    for number in range(rounds):
        roomy = f"empty{number}"
        manager.create_group(roomy, 4 << 40, storage)
        empty.append(_write(manager, roomy, roomy, with_bytes, ["--seconds", seconds], seconds))
        manager.call("removeInstance", instance_group=roomy, instance_id=roomy)
        full.append(_write(manager, "full", "full", with_bytes, ["--seconds", seconds], seconds))
        manager.wait_idle("full")
    speeds = {name: float(np.mean([_speed(told) for told in runs])) for name, runs in by_state.items()}
    everything = [answer for told in full for answer in told]
    return {
        "write_full_ratio": round(speeds["full"] / speeds["empty"], 3),
        "write_empty_blocks_per_s": round(speeds["empty"]),
        "write_full_blocks_per_s": round(speeds["full"]),
        "write_full_blocks": sum(answer["blocks"] for answer in everything),
        "write_evicted_blocks": manager.capacity("full")["reclaim"]["evicted_blocks"] - begun,
        "write_refused_batches": sum(answer["refused"] for answer in everything),
    }


def _write(
    manager: Control, group: str, instance: str, with_bytes: bool, how_long: list[Any], seconds: float
) -> list[dict[str, Any]]:
    command = [
        "--data-dir", manager.data_dir, "--instance", instance, "--group", group,
        "--block-bytes", WRITE_BLOCK_BYTES, *how_long, *(["--with-bytes"] if with_bytes else []),
    ]  # fmt: skip
    return run_children(writer.MODULE, [command] * WRITE_CLIENTS, seconds)


def _speed(told: list[dict[str, Any]]) -> float:
    return float(sum(answer["blocks"] / answer["seconds"] for answer in told))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--out", type=Path, required=True)
    print(json.dumps(_asking(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
