"""Sliding windows in the vLLM connector: which of their blocks are kept, and where a prompt can go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.actors import paths
from kvcm_ray.connectors.vllm import windows
from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.testing.served import Served, served
from kvcm_ray.testing.vllm_lab import TOKENS, Lab, Request, lab, request, wait


def layout(*tokens: int) -> Layout:
    return Layout(16, 16, tuple(Group(i, (), 16, 1, window) for i, window in enumerate(tokens)), 64)


def test_groups_with_windows_are_a_part_of_their_own() -> None:
    full, window = windows.parts_of(layout(31, 0, 48))
    assert (full.groups, full.window) == ((1,), 0)
    assert (window.groups, window.window) == ((0, 2), 3)
    names = windows.spec_groups((full, window), ["tp0-g0", "tp0-g1", "tp0-g2", "pp1-tp1-g0", "pp1-tp1-g1"])
    assert names == {"full": ["tp0-g1", "pp1-tp1-g1"], "window": ["tp0-g0", "tp0-g2", "pp1-tp1-g0"]}


@pytest.mark.parametrize("tokens", [(0,), (0, 0), (31,), (31, 31)])
def test_layers_of_one_kind_are_one_part(tokens: tuple[int, ...]) -> None:
    (only,) = windows.parts_of(layout(*tokens))
    assert (only.groups, only.name, only.window) == (tuple(range(len(tokens))), "", 0)
    assert windows.spec_groups((only,), ["tp0"]) == {}


def test_blocks_to_keep() -> None:
    assert windows.runs_to_keep([10], 3, 0).tolist() == [6, 7, 8, 9]
    assert windows.runs_to_keep([10, 12], 3, 8).tolist() == [8, 9, 10, 11]
    assert windows.runs_to_keep([2], 3, 0).tolist() == [0, 1]
    assert windows.runs_to_keep([], 3, 0).tolist() == []
    assert list(windows.checkpoints(0, 60, 3)) == [24, 48]
    assert list(windows.checkpoints(24, 47, 3)) == []


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_the_last_end_with_a_whole_window_is_found(flags: list[bool], window: int) -> None:
    present = np.array(flags, np.bool_)
    asked: list[int] = []

    def lookup(index: np.ndarray) -> np.ndarray:
        asked.extend(index.tolist())
        assert len(index) == 0 or 0 <= index.min() <= index.max() < len(flags)
        found: np.ndarray = present[index]
        return found

    ends = [n for n in range(1, len(flags) + 1) if present[max(0, n - window) : n].all()]
    assert windows.last_end(lookup, len(flags), window) == max(ends, default=0)


def test_few_keys_are_asked_for_when_nothing_is_there() -> None:
    asked = []

    def lookup(index: np.ndarray) -> np.ndarray:
        asked.append(len(index))
        return np.zeros(len(index), np.bool_)

    assert windows.last_end(lookup, 4096, 32) == 0
    assert sum(asked) == 32 + 128


# ------------------------------------------------------------------------------- both sides of the connector


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("manager") / "data") as found:
        yield found


def kept(manager: Served, one: Lab, asked: Request) -> list[int]:
    """Numbers of the blocks whose window is in the cache."""
    from kvcm_ray.client import connect

    keys = windows.window_keys(one.layout.keys(asked.block_hashes))
    with connect(manager.url) as client:
        flags = client.instance(one.link.info.instance_id).lookup(keys).flags
    return np.flatnonzero(flags).tolist()


def save(one: Lab, asked: Request, *, seed: int) -> None:
    one.compute(asked, 0, seed=seed)
    one.settle()


@pytest.mark.parametrize("by_url", [False, True])
def test_windows_are_kept_at_ends_and_where_prompts_part(manager: Served, by_url: bool) -> None:
    """Two blocks each; one window of eight is kept anyway."""
    one = lab(manager, f"parting-{by_url}", windows=(0, 31), by_url=by_url, lookup_timeout_s=5)
    try:
        first = request("a", 1, 22 * TOKENS + 5)
        save(one, first, seed=1)
        wait(lambda: kept(manager, one, first) == [13, 14, 15, 19, 20, 21])
        wrote = one.rows(0, 22)

        second = request("b", 2, 30 * TOKENS, shared=(1, 19))
        assert one.load(second, 30) == 16 * TOKENS  # not 19: behind that there is no window
        assert one.missing == [set()]
        np.testing.assert_array_equal(one.rows(30, 16)[:, :3], wrote[:, :3, :16])
        np.testing.assert_array_equal(one.rows(44, 2)[:, 3:], wrote[:, 3:, 14:16])
        assert not one.rows(30, 14)[:, 3:].any()  # of the window no more is loaded than is needed

        save(one, second, seed=1)
        wait(lambda: kept(manager, one, second) == [13, 14, 15, 16, 17, 18, 27, 28, 29])
        third = request("c", 3, 25 * TOKENS, shared=(1, 19))
        assert one.load(third, 30) == 19 * TOKENS
        assert one.load(request("d", 1, 22 * TOKENS + 5), 30) == 22 * TOKENS
        assert one.load(request("e", 2, 30 * TOKENS, shared=(1, 19)), 30) == 29 * TOKENS
    finally:
        one.close()


def test_a_prompt_in_steps_and_what_was_generated(manager: Served) -> None:
    """The engine lets go of blocks that slide out of the window while later ones are computed."""
    one = lab(manager, "steps", windows=(0, 31))
    try:
        asked = request("a", 5, 40 * TOKENS)
        asked.num_prompt_tokens = 11 * TOKENS + 3
        null = 63
        assert one.scheduler.matched(asked, 0) == (0, False)
        for begin, end in ((0, 6), (6, 11), (11, 20), (20, 21)):  # blocks
            asked.tables = (
                list(range(end)), [null if b < begin - 2 else b for b in range(end)],
            )  # fmt: skip
            asked.num_computed_tokens = begin * TOKENS
            one.step({"a": (end - begin) * TOKENS}, [asked])
        asked.num_computed_tokens = 21 * TOKENS + 4
        one.scheduler.finished(asked, asked.tables)
        one.settle()
        wait(lambda: kept(manager, one, asked) == [8, 9, 10, 13, 14, 15, 17, 18, 19, 20])
        assert not +one.references
    finally:
        one.close()


def test_lost_bytes_of_a_window_make_the_load_fail(manager: Served) -> None:
    one = lab(manager, "lost-window", windows=(0, 31))
    try:
        first = request("a", 7, 10 * TOKENS + 1)
        save(one, first, seed=7)
        wait(lambda: one.found(request("b", 7, 10 * TOKENS + 1)) == 10)
        hit = request("c", 7, 10 * TOKENS + 1)
        assert one.scheduler.matched(hit, 0) == (10 * TOKENS, True)
        memory = Path("/dev/shm") / f"kvcm-test-{paths.data_dir_hash(paths.resolve(manager.data_dir))}"
        (path,) = memory.rglob("lost-window/*/tp0-g1.dat")
        path.write_bytes(b"\xee" * path.stat().st_size)
        hit.tables = (list(range(30, 40)), list(range(30, 40)))
        one.scheduler.allocated(hit, hit.tables, 10 * TOKENS)
        one.step()
        (worker,) = one.workers
        assert one.ended(worker, hit) == {38, 39}
        one.step()
        assert one.scheduler.matched(hit, 0) == (0, False)
    finally:
        one.close()
