"""Pages in arrays into blocks and back, and the bookkeeping of pinned memory; no torch is needed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from kvcm_ray.benchmarks import paged as bench
from kvcm_ray.connectors.paged import LAYER_FIRST, PAGE_FIRST, PagedCache, gather, host, scatter
from kvcm_ray.connectors.paged.copying import runs
from kvcm_ray.connectors.paged.pinned import HostMemory, Ranges
from kvcm_ray.errors import InvalidArgument, Unsupported

PAGES = 20


def cache_of(runs_of_planes: list[int], pages: int, order: str, seed: int = 0) -> PagedCache:
    random = np.random.default_rng(seed)
    matrices = [random.integers(0, 256, (PAGES, run + 8), np.uint8)[:, :run] for run in runs_of_planes]
    return PagedCache(matrices, pages, order)  # type: ignore[arg-type]


@given(
    some.lists(some.sampled_from([1, 3, 4, 8, 16, 24, 64]), min_size=1, max_size=5),
    some.integers(1, 3), some.sampled_from([PAGE_FIRST, LAYER_FIRST]), some.integers(0, 2**32), some.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_byte_is_where_the_orders_say(
    sizes: list[int], pages: int, order: str, seed: int, data: some.DataObject
) -> None:
    cache = cache_of(sizes, pages, order, seed)
    chosen = data.draw(some.lists(some.integers(0, PAGES - 1), unique=True, min_size=pages))
    ids = np.array(chosen[: len(chosen) // pages * pages], np.int64).reshape(-1, pages)
    ids[np.random.default_rng(seed).random(ids.shape) < 0.2] = -1
    out = np.full((len(ids), cache.bytes), 7, np.uint8)
    gather(cache, ids, out)
    for block, wanted in enumerate(ids.tolist()):
        parts = [(rows, page) for page in wanted for rows in cache.planes]
        if order == LAYER_FIRST:
            parts = [(rows, page) for rows in cache.planes for page in wanted]
        expected = [plane.rows[page] if page >= 0 else np.full(plane.run, 7) for plane, page in parts]
        assert (out[block] == np.concatenate(expected)).all()
    before = [plane.rows.copy() for plane in cache.planes]
    for plane in cache.planes:
        plane.rows[ids[ids >= 0]] = 0
    scatter(cache, ids, out)
    for plane, old in zip(cache.planes, before, strict=True):
        assert (plane.rows == old).all()


@pytest.mark.parametrize("order", [PAGE_FIRST, LAYER_FIRST])
def test_a_layer_can_be_moved_alone(order: str) -> None:
    cache = cache_of([8, 16, 8], 2, order)
    ids = np.array([[3, 4], [9, 1]], np.int64)
    whole, parts = np.zeros((2, cache.bytes), np.uint8), np.zeros((2, cache.bytes), np.uint8)
    host.gather_to_host(cache, ids, whole)
    host.gather_to_host(cache, ids, parts, range(1, 2))
    assert 0 < np.count_nonzero(parts) <= 2 * 2 * 16
    assert ((parts == whole) | (parts == 0)).all()
    host.gather_to_host(cache, ids, parts, range(1))
    host.gather_to_host(cache, ids, parts, range(2, 3))
    assert (parts == whole).all()
    first, second = cache.planes[0].rows.copy(), cache.planes[1].rows.copy()
    for plane in cache.planes:
        plane.rows[:] = 0
    host.scatter_from_host(cache, ids, parts, range(1, 2))
    assert (cache.planes[1].rows[ids] == second[ids]).all()
    assert not cache.planes[0].rows.any()
    host.scatter_from_host(cache, ids, parts, range(1))
    assert (cache.planes[0].rows[ids] == first[ids]).all()


@pytest.mark.parametrize(
    ("ids", "shape", "word"),
    [
        ([[1], [2]], (2, 48), "2 make a block"),
        ([[1, 2]], (2, 48), "for 1 blocks of 48"),
        ([[1, 2]], (1, 47), "for 1 blocks of 48"),
        ([[1, PAGES]], (1, 48), "a cache that has 20"),
        ([[1, -2]], (1, 48), "a cache that has 20"),
    ],
)
def test_wrong_pages_touch_nothing(ids: list[list[int]], shape: tuple[int, int], word: str) -> None:
    cache = cache_of([8, 16], 2, PAGE_FIRST)
    before = [plane.rows.copy() for plane in cache.planes]
    with pytest.raises(InvalidArgument, match=word):
        scatter(cache, np.array(ids, np.int64), np.zeros(shape, np.uint8))
    assert all((plane.rows == old).all() for plane, old in zip(cache.planes, before, strict=True))


def test_caches_that_do_not_fit_together_are_refused() -> None:
    rows = np.zeros((4, 8), np.uint8)
    with pytest.raises(InvalidArgument, match="numbers of pages: 4, 5"):
        PagedCache([rows, np.zeros((5, 8), np.uint8)])
    with pytest.raises(InvalidArgument, match="none"):
        PagedCache([])
    with pytest.raises(InvalidArgument, match="head_first"):
        PagedCache([rows], 1, "head_first")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="lie together"):
        gather(PagedCache([rows]), np.zeros((1, 1), np.int64), np.zeros((1, 16), np.uint8)[:, ::2])


def test_runs() -> None:
    ids = np.array([3, 4, 5, -1, -1, 9, 2, 3, -1], np.int64)
    assert runs(ids) == [(0, 3), (5, 6), (6, 8)]
    assert runs(np.array([-1, 0, 1], np.int64)) == [(1, 3)]
    assert runs(np.zeros(0, np.int64)) == []


class TestRanges:
    def test_a_copy_may_not_cross_from_one_to_the_next(self) -> None:
        ranges = Ranges()
        ranges.add(100, 200)
        ranges.add(200, 300)
        assert ranges.holds(100, 200)
        assert ranges.holds(210, 220)
        assert not ranges.holds(190, 210)
        assert not ranges.holds(50, 60)
        assert not ranges.holds(299, 301)

    @pytest.mark.parametrize("other", [(50, 101), (199, 300), (120, 130), (50, 300), (100, 200), (7, 7)])
    def test_ranges_that_overlap_are_refused(self, other: tuple[int, int]) -> None:
        ranges = Ranges()
        ranges.add(100, 200)
        with pytest.raises(InvalidArgument, match="registered in part already"):
            ranges.add(*other)
        assert len(ranges) == 1

    @given(some.lists(some.tuples(some.integers(0, 60), some.integers(1, 8), some.booleans()), max_size=60))
    def test_against_a_set_of_addresses(self, steps: list[tuple[int, int, bool]]) -> None:
        ranges, model = Ranges(), {}
        for begin, size, add in steps:
            taken = {at for first, last in model.items() for at in range(first, last)}
            if not add:
                assert ranges.remove(begin) == (model.pop(begin, None) is not None)
            elif taken.isdisjoint(range(begin, begin + size)):
                ranges.add(begin, begin + size)
                model[begin] = begin + size
            else:
                with pytest.raises(InvalidArgument):
                    ranges.add(begin, begin + size)
        assert len(ranges) == len(model)
        assert ranges.take() == sorted(model)
        assert len(ranges) == 0


def test_the_benchmark_compares_with_plain_copies() -> None:
    found = bench.run(quick=True, total_bytes=4 << 20, ways=["numpy"])
    assert [(row["order"], row["pages"], row["ids"]) for row in found["rows"]] == [
        (PAGE_FIRST, 1, "random"), (PAGE_FIRST, 1, "run"), (PAGE_FIRST, 4, "random"),
        (PAGE_FIRST, 4, "run"), (LAYER_FIRST, 4, "random"), (LAYER_FIRST, 4, "run"),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["gather_ratio"] == pytest.approx(row["gather_gbps"] / row["copy_gbps"])
        assert row["scatter_gbps"] > 0
    with pytest.raises(InvalidArgument, match="'tpu'"):
        bench.run(device="tpu")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_a_benchmark_without_its_gpu_says_so() -> None:
    with pytest.raises(Unsupported, match="no GPU here"):
        bench.run(device="cuda")


def test_without_cuda_memory_is_ordinary() -> None:
    memory = HostMemory()
    buffer = memory.new(1000)
    assert buffer.shape == (1000,)
    assert buffer.flags.owndata
    assert not memory.is_pinned(buffer)
    memory.drop(buffer)
    memory.close()
