"""What can be set: one class for the file, the environment and the flags of ``kvcm up``.

The fields of `Settings` before `storages` are those of `kvcm_ray.cluster.Options`, which stays the one
list of launch settings (a test compares names and defaults); those of `Group` are the options of
``kvcm group``. Each field says its meaning, and where it helps its unit and what raising it does: that is
what ``kvcm config explain`` and ``kvcm config example`` print.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT
from kvcm_ray.cli.output import BYTES
from kvcm_ray.cli.values import FRACTION, SECONDS
from kvcm_ray.client.connect import DATA_DIR
from kvcm_ray.cluster.defaults import parse_tiers
from kvcm_ray.cluster.options import GRPC_PORT, PORT
from kvcm_ray.config.group_form import POLICIES, STRATEGIES
from kvcm_ray.core.model import safe_name
from kvcm_ray.errors import InvalidArgument


def setting(default: Any, meaning: str, *, unit: str = "", raised: str = "", **limits: Any) -> Any:
    """A field with all that is said about it."""
    about: dict[str, Any] = {"unit": unit, "raised": raised}
    if callable(default):
        return Field(default_factory=default, description=meaning, json_schema_extra=about, **limits)
    return Field(default, description=meaning, json_schema_extra=about, **limits)


def _as(kind: click.ParamType) -> Callable[[Any], Any]:  # type: ignore[type-arg]
    """Values are written as on the command line."""

    def read(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number")
        try:
            return kind.convert(str(value), None, None)
        except click.BadParameter as error:
            raise ValueError(error.message) from error

    return read


Size = Annotated[int, BeforeValidator(_as(BYTES))]
Share = Annotated[float, BeforeValidator(_as(FRACTION))]
Time = Annotated[int, BeforeValidator(_as(SECONDS))]


class Storage(BaseModel):
    """A place for the bytes of blocks, beside those that the tiers make."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["file", "shm"] = setting("file", "file: in any file system; shm: below /dev/shm")
    path: str = Field(description="absolute directory; made if it does not exist", pattern="^/")


class Group(BaseModel):
    """A quota and a list of storages for a team or a model family; the options of `kvcm group`."""

    model_config = ConfigDict(extra="forbid")

    quota: Size | None = setting(
        None,
        "bytes that the group's blocks may take over all storages",
        unit="bytes, as 8GiB",
        gt=0,
        raised="more hits, until the device is full; eviction begins later. It acts at once.",
    )
    file_quota: Size | None = setting(
        None,
        "the part of the quota that may lie on file storages",
        unit="bytes, as 8GiB",
        gt=0,
    )
    memory_quota: Size | None = setting(
        None,
        "the part of the quota that may lie in shared memory",
        unit="bytes, as 8GiB",
        gt=0,
        raised="more hits from memory; the machine has so much less for others",
    )
    storages: list[str] | None = setting(
        None, "names of storages that blocks may go to, fastest first; tiers are shm_01, nfs_01, ..."
    )
    prefer: Literal[tuple(STRATEGIES)] | None = setting(None, "storages to choose from first")  # type: ignore[valid-type]
    policy: Literal[tuple(POLICIES)] | None = setting(None, "what is evicted first")  # type: ignore[valid-type]
    high_water: Share | None = setting(
        None,
        "reclaiming begins when this share of the quota is used; 0: when a write finds no room",
        unit="share, as 95%",
        raised="more blocks are kept, and bursts of writes find less room at once",
    )
    high_water_bytes: Size | None = setting(
        None, "the same in bytes over all storages; 0: not set", unit="bytes, as 8GiB"
    )
    low_water: Share | None = setting(
        None,
        "reclaiming goes on down to this share; 0: 5 % below the high mark",
        unit="share, as 90%",
        raised="smaller and more frequent rounds of reclaiming",
    )
    ttl: Time | None = setting(
        None, "what nobody touched for so long is dropped; 0: never", unit="seconds, as 90s, 5m, 2h, 1d"
    )
    period: Time | None = setting(
        None, "time between looks at the marks; 0: always", unit="seconds, as 90s, 5m"
    )
    step: int | None = setting(
        None,
        "most blocks that one step of reclaiming takes; 0: 1024",
        unit="blocks",
        ge=0,
        raised="room is made faster, and a request may wait longer for a step to end",
    )
    step_percent: int | None = setting(
        None, "the same in percent of all blocks; 0: no bound", unit="percent", ge=0, le=100
    )
    delete_delay_ms: int | None = setting(
        None,
        "time between evicting a block and erasing its bytes",
        unit="milliseconds",
        ge=0,
        raised="slow readers lose fewer blocks under their hands; evicted bytes are free later",
    )
    max_instances: int | None = setting(None, "instances that may be registered; 0: no limit", ge=0)
    max_keys: int | None = setting(None, "blocks that an instance may hold; 0: no limit", unit="blocks", ge=0)


class Settings(BaseModel):
    """Everything that a manager is started with."""

    model_config = ConfigDict(extra="forbid")

    data_dir: str = setting(
        DATA_DIR, "directory where the manager keeps everything; in a file relative to that file"
    )
    port: int = setting(PORT, "port of HTTP; 0 picks a free one", ge=0, le=65535)
    tiers: list[str] = setting(
        list,
        "shm:SIZE or file:SIZE[:PATH], fastest first; they count for a new data directory only, "
        "where none means shm:256MiB, file:8GiB",
    )
    host: str = setting("127.0.0.1", "address to listen on")
    replicas: int = setting(
        2,
        "processes that answer HTTP and gRPC",
        ge=1,
        le=64,
        raised="more requests a second, until the cores are busy; about 200 MB of memory each",
    )
    reclaimers: int = setting(
        RECLAIMERS_DEFAULT,
        "processes that erase and copy blocks",
        ge=1,
        le=64,
        raised="room is made faster on devices that can; `kvcm reclaimer --size` changes it later",
    )
    log_format: Literal["text", "json"] = setting(
        "text", "how log lines are written, of all processes; json: one object a line, with the trace_id"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "the least that is logged")
    accounts: bool | None = setting(
        None,
        "calls need an account; not set: as the data directory has it, and a new one is open to all of "
        "this machine",
    )
    tls_cert: str | None = setting(
        None, "PEM file with the certificate and its chain; HTTP and gRPC speak TLS"
    )
    tls_key: str | None = setting(None, "PEM file with the certificate's key, without a password")
    requests_per_second: float = setting(
        0.0,
        "that one account may send to one replica, or one address while the manager is open; 0: no limit",
        ge=0,
        raised="one client can take more of the manager from the others",
    )
    grpc_port: int | None = setting(
        None,
        f"port of gRPC; 0 picks a free one, -1: no gRPC; not set: {GRPC_PORT} if HTTP is on {PORT}, else a "
        "free one",
        ge=-1,
        le=65535,
    )
    debug_api: bool = setting(False, "serve the API that makes calls fail on purpose, over HTTP and gRPC")
    storages: dict[str, Storage] = setting(dict, "storages by name, made when they do not exist")
    groups: dict[str, Group] = setting(dict, "instance groups by name, made when they do not exist")

    @field_validator("storages", "groups")
    @classmethod
    def _names(cls, found: dict[str, Any]) -> dict[str, Any]:
        for name in found:
            if not name or len(safe_name(name)) > 200:
                raise ValueError(f"{name!r} is not a name")
        return found

    @field_validator("tiers")
    @classmethod
    def _tiers(cls, found: list[str]) -> list[str]:
        try:
            parse_tiers(found, Path("/"))
        except InvalidArgument as error:
            raise ValueError(error.message) from error
        return found

    def launch(self) -> dict[str, Any]:
        """The fields of `kvcm_ray.cluster.Options`."""
        fields = self.model_dump(exclude={"storages", "groups"})
        return {**fields, "tiers": tuple(self.tiers), "declared": self.declared()}

    def declared(self) -> dict[str, Any]:
        """Storages and groups as `kvcm_ray.config.declared` takes them."""
        found = self.model_dump(include={"storages", "groups"}, exclude_none=True)
        return {kind: entries for kind, entries in found.items() if entries}
