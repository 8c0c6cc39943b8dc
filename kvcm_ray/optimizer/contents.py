"""What is in a trace file, in a few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.optimizer.accesses import I32, READ, WRITE, Accesses, Flags
from kvcm_ray.optimizer.dataset import load, read_batches
from kvcm_ray.traces.files import resolve
from kvcm_ray.traces.writing import end_of


def contents(path: str | Path) -> dict[str, Any]:
    """Facts about a trace file or a bundled trace, as plain JSON values.

    ``recording`` is None for other files; its ``state`` says why the recording ended, or that it is cut
    off or under way.

    Raises:
        InvalidArgument: as `load`.
        Unsupported: numba is not installed.
    """
    file = resolve(path)
    form, _ = next(read_batches(file))
    accesses = load(file)
    end = end_of(file) if form.recording else None
    recording = end or {"state": "cut off or under way", "missing_requests": 0}
    return {
        "format": form.name,
        **described(accesses),
        "recording": recording if form.recording else None,
    }


def described(accesses: Accesses) -> dict[str, Any]:
    """The same of a trace in memory."""
    reads = (accesses.ops & READ) > 0
    lengths = accesses.lengths[reads]
    times_s = accesses.times_s
    seconds = float(times_s.max() - times_s.min()) if len(times_s) else 0.0
    return {
        "block_tokens": accesses.block_tokens,
        "sample_level": accesses.sample_level,
        "requests": accesses.requests,
        "look_ups": int(reads.sum()),
        "writes": int(((accesses.ops & WRITE) > 0).sum()),
        "seconds": seconds,
        "requests_per_s": accesses.requests / seconds if seconds else 0.0,
        "accessed_blocks": int(lengths.sum()),
        "unique_blocks": accesses.unique,
        "mean_blocks": float(lengths.mean()) if len(lengths) else 0.0,
        "longest_blocks": int(lengths.max(initial=0)),
        "repeated_requests": _repeated(accesses, reads),
        "prompt_tokens": int(accesses.input_tokens.sum()),
        "output_tokens": int(accesses.output_tokens.sum()),
        "turns": int(accesses.turns.max(initial=0)),
        "first_turns": int((accesses.turns == 1).sum()),
        "instances": _counted(accesses.instances, accesses.instance_names),
        "classes": _counted(accesses.classes, accesses.class_names),
    }


def _repeated(accesses: Accesses, reads: Flags) -> int:
    """Look-ups of just the blocks of an earlier one. By the last key, as a prefix key names them all."""
    some = reads & (accesses.lengths > 0)
    last = accesses.blocks[accesses.offsets[1:][some] - 1]
    return len(last) - len(np.unique(last))


def _counted(numbers: I32, names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))
