"""Layer by layer: what a step waits for, what it copies while it computes, and when it must not go on."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvcm_ray.connectors.vllm import loading
from kvcm_ray.testing.served import Served, served
from kvcm_ray.testing.vllm_lab import LAYERS, TOKENS, Lab, Request, lab, layer_name, request, wait

FIRST, SECOND, LAST = (layer_name(0, layer) for layer in range(LAYERS))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("manager") / "data") as found:
        yield found


def saved(one: Lab, prompt: int, blocks: int) -> np.ndarray:
    """A prompt in the cache; the bytes of its blocks."""
    one.compute(request("saved", prompt, blocks * TOKENS), 0, seed=prompt)
    one.settle()
    wait(functools.partial(found_all, one, prompt, blocks))
    return one.rows(0, blocks)


def found_all(one: Lab, prompt: int, blocks: int) -> bool:
    return one.found(request("x", prompt, blocks * TOKENS)) == blocks


def begin(one: Lab, prompt: int, blocks: int, name: str = "hit") -> Request:
    """Begin a step that loads and computes upon a prompt's blocks, into engine blocks 30.."""
    hit = request(name, prompt, blocks * TOKENS + 1)
    assert one.scheduler.matched(hit, 0) == (blocks * TOKENS, False)
    hit.tables = (list(range(30, 30 + blocks)),)
    one.scheduler.allocated(hit, hit.tables, blocks * TOKENS)
    one.workers[0].begin_step(one.scheduler.orders({}, lambda _: None))
    return hit


def end(one: Lab) -> set[int]:
    one.workers[0].end_step(one.scheduler.orders({}, lambda _: None))
    return one.workers[0].take_missing()


class Gate:
    """Holds the copies of all layers but the first."""

    def __init__(self, one: Lab) -> None:
        (self.group,) = one.workers[0]._loads._memory.specs.values()
        self.open = threading.Event()
        self.real = self.group.scatter
        self.group.scatter = self.scatter  # type: ignore[method-assign]

    def scatter(self, ids: Any, rows: Any, matrices: range | None = None) -> None:
        if matrices is None or matrices.start:
            assert self.open.wait(10)
        self.real(ids, rows, matrices)


def in_thread(work: Any) -> threading.Event:
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def test_a_step_waits_for_one_layer_at_a_time(manager: Served) -> None:
    one = lab(manager, "one-at-a-time", async_load=False)
    try:
        wrote = saved(one, 1, 10)  # in that step the engine announced its layers
        gate = Gate(one)
        begin(one, 1, 10)
        worker = one.workers[0]
        worker.wait_for_layer(FIRST)
        np.testing.assert_array_equal(one.rows(30, 10)[:, 0], wrote[:, 0])
        later = in_thread(lambda: worker.wait_for_layer(LAST))
        assert not later.wait(0.2)
        assert not one.rows(30, 10)[:, 1:].any()
        gate.open.set()
        assert later.wait(10)
        np.testing.assert_array_equal(one.rows(30, 10), wrote)
        assert end(one) == set()
    finally:
        one.close()


def test_layers_that_are_not_announced_are_there_when_the_step_begins(manager: Served) -> None:
    one = lab(manager, "not-announced", async_load=False)
    other = lab(manager, "not-announced", async_load=False)
    try:
        wrote = saved(one, 2, 10)
        other.workers[0].wait_for_layer(FIRST)
        other.workers[0].wait_for_layer(LAST)
        gate = Gate(other)
        begun = in_thread(lambda: begin(other, 2, 10))
        assert not begun.wait(0.3)  # for the second layer nobody will wait
        gate.open.set()
        assert begun.wait(10)
        np.testing.assert_array_equal(other.rows(30, 10)[:, 1], wrote[:, 1])
        assert end(other) == set()
        np.testing.assert_array_equal(other.rows(30, 10), wrote)
    finally:
        one.close()
        other.close()


def test_more_than_fits_is_copied_while_it_is_read(manager: Served) -> None:
    """Only the last blocks wait in memory for their layers."""
    one = lab(manager, "large", async_load=False)
    try:
        wrote = saved(one, 3, 22)  # 4.1 MiB
        worker = one.workers[0]
        worker._loads._settings = one.link.settings.__class__(
            kvcm_data_dir=str(manager.data_dir), staging_bytes=1
        )
        begin(one, 3, 22)
        worker.wait_for_layer(LAST)
        np.testing.assert_array_equal(one.rows(30, 22), wrote)
        assert end(one) == set()
    finally:
        one.close()


def test_a_read_that_hangs_ends_in_time_and_touches_nothing_later(
    manager: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "GRACE_S", 0.2)
    one = lab(manager, "hangs", async_load=False, load_timeout_s=0.3)
    try:
        wrote = saved(one, 4, 10)
        loads, hung = one.workers[0]._loads, threading.Event()
        real = loads._read_rows

        def hanging(*args: Any) -> int:
            assert hung.wait(10)
            return real(*args)

        monkeypatch.setattr(loads, "_read_rows", hanging)
        started = time.monotonic()
        hit = begin(one, 4, 10)
        one.workers[0].wait_for_layer(FIRST)
        assert 0.3 < time.monotonic() - started < 3
        assert end(one) == set(range(30, 40))
        hung.set()  # by now these blocks may be another request's
        time.sleep(0.3)
        assert not one.rows(30, 10).any()
        report = one.workers[0].report()
        assert report is not None
        assert (report.failed_loads, report.failed_steps) == ({"hit"}, 1)
        one.scheduler.heard(report)
        assert one.scheduler.matched(hit, 0) == (0, False)
        monkeypatch.undo()
        begin(one, 4, 10, "again")
        assert end(one) == set()
        np.testing.assert_array_equal(one.rows(30, 10), wrote)
    finally:
        one.close()


def test_a_layer_is_copied_when_it_is_computed(manager: Served) -> None:
    """And not when the step is done: by then these bytes are others."""
    one = lab(manager, "saves")
    try:
        asked = request("a", 5, 8 * TOKENS)
        asked.tables = (list(range(8)),)
        one.scheduler.matched(asked, 0)
        orders = one.scheduler.orders({"a": 8 * TOKENS}, lambda _: asked.tables)
        worker, cache = one.workers[0], one.caches[0]
        worker.begin_step(orders)
        cache[0][:8] = 11
        worker.layer_computed(orders, FIRST)
        cache[1][:8] = 12
        worker.layer_computed(orders, SECOND)
        copies = threading.Event()
        worker._saves._copies.submit(copies.set)  # behind the two
        assert copies.wait(10)
        cache[0][:8] = cache[1][:8] = 99
        cache[2][:8] = 13  # the engine says nothing of this one
        worker.end_step(orders)
        one.settle()
        wait(lambda: one.found(asked) == 8)
        for rows in cache:
            rows[:] = 0
        assert one.load(request("b", 5, 8 * TOKENS), 30) == 8 * TOKENS
        assert [int(rows[33, 0]) for rows in cache] == [11, 12, 13]
    finally:
        one.close()


def test_a_slow_storage_does_not_keep_the_engines_blocks(manager: Served) -> None:
    one = lab(manager, "slow-writes")
    try:
        saves, hung = one.workers[0]._saves, threading.Event()
        real = saves._write_groups

        def hanging(*args: Any) -> Any:
            assert hung.wait(10)
            return real(*args)

        saves._write_groups = hanging  # type: ignore[method-assign,assignment]
        for prompt in (6, 7):
            one.compute(request(f"r{prompt}", prompt, 8 * TOKENS), 8 * (prompt - 6), seed=prompt)
            wait(lambda: not one.step() and not +one.references)
        assert one.scheduler.saving.pending
        hung.set()
        one.settle()
        for prompt in (6, 7):
            wait(functools.partial(found_all, one, prompt, 8))
    finally:
        one.close()
