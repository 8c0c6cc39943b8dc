"""`KVCMConnector`: the two sides behind vLLM's connector interface. Needs vLLM 0.32 or newer.

vLLM makes one object in the scheduler's process and one in each worker. This class only translates; what a
method is for is said in vLLM's base class, and how we do it in `scheduler` and `worker`. A model whose
cache cannot be saved, and a manager that is not there, leave the engine running without a cache.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvcm_ray.connectors.vllm import identity
from kvcm_ray.connectors.vllm.layout import Layout, layout_of
from kvcm_ray.connectors.vllm.link import Link
from kvcm_ray.connectors.vllm.memory import shape_text, worker_memory
from kvcm_ray.connectors.vllm.metrics import KVCMPromMetrics, KVCMStats
from kvcm_ray.connectors.vllm.orders import Orders, Report
from kvcm_ray.connectors.vllm.scheduler import SchedulerSide
from kvcm_ray.connectors.vllm.settings import settings_of
from kvcm_ray.connectors.vllm.windows import Part, parts_of, spec_groups
from kvcm_ray.connectors.vllm.worker import WorkerSide
from kvcm_ray.core.model import ModelDeployment
from kvcm_ray.errors import KvcmError, Unsupported

log = logging.getLogger("vllm.kvcm")


@dataclass
class StepMetadata(KVConnectorMetadata):
    orders: Orders = field(default_factory=Orders)


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    report: Report = field(default_factory=Report)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(self.report.merge(other.report))


@dataclass
class HandshakeMetadata(KVConnectorHandshakeMetadata):
    """What a worker's cache looks like, told once at the engine's start."""

    specs: dict[str, int]
    shape: str
    writes: bool  #: False: another rank holds the same bytes and writes them


class KVCMConnector(KVConnectorBase_V1, SupportsHMA):
    """See the text of `kvcm_ray.connectors.vllm` for how to configure it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = settings_of(transfer.kv_connector_extra_config)
        self._settings = dataclasses.replace(
            settings,
            load=settings.load and transfer.is_kv_consumer,
            save=settings.save and transfer.is_kv_producer,
        )
        # With "fail", vLLM's default, a block that does not come would fail its request.
        transfer.kv_load_failure_policy = "recompute"
        self._layout: Layout | None = None
        try:
            self._layout = self._checked_layout()
        except Unsupported as error:
            log.warning("kvcm: this engine runs without the cache: %s", error)
        self._pool: Any = None
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._handshake: HandshakeMetadata | None = None
        self._missing: set[int] = set()

    def _checked_layout(self) -> Layout:
        parallel = self._vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise Unsupported("context parallelism spreads a block's tokens over ranks")
        algorithm = self._vllm_config.cache_config.prefix_caching_hash_algo
        if identity.hash_scheme(algorithm) is None:
            raise Unsupported(
                f"{algorithm} hashes differ between processes; set PYTHONHASHSEED, or use sha256"
            )
        return layout_of(self._kv_cache_config, self._vllm_config.cache_config.block_size)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is dropped is a later miss

    # ------------------------------------------------------------------------------ worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._layout is None:
            return
        rank, writes = self._rank()
        try:
            memory = worker_memory(self._layout, kv_caches, rank)
        except Unsupported as error:
            log.warning("kvcm: this engine runs without the cache: %s", error)
            return
        shape = shape_text(self._layout, kv_caches)
        self._handshake = HandshakeMetadata(memory.sizes, shape, writes)
        self._worker = WorkerSide(self._settings, memory, writes=writes)

    def _rank(self) -> tuple[str, bool]:
        """Name of this worker's specs, and whether it is the one that writes them."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        replicas = int(getattr(self._kv_cache_config, "kv_tp_replicas", 1))
        rank = get_tp_group().rank_in_group
        name = f"tp{rank // replicas}"
        if self._vllm_config.parallel_config.pipeline_parallel_size > 1:
            name = f"pp{get_pp_group().rank_in_group}-{name}"
        return name, rank % replicas == 0

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._handshake

    def _orders(self) -> Orders:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.orders

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.begin_step(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.layer_computed(self._orders(), layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Graphs that run as a whole do not wait for layers, so loads within a step forbid them."""
        return extra_config.get("async_load") is False

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end_step(self._orders())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        if self._worker is None or self._layout is None:
            return results
        for request_id, missing in self._worker.finished_loads().items():
            results.finished_recving.add(request_id)
            if missing and len(self._layout.groups) > 1:
                results.failed_recving.add(request_id)
            else:
                self._missing |= missing
        return results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self.get_transfer_results(finished_req_ids).finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        missing, self._missing = self._missing, set()
        return missing if self._worker is None else missing | self._worker.take_missing()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.report() if self._worker is not None else None
        return None if report is None else WorkerMetadata(report)

    # --------------------------------------------------------------------------- scheduler side

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        workers = [found for found in metadata.values() if isinstance(found, HandshakeMetadata)]
        if not workers or len(workers) != self._vllm_config.parallel_config.world_size:
            return  # a worker has said why
        if self._layout is None or self._pool is None:
            return
        specs: dict[str, int] = {}
        for worker in workers:
            specs |= worker.specs
        shapes = sorted({worker.shape for worker in workers})
        parts = parts_of(self._layout)
        link = Link(self._settings, self._instance_info(specs, shapes, parts), parts)
        self._scheduler = SchedulerSide(
            link, self._layout, workers=len(workers), writers=sum(worker.writes for worker in workers),
            hold=self._hold, release=self._release, null_block=self._pool.null_block.block_id,
            whole_prompts=self._whole_prompts(),
        )  # fmt: skip
        if not link.connect():
            log.warning("kvcm: no manager at %s yet; the engine starts without it", self._settings.address)

    def _whole_prompts(self) -> bool:
        """Where vLLM turns both features off for latent attention, it computes a prompt as if nothing
        was before it; only single tokens see the cache. (The CPU build does.)"""
        chunked = self._vllm_config.scheduler_config.enable_chunked_prefill
        cached = self._vllm_config.cache_config.enable_prefix_caching
        return bool(self._vllm_config.model_config.use_mla and not chunked and not cached)

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): found for rank, found in metadata.items()})

    def _instance_info(self, specs: dict[str, int], shapes: list[str], parts: tuple[Part, ...]) -> Any:
        assert self._layout is not None
        config = self._vllm_config
        model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
        version = self._settings.model_version or identity.weights_version(
            model.model, model.revision, str(config.load_config.load_format), model.seed
        )
        speculative = getattr(config.speculative_config, "model", "")
        return identity.instance_info(
            group=self._settings.instance_group,
            instance_id=self._settings.instance_id,
            block_tokens=self._layout.block_tokens,
            specs=specs,
            deployment=ModelDeployment(
                model_name=identity.model_name(model.model), dtype=str(model.dtype),
                use_mla=bool(model.use_mla), tp_size=parallel.tensor_parallel_size,
                pp_size=parallel.pipeline_parallel_size, extra="vllm",
            ),
            version=version,
            spec_groups=spec_groups(parts, specs),
            depends_on=(
                model.hf_config.to_json_string(), model.quantization, cache.cache_dtype, speculative,
                identity.hash_scheme(cache.prefix_caching_hash_algo), self._layout.hash_tokens, *shapes,
            ),
        )  # fmt: skip

    def _hold(self, blocks: list[int]) -> None:
        self._pool.touch([self._pool.blocks[block] for block in blocks])

    def _release(self, blocks: list[int]) -> None:
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(blocks)])

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None and num_external_tokens:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        if self._scheduler is None or not num_external_tokens:
            return {}
        tiers = self._scheduler.tiers(request, num_external_tokens)
        names = {True: CacheHitSource.HOST, False: CacheHitSource.DISK}
        return {names[in_memory]: tokens for in_memory, tokens in tiers.items()}

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._scheduler is None:
            return StepMetadata()
        state = scheduler_output.kv_connector_block_state
        tables = state.get_block_ids if state is not None else lambda request_id: None
        return StepMetadata(self._scheduler.orders(scheduler_output.num_scheduled_tokens, tables))

    def update_connector_output(self, connector_output: Any) -> None:
        found = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(found, WorkerMetadata):
            self._scheduler.heard(found.report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finished(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.saving.pending

    def has_pending_block_frees(self) -> bool:
        return self._scheduler is not None and self._scheduler.saving.holds

    def take_events(self) -> Iterable[Any]:
        return ()

    def reset_cache(self) -> bool | None:
        """The cache is shared with other engines: an engine that forgets its own blocks leaves it be."""
        return None

    # ---------------------------------------------------------------------------------- figures

    def get_kv_connector_stats(self) -> KVCMStats | None:
        stats = KVCMStats()
        if self._worker is not None:
            moved = self._worker.moved()
            for name in ("loaded_blocks", "loaded_bytes", "load_seconds", "saved_bytes", "save_seconds"):
                stats.data[name] = getattr(moved, name)
            stats.data["unsaved_blocks"] = moved.unsaved_blocks
        if self._scheduler is not None:
            stats.data |= self._scheduler.take_counts()
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVCMStats:
        return KVCMStats(data=data) if data is not None else KVCMStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVCMPromMetrics:
        return KVCMPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        try:
            if self._worker is not None:
                self._worker.close()
            if self._scheduler is not None:
                self._scheduler.close()
        except KvcmError as error:
            log.debug("kvcm: %s", error)
