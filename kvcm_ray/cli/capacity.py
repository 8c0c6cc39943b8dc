"""``kvcm capacity | pin | reclaimer``: what holds a quota, what must stay, and who makes room."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TextIO

import click

from kvcm_ray.cli.output import done, emit, human_bytes, json_option, note, table
from kvcm_ray.cli.reports import report, reports, reports_at_hand
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.cli.values import RATE, SECONDS, human_seconds, keys_of, keys_options

Json = dict[str, Any]

_KINDS = {"ST_TAIRMEMPOOL": "memory", "ST_NFS": "files", "ST_3FS": "3fs"}
_HEADINGS = (
    "tier", "quota", "used", "reserved", "deleting", "reclaimable", "pinned", "leased", "blocks", "copies",
    "coldest", "filling", "full in",
)  # fmt: skip

# ------------------------------------------------------------------------------------ capacity


@click.command()
@click.argument("group", required=False)
@target_options
@json_option
def capacity(group: str | None, target: Target, as_json: bool) -> None:
    """Show what holds the quota of a group, or of all groups, tier by tier.

    \b
    Examples:
      kvcm capacity
      kvcm capacity chat --json
    """
    with open_api(target) as api:
        found = [report(api, group)] if group else reports(api)
    texts = ["\n".join(_report_lines(each)) for each in found]
    emit(found[0] if group else {"groups": found}, as_json, ["\n\n".join(texts)])


def _report_lines(found: Json) -> list[str]:
    lines = [f"group {found['group']}  policy {found['policy']}  reclaims {_marks(found)}", ""]
    rows = [_tier_row(_tier_name(tier), tier) for tier in found["tiers"]]
    total = {**found, "copies": sum(tier["copies"] for tier in found["tiers"])}
    lines += table(_HEADINGS, [*rows, _tier_row("total", total)])
    for title, more in (
        ("instances", _instance_rows(found["instances"])),
        ("pins", _pin_rows(found["pins"])),
        ("draining", _drain_rows(found["draining"])),
    ):
        if len(more) > 1:
            lines += ["", *table((title, *more[0]), more[1:])]
    return [*lines, "", _reclaim_line(found["reclaim"])]


def _marks(found: Json) -> str:
    high, low = found["high_bytes"], found["low_bytes"]
    if high >= found["quota_bytes"]:
        return "when it is full"
    return f"from {human_bytes(high)} down to {human_bytes(low)}"


def _tier_name(tier: Json) -> str:
    kind = _KINDS.get(tier["storage_type"], tier["storage_type"])
    return f"{kind} ({', '.join(tier['storages']) or 'no storage of the group'})"


def _tier_row(name: str, of: Json) -> tuple[Any, ...]:
    return (
        name,
        human_bytes(of["quota_bytes"]) if of["quota_bytes"] else "-",
        *(
            human_bytes(of[f"{what}_bytes"])
            for what in ("used", "reserved", "pending_delete", "reclaimable", "pinned", "leased")
        ),
        of["blocks"],
        of["copies"],
        human_seconds(of["coldest_age_s"]) if "coldest_age_s" in of else "",
        f"{human_bytes(of['fill_bytes_per_s'])}/s",
        "full" if 0 < (of["quota_bytes"] or 0) <= of["used_bytes"] else _full_in(of["seconds_to_full"]),
    )


def _full_in(seconds: float | None) -> str:
    return "never" if seconds is None else human_seconds(seconds)


def _instance_rows(instances: Sequence[Json]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("version", "supersedes", "used", "blocks", "at most", "retiring")]
    for i in instances:
        retiring = i["retiring"]
        rows.append((
            i["instance_id"], i["model_version"] or "-", i["supersedes"] or "-",
            human_bytes(i["used_bytes"]), i["blocks"], i["max_key_count"] or "-",
            "-" if retiring is None else "empty" if retiring["empty"]
            else f"{retiring['share']:.0%}, {human_seconds(retiring['seconds_left'])} left",
        ))  # fmt: skip
    return rows


def _pin_rows(pins: Sequence[Json]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("instance", "keys", "there", "bytes", "until")]
    return rows + [
        (p["name"], p["instance_id"], p["keys"], p["blocks"], human_bytes(p["bytes"]), _until(p["until_s"]))
        for p in pins
    ]


def _until(until_s: int) -> str:
    if not until_s:
        return "no end"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(until_s))


def _drain_rows(draining: Sequence[Json]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("blocks", "used", "state")]
    return rows + [
        (d["storage"], d["blocks"], human_bytes(d["used_bytes"]), "empty" if d["empty"] else "draining")
        for d in draining
    ]


def _reclaim_line(reclaim: Json) -> str:
    counts = ", ".join(
        f"{reclaim[f'{what}_blocks']} {what}"
        for what in ("evicted", "expired", "retired", "demoted", "promoted", "drained")
    )
    failed = f", {reclaim['failed_moves']} moves failed" if reclaim["failed_moves"] else ""
    now = f"{reclaim['moves_in_flight']} moves and {reclaim['trash_records']} deletions under way"
    paused = "; PAUSED, `kvcm reclaimer --resume` goes on" if reclaim["paused"] else ""
    return f"blocks {counts}{failed}; {now}{paused}"


# ---------------------------------------------------------------------------------------- pins


@click.group()
def pin() -> None:
    """Pins: blocks that are never evicted, a shared system prompt for example."""


@pin.command("add")
@click.argument("instance")
@click.argument("name")
@keys_options
@click.option("--for", "seconds", type=SECONDS, help="Ends by itself, e.g. 8h.  [default: never]")
@target_options
@json_option
def pin_add(
    instance: str, name: str, keys: Sequence[int], tokens: TextIO | None, seconds: int | None,
    target: Target, as_json: bool,
) -> None:  # fmt: skip
    """Pin a prompt's blocks under a name; blocks that come later are pinned too.

    kvcm pin add m system-prompt --tokens prompt.json
    """
    if seconds == 0:
        raise click.BadParameter(
            "a pin of no time; leave it out for a pin without an end", param_hint="--for"
        )
    until_s = int(time.time()) + seconds if seconds else 0
    blocks = keys_of(keys, tokens)
    with open_api(target) as api:
        answer = api.call("pinCache", instance_id=instance, name=name, until_s=until_s, **blocks)
    text = f"pin {name} holds {answer['keys']} blocks, {answer['blocks']} of them are there"
    done(text, as_json, name=name, keys=answer["keys"], blocks=answer["blocks"], until_s=until_s)


@pin.command("remove")
@click.argument("instance")
@click.argument("name")
@target_options
@json_option
def pin_remove(instance: str, name: str, target: Target, as_json: bool) -> None:
    """Remove a pin; its blocks stay until they are evicted like others.

    \b
    Example:
      kvcm pin remove llama system-prompt
    """
    with open_api(target) as api:
        api.call("unpinCache", instance_id=instance, name=name)
    done(f"pin {name} removed", as_json, name=name)


@pin.command("list")
@click.option("--instance", default="", help="Only of this instance.")
@target_options
@json_option
def pin_list(instance: str, target: Target, as_json: bool) -> None:
    """List the pins of all groups.

    \b
    Example:
      kvcm pin list --instance llama
    """
    with open_api(target) as api:
        found = [pin for each in reports(api) for pin in each["pins"]]
    pins = [pin for pin in found if instance in ("", pin["instance_id"])]
    rows = _pin_rows(pins)
    emit({"pins": pins}, as_json, table(("pin", *rows[0]), rows[1:]))


# ---------------------------------------------------------------------------------- reclaimers


@click.command()
@click.option("--size", type=click.IntRange(1, 64), help="Reclaimers in the pool.")
@click.option("--rate", type=RATE, help="Bytes/s they may copy or erase together; 0 is no limit.")
@click.option("--pause", "paused", flag_value=True, default=None, help="Evict, move and erase nothing.")
@click.option("--resume", "paused", flag_value=False, help="End a pause.")
@target_options
@json_option
def reclaimer(size: int | None, rate: int | None, paused: bool | None, target: Target, as_json: bool) -> None:
    """Show what the reclaimers do, and change how much they may do.

    kvcm reclaimer --size 4 --rate 500MiB/s
    """
    given = {"reclaimers": size, "max_bytes_per_second": rate, "paused": paused}
    changes = {name: value for name, value in given.items() if value is not None}
    with open_api(target) as api:
        settings = api.call("updateReclaimer", **changes) if changes else api.call("getReclaimer")
        progress = {name: each["reclaim"] for name, each in reports_at_hand(api).items()}
    if settings["paused"]:
        note("paused: a group that gets full refuses writes until `kvcm reclaimer --resume`")
    facts = {
        "reclaimers": settings["reclaimers"],
        "max_bytes_per_second": int(settings["max_bytes_per_second"]),
        "paused": settings["paused"],
    }
    emit({**facts, "groups": progress}, as_json, _reclaimer_lines(facts, progress))


def _reclaimer_lines(facts: Json, progress: dict[str, Json]) -> list[str]:
    rate = facts["max_bytes_per_second"]
    limit = f"at most {human_bytes(rate)}/s" if rate else "no limit of bytes/s"
    state = "paused" if facts["paused"] else "at work"
    lines = [f"{facts['reclaimers']} reclaimers, {limit}, {state}"]
    return lines + [f"{name}: {_reclaim_line(reclaim)}" for name, reclaim in progress.items()]
