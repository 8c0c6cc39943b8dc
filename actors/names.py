"""Names of the actors. All are in one namespace of the manager's own Ray cluster."""

from __future__ import annotations

NAMESPACE = "kvcm"
REGISTRY = "registry"


def group_actor_name(group: str) -> str:
    return f"group:{group}"


def reclaimer_name(number: int) -> str:
    return f"reclaimer:{number}"
