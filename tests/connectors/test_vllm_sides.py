"""Both sides of the vLLM connector without vLLM, on a real manager in this process (no Ray).

`Lab` is the engine: its cache is an array, its block pool counts references, and a step is what vLLM does
with the two sides in one. Workers are called one after the other and their reports merged.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.connectors.vllm import identity
from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.connectors.vllm.link import Link
from kvcm_ray.connectors.vllm.memory import GroupMemory, WorkerMemory
from kvcm_ray.connectors.vllm.orders import Report
from kvcm_ray.connectors.vllm.scheduler import SchedulerSide
from kvcm_ray.connectors.vllm.settings import settings_of
from kvcm_ray.connectors.vllm.worker import WorkerSide
from kvcm_ray.core.model import ModelDeployment
from kvcm_ray.testing.served import Served, served

BLOCKS, LAYERS, ROW = 64, 3, 64 * 1024
TOKENS = 16


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("manager") / "data") as found:
        yield found


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
            worker.begin_step(orders)
            worker.end_step(orders)
        time.sleep(0.01)
        for worker in self.workers:
            merged = merged.merge(worker.report() or Report())
        if merged:
            self.scheduler.heard(merged)
        return merged

    def settle(self) -> None:
        """Steps with nothing to compute, until no save is on its way."""
        end = time.monotonic() + 20
        while self.scheduler.saving.pending:
            assert time.monotonic() < end, "still on its way"
            self.step()

    def found(self, request: Request) -> int:
        """Leading blocks of a prompt that the index has."""
        return len(self.link.match(self.layout.keys(request.block_hashes)))

    def compute(self, request: Request, first_block: int, *, seed: int) -> None:
        """Fill the request's whole prompt with numbers and let it be saved."""
        count = request.num_prompt_tokens // TOKENS
        request.tables = tuple(list(range(first_block, first_block + count)) for _ in self.layout.groups)
        for number, cache in enumerate(self.caches):
            for layer, rows in enumerate(cache):
                random = np.random.default_rng([seed, number, layer])
                rows[first_block : first_block + count] = random.integers(0, 256, (count, ROW), np.uint8)
        self.scheduler.matched(request, 0)
        self.step({request.request_id: request.num_prompt_tokens}, [request])

    def load(self, request: Request, first_block: int) -> int | None:
        """Tokens that were found and offered; they are loaded into fresh blocks."""
        found, between = self.scheduler.matched(request, 0)
        if found:
            count = found // TOKENS
            request.tables = tuple(list(range(first_block, first_block + count)) for _ in self.layout.groups)
            self.scheduler.allocated(request, request.tables, found)
            self.step()
            self.missing = [self.ended(worker, request) for worker in self.workers]
            self.step()
            assert between
        return found

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


def lab(manager: Served, name: str, *, workers: int = 1, groups: int = 1, **settings: Any) -> Lab:
    layout = Layout(TOKENS, TOKENS, tuple(Group(i, (f"l{i}",), TOKENS, 1) for i in range(groups)), BLOCKS)
    caches = [[np.zeros((BLOCKS, ROW), np.uint8) for _ in range(LAYERS * groups)] for _ in range(workers)]
    memories = [
        WorkerMemory(
            {
                layout.spec_name(f"tp{rank}", group): GroupMemory(
                    cache[group * LAYERS : (group + 1) * LAYERS], 1
                )
                for group in range(groups)
            }
        )
        for rank, cache in enumerate(caches)
    ]
    found = settings_of({"kvcm_data_dir": str(manager.data_dir), **settings})
    specs = {name: size for memory in memories for name, size in memory.sizes.items()}
    info = identity.instance_info(
        group="default", instance_id=name, block_tokens=TOKENS, specs=specs, version="v",
        deployment=ModelDeployment(model_name="m", dtype="u8", tp_size=workers), depends_on=(),
    )  # fmt: skip
    link = Link(found, info)
    assert link.connect()
    references: Counter[int] = Counter()
    scheduler = SchedulerSide(
        link, layout, workers=workers, writers=workers, null_block=BLOCKS - 1,
        hold=references.update, release=references.subtract,
    )  # fmt: skip
    sides = [WorkerSide(found, memory, writes=True) for memory in memories]
    return Lab(link, layout, scheduler, sides, caches, references)


def request(name: str, prompt: int, tokens: int) -> Request:
    hashes = [hashlib.sha256(f"{prompt}-{i}".encode()).digest() for i in range(tokens // TOKENS)]
    return Request(name, hashes, tokens, tokens)


@pytest.mark.parametrize(("workers", "groups"), [(1, 1), (2, 1), (1, 3)])
def test_what_one_saves_the_other_loads(manager: Served, workers: int, groups: int) -> None:
    name = f"pass-on-{workers}-{groups}"
    one = lab(manager, name, workers=workers, groups=groups)
    try:
        assert one.load(request("cold", 1, 100), 20) == 0
        one.compute(request("a", 1, 100), 0, seed=1)
        one.settle()
        wait(lambda: one.found(request("a", 1, 100)) == 6)
        assert not +one.references, "blocks are still held"
        wrote = one.rows(0, 6)
        assert one.load(request("b", 1, 120), 30) == 96
        assert one.missing == [set()] * workers
        np.testing.assert_array_equal(one.rows(30, 6), wrote)
    finally:
        one.close()
    other = lab(manager, name, workers=workers, groups=groups)
    try:
        assert other.load(request("c", 1, 100), 7) == 96
        np.testing.assert_array_equal(other.rows(7, 6), wrote)
    finally:
        other.close()


def test_bytes_that_are_lost_are_computed_and_saved_again(manager: Served) -> None:
    one = lab(manager, "lost")
    try:
        one.compute(request("a", 2, 160), 0, seed=2)
        one.settle()
        wait(lambda: one.found(request("a", 2, 160)) == 10)
        wrote = one.rows(0, 10)
        overwrite(manager, "lost", slot=3)
        hit = request("b", 2, 160)
        assert one.load(hit, 20) == 160
        assert one.missing == [set(range(23, 30))]
        np.testing.assert_array_equal(one.rows(20, 3), wrote[:, :, :3])
        # The same request is not offered them again; what is computed instead is saved.
        assert one.scheduler.matched(hit, 0) == (0, False)
        wait(lambda: one.found(hit) == 3)
        one.compute(request("c", 2, 160), 40, seed=2)
        one.settle()
        wait(lambda: one.found(hit) == 10)
    finally:
        one.close()


def overwrite(manager: Served, instance_id: str, slot: int, prompt: int = 2) -> None:
    from kvcm_ray.client import connect

    with connect(manager.url) as client:
        cache = client.instance(instance_id)
        keys = Layout(TOKENS, TOKENS, (), BLOCKS).keys(request("x", prompt, 160).block_hashes)
        found = cache.match(keys)
        uri = found.uris("tp0")[slot]
    path = Path(uri.partition("://")[2].partition("?")[0].partition("/")[2])
    path = path if path.is_absolute() else Path("/") / path
    number = int(uri.partition("blkid=")[2].partition("&")[0])
    with path.open("r+b") as file:
        file.seek(number * LAYERS * ROW)
        file.write(b"\xee" * 100)


def wait(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_captured_blocks_are_let_go_of_although_nobody_takes_them(manager: Served) -> None:
    one = lab(manager, "nobody", save_timeout_s=0.2, staging_bytes=1)
    try:
        one.compute(request("a", 3, 100), 0, seed=3)  # there is no memory to copy them to
        one.settle()
        assert not +one.references
        assert one.found(request("a", 3, 100)) == 0
    finally:
        one.close()


def test_a_look_up_costs_little(manager: Served) -> None:
    """128 blocks, nothing found. CPU time of this thread, so that neighbours do not count."""
    one = lab(manager, "quick")
    try:
        one.compute(request("a", 4, 100), 0, seed=4)
        one.settle()
        spent = []
        for number in range(300):
            asked = request(f"r{number}", 1000 + number, 128 * TOKENS + 1)
            begin = time.thread_time()
            assert one.scheduler.matched(asked, 0) == (0, False)
            spent.append(time.thread_time() - begin)
        assert np.percentile(spent, 99) < 0.001
    finally:
        one.close()


def test_what_is_computed_upon_missing_blocks_is_not_saved(manager: Served) -> None:
    """Loads within the step: the step goes on although a block is missing, and so may the next one."""
    one = lab(manager, "upon", async_load=False)
    try:
        one.compute(request("a", 5, 160), 0, seed=5)
        one.settle()
        wait(lambda: one.found(request("a", 5, 160)) == 10)
        overwrite(manager, "upon", slot=9, prompt=5)
        hit = request("b", 5, 192)
        assert one.scheduler.matched(hit, 0) == (160, False)
        hit.tables = (list(range(20, 32)),)
        one.scheduler.allocated(hit, hit.tables, 160)
        hit.num_computed_tokens = 160
        for rows in one.caches[0]:
            rows[30:32] = 111  # wrong numbers, made from a missing block
        first = one.scheduler.orders({"b": 32}, lambda _: hit.tables)  # computes blocks 10 and 11
        assert len(first.captures) == 1
        (worker,) = one.workers
        assert worker.begin_step(first) == {29}
        worker.end_step(first)
        second = one.scheduler.orders({"b": 0}, lambda _: hit.tables)  # handed out before it heard
        worker.begin_step(second)
        worker.end_step(second)
        one.settle()
        hit.num_computed_tokens = 144  # the engine has gone back to the last good block
        for rows in one.caches[0]:
            rows[29:32] = 222
        one.step({"b": 48}, [hit])
        one.settle()
        wait(lambda: one.found(request("c", 5, 192)) == 12)
        back = request("c", 5, 193)
        assert one.scheduler.matched(back, 0) == (192, False)
        back.tables = (list(range(40, 52)),)
        one.scheduler.allocated(back, back.tables, 192)
        assert worker.begin_step(one.scheduler.orders({}, lambda _: None)) == set()
        assert (one.rows(49, 3) == 222).all()
    finally:
        one.close()


def test_keys_follow_a_request_whose_tokens_are_exchanged(manager: Served) -> None:
    one = lab(manager, "exchanged")
    try:
        one.compute(request("a", 6, 160), 0, seed=6)
        one.settle()
        wait(lambda: one.found(request("a", 6, 160)) == 10)
        asked = request("b", 6, 160)
        assert one.scheduler.matched(asked, 0)[0] == 160
        asked.block_hashes[5:] = request("x", 7, 160).block_hashes[5:]
        assert one.scheduler.matched(asked, 0)[0] == 80
    finally:
        one.close()
