"""The HTTP application on a real manager in this process, driven through ASGI by tests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from kvcm_ray.core.model import (
    CacheConfig,
    CachePreferStrategy,
    InstanceGroup,
    InstanceGroupQuota,
    MetaIndexerConfig,
    NfsSpec,
    StorageConfig,
)
from kvcm_ray.serve_app.app import build_app
from kvcm_ray.serve_app.metrics import Metrics
from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.testing.local_backend import LocalBackend


class Http:
    """Synchronous access to the application; one event loop for its whole life."""

    def __init__(self, data_dir: Path, options: GatewayOptions | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self.data_dir = data_dir
        self.backend = LocalBackend(data_dir)
        self.metrics = Metrics(data_dir / "serve-metrics")
        self.app = build_app(self.backend, self.metrics, options)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://manager")

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def raw(self, path: str, body: bytes, **more: Any) -> httpx.Response:
        response: httpx.Response = self.run(self.client.post(path, content=body, **more))
        return response

    def get(self, path: str) -> httpx.Response:
        response: httpx.Response = self.run(self.client.get(path))
        return response

    def post(self, name: str, /, **request: Any) -> dict[str, Any]:
        """The answer of ``/api/<name>``, which must be HTTP 200 and a JSON object."""
        response = self.run(self.client.post(f"/api/{name}", json={"trace_id": "t", **request}))
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        assert isinstance(answer, dict)
        return answer

    def ok(self, name: str, /, **request: Any) -> dict[str, Any]:
        answer = self.post(name, **request)
        assert answer["header"]["status"]["code"] == "OK", answer["header"]
        return answer

    def refused(self, name: str, code: str, /, **request: Any) -> str:
        """The message of a refusal with this code."""
        answer = self.post(name, **request)
        assert answer["header"]["status"]["code"] == code, answer["header"]
        assert answer["header"]["request_id"].startswith("t_")
        return str(answer["header"]["status"]["message"])

    def register(self, instance_id: str, specs: tuple[str, ...] = ("tp0",), **more: Any) -> None:
        request = registration(instance_id) | {
            "location_spec_infos": [{"name": s, "size": 1024} for s in specs]
        }
        self.ok("registerInstance", **(request | more))

    def write(self, instance_id: str, keys: list[int], **more: Any) -> list[dict[str, Any]]:
        """Start and finish a write of all `keys`; the locations it got."""
        started = self.ok(
            "startWriteCache", instance_id=instance_id, block_keys=keys, write_timeout_seconds=30
        )
        self.ok(
            "finishWriteCache",
            instance_id=instance_id,
            write_session_id=started["write_session_id"],
            success_blocks={"offset": len(started["locations"])},
        )
        return list(started["locations"])

    def prefix(self, instance_id: str, keys: list[int], **more: Any) -> list[dict[str, Any]]:
        answer = self.ok(
            "getCacheLocation", instance_id=instance_id, block_keys=keys,
            query_type="QT_PREFIX_MATCH", **more,
        )  # fmt: skip
        return list(answer["locations"])

    def start_default(self, root: Path) -> None:
        """A storage ``nfs_01`` below `root` and the group ``default``."""
        storage = StorageConfig("nfs_01", nfs=NfsSpec(f"{root}/", key_count_per_file=8))
        self.run(self.backend.registry("add_storage", storage))
        self.run(self.backend.registry("create_group", default_group()))

    def close(self) -> None:
        self.run(self.backend.flush_touches())
        self.run(self.client.aclose())
        self.backend.close()
        self.metrics.close()
        self.loop.close()


def registration(instance_id: str) -> dict[str, Any]:
    return {
        "instance_group": "default",
        "instance_id": instance_id,
        "block_size": 128,
        "model_deployment": {"model_name": "m", "dtype": "FP8", "tp_size": 1},
        "location_spec_infos": [{"name": "tp0", "size": 1024}],
    }


def default_group() -> InstanceGroup:
    """As a fresh manager has it: no reclaim strategy, no meta backend."""
    return InstanceGroup(
        name="default",
        storage_candidates=("nfs_01",),
        global_quota_group_name="default_quota_group",
        max_instance_count=100,
        quota=InstanceGroupQuota(capacity=1 << 30),
        cache_config=CacheConfig(
            data_storage_strategy=CachePreferStrategy.CPS_PREFER_3FS,
            meta_indexer_config=MetaIndexerConfig(max_key_count=1_000_000),
        ),
        version=1,
    )
