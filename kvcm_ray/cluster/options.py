"""What a manager is started with, in one place: the command line, the background child and `up` share it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT

PORT = 6382


@dataclass(frozen=True, slots=True)
class Options:
    """What a manager is started with.

    Args:
        data_dir: made if it does not exist.
        port: of HTTP; 0 picks a free one.
        tiers: see `kvcm_ray.cluster.defaults`; they count for a new data directory only.
        host: address that HTTP and gRPC listen on.
        replicas: processes that answer HTTP and gRPC.
        reclaimers: processes that erase blocks.
    """

    data_dir: str | os.PathLike[str]
    port: int = PORT
    tiers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    replicas: int = 2
    reclaimers: int = RECLAIMERS_DEFAULT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> Options:
        fields = json.loads(text)
        return cls(**{**fields, "tiers": tuple(fields["tiers"])})
