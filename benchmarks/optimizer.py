"""Speed and truth of the optimizer, on the two bundled traces.

Truth: hit blocks at the capacities of which others found the numbers (`ORACLE`), the error of sampling, and
what settings of the adaptive policy are worth in the halves of the traces that did not choose them. Speed:
the curve of all capacities, a sweep, whole commands in processes of their own, with and without compiled code
kept from before. With `huge` also a trace of a hundred million accesses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvcm_ray.benchmarks import huge as huge_trace
from kvcm_ray.errors import KvcmError
from kvcm_ray.optimizer import Accesses, hit_curve, load, optimum, replay, sample, sampled_curve
from kvcm_ray.optimizer.sweep import sweep
from kvcm_ray.optimizer.tuning import grid, tune
from kvcm_ray.traces import bundled

TRACES = ("conversation", "synthetic")
#: Hit blocks by trace, policy and capacity: those of independent simulators, "lru_head_first" those of the
#: C++ optimizer of Tair KVCache.
ORACLE: dict[str, dict[str, dict[int, int]]] = {
    "conversation": {
        "lru": {1000: 12847, 5000: 32260, 10000: 61046, 30000: 93978, 50000: 102290, 100000: 104924},
        "lru_head_first": {
            1000: 12831, 5000: 31817, 10000: 60822, 30000: 93967, 50000: 102290, 100000: 104924,
        },
        "optimum": {1000: 55019, 5000: 98448, 10000: 105710, 30000: 105710, 50000: 105710, 100000: 105710},
    },
    "synthetic": {
        "lru": {1000: 10252, 5000: 34043, 10000: 51669, 30000: 76077},
        "lru_head_first": {1000: 10006, 5000: 34001, 10000: 51622, 30000: 76077},
        "optimum": {1000: 33728, 5000: 64139, 10000: 75316, 30000: 77953},
    },
}  # fmt: skip
POLICIES = ("lru", "lfu", "adaptive")
PEER_PROCESS_S = 0.2  #: one capacity in the C++ optimizer, a process each, as documented there
RATE = 0.1
#: What the settings of the adaptive policy are chosen from, and by hits at which capacities.
CANDIDATES = {
    "stay_first": (0, 0.5, 1, 2), "period": (0.05, 0.1, 0.2), "step": (0.05, 0.1),
    "kept": (0.9, 0.95, 0.98), "remembered": (1, 2),
}  # fmt: skip
CANDIDATES_QUICK = {"stay_first": (0.5, 2), "step": (0.05, 0.1)}
CAPACITIES = (1000, 2000, 5000, 10000, 20000, 30000)
COMMAND_S_MAX = 300.0


def run(quick: bool = False, huge: bool = False, report: Callable[[str], None] = print) -> dict[str, Any]:
    """All figures.

    Args:
        quick: fewer candidates of settings, and one repetition of each command.
        huge: also write and read a trace of 100 M accesses: a gigabyte of temporary files, some minutes.
        report: is told what is being measured.
    """
    traces = {name: load(name) for name in TRACES}
    report("hit blocks at known capacities")
    result: dict[str, Any] = {"rows": oracle_rows(traces)}
    result |= {"oracle_rows": len(result["rows"]), "oracle_equal": sum(r["equal"] for r in result["rows"])}
    report("one pass, and a sweep of 3 policies at 40 capacities")
    result |= speed(traces["conversation"], 3 if quick else 9)
    report("sampling")
    result["sampled_error"] = {name: sampled_error(accesses) for name, accesses in traces.items()}
    report("the whole command, in processes of its own")
    result |= commands(1 if quick else 3)
    report("settings of the adaptive policy")
    result |= adaptive(traces, quick)
    if huge:
        report("100 M accesses")
        result |= huge_trace.run(report=report)
    return result


def oracle_rows(traces: dict[str, Accesses]) -> list[dict[str, Any]]:
    rows = []
    for name, policies in ORACLE.items():
        for policy, known in policies.items():
            for capacity, hits in known.items():
                found = _hits(traces[name], policy, capacity)
                row = {"trace": name, "policy": policy, "capacity_blocks": capacity, "hit_blocks": found}
                rows.append(row | {"known": hits, "equal": found == hits})
    return rows


def _hits(accesses: Accesses, policy: str, capacity: int) -> int:
    if policy == "optimum":
        return int(optimum(accesses, [capacity])[0])
    if policy == "lru":
        assert hit_curve(accesses).at(capacity) == replay(accesses, "lru", capacity).sum()
    return int(replay(accesses, policy, capacity).sum())


def speed(accesses: Accesses, repetitions: int) -> dict[str, Any]:
    capacities = np.unique(np.geomspace(accesses.unique / 64, accesses.unique, 40).astype(int)).tolist()
    middle = capacities[len(capacities) // 2]
    sweep_s = _seconds(lambda: sweep(accesses, POLICIES, capacities), repetitions)
    return {
        "cached_parse_s": _seconds(lambda: load("conversation"), repetitions),
        "one_pass_s": _seconds(lambda: hit_curve(accesses), repetitions),
        "sweep_s": sweep_s,
        "sweep_points": len(POLICIES) * len(capacities),
        "sweep_vs_120_processes": len(POLICIES) * len(capacities) * PEER_PROCESS_S / sweep_s,
        "accesses_per_s": {
            policy: len(accesses.blocks)
            / _seconds(lambda policy=policy: replay(accesses, policy, middle), repetitions)
            for policy in (*POLICIES, "lru_head_first")
        },
    }


def _seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median; compiled before."""
    call()
    took = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return median(took)


def sampled_error(accesses: Accesses) -> float:
    """Largest difference of hit ratios to the exact curve, at any capacity from 1 block up."""
    exact, estimated = hit_curve(accesses), sampled_curve(sample(accesses, RATE))
    capacities = np.unique(np.concatenate([exact.capacities, estimated.capacities]))
    return float(np.abs(exact.ratio(capacities) - estimated.ratio(capacities)).max())


def commands(repetitions: int) -> dict[str, Any]:
    """`kvcm optimize` from the raw file to charts: at first without compiled code, then with it."""
    with tempfile.TemporaryDirectory(prefix="kvcm-bench-") as name:
        folder = Path(name)
        compiled = {"NUMBA_CACHE_DIR": str(folder / "compiled")}
        return {
            "first_run_s": _optimized(folder, compiled),
            "raw_to_charts_s": min(_optimized(folder, compiled) for _ in range(repetitions)),
        }


def _optimized(folder: Path, environment: dict[str, str]) -> float:
    """Seconds of the whole command, of a file that was never parsed."""
    source, out = folder / "conversation.jsonl.gz", folder / "charts"
    shutil.rmtree(folder / ".kvcm_cache", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copy(bundled("conversation"), source)
    command = [sys.executable, "-m", "kvcm_ray.cli", "optimize", str(source), "--model", "llama-3-70b"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--gpu", "h100", "--out", str(out), "--json"],
        env=os.environ | environment, capture_output=True, text=True, timeout=COMMAND_S_MAX,
    )  # fmt: skip
    took = time.perf_counter() - began
    if done.returncode or not list(out.glob("*.svg")):
        raise KvcmError(f"kvcm optimize failed with code {done.returncode}: {done.stderr[-2000:]}")
    return took


def adaptive(traces: dict[str, Accesses], quick: bool) -> dict[str, Any]:
    """Hit ratios in the second half of each trace: "tuned" with settings chosen by the first halves,
    "production" with those in the code, which are the same if the grid above has not changed."""
    candidates = grid(**(CANDIDATES_QUICK if quick else CANDIDATES))  # type: ignore[arg-type]
    tuned = tune(traces, candidates, CAPACITIES)
    return {
        "second_halves": [
            {"trace": row.trace, "capacity_blocks": row.capacity}
            | {
                f"{name}_hit_percent": 100 * getattr(row, name)
                for name in ("lru", "production", "tuned", "optimum")
            }
            for row in tuned.rows
        ],
        "tuned_candidates": len(candidates),
        "tuned_settings": asdict(tuned.settings),
        "tuned_gain_percent": 100 * tuned.gain,
        "tuned_is_production": astuple(tuned.settings) == astuple(type(tuned.settings)()),
    }
