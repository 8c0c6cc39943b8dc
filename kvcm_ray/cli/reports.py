"""Capacity reports of a manager's groups, as the commands read them."""

from __future__ import annotations

from typing import Any

from kvcm_ray.cli.target import Api
from kvcm_ray.errors import KvcmError

Json = dict[str, Any]


def group_names(api: Api) -> list[str]:
    return [g["name"] for g in api.call("listInstanceGroup")["instance_group"]]


def report(api: Api, group: str) -> Json:
    """Raises a `KvcmError` if there is no such group, or it does not answer."""
    return dict(api.call("getCapacity", instance_group=group)["capacity"])


def reports(api: Api) -> list[Json]:
    """Of all groups. Raises a `KvcmError` if one does not answer."""
    return [report(api, name) for name in group_names(api)]


def reports_at_hand(api: Api) -> dict[str, Json]:
    """By group, without those that do not answer now."""
    found = {}
    for name in group_names(api):
        try:
            found[name] = report(api, name)
        except KvcmError:
            continue
    return found
