"""The scheduler's side: what is found, what is to be loaded and what is to be saved.

It runs inside the engine's scheduling, so it calls nobody: look-ups read the index in this process, and
sessions are opened and finished by threads of the link. (Managers known by URL only are asked in the
background, while the engine lets the request wait.) Requests and outputs of the engine are used by the
names of their attributes; vLLM is not imported here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.client.transfer import Blocks
from kvcm_ray.connectors.vllm import windows
from kvcm_ray.connectors.vllm.layout import Layout
from kvcm_ray.connectors.vllm.link import Link
from kvcm_ray.connectors.vllm.orders import Load, LoadPart, Orders, Report
from kvcm_ray.connectors.vllm.saving import Hold, Saving
from kvcm_ray.connectors.vllm.windows import Found, nothing
from kvcm_ray.core.requests import Keys

#: Generated blocks are saved by so many, or at the end: a session for each would be many calls.
DECODE_BATCH = 8


@dataclass(slots=True)
class _Lookup:
    """By URL: one that a thread makes."""

    deadline_s: float
    found: Found | None = None


@dataclass(slots=True)
class _Request:
    request: Any
    keys: Keys = field(default_factory=lambda: np.zeros(0, np.int64))
    computed: int = 0  #: tokens that the engine had itself at the look-up
    found: Found | None = None
    lookup: _Lookup | None = None
    saved: int = 0  #: leading blocks that are in the cache, or on their way, as far as we know
    parting: int = 0  #: blocks behind which others went on, and no window is kept
    window_end: int = 0  #: the last end behind which it is
    windows_seen: int = 0  #: blocks up to which ends were looked for
    may_load: bool = True
    may_save: bool = True

    def forget(self) -> None:
        """Nothing is known of what is in the cache."""
        self.saved = self.parting = self.window_end = self.windows_seen = 0


@dataclass(slots=True)
class Counts:
    """Since the last time they were taken."""

    lookups: int = 0
    lookup_seconds: list[float] = field(default_factory=list)
    asked_blocks: int = 0
    found_blocks: int = 0
    failed_loads: int = 0
    saved_blocks: int = 0


class SchedulerSide:
    """Args:
    workers: how many there are. writers: of those, the ones that write their specs.
    null_block: number of the engine's block that stands for "none".
    whole_prompts: the engine can compute no more than one token behind what is loaded.
    """

    def __init__(
        self, link: Link, layout: Layout, *, workers: int, writers: int, hold: Hold, release: Hold,
        null_block: int, whole_prompts: bool = False,
    ) -> None:  # fmt: skip
        self._link = link
        self._settings = link.settings
        self._layout = layout
        self._null = null_block
        self._whole_prompts = whole_prompts
        self._saving = Saving(link, writers, hold, release)
        self._requests: dict[str, _Request] = {}
        # With several groups an engine hears of failed loads only if they are made between steps; and
        # with several workers, one would compute upon what another one failed to load.
        self._between_steps = link.settings.async_load or len(layout.groups) > 1 or workers > 1
        self._window = link.parts[1] if len(link.parts) > 1 else None
        self._failed_steps = 0  #: that the worker told of
        self._next = Orders()  #: what the next step's will begin with
        self.counts = Counts()

    @property
    def saving(self) -> Saving:
        return self._saving

    # -------------------------------------------------------------------------------- look-ups

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens behind the first `computed` that can be loaded, and whether between steps.

        None: ask again later. May be called any number of times.
        """
        mine = self._known(request)
        if not (self._settings.load and mine.may_load and self._link.is_connected):
            return 0, False
        begin = time.perf_counter()
        self._extend(mine)
        found = self._find(mine, self._most(request.num_tokens))
        self.counts.lookup_seconds.append(time.perf_counter() - begin)
        if found is None:
            return None, False
        mine.found, mine.computed = found, computed
        mine.saved = max(mine.saved, len(found.blocks))
        mine.parting = len(found.blocks)
        mine.window_end = max(mine.window_end, found.usable)
        mine.windows_seen = max(mine.windows_seen, found.usable)
        loadable = min(found.usable, self._most(request.num_tokens))
        ahead = loadable * self._layout.block_tokens - computed
        if ahead < self._settings.min_load_blocks * self._layout.block_tokens:
            return 0, False
        if self._whole_prompts and request.num_tokens - computed - ahead > 1:
            return 0, False
        return ahead, self._between_steps

    def _most(self, tokens: int) -> int:
        """A token must be left to compute; an engine sees to it itself if there is one simple group."""
        if self._between_steps and len(self._layout.groups) == 1:
            return tokens // self._layout.block_tokens
        return (tokens - 1) // self._layout.block_tokens

    def _find(self, mine: _Request, most: int) -> Found | None:
        if not self._settings.kvcm_url:
            self.counts.lookups += 1
            found = self._link.match(mine.keys, most)
        elif mine.lookup is None:
            lookup = mine.lookup = _Lookup(time.monotonic() + self._settings.lookup_timeout_s)
            self.counts.lookups += 1
            self._link.match_soon(mine.keys, most, lambda found: setattr(lookup, "found", found))
            return None
        elif mine.lookup.found is None and time.monotonic() < mine.lookup.deadline_s:
            return None
        else:
            found = nothing() if mine.lookup.found is None else mine.lookup.found
            mine.lookup = None
        self.counts.asked_blocks += len(mine.keys)
        self.counts.found_blocks += found.usable
        return found

    def _known(self, request: Any) -> _Request:
        mine = self._requests.get(request.request_id)
        if mine is None:
            mine = self._requests[request.request_id] = _Request(request)
        return mine

    def _extend(self, mine: _Request) -> None:
        """Follow the request's hashes. The last key names all before it; if it is another one than it
        was, the engine has exchanged tokens of the request, and nothing is known of it."""
        last = max(0, len(mine.keys) - 1)
        now = self._layout.keys(mine.request.block_hashes, last)
        if len(mine.keys) and (not len(now) or now[0] != mine.keys[-1]):
            mine.keys = self._layout.keys(mine.request.block_hashes)
            mine.forget()
        elif len(now) > len(mine.keys) - last:
            mine.keys = np.concatenate([mine.keys[:last], now])

    # ----------------------------------------------------------------------------------- loads

    def allocated(self, request: Any, tables: tuple[Sequence[int], ...], external_tokens: int) -> None:
        """The engine gave the request blocks; `external_tokens` of them are to be loaded (or 0)."""
        mine = self._known(request)
        if not external_tokens or mine.found is None:
            return
        first = mine.computed // self._layout.block_tokens
        last = (mine.computed + external_tokens) // self._layout.block_tokens
        blocks, window = mine.found.blocks.take(slice(first, last)), mine.found.window
        parts = [self._part(mine, 0, blocks, first, tables)]
        if window is not None:
            begin = max(first, last - len(window))
            blocks = window.take(slice(len(window) - (last - begin), len(window)))
            parts.append(self._part(mine, 1, blocks, begin, tables))
        self._next.loads.append(Load(request.request_id, tuple(parts), in_step=not self._between_steps))

    def _part(self, mine: _Request, number: int, blocks: Blocks, first: int, tables: Any) -> LoadPart:
        groups = self._link.parts[number].groups
        ids = self._layout.ids(
            tables, first, first + len(blocks), after=mine.computed, null=self._null, groups=groups
        )
        return LoadPart(blocks, groups, ids)

    def tiers(self, request: Any, external_tokens: int) -> dict[bool, int]:
        """Of the tokens to be loaded, how many are in shared memory (True) and elsewhere (False)."""
        mine = self._known(request)
        if mine.found is None:
            return {}
        tokens = self._layout.block_tokens
        first = mine.computed // tokens
        blocks = mine.found.blocks.take(slice(first, (mine.computed + external_tokens) // tokens))
        memory = [
            number
            for number, segment in blocks.segments.items()
            if segment.storage in blocks.storages and blocks.storages[segment.storage].is_shared_memory
        ]
        in_memory = int(np.isin(blocks.locations.segment, memory).sum()) * tokens
        in_memory = min(in_memory, external_tokens)
        counted = {True: in_memory, False: external_tokens - in_memory}
        return {tier: count for tier, count in counted.items() if count}

    # ----------------------------------------------------------------------------------- steps

    def orders(self, scheduled: dict[str, int], tables_of: Any) -> Orders:
        """For the step that computes ``scheduled[request]`` tokens; `tables_of(request)` gives tables."""
        orders, self._next = self._next, Orders()
        orders.failed_steps = self._failed_steps
        self._saving.advance(orders)
        if self._settings.save:
            for request_id, tokens in scheduled.items():
                mine = self._requests.get(request_id)
                if mine is not None:
                    self._save_computed(mine, tokens, tables_of, orders)
        if orders.loads or orders.plans:
            orders.info = self._link.info
        return orders

    def _save_computed(self, mine: _Request, tokens: int, tables_of: Any, orders: Orders) -> None:
        request = mine.request
        computed = min(request.num_computed_tokens + tokens, request.num_tokens)
        done = computed // self._layout.block_tokens
        begun = mine.saved if self._window is None else min(mine.saved, mine.windows_seen)
        if done <= begun or not self._wanted(request, computed, done - begun):
            return
        tables = tables_of(request.request_id)
        if tables is not None:
            self._save(mine, done, tables, orders)

    def _wanted(self, request: Any, computed: int, blocks: int) -> bool:
        if computed <= request.num_prompt_tokens:
            return True
        return self._settings.save_decode and blocks >= DECODE_BATCH

    def _save(self, mine: _Request, done: int, tables: Any, orders: Orders) -> None:
        """Begin to save what is computed of the first `done` blocks and not saved yet."""
        self._extend(mine)
        done = min(done, len(mine.keys))
        if self._window is not None:
            self._save_windows(mine, self._window, done, tables, orders)
        first, mine.saved = mine.saved, max(mine.saved, done)
        if mine.saved == first or not mine.may_save:
            return
        part = self._link.parts[0]
        ids = self._layout.ids(tables, first, mine.saved, null=self._null, groups=part.groups)
        whole = np.logical_and.reduce([(group >= 0).all(axis=1) for group in ids])
        if not whole.all():
            # The engine let go of a block in some group; nothing behind the gap would be found.
            mine.may_save = False
            count = int(np.argmin(whole))
            ids = tuple(group[:count] for group in ids)
            mine.saved = first + count
        if mine.saved > first:
            self._saving.begin(orders, part, mine.keys[: mine.saved], first, ids)

    def _save_windows(
        self, mine: _Request, part: windows.Part, done: int, tables: Any, orders: Orders
    ) -> None:
        """The same for the windows before the ends that were reached."""
        seen, mine.windows_seen = mine.windows_seen, max(mine.windows_seen, done)
        prompt = mine.request.num_prompt_tokens // self._layout.block_tokens
        ends = {mine.parting, prompt, *windows.checkpoints(seen, done, part.window)}
        if done > prompt:
            ends.add(done)
        ends = {end for end in ends if seen < end <= done}
        index = windows.runs_to_keep(ends, part.window, mine.window_end)
        if not len(index):
            return
        mine.window_end = max(ends)
        ids = self._layout.ids(tables, 0, done, null=self._null, groups=part.groups)
        there = np.logical_and.reduce([(group[index] >= 0).all(axis=1) for group in ids])
        index = index[there]  # the engine let go of the others
        if len(index):
            keys = windows.window_keys(mine.keys[index])
            self._saving.begin(orders, part, keys, 0, tuple(group[index] for group in ids))

    def heard(self, report: Report) -> None:
        """What the workers did; all of them together."""
        self._saving.heard(report)
        self._failed_steps += report.failed_steps
        self.counts.failed_loads += len(report.failed_loads)
        for request_id in report.failed_loads:
            mine = self._requests.get(request_id)
            if mine is not None:  # the engine computes now; it must not be offered the same again
                mine.may_load = False
                mine.forget()
        if report.lost:
            self._link.forget(np.array(report.lost, np.int64))

    def finished(self, request: Any, tables: tuple[Sequence[int], ...]) -> None:
        """The request ended; its blocks are still its own. What is not saved is saved with the next step."""
        mine = self._requests.pop(request.request_id, None)
        if mine is None or not self._settings.save:
            return
        computed = request.num_computed_tokens - getattr(request, "num_in_flight_tokens", 0)
        computed = min(computed, request.num_tokens)
        if not self._settings.save_decode:
            computed = min(computed, request.num_prompt_tokens)
        if computed > mine.computed:
            self._save(mine, computed // self._layout.block_tokens, tables, self._next)

    def take_counts(self) -> dict[str, Any]:
        """By name; they begin at zero again."""
        counts, self.counts = self.counts, Counts()
        counts.saved_blocks = self._saving.take_saved()
        return dataclasses.asdict(counts)

    def close(self) -> None:
        self._link.close()
