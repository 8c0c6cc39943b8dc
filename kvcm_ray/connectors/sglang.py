"""A storage backend for SGLang's hierarchical cache (HiCache), loaded by its dynamic backend mechanism.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvcm", "interface_v1": 1,
        "module_path": "kvcm_ray.connectors.sglang", "class_name": "KVCMStorage",
        "kvcm_data_dir": "/path/of/the/manager"}'

(`Settings` lists what else may be said.) Each host pool of a rank is one instance of the manager, whose id
names all that its bytes depend on: model, type, layout, shape, layers and, unless the pool is replicated, the
rank. So another layout or another parallelism is a miss, never wrong bytes. SGLang's ranks agree on what they
have by themselves. A page is one block. Where a page is at most two pieces of memory (K and V of the
page-first layouts) each is a spec of its own and moves straight between pool and storage; otherwise pages
pass through a buffer. Both interfaces (flat pages, v1) store the same bytes, so they read each other's.

Block keys come from SGLang's page hashes (`keys`). Trouble of the cache is a miss, or a page not stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from kvcm_ray.client import Client, connect
from kvcm_ray.connectors.hicache import Pages, Settings, page_keys, restorable, settings_of

Flags = list[bool]
TP_SHARDED = ("mamba", "draft", "draft_swa")  #: pools that differ by TP rank also where KV is replicated


class KVCMStorage(HiCacheStorage):  # type: ignore[misc]
    """See the module's text. Made by SGLang, one for each rank."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        """Raises InvalidArgument for a wrong word in the extra config, Unavailable for no such manager."""
        self._config = storage_config
        self._settings: Settings = settings_of(storage_config.extra_config or {})
        self._client: Client = connect(self._settings.address)
        self._pools: dict[str, Pages] = {}

    # ------------------------------------------------------------------------- registering pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(PoolName.KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) not in self._pools:
            self._register(host_pool_name, host_pool)

    def _register(self, name: Any, pool: Any) -> None:
        if getattr(pool, "kv_buffer", True) is None:
            return  # it holds nothing of its own; its side pools do
        identity = self._identity(str(name), pool)
        step = getattr(pool, "logical_page_size", None) or getattr(pool, "page_size", None) or 1
        self._pools[str(name)] = Pages(self._client, self._settings, pool, identity, torch.arange(step))

    def _identity(self, name: str, pool: Any) -> dict[str, Any]:
        """All that the bytes of a page depend on."""
        config = self._config
        replicated = config.is_mla_model and name not in TP_SHARDED
        ranks = {
            "tp": (0, 0) if replicated else (config.tp_rank, config.tp_size),
            "pp": (config.pp_rank, config.pp_size),
            "cp": (config.attn_cp_rank, config.attn_cp_size),
            "dcp": (config.dcp_rank, config.dcp_size),
        }
        shape = ("layer_num", "head_num", "head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim")
        fields = ("dtype", "layout", "page_size", "start_layer", "end_layer", "storage_format_tag", *shape)
        parts = {field: str(getattr(pool, field, "")) for field in fields}
        return {"pool": name, "model": config.model_name or "", **ranks, **parts}

    # ----------------------------------------------------------------------------------- v1, pages

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        pages = self._pools.get(PoolName.KV.value)
        if pages is None:
            return len(keys)  # a logical pool: the side pools decide
        return pages.match_length(page_keys(keys))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> Flags:
        pages = self._pools.get(PoolName.KV.value)
        return [True] * len(keys) if pages is None else pages.load(page_keys(keys), host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> Flags:
        pages = self._pools.get(PoolName.KV.value)
        if pages is None:
            return [True] * len(keys)
        return pages.save(page_keys(keys), host_indices, parent=_parent(extra_info))

    # ------------------------------------------------------------------------- generic, flat pages

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """`target_locations` are flat pages to be filled; they are what is returned, up to the first miss."""
        if target_locations is None:
            target_locations = [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
        flags = self._pools[PoolName.KV.value].load_flat(page_keys(keys), target_locations)
        return [page if good else None for page, good in zip(target_locations, flags, strict=True)]

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all(self._pools[PoolName.KV.value].save_flat(page_keys(keys), values))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    # --------------------------------------------------------------------------- v2, several pools

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Side pools that group their keys (BLOCK_GROUPS) get no verdict, which SGLang allows."""
        numbers = page_keys(keys)
        usable = self.batch_exists(keys, extra_info)
        hits = {PoolName.KV: usable} if usable else {}
        prefixes = np.arange(1, usable + 1)
        for transfer in pool_transfers or []:
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS or not len(prefixes):
                continue
            pages = self._pools.get(str(transfer.name))
            found = np.zeros(usable, np.bool_) if pages is None else pages.lookup(numbers[:usable])
            trailing = transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES
            good = restorable(found, max(1, len(transfer.keys or ())) if trailing else usable)
            if len(good):
                hits[transfer.name] = int(good[-1])
            prefixes = np.intersect1d(prefixes, good)
        return PoolTransferResult(int(prefixes[-1]) if len(prefixes) else 0, hits, prefixes.tolist())

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, Flags]:
        return {transfer.name: self._move(transfer, Pages.load_each) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, Flags]:
        return {transfer.name: self._move(transfer, Pages.save) for transfer in transfers}

    def _move(self, transfer: PoolTransfer, work: Any) -> Flags:
        keys, pages = transfer.keys or [], self._pools.get(str(transfer.name))
        if not keys or pages is None or transfer.host_indices is None:
            return [False] * len(keys)
        flags: Flags = work(pages, page_keys(keys), transfer.host_indices)
        return flags

    # ------------------------------------------------------------------------------------- the rest

    def clear(self) -> None:
        """Forget the pages of this rank's instances, whoever wrote them."""
        for pages in self._pools.values():
            pages.clear()

    def close(self) -> None:
        self._client.close()


def _parent(extra_info: HiCacheStorageExtraInfo | None) -> str | None:
    """The page before the first one: by it the cache knows what hangs on what."""
    prefix = extra_info.prefix_keys if extra_info is not None else None
    return prefix[-1] if prefix else None
