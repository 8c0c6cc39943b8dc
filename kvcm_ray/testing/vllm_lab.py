"""Both sides of the vLLM connector without vLLM, on a real manager in this process (no Ray).

`Lab` is the engine: its cache is an array, its block pool counts references, and a step is what vLLM does
with the two sides in one, layer by layer. Workers are called one after the other and their reports merged.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcm_ray.connectors.vllm import identity
from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.connectors.vllm.link import Link
from kvcm_ray.connectors.vllm.memory import GroupMemory, WorkerMemory
from kvcm_ray.connectors.vllm.orders import Orders, Report
from kvcm_ray.connectors.vllm.scheduler import SchedulerSide
from kvcm_ray.connectors.vllm.settings import settings_of
from kvcm_ray.connectors.vllm.windows import parts_of, spec_groups
from kvcm_ray.connectors.vllm.worker import WorkerSide
from kvcm_ray.core.model import ModelDeployment
from kvcm_ray.testing.served import Served

BLOCKS, LAYERS, ROW = 64, 3, 64 * 1024
TOKENS = 16


@dataclass
class Request:
    """As much of an engine's request as is looked at; `computed` tokens are in its cache."""

    request_id: str
    block_hashes: list[bytes]
    num_tokens: int
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    tables: tuple[list[int], ...] = ()


@dataclass
class Lab:
    link: Link
    layout: Layout
    scheduler: SchedulerSide
    workers: list[WorkerSide]
    caches: list[list[np.ndarray]]  #: of each worker, the layers of all groups
    references: Counter[int]  #: of engine blocks, those of the connector
    missing: list[set[int]] = field(default_factory=list)  #: of the last load, by worker

    def step(self, scheduled: dict[str, int] | None = None, requests: list[Request] | None = None) -> Report:
        """One engine step; what was computed is in the caches already."""
        by_id = {request.request_id: request for request in requests or []}
        orders = self.scheduler.orders(scheduled or {}, lambda request_id: by_id[request_id].tables)
        merged = Report()
        for worker in self.workers:
            self.run(worker, orders)
        time.sleep(0.01)
        for worker in self.workers:
            merged = merged.merge(worker.report() or Report())
        if merged:
            self.scheduler.heard(merged)
        return merged

    def run(self, worker: WorkerSide, orders: Orders) -> None:
        worker.begin_step(orders)
        for name in self.layers:
            worker.wait_for_layer(name)
            worker.layer_computed(orders, name)
        worker.end_step(orders)

    @property
    def layers(self) -> list[str]:
        """Names, in the order in which a step computes them."""
        return [
            layer_name(group, layer) for layer in range(LAYERS) for group in range(len(self.layout.groups))
        ]

    def settle(self) -> None:
        """Steps with nothing to compute, until no save is on its way."""
        end = time.monotonic() + 20
        while self.scheduler.saving.pending:
            assert time.monotonic() < end, "still on its way"
            self.step()

    def found(self, request: Request) -> int:
        """Leading blocks of a prompt that a request can go on behind."""
        return len(self.link.match(self.layout.keys(request.block_hashes), BLOCKS))

    def compute(self, request: Request, first_block: int, *, seed: int) -> None:
        """Fill the request's whole prompt with numbers and let it be saved."""
        count = request.num_prompt_tokens // TOKENS
        request.tables = tuple(list(range(first_block, first_block + count)) for _ in self.layout.groups)
        for number, cache in enumerate(self.caches):
            for layer, rows in enumerate(cache):
                random = np.random.default_rng([seed, number, layer])
                rows[first_block : first_block + count] = random.integers(0, 256, (count, ROW), np.uint8)
        self.matched(request)
        self.step({request.request_id: request.num_prompt_tokens}, [request])

    def load(self, request: Request, first_block: int) -> int:
        """Tokens that were found and offered; they are loaded into fresh blocks."""
        found, between = self.matched(request)
        if found:
            count = found // TOKENS
            request.tables = tuple(list(range(first_block, first_block + count)) for _ in self.layout.groups)
            self.scheduler.allocated(request, request.tables, found)
            self.step()
            self.missing = [self.ended(worker, request) for worker in self.workers]
            self.step()
            assert between
        return found

    def matched(self, request: Request) -> tuple[int, bool]:
        """As often as the scheduler wants to be asked."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            found, between = self.scheduler.matched(request, 0)
            if found is not None:
                return found, between
            time.sleep(0.005)
        raise AssertionError("the look-up did not end")

    def ended(self, worker: WorkerSide, request: Request) -> set[int]:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            finished = worker.finished_loads()
            if finished:
                assert list(finished) == [request.request_id]
                return finished[request.request_id]
            time.sleep(0.005)
        raise AssertionError("the load did not end")

    def rows(self, begin: int, count: int) -> np.ndarray:
        return np.stack([np.stack([rows[begin : begin + count] for rows in cache]) for cache in self.caches])

    def close(self) -> None:
        self.scheduler.close()
        for worker in self.workers:
            worker.close()


def layer_name(group: int, layer: int) -> str:
    return f"group{group}.layer{layer}"


def memory_of(layout: Layout, rank: int, cache: list[np.ndarray]) -> WorkerMemory:
    specs = {}
    for group in range(len(layout.groups)):
        of_layer = {layer_name(group, layer): range(layer, layer + 1) for layer in range(LAYERS)}
        rows = cache[group * LAYERS : (group + 1) * LAYERS]
        specs[layout.spec_name(f"tp{rank}", group)] = GroupMemory(rows, 1, of_layer)
    return WorkerMemory(specs)


def lab(
    manager: Served, name: str, *, workers: int = 1, windows: tuple[int, ...] = (0,), by_url: bool = False,
    **settings: Any,
) -> Lab:  # fmt: skip
    """Args:
    windows: for each group, tokens before the next one that it needs; 0 = all.
    by_url: look-ups are calls.
    """
    groups = len(windows)
    layout = Layout(
        TOKENS, TOKENS, tuple(Group(i, (), TOKENS, 1, window) for i, window in enumerate(windows)), BLOCKS
    )
    caches = [[np.zeros((BLOCKS, ROW), np.uint8) for _ in range(LAYERS * groups)] for _ in range(workers)]
    address = {"kvcm_url": manager.url} if by_url else {"kvcm_data_dir": str(manager.data_dir)}
    memories = [memory_of(layout, rank, cache) for rank, cache in enumerate(caches)]
    found = settings_of(address | settings)
    specs = {name: size for memory in memories for name, size in memory.sizes.items()}
    parts = parts_of(layout)
    info = identity.instance_info(
        group="default", instance_id=name, block_tokens=TOKENS, specs=specs, version="v",
        deployment=ModelDeployment(model_name="m", dtype="u8", tp_size=workers), depends_on=(),
        spec_groups=spec_groups(parts, specs),
    )  # fmt: skip
    link = Link(found, info, parts)
    assert link.connect()
    references: Counter[int] = Counter()
    scheduler = SchedulerSide(
        link, layout, workers=workers, writers=workers, null_block=BLOCKS - 1,
        hold=references.update, release=references.subtract,
    )  # fmt: skip
    sides = [WorkerSide(found, memory, writes=True) for memory in memories]
    return Lab(link, layout, scheduler, sides, caches, references)


def request(name: str, prompt: int, tokens: int, shared: tuple[int, int] = (0, 0)) -> Request:
    """Args:
    shared: another prompt, and how many leading blocks of it this one begins with.
    """
    other, blocks = shared
    hashes = [
        hashlib.sha256(f"{other if i < blocks else prompt}-{i}".encode()).digest()
        for i in range(tokens // TOKENS)
    ]
    return Request(name, hashes, tokens, tokens)


def wait(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
