"""Pages of real torch tensors into blocks and back: numpy, torch and the Triton kernel, all bit for bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcm_ray.connectors.paged import PagedCache, copying, gather, host, planes_of, way_of
from kvcm_ray.connectors.paged.pinned import HostMemory
from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.testing import paged

BLOCKS = 12
ON_CPU = not torch.cuda.is_available()


@pytest.mark.parametrize("way", ["numpy", "torch"])
def test_blocks_and_pages_are_the_same_bits(way: str) -> None:
    for seed in range(80):
        paged.check(paged.case(seed), way)


def test_the_cases_are_of_all_kinds() -> None:
    texts = [paged.case(seed).text for seed in range(60)]
    for word in (*paged.KINDS, *paged.POOLS, "page_first", "layer_first", "float8_e4m3fn", "bfloat16"):
        assert any(word in text for text in texts), word


def test_the_kernel_copies_the_same_bits(tmp_path: Path) -> None:
    """Under Triton's interpreter, in a process of its own: it is switched on by importing Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "kvcm_ray.testing.paged", "20", "triton"],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"cases": 20, "ways": ["triton"]}


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvcm_ray.connectors.paged.kernels import FIELDS, WORDS, copy_pages
found = {}
for word, aligned in (("*i64", True), ("*i64", False), ("*i32", False), ("*u8", False)):
    for into_cache in (False, True):
        source = ASTSource(
            fn=copy_pages,
            signature={"table": "*i64", "ids": "*i64", "blocks": word, "block_words": "i32", "pages": "i32",
                       **dict.fromkeys(["fields", "words", "aligned", "into_cache"], "constexpr")},
            constexprs={"fields": FIELDS, "words": WORDS, "aligned": aligned, "into_cache": into_cache},
            attrs={(n,): [["tt.divisibility", 16]] for n in range(3 if aligned else 2)},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
        found[f"{word} {aligned} {into_cache}"] = compiled.asm["ptx"]
print(json.dumps(found))
"""


def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """No GPU is needed for that. Aligned memory is read and written by 16 bytes at a time."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout)
    assert len(codes) == 8
    for into_cache in (False, True):
        code = codes[f"*i64 True {into_cache}"]
        assert re.search(r"ld\.global\.v2\.b64", code)
        assert re.search(r"st\.global\.v2\.b64", code)


class TestPlanes:
    @pytest.mark.parametrize(
        ("tensor", "planes", "run"),
        [
            (torch.zeros(BLOCKS, 2, 16, 64), 1, 2 * 16 * 64 * 4),
            (torch.zeros(BLOCKS, 16, 2, 64).permute(0, 2, 1, 3), 1, 2 * 16 * 64 * 4),
            (torch.zeros(2, BLOCKS, 16, 2, 32), 2, 16 * 2 * 32 * 4),
            (torch.zeros(4, BLOCKS, 16, 64).permute(1, 0, 2, 3), 4, 16 * 64 * 4),
            (torch.zeros(BLOCKS, 4, 3, 16, 64)[:, :, 1], 4, 16 * 64 * 4),
            (torch.zeros(BLOCKS, 1, 16, 64), 1, 16 * 64 * 4),
            (torch.zeros(4 * BLOCKS, 2, 4, 64), 1, 4 * 2 * 4 * 64 * 4),
            (torch.zeros(BLOCKS, 3 * 128)[:, :128].unflatten(1, (2, 64)), 1, 128 * 4),
            (torch.zeros(1, 2, 16, 64), 1, 2 * 16 * 64 * 4),
        ],
        ids=["HND", "NHD", "separate", "heads outside", "pool", "one head", "kernel pages", "padded", "one"],
    )
    def test_of_the_layouts_that_engines_have(self, tensor: torch.Tensor, planes: int, run: int) -> None:
        pages = 1 if tensor.shape[0] == 1 else BLOCKS
        found = planes_of(tensor, pages)
        assert [tuple(rows.shape) for rows in found] == [(pages, run)] * planes
        assert {rows.untyped_storage().data_ptr() for rows in found} == {tensor.untyped_storage().data_ptr()}

    def test_others_are_refused(self) -> None:
        with pytest.raises(Unsupported, match="no dimension of 12 blocks"):
            planes_of(torch.zeros(16, 64, BLOCKS), BLOCKS)
        with pytest.raises(Unsupported, match="scattered"):
            planes_of(torch.zeros(BLOCKS, 64, 2)[:, :, 0], BLOCKS)


class TestWays:
    def test_are_chosen_and_forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = PagedCache([torch.zeros(4, 16, dtype=torch.uint8)])
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert way_of(cache) == "numpy"
        assert way_of(cache, "torch") == "torch"
        monkeypatch.setenv("KVCM_PAGED_COPY", "torch")
        assert way_of(cache) == "torch"
        monkeypatch.setenv("KVCM_PAGED_COPY", "fast")
        with pytest.raises(InvalidArgument, match="'fast' is no way"):
            way_of(cache)
        monkeypatch.delenv("KVCM_PAGED_COPY")
        with pytest.raises(Unsupported, match="TRITON_INTERPRET"):
            way_of(cache, "triton")

    def test_a_cache_that_is_elsewhere_is_not_mixed_up(self) -> None:
        cache = PagedCache([torch.zeros(4, 16, dtype=torch.uint8, device="meta")])
        assert way_of(cache) == "triton"
        with pytest.raises(Unsupported, match="meta"):
            way_of(cache, "numpy")
        with pytest.raises(InvalidArgument, match="blocks on cpu for a cache on meta"):
            gather(cache, np.zeros((1, 1), np.int64), np.zeros((1, 16), np.uint8))

    def test_a_kernel_that_does_not_work_is_torchs_turn(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """There is no driver for this device."""
        monkeypatch.setattr(copying._Kernel, "works", True)
        cache = PagedCache([torch.zeros(4, 16, dtype=torch.uint8, device="meta")])
        out = torch.zeros(1, 16, dtype=torch.uint8, device="meta")
        with pytest.raises(Exception, match=r"."):
            gather(cache, np.zeros((1, 1), np.int64), out, "triton")
        assert way_of(cache) == "triton"
        gather(cache, np.zeros((1, 1), np.int64), out)
        assert way_of(cache) == "torch"
        assert "pages are copied by torch" in caplog.text


@pytest.mark.skipif(ON_CPU, reason="needs a GPU")
class TestGpu:
    """What only a GPU shows."""

    @pytest.mark.parametrize("way", ["torch", "triton"])
    def test_blocks_are_the_same_bits(self, way: str) -> None:
        for seed in range(100):
            one = paged.case(seed)
            there = PagedCache(
                [plane.rows.cuda() for plane in one.cache.planes], one.cache.pages, one.cache.order
            )
            out = torch.full((len(one.ids), there.bytes), 0xA5, dtype=torch.uint8, device="cuda")
            gather(there, one.ids, out, way)
            expected = paged.plain(one, np.full(tuple(out.shape), 0xA5, np.uint8))
            assert np.array_equal(out.cpu().numpy(), expected), one.text

    @pytest.mark.parametrize("planes", [None, range(1, 3)])
    def test_host_memory_and_back(self, planes: range | None) -> None:
        rows = torch.randint(0, 256, (4, 4096, 65536), dtype=torch.uint8, device="cuda")
        cache = PagedCache(list(rows), 2)
        ids = np.random.default_rng(0).permutation(4096)[:800].reshape(400, 2).astype(np.int64)
        memory = HostMemory()
        buffer = memory.new(len(ids) * cache.bytes)
        assert memory.is_pinned(buffer)
        blocks = buffer.reshape(len(ids), cache.bytes)
        torch.cuda.synchronize()
        host.gather_to_host(cache, ids, blocks, planes)
        before = rows.clone()
        chosen = range(4) if planes is None else planes
        for plane in chosen:
            rows[plane, ids.reshape(-1)] = 0
        torch.cuda.synchronize()
        thread = threading.Thread(target=host.scatter_from_host, args=(cache, ids, blocks, planes))
        thread.start()
        thread.join()
        assert torch.equal(rows, before)
        memory.drop(buffer)
        assert not memory.is_pinned(buffer)
