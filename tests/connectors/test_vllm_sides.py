"""The two sides of the vLLM connector together, in a `Lab` without vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.connectors.vllm.layout import Layout
from kvcm_ray.testing.served import Served, served
from kvcm_ray.testing.vllm_lab import BLOCKS, LAYERS, ROW, TOKENS, lab, request, wait


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("manager") / "data") as found:
        yield found


@pytest.mark.parametrize(("workers", "windows"), [(1, (0,)), (2, (0,)), (1, (0, 0, 0)), (1, (30, 0, 95))])
def test_what_one_saves_the_other_loads(manager: Served, workers: int, windows: tuple[int, ...]) -> None:
    name = f"pass-on-{workers}-{len(windows)}-{max(windows)}"
    one = lab(manager, name, workers=workers, windows=windows)
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
    other = lab(manager, name, workers=workers, windows=windows)
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
        worker.begin_step(first)
        worker.end_step(first)
        assert worker.take_missing() == {29}
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
        worker.begin_step(one.scheduler.orders({}, lambda _: None))
        assert worker.take_missing() == set()
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
