"""Sliding windows: which of their blocks are worth keeping, and finding them again.

A group of layers with a sliding window needs, before it can go on behind the first n blocks of a prompt,
only the last few of them, its *window*. So its blocks are kept where a request may go on: at the end of a
prompt, along what was generated, where two prompts were seen to part, and every few windows, for prompts
that part where none did before.

Groups with windows and those with full attention are two *parts* of an instance. Each is a spec group, and
the windows' blocks have keys of their own, since a prompt's block may get its window later than the rest,
or lose it sooner. Models whose layers are all of one kind have one part, and all of their blocks are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcm_ray.client.backend import no_blocks
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.connectors.vllm.layout import Layout
from kvcm_ray.core.requests import Flags, Keys

EVERY = 8  #: windows; one is kept for each so many
_WINDOW = np.int64(0x5177_1D0E_C0DE_5A1D)

Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Part:
    groups: tuple[int, ...]  #: positions in `Layout.groups`
    name: str = ""  #: of its spec group; "" = all specs of the instance
    window: int = 0  #: our blocks that are needed before the next token; 0 = all


@dataclass(frozen=True, slots=True)
class Found:
    """What the cache holds of a prompt."""

    blocks: Blocks  #: of the first part: its leading blocks
    usable: int  #: leading blocks that a request can go on behind
    window: Blocks | None = None  #: of the second part: the last ones of these

    def __len__(self) -> int:
        return self.usable


def nothing() -> Found:
    return Found(no_blocks(), 0)


def parts_of(layout: Layout) -> tuple[Part, ...]:
    """One part, or the one with full attention and then the one with windows."""
    windows = tuple(i for i, group in enumerate(layout.groups) if group.window)
    full = tuple(i for i, group in enumerate(layout.groups) if not group.window)
    if not windows or not full:
        return (Part(full or windows),)
    tokens = max(layout.groups[i].window for i in windows)
    return Part(full, "full"), Part(windows, "window", -(-tokens // layout.block_tokens))


def spec_groups(parts: tuple[Part, ...], specs: Iterable[str]) -> dict[str, list[str]]:
    """By name of the part, which of the specs of all ranks (`Layout.spec_name`) are its own."""
    if len(parts) == 1:
        return {}
    group_of = {spec: int(spec.rpartition("-g")[2]) for spec in specs}
    return {part.name: [s for s, group in group_of.items() if group in part.groups] for part in parts}


def window_keys(keys: Keys) -> Keys:
    """Keys of the same blocks in the part with windows."""
    return keys ^ _WINDOW


def runs_to_keep(ends: Iterable[int], window: int, kept: int) -> Index:
    """Numbers of the blocks in the windows before `ends`, without those before `kept`, an earlier end.

    One block more than the window each: of the very same prompt a token has to be computed again, so
    it may go on one block sooner.
    """
    wanted: set[int] = set()
    for end in ends:
        wanted.update(range(max(0, kept, end - window - 1), end))
    return np.array(sorted(wanted), np.intp)


def checkpoints(first: int, last: int, window: int) -> range:
    """Ends above `first`, up to `last`, at which windows are kept for prompts that may part anywhere."""
    step = EVERY * window
    return range((first // step + 1) * step, last + 1, step)


def last_end(present: Callable[[Index], Flags], end: int, window: int) -> int:
    """The largest n up to `end` for which the `window` blocks before n (or all n) are present; 0 if none.

    That is the protocol's sliding window query, right-most first. Of blocks further back only every
    `window`-th is asked for: each run of that length contains one.
    """
    if end <= 0:
        return 0
    if present(np.arange(max(0, end - window), end)).all():
        return end
    samples = np.arange(0, end, window)
    for sample in samples[present(samples)][::-1].tolist():
        around = np.arange(max(0, sample - window + 1), min(end, sample + window))
        found = _last_run(present(around), int(around[0]), window)
        if found:
            return found
    return 0


def _last_run(flags: Flags, first: int, window: int) -> int:
    """End of the last run of `window` flags, or of one that begins with the prompt; 0 if none."""
    length = best = 0
    for number, flag in enumerate(flags.tolist(), first):
        length = length + 1 if flag else 0
        if length >= window or (length and length == number + 1):
            best = number + 1
    return best
