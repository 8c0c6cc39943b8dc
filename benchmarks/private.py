"""Managers that benchmarks start for themselves, and how they are configured: by HTTP.

The measuring process thereby joins no Ray; clients that do are processes of their own (`children`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.errors import Unavailable

CALL_TIMEOUT_S = 30.0
POLL_S = 0.02
#: Reclaim strategy of groups that are emptied to the quota exactly, and at once.
EXACT: dict[str, Any] = {
    "trigger_strategy": {"used_percentage": 1.0},
    "low_water_percentage": 1.0,
    "delay_before_delete_ms": 0,
}

Json = dict[str, Any]


@dataclass(slots=True)
class Control:
    """A running manager and its administration."""

    data_dir: Path
    backend: HttpBackend

    def call(self, name: str, /, **fields: Any) -> Json:
        """One API call. Raises KvcmError."""
        return drive(self.backend.post(name, fields, CALL_TIMEOUT_S))

    def create_group(
        self, name: str, quota_bytes: int, storages: Sequence[str], **reclaim_strategy: Any
    ) -> None:
        """A group like the default one but for these; no quotas of single storage types."""
        body = self.group("default")
        body |= {"name": name, "version": 1, "storage_candidates": list(storages)}
        body["quota"] = {"capacity": quota_bytes, "quota_config": []}
        body["cache_config"]["reclaim_strategy"] |= reclaim_strategy
        body["cache_config"]["reclaim_strategy"]["storage_unique_name"] = storages[0]
        body["cache_config"]["meta_indexer_config"]["max_key_count"] = 0
        self.call("createInstanceGroup", instance_group=body)

    def set_quota(self, name: str, quota_bytes: int, memory_bytes: int | None = None) -> None:
        """`memory_bytes` bounds what is in shared memory; None: as all the rest."""
        body = self.group(name)
        version = int(body["version"])
        body["version"] = version + 1
        memory = {"storage_type": "ST_TAIRMEMPOOL", "capacity": memory_bytes}
        body["quota"] = {"capacity": quota_bytes, "quota_config": [] if memory_bytes is None else [memory]}
        self.call("updateInstanceGroup", instance_group=body, current_version=version)

    def group(self, name: str) -> Json:
        groups = self.call("listInstanceGroup")["instance_group"]
        return dict(next(group for group in groups if group["name"] == name))

    def capacity(self, group: str) -> Json:
        """The capacity report; see `GroupState.capacity`."""
        return dict(self.call("getCapacity", instance_group=group)["capacity"])

    def reclaimer(self, **settings: Any) -> None:
        """Change `ReclaimerSettings`."""
        self.call("updateReclaimer", **settings)

    def wait(
        self, group: str, until: Callable[[Json], bool], what: str, timeout_s: float = 120.0
    ) -> tuple[float, Json]:
        """Poll the capacity report; when `until` was first true (CLOCK_MONOTONIC), and that report.

        Raises:
            Unavailable: not within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        while not until(report := self.capacity(group)):
            if time.monotonic() > deadline_s:
                raise Unavailable(f"group {group!r} is not {what} after {timeout_s:g} s: {report}")
            time.sleep(POLL_S)
        return time.monotonic(), report

    def wait_idle(self, group: str) -> Json:
        """Until no write is open and nothing waits to be erased."""
        return self.wait(group, is_idle, "idle")[1]


def is_idle(report: Json) -> bool:
    return not (report["reserved_bytes"] or report["pending_delete_bytes"])


@contextmanager
def private_manager(tiers: Sequence[str], **options: Any) -> Iterator[Control]:
    """A manager in a temporary directory, with one HTTP replica; removed at the end."""
    from kvcm_ray import cluster

    directory = Path(tempfile.mkdtemp(prefix="kvcm-bench-"))
    data_dir = directory / "data"
    try:
        url = cluster.up_detached(data_dir, 0, tiers, replicas=1, **options).url
        backend = HttpBackend(url, blocking=True)
        try:
            yield Control(data_dir, backend)
        finally:
            drive(backend.close())
    finally:
        cluster.down(data_dir, purge=True)
        shutil.rmtree(directory, ignore_errors=True)
