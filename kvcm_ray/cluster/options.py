"""What a manager is started with, in one place: the command line, the background child and `up` share it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT

PORT = 6382
GRPC_PORT = 6381


@dataclass(frozen=True, slots=True)
class Options:
    """What a manager is started with.

    Args:
        data_dir: made if it does not exist.
        port: of HTTP; 0 picks a free one.
        grpc_port: of gRPC; 0 picks a free one, -1 is no gRPC; None: 6381 if HTTP is on 6382, else a free one.
        tiers: see `kvcm_ray.cluster.defaults`; they count for a new data directory only.
        host: address that HTTP and gRPC listen on.
        replicas: processes that answer HTTP and gRPC.
        reclaimers: processes that erase blocks.
        log_format: "text" or "json", of all processes; see `kvcm_ray.logs`.
        log_level: "debug", "info", "warning" or "error".
        accounts: calls need an account; None: as the data directory has it, a new one is open.
        tls_cert, tls_key: PEM files; HTTP and gRPC speak TLS with them.
        requests_per_second: that one account may send to one replica, or one address while the manager is
            open; 0 for no limit.
        debug_api: serve the API that makes calls fail on purpose, over HTTP and gRPC.
        declared: storages and groups that shall exist; see `kvcm_ray.config.declared`.
    """

    data_dir: str | os.PathLike[str]
    port: int = PORT
    tiers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    replicas: int = 2
    reclaimers: int = RECLAIMERS_DEFAULT
    log_format: str = "text"
    log_level: str = "info"
    accounts: bool | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    requests_per_second: float = 0.0
    grpc_port: int | None = None
    debug_api: bool = False
    declared: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> Options:
        fields = json.loads(text)
        return cls(**{**fields, "tiers": tuple(fields["tiers"])})
