"""Names of the actors. All are in one namespace of the Ray cluster that the manager runs in."""

from __future__ import annotations

NAMESPACE = "kvcm"
REGISTRY = "registry"
HOST = "manager"  #: of a manager inside a Ray cluster that others started


def group_actor_name(group: str) -> str:
    return f"group:{group}"


def reclaimer_name(number: int, pool_size: int) -> str:
    """Names the size too, so that nobody reaches a reclaimer of an earlier pool by accident."""
    return f"reclaimer:{number}.{pool_size}"
