"""What ``request_router_kwargs`` may say. A wrong word is refused before the deployment starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcm_ray.connectors.given import checked
from kvcm_ray.errors import InvalidArgument

ROUTER_CLASS = "kvcm_ray.connectors.serve_llm.router:KVCMRequestRouter"

_AT_LEAST = {
    "min_match_chars": 1, "queue_chars": 0, "table_entries": 1, "memory_s": 1, "budget_ms": 0.01,
    "hash_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Without `kvcm_data_dir` a router knows only what it sent where itself."""

    kvcm_data_dir: str = ""  #: the manager's, on the router's node
    instance_id: str = ""  #: that the engines' connectors were given: whose blocks are looked up
    tokenizer: str = ""  #: folder or name; needed to look prompts up that come as text
    hash_algorithm: str = "sha256"  #: the engines' ``prefix_caching_hash_algo``
    hash_tokens: int = 0  #: of the engines' block hashes; 0 = as many as a block of the instance has
    min_match_chars: int = 256  #: a shorter match counts as none
    queue_chars: int = 2048  #: a waiting request weighs as much as computing so many characters
    shared_worth: float = (
        0.9  #: of what a replica computed itself: blocks to be loaded, on the manager's node
    )
    remote_worth: float = 0.0  #: for replicas on other nodes; above 0 if they mount the storages
    table_entries: int = 100_000  #: pieces of prompts that are remembered; about 0.5 KB each
    memory_s: float = 600.0  #: a replica is thought to have its own blocks so long
    budget_ms: float = 1.0  #: a decision that has taken so long looks nothing else up

    def __post_init__(self) -> None:
        if bool(self.kvcm_data_dir) != bool(self.instance_id):
            raise InvalidArgument("the router needs kvcm_data_dir and instance_id together, or neither")
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise InvalidArgument(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("shared_worth", "remote_worth"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgument(f"{name} must be within 0 and 1, got {getattr(self, name)}")
        if self.hash_algorithm not in ("sha256", "sha256_cbor"):
            raise InvalidArgument(
                f"hash_algorithm must be sha256 or sha256_cbor, got {self.hash_algorithm!r}: other hashes "
                "differ between processes"
            )


def router_settings(given: Mapping[str, Any]) -> RouterSettings:
    """Settings from ``request_router_kwargs``.

    Raises:
        InvalidArgument: an unknown name, a value of the wrong type or out of range.
    """
    return RouterSettings(**checked(RouterSettings, given, "the router has no setting"))


def router_config(**settings: Any) -> dict[str, Any]:
    """The ``request_router_config`` of a deployment, checked.

    Raises:
        InvalidArgument: see `router_settings`.
    """
    router_settings(settings)
    return {"request_router_class": ROUTER_CLASS, "request_router_kwargs": dict(settings)}
