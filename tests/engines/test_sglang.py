"""The backend in SGLang's own storage interface, made by its factory, on its real host pools (CPU).

Runs in an environment of its own with SGLang (``make test-sglang``), which has no CPU engine; elsewhere there
is nothing to test here. No device copy, controller or radix tree is exercised: those need a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang has an environment of its own", allow_module_level=True)

# SGLang imports torchvision, whose build on the index has operators for CUDA only. Their names are enough.
_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt.mem_cache.device_pool_info import (  # noqa: E402
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.storage import StorageBackendFactory  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402

from kvcm_ray.cluster import Manager  # noqa: E402
from kvcm_ray.connectors.hicache import page_keys  # noqa: E402
from kvcm_ray.connectors.keys import keys_of_tokens  # noqa: E402
from kvcm_ray.errors import InvalidArgument  # noqa: E402
from kvcm_ray.index import IndexReader  # noqa: E402
from kvcm_ray.testing.served import Served, served  # noqa: E402

PAGE, LAYERS, HEADS, WIDTH = 16, 4, 2, 64
TOKENS = 512
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


def mha_pool(layout: str, dtype: torch.dtype = torch.float16, layers: int = LAYERS) -> Any:
    k, v = (tuple(torch.zeros(TOKENS + PAGE, HEADS, WIDTH, dtype=dtype) for _ in range(layers)) for _ in "kv")
    pointers = [torch.tensor([t.data_ptr() for t in part], dtype=torch.uint64) for part in (k, v)]
    buffers = KVBuffers(k=k, v=v, k_data_ptrs=pointers[0], v_data_ptrs=pointers[1], layout=KVBufferLayout.NHD)
    info = MHABufferInfo(
        buffers=buffers, page_size=PAGE, head_num=HEADS, head_dim=WIDTH, v_head_dim=WIDTH, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    return MHATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, pin_memory=False, device="cpu", device_capacity_tokens=TOKENS,
        start_layer=0, end_layer=layers,
    )  # fmt: skip


def mla_pool(layout: str) -> Any:
    buffers = tuple(torch.zeros(TOKENS + PAGE, 1, 96, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=buffers, data_ptrs=torch.tensor([t.data_ptr() for t in buffers], dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)), device_layer_num=LAYERS, page_size=PAGE, kv_lora_rank=64,
        qk_rope_head_dim=32, kv_cache_dim=96, dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    return MLATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, pin_memory=False, device="cpu", device_capacity_tokens=TOKENS,
        start_layer=0, end_layer=LAYERS, target_layer_num=LAYERS,
    )  # fmt: skip


def fill(pool: Any, seed: int = 0) -> torch.Tensor:
    """Random bytes in all of a pool; returns a copy."""
    generator = torch.Generator().manual_seed(seed)
    raw = pool.kv_buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
    return raw.clone()


def pages_of(pool: Any, indices: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of pages."""
    return [pool.get_data_page(int(index)).view(torch.uint8).clone() for index in indices[::PAGE]]


def indices_of(*pages: int) -> torch.Tensor:
    """Of these pages of a pool, in this order."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def names(count: int, seed: int = 0) -> list[str]:
    """Page names as SGLang hashes them."""
    found = get_storage_hash_str(prompt(count, seed), None, page_size=PAGE)
    assert len(found) == count
    return list(found)


def prompt(pages: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, 50_000, pages * PAGE).tolist()
    return found


def configuration(manager: Served | Manager, model: str, **changes: Any) -> Any:
    extra = {
        "backend_name": "kvcm", "module_path": "kvcm_ray.connectors.sglang", "class_name": "KVCMStorage",
        "interface_v1": 1, "kvcm_url": manager.url,
    }  # fmt: skip
    fields = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False,
        "model_name": model, "extra_config": extra | changes.pop("extra", {}),
    }  # fmt: skip
    return HiCacheStorageConfig(**(fields | changes))


def make(manager: Served | Manager, pool: Any, model: str, **changes: Any) -> Any:
    """A backend as SGLang's controller attaches it."""
    found = StorageBackendFactory.create_backend("dynamic", configuration(manager, model, **changes), pool)
    found.register_mem_pool_host(pool)
    found.on_host_pools_registered()
    return found


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("sglang")) / "data") as found:
        yield found


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    return f"org/{request.node.name}"


def test_page_names_are_our_token_hashes() -> None:
    assert page_keys(names(8)).tolist() == keys_of_tokens(prompt(8), PAGE).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_v1_round_trip(manager: Served, model: str, layout: str, dtype: torch.dtype) -> None:
    pool = mha_pool(layout, dtype)
    storage, keys = make(manager, pool, model), names(10)
    fill(pool)
    source, target = indices_of(*range(3, 13)), indices_of(*range(30, 20, -1))
    expected = pages_of(pool, source)
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, source) == [True] * 10
    assert storage.batch_exists(keys) == 10
    before = fill(pool, seed=1)
    assert storage.batch_get_v1(keys, target) == [True] * 10
    for page, original in zip(pages_of(pool, target), expected, strict=True):
        assert torch.equal(page, original)
    untouched = indices_of(*range(21), *range(31, 33))
    after, pool.kv_buffer.view(torch.uint8)[...] = pages_of(pool, untouched), before
    assert all(torch.equal(a, b) for a, b in zip(after, pages_of(pool, untouched), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generic_round_trip_and_both_interfaces_read_each_other(
    manager: Served, model: str, layout: str
) -> None:
    """As the controller calls them: dummy flat pages to be filled, flat pages to be stored."""
    pool = mha_pool(layout)
    storage, keys = make(manager, pool, model), names(6)
    fill(pool)
    first, second = indices_of(0, 1, 2), indices_of(3, 4, 5)
    expected = pages_of(pool, indices_of(*range(6)))
    assert storage.batch_set(keys[:3], [pool.get_data_page(int(i)) for i in first[::PAGE]])
    assert storage.batch_set_v1(keys[3:], second) == [True] * 3
    pages = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    assert all(torch.equal(p.view(torch.uint8), e) for p, e in zip(pages, expected, strict=True))
    target = indices_of(*range(20, 26))
    assert storage.batch_get_v1(keys, target) == [True] * 6
    assert all(torch.equal(p, e) for p, e in zip(pages_of(pool, target), expected, strict=True))
    pool.set_from_flat_data_page(int(target[0]), pages[5])
    assert torch.equal(pages_of(pool, target[:PAGE])[0], expected[5])


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_mla(manager: Served, model: str, layout: str) -> None:
    pool = mla_pool(layout)
    storage, keys = make(manager, pool, model, is_mla_model=True, tp_size=2), names(5)
    fill(pool)
    source = indices_of(*range(5))
    expected = pages_of(pool, source)
    assert storage.batch_set_v1(keys, source) == [True] * 5
    other_pool = mla_pool(layout)
    other = make(manager, other_pool, model, is_mla_model=True, tp_size=2, tp_rank=1)
    assert other.batch_get_v1(keys, source) == [True] * 5, "replicated: what one rank wrote serves all"
    assert all(torch.equal(p, e) for p, e in zip(pages_of(other_pool, source), expected, strict=True))
    flat = other.batch_get(keys)
    assert all(torch.equal(p.view(torch.uint8), e) for p, e in zip(flat, expected, strict=True))


def test_single_pages(manager: Served, model: str) -> None:
    pool = mha_pool("page_first")
    storage, (key, other) = make(manager, pool, model), names(2)
    page = torch.arange(pool.get_dummy_flat_data_page().numel()).to(torch.float16)
    assert not storage.exists(key)
    assert storage.get(key, pool.get_dummy_flat_data_page()) is None
    assert storage.set(key, page)
    assert storage.set(key, page), "again is fine"
    assert storage.exists(key)
    assert not storage.exists(other)
    assert torch.equal(storage.get(key, pool.get_dummy_flat_data_page()), page)
    assert not storage.set(other, page[:-1]), "of another size"
    storage.clear()
    assert not storage.exists(key)


def test_a_missing_page_ends_the_prefix(manager: Served, model: str) -> None:
    pool = mha_pool("page_head")
    storage, keys = make(manager, pool, model), names(8)
    fill(pool)
    where = indices_of(*range(8))
    storage.batch_set_v1(keys[:3] + keys[4:], torch.cat([where[: 3 * PAGE], where[4 * PAGE :]]))
    assert storage.batch_exists(keys) == 3
    assert storage.batch_exists(keys[4:]) == 4, "a batch begins in the middle of a prompt"
    assert storage.batch_get_v1(keys, where) == [True] * 3 + [False] * 5
    assert storage.batch_get(keys)[2:4][1] is None
    assert storage.batch_set_v1(keys, where) == [True] * 8, "only the missing one is written"
    assert storage.batch_exists(keys) == 8


def test_batches_of_a_long_prompt_hang_together(manager: Served, model: str) -> None:
    """The parent of a batch is known, so the cache drops a prompt's tail before its head."""
    pool = mha_pool("page_first")
    storage, keys = make(manager, pool, model), names(20)
    fill(pool)
    for begin in range(0, 20, 5):
        info = HiCacheStorageExtraInfo(prefix_keys=keys[:begin] or None)
        where = indices_of(*range(begin, begin + 5))
        assert storage.batch_set_v1(keys[begin : begin + 5], where, info) == [True] * 5
    assert storage.batch_exists(keys) == 20
    view, instance = manager.backend.view, storage._pools["kv"].instance_id
    reader = IndexReader(view.index_path(view.instance(instance)))
    assert [run.keys.tolist() for run in reader.runs()] == [page_keys(keys).tolist()], "one chain"
    reader.close()
    gone = HiCacheStorageExtraInfo(prefix_keys=names(3, seed=9))
    assert storage.batch_set_v1(names(2, seed=5), indices_of(0, 1), gone) == [True] * 2, "parent not there"


def test_ranks_layouts_models_and_versions_do_not_meet(manager: Served, model: str) -> None:
    keys, where = names(2), indices_of(0, 1)
    pool = mha_pool("page_first")
    storage = make(manager, pool, model, tp_size=2)
    assert storage.batch_set_v1(keys, where) == [True] * 2
    assert make(manager, mha_pool("page_first"), model, tp_size=2).batch_exists(keys) == 2
    others = [
        make(manager, pool, model, tp_size=2, tp_rank=1),
        make(manager, pool, model, tp_size=4),
        make(manager, pool, model, tp_size=2, pp_size=2),
        make(manager, pool, model + "-x", tp_size=2),
        make(manager, pool, model, tp_size=2, extra={"model_version": "2"}),
        make(manager, mha_pool("page_head"), model, tp_size=2),
        make(manager, mha_pool("page_first", torch.bfloat16), model, tp_size=2),
        make(manager, mha_pool("page_first", layers=2), model, tp_size=2),
    ]
    assert [other.batch_exists(keys) for other in others] == [0] * len(others)


def test_v2_side_pools(manager: Served, model: str) -> None:
    """A side pool of every page and one of the last pages only, as for sliding windows."""
    pool, every, window = mha_pool("page_first"), mha_pool("page_head"), mha_pool("layer_first")
    storage, keys = make(manager, pool, model), names(6)
    for name, side in ((PoolName.INDEXER, every), (PoolName.SWA, window)):
        storage.register_mem_host_pool_v2(side, name)
        fill(side)
    fill(pool)
    where = indices_of(*range(6))
    transfers = [
        PoolTransfer(PoolName.INDEXER, hit_policy=PoolHitPolicy.ALL_PAGES),
        PoolTransfer(PoolName.SWA, keys=keys[:2], hit_policy=PoolHitPolicy.TRAILING_PAGES),
    ]
    assert storage.batch_exists_v2(keys, transfers).kv_hit_pages == 0
    assert storage.batch_set_v1(keys, where) == [True] * 6
    stored = storage.batch_set_v2(
        [
            PoolTransfer(PoolName.INDEXER, host_indices=where[: 5 * PAGE], keys=keys[:5]),
            PoolTransfer(PoolName.SWA, host_indices=indices_of(7, 8, 9), keys=[keys[1], keys[2], keys[5]]),
        ]
    )
    assert stored == {PoolName.INDEXER: [True] * 5, PoolName.SWA: [True] * 3}
    found = storage.batch_exists_v2(keys, transfers)
    assert found.restorable_prefix_pages == [3], "the window of 2 ends at page 3; of page 5 one is missing"
    assert found.kv_hit_pages == 3
    assert found.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.INDEXER: 5, PoolName.SWA: 3}
    assert storage.batch_exists_v2(keys).kv_hit_pages == 6
    expected = [pages_of(every, where)[4], *pages_of(window, indices_of(8, 9))]
    target = indices_of(20, 21, 22)
    got = storage.batch_get_v2(
        [
            PoolTransfer(PoolName.INDEXER, host_indices=target[:PAGE], keys=keys[4:5]),
            PoolTransfer(PoolName.SWA, host_indices=target, keys=[keys[2], keys[3], keys[5]]),
            PoolTransfer(PoolName.MAMBA, host_indices=target, keys=keys[:3]),
        ]
    )
    assert got == {
        PoolName.INDEXER: [True], PoolName.SWA: [True, False, True], PoolName.MAMBA: [False] * 3,
    }  # fmt: skip
    read = [*pages_of(every, target[:PAGE]), *pages_of(window, indices_of(20, 22))]
    assert all(torch.equal(page, original) for page, original in zip(read, expected, strict=True))


def test_trouble_is_a_miss(tmp_path: Path, model: str) -> None:
    pool, keys, where = mha_pool("page_first"), names(3), indices_of(0, 1, 2)
    with served(tmp_path / "data") as manager:
        storage = make(manager, pool, model)
        assert storage.batch_set_v1(keys, where) == [True] * 3
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, where) == [False] * 3
    assert storage.batch_set_v1(keys, where) == [False] * 3
    assert storage.batch_get(keys) == [None] * 3
    late = make(manager, pool, model + "-late")  # an engine that starts while the manager is away
    assert late.batch_exists(keys) == 0
    storage.close()


def test_an_instance_that_was_removed_comes_back(manager: Served, model: str) -> None:
    pool, keys, where = mha_pool("page_first"), names(3), indices_of(0, 1, 2)
    storage = make(manager, pool, model)
    assert storage.batch_set_v1(keys, where) == [True] * 3
    body = {"trace_id": "t", "instance_group": "default", "instance_id": storage._pools["kv"].instance_id}
    httpx.post(f"{manager.url}/api/removeInstance", json=body, timeout=10).raise_for_status()
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, where) == [False] * 3, "noticed here"
    assert storage.batch_set_v1(keys, where) == [True] * 3
    assert storage.batch_exists(keys) == 3


@pytest.mark.parametrize("layout", ["layer_first", "page_first_direct"])
def test_look_ups_on_the_node(running: Manager, model: str, layout: str) -> None:
    """With the data directory: the index is read in this process, writes are actor calls."""
    pool, keys, where = mha_pool(layout), names(16), indices_of(*range(16))
    fill(pool)
    expected = pages_of(pool, where)
    extra = {"kvcm_url": "", "kvcm_data_dir": str(running.data_dir)}
    storage = make(running, pool, model, extra=extra)
    assert storage.batch_set_v1(keys, where) == [True] * 16
    assert storage.batch_exists(keys) == 16
    fill(pool, seed=1)
    assert storage.batch_get_v1(keys, where) == [True] * 16
    assert all(torch.equal(p, e) for p, e in zip(pages_of(pool, where), expected, strict=True))
    assert make(running, pool, model).batch_exists(keys) == 16, "by URL: the same blocks"
    storage.clear()
    assert storage.batch_exists(keys) == 0


def test_wrong_settings_stop_the_engine(manager: Served) -> None:
    with pytest.raises(InvalidArgument, match="kvcm_port"):
        make(manager, mha_pool("page_first"), "m", extra={"kvcm_port": 1})


@pytest.mark.parametrize("probability", [0.5])
def test_sglangs_own_fault_injector(
    manager: Served, model: str, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wrapper knows our class as any other backend; what it lets through is right."""
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", str(probability))
    pool, keys, where = mha_pool("page_first"), names(4), indices_of(0, 1, 2, 3)
    storage = make(manager, pool, model)
    assert type(storage).__name__ == "HiCacheStorageFailureInjector"
    fill(pool)
    expected = pages_of(pool, where)
    for _ in range(40):
        storage.batch_set_v1(keys, where)
    passed = 0
    for _ in range(40):
        target = indices_of(10, 11, 12, 13)
        flags = storage.batch_get_v1(keys, target)
        passed += all(flags)
        if all(flags):
            assert all(torch.equal(p, e) for p, e in zip(pages_of(pool, target), expected, strict=True))
    assert 0 < passed < 40
