"""``kvcm status``: groups, storages and nodes of a manager."""

from __future__ import annotations

from typing import Any

import click

from kvcm_ray.cli.output import emit, human_bytes, json_option, table
from kvcm_ray.cli.reports import reports_at_hand
from kvcm_ray.cli.storages import list_storages, storage_kind
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.cli.values import human_seconds

Json = dict[str, Any]

GROUP_KEYS = (
    "used_bytes", "reserved_bytes", "quota_bytes", "blocks", "hit_blocks", "lookup_blocks",
)  # fmt: skip
CAPACITY_KEYS = ("reclaimable_bytes", "pinned_bytes", "fill_bytes_per_s", "seconds_to_full")
_PREFIX = "cache_manager_group."


@click.command()
@target_options
@json_option
def status(target: Target, as_json: bool) -> None:
    """Show usage of groups, storages and nodes.

    \b
    Examples:
      kvcm status
      kvcm status --url http://10.0.0.5:6382 --json
    """
    with open_api(target) as api:
        found = collect(api)
        url = api.backend.address
    emit({"url": url, **found}, as_json, _lines(url, found))


def collect(api: Api) -> Json:
    """What `kvcm status --json` prints, but for the URL."""
    names = [g["name"] for g in api.call("listInstanceGroup")["instance_group"]]
    instances = api.call("listInstanceInfo", instance_group_name="")["instance_info"]
    usage = usage_of(api)
    capacity = reports_at_hand(api)
    health = api.call("checkHealth")
    info = api.call("getManagerClusterInfo")
    return {
        "healthy": bool(health["is_health"]),
        "reclaiming_paused": any(report["reclaim"]["paused"] for report in capacity.values()),
        "groups": [
            {
                "name": name,
                **{key: int(usage.get(name, {}).get(key, 0)) for key in GROUP_KEYS},
                **{key: capacity.get(name, {}).get(key) for key in CAPACITY_KEYS},
                "available": bool(usage.get(name, {}).get("available", 0)),
                "instances": sum(i["instance_group_name"] == name for i in instances),
            }
            for name in names
        ],
        "storages": [
            {"name": s["global_unique_name"], "kind": kind, "path": path, "state": s["state"]}
            for s in list_storages(api)
            for kind, path in [storage_kind(s)]
        ],
        "nodes": [{"node_id": info["self_node_id"], "role": "head", "alive": True}],
    }


def usage_of(api: Api) -> dict[str, dict[str, float]]:
    """Gauges of each group by name."""
    groups: dict[str, dict[str, float]] = {}
    for metric in api.call("getMetrics")["metrics"]:
        if not metric["metric_name"].startswith(_PREFIX):
            continue
        tags = {tag["tag_key"]: tag["tag_value"] for tag in metric["metric_tags"]}
        name = metric["metric_name"].removeprefix(_PREFIX)
        value = metric["metric_value"].get("float_value", 0.0)
        groups.setdefault(tags["instance_group"], {})[name] = float(value)
    return groups


def _lines(url: str, found: Json) -> list[str]:
    rows = [
        (
            g["name"] if g["available"] else f"{g['name']} (away)",
            f"{human_bytes(g['used_bytes'])} of {human_bytes(g['quota_bytes'])}",
            human_bytes(g["reserved_bytes"]),
            "-" if g["reclaimable_bytes"] is None else human_bytes(g["reclaimable_bytes"]),
            "never" if g["seconds_to_full"] is None else human_seconds(g["seconds_to_full"]),
            g["blocks"],
            _ratio(g["hit_blocks"], g["lookup_blocks"]),
            g["instances"],
        )
        for g in found["groups"]
    ]
    headings = ("group", "used", "being written", "reclaimable", "full in", "blocks", "hits", "instances")
    storages = [(s["name"], s["kind"], s["path"], s["state"]) for s in found["storages"]]
    state = "healthy" if found["healthy"] else "NOT healthy"
    paused = "  reclaiming PAUSED, `kvcm reclaimer --resume` goes on" if found["reclaiming_paused"] else ""
    return [
        f"{url}  {state}{paused}",
        "",
        *table(headings, rows),
        "",
        *table(("storage", "kind", "path", "state"), storages),
    ]


def _ratio(hits: int, lookups: int) -> str:
    return f"{hits / lookups:.1%} of {lookups}" if lookups else "-"
