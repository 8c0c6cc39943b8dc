"""What ``kv_connector_extra_config`` may say. A wrong word stops the engine at its start, with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcm_ray.connectors.given import checked, with_address
from kvcm_ray.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Settings:
    """One of `kvcm_data_dir` and `kvcm_url` is set."""

    kvcm_data_dir: str = ""  #: the manager's, on this node: look-ups cost no call
    kvcm_url: str = ""  #: a manager elsewhere: look-ups are HTTP calls, made while the request waits
    instance_group: str = "default"
    instance_id: str = ""  #: "" = made from the model and all that blocks depend on
    model_version: str = ""  #: "" = made from the weights
    load: bool = True
    save: bool = True
    save_decode: bool = True  #: also what was generated, for the next turn of a conversation
    async_load: bool = True  #: load between steps; False: within the step, layer by layer
    min_load_blocks: int = 1  #: fewer are computed, not loaded
    load_timeout_s: float = 5.0  #: what is not loaded by then is computed
    save_timeout_s: float = 15.0  #: what is not saved by then is not saved
    connect_timeout_s: float = 3.0  #: the engine's start waits so long for the manager, then goes on
    lookup_timeout_s: float = 0.25  #: by URL only: a request waits so long for its look-up
    staging_bytes: int = 512 * 1024 * 1024  #: of each worker, for blocks on their way

    def __post_init__(self) -> None:
        if bool(self.kvcm_data_dir) == bool(self.kvcm_url):
            raise InvalidArgument("kv_connector_extra_config needs either kvcm_data_dir or kvcm_url")
        for name in ("load_timeout_s", "save_timeout_s", "connect_timeout_s", "lookup_timeout_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise InvalidArgument(f"{name} must be above 0 and at most 3600, got {getattr(self, name)}")
        if self.min_load_blocks < 1 or self.staging_bytes < 1:
            raise InvalidArgument("min_load_blocks and staging_bytes must be 1 or more")

    @property
    def address(self) -> str:
        return self.kvcm_data_dir or self.kvcm_url


def settings_of(extra: Mapping[str, Any]) -> Settings:
    """Settings from an engine's ``kv_connector_extra_config``; names that we do not know are refused.

    Without an address there, KVCM_ADDRESS (a data directory) or KVCM_URL is taken.

    Raises:
        InvalidArgument: an unknown name, a value of the wrong type or out of range, no address.
    """
    return Settings(**with_address(checked(Settings, extra, "kv_connector_extra_config has no")))
