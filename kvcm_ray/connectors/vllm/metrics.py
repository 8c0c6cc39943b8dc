"""Figures for vLLM's log and its Prometheus endpoint (``vllm:kvcm_...``). Needs vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

#: name -> what it counts
COUNTERS = {
    "lookups": "Look-ups of prompts in the index",
    "asked_blocks": "Blocks that were looked up",
    "found_blocks": "Blocks that were found",
    "loaded_blocks": "Blocks that were loaded into the engine",
    "loaded_bytes": "Bytes that were loaded into the engine",
    "failed_loads": "Loads that the engine had to make up for by computing",
    "saved_blocks": "Blocks that were saved and are readable",
    "saved_bytes": "Bytes that were written to a storage",
    "unsaved_blocks": "Blocks that were to be saved and were not",
}
#: name -> what it measures, in seconds
TIMES = {
    "lookup_seconds": "Time of look-ups, in the scheduler",
    "load_seconds": "Time of loads, from their start until the engine may use the blocks",
    "save_seconds": "Time of writing captured blocks, in the background",
}
_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


@dataclass
class KVCMStats(KVConnectorStats):
    """``data``: counters as numbers, times as lists."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {**dict.fromkeys(COUNTERS, 0), **{name: [] for name in TIMES}}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        found: dict[str, int | float] = {name: self.data[name] for name in COUNTERS}
        for name in TIMES:
            values = sorted(self.data[name])
            if values:
                found[f"{name}_p50"] = round(values[len(values) // 2], 6)
                found[f"{name}_max"] = round(values[-1], 6)
        return found

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KVCMPromMetrics(KVConnectorPromMetrics):
    """The same figures, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvcm_{name}", documentation=text, labelnames=labelnames)
            self._metrics[name] = self._by_engine(counter)
        for name, text in TIMES.items():
            histogram = self._histogram_cls(
                name=f"vllm:kvcm_{name}", documentation=text, labelnames=labelnames, buckets=_BUCKETS
            )
            self._metrics[name] = self._by_engine(histogram)

    def _by_engine(self, metric: Any) -> dict[int, Any]:
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name in COUNTERS:
            if transfer_stats_data.get(name):
                self._metrics[name][engine_idx].inc(transfer_stats_data[name])
        for name in TIMES:
            for seconds in transfer_stats_data.get(name, ()):
                self._metrics[name][engine_idx].observe(seconds)
