"""A trace of a hundred million accesses: written to a temporary file, and its curve estimated from there.

The traffic is that of the bundled conversation many times over: each *site* has blocks of its own and
goes through the conversation's requests in their order, over and over; which site is next is drawn by
Zipf's law. So there are hot and cold prefixes, dialogues that grow, and far more blocks than fit
anywhere. The reader is a fresh process, whose largest memory is what the kernel says of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from kvcm_ray.errors import KvcmError
from kvcm_ray.optimizer import load

ACCESSES = 100_000_000
RATE = 0.1
SITES = 300
EXPONENT = 1.1
_LINES = 4096

_READER = """
import json, re, sys, time
from pathlib import Path
began = time.perf_counter()
from kvcm_ray.optimizer import sample_file, sampled_curve
drawn = sample_file(sys.argv[1], float(sys.argv[2]))
read = time.perf_counter()
curve = sampled_curve(drawn)
print(json.dumps({
    "accesses": drawn.accessed, "read_s": read - began, "curve_s": time.perf_counter() - read,
    "infinite_hit_ratio": curve.infinite / curve.accessed,
    # Not ru_maxrss, which begins with what the process weighed that made this one.
    "peak_rss_bytes": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024,
}))
"""


def run(accesses: int = ACCESSES, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the trace, read it in a process of its own; figures of both."""
    with tempfile.TemporaryDirectory(prefix="kvcm-bench-") as folder:
        file = Path(folder) / "huge.jsonl"
        began = time.perf_counter()
        requests = write(file, accesses)
        wrote_s = time.perf_counter() - began
        report(f"{file.stat().st_size / 1e9:.2f} GB of {requests} requests written in {wrote_s:.0f} s")
        done = subprocess.run(
            [sys.executable, "-c", _READER, str(file), str(RATE)], capture_output=True, text=True
        )
        if done.returncode:
            raise KvcmError(f"the reader failed: {done.stderr[-2000:]}")
        found = {"requests": requests, "file_bytes": file.stat().st_size, "write_s": wrote_s, "rate": RATE}
        return {f"huge_{name}": value for name, value in (found | json.loads(done.stdout)).items()}


def write(file: Path, accesses: int, seed: int = 0) -> int:
    """Write at least so many accesses; how many requests they are."""
    source = load("conversation")
    prompts = np.split(source.blocks.astype(np.int64), source.offsets[1:-1])
    lengths, tokens = source.lengths, source.input_tokens.tolist()
    chance = np.random.default_rng(seed)
    weights = np.arange(1, SITES + 1) ** -EXPONENT
    position, rounds = np.zeros(SITES, np.int64), np.zeros(SITES, np.int64)
    requests = 0
    with file.open("wb") as out:
        while accesses > 0:
            lines = []
            for site in chance.choice(SITES, _LINES, p=weights / weights.sum()).tolist():
                row = int(position[site])
                first = (int(rounds[site]) * SITES + site) * source.unique
                lines.append(_line(requests + len(lines), tokens[row], prompts[row] + first))
                position[site] = (row + 1) % len(prompts)
                rounds[site] += row + 1 == len(prompts)
                accesses -= int(lengths[row])
            requests += len(lines)
            out.write(b"".join(lines))
    return requests


def _line(number: int, tokens: int, ids: np.ndarray[Any, Any]) -> bytes:
    record = {"timestamp": number, "input_length": tokens, "output_length": 1, "hash_ids": ids}
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
