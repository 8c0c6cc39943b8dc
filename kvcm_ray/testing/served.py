"""A whole manager without Ray behind a real HTTP server in this process, for clients and the CLI.

The server is uvicorn on a free loopback port in a thread of its own; ``manager.json`` lies in the
data directory, so that ``--data-dir`` finds it. Storages: ``files`` and ``memory``; group:
``default``. A manager that was kept can be served again, at another port.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from kvcm_ray.actors import paths
from kvcm_ray.core.model import CachePreferStrategy, NfsSpec, ShmSpec, StorageConfig
from kvcm_ray.serve_app.app import build_app
from kvcm_ray.serve_app.metrics import Metrics
from kvcm_ray.testing.certificates import Certificate
from kvcm_ray.testing.http import default_group
from kvcm_ray.testing.local_backend import LocalBackend


@dataclass(slots=True)
class Served:
    url: str
    data_dir: Path
    backend: LocalBackend


@contextmanager
def served(data_dir: Path, *, keep: bool = False, tls: Certificate | None = None) -> Iterator[Served]:
    """Serve the manager of `data_dir`, a fresh one if there is none; `keep` what is in shared memory."""
    memory = Path("/dev/shm") / f"kvcm-test-{paths.data_dir_hash(paths.resolve(data_dir))}"
    backend = LocalBackend(data_dir)
    metrics = Metrics(data_dir / "serve-metrics")
    listener = socket.create_server(("127.0.0.1", 0))
    files = {"ssl_certfile": str(tls.cert), "ssl_keyfile": str(tls.key)} if tls else {}
    config = uvicorn.Config(build_app(backend, metrics), log_level="error", lifespan="off", **files)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    try:
        asyncio.run(_set_up(backend, data_dir / "tiers" / "files", memory))
        thread.start()
        url = f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        (data_dir / "manager.json").write_text(json.dumps({"url": url}))
        yield Served(url, data_dir, backend)
    finally:
        server.should_exit = True
        if thread.is_alive():
            thread.join(10)
        backend.close()
        metrics.close()
        listener.close()
        (data_dir / "manager.json").unlink(missing_ok=True)
        if not keep:
            shutil.rmtree(memory, ignore_errors=True)


async def _set_up(backend: LocalBackend, files: Path, memory: Path) -> None:
    if backend.groups():
        return
    await backend.registry("add_storage", StorageConfig("files", nfs=NfsSpec(str(files))))
    await backend.registry("add_storage", StorageConfig("memory", shm=ShmSpec(str(memory))))
    group = default_group()
    config = group.cache_config
    assert config is not None
    prefer = replace(config, data_storage_strategy=CachePreferStrategy.CPS_PREFER_TAIR_MEMPOOL)
    group = replace(group, storage_candidates=("memory", "files"), cache_config=prefer)
    await backend.registry("create_group", group)
