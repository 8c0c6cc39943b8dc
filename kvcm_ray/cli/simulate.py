"""``kvcm simulate``: a trace against groups with tiers, without a manager."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvcm_ray.cli.output import emit, human_bytes, json_option, note, table
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.cli.values import human_seconds

GIB = 1 << 30


@click.command()
@click.argument("trace")
@click.argument("scenario", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--group", "groups", multiple=True, help="A live group in place of SCENARIO; repeat for more.")
@click.option(
    "--by", type=click.Choice(["turn", "class", "instance"]), multiple=True,
    help="Also the results of each turn, request class or instance.",
)  # fmt: skip
@target_options
@json_option
def simulate(
    trace: str,
    scenario: Path | None,
    groups: tuple[str, ...],
    by: tuple[str, ...],
    target: Target,
    as_json: bool,
) -> None:
    """Simulate TRACE against the storages, groups and tiers of SCENARIO.

    TRACE is a file of any known format, or a bundled one: conversation, synthetic. SCENARIO is a YAML
    or JSON file; examples/scenario.yaml explains each key.

    Example: kvcm simulate conversation examples/scenario.yaml
    """
    from kvcm_ray.optimizer.dataset import load
    from kvcm_ray.optimizer.scenario import Scenario
    from kvcm_ray.optimizer.simulation import simulate as run

    if (scenario is None) == (not groups):
        raise click.UsageError("give either a SCENARIO file or --group")
    wanted = Scenario.from_file(scenario) if scenario else _live(target, groups)
    accesses = load(trace)
    outcome = run(accesses, wanted)
    result = _result(accesses, outcome, by)
    emit(result, as_json, _lines(result))
    for storage in result["storages"]:
        for name in ("read", "write"):
            if (busy := storage[f"{name}_busy"] or 0) > 1:
                note(
                    f"note: {storage['name']} would have to {name} {busy:.1f} times as fast as it can; "
                    "these hits and times are better than what it would give"
                )


def _live(target: Target, names: Sequence[str]) -> Any:
    from kvcm_ray.optimizer.scenario import live_scenario

    with open_api(target) as api:
        return live_scenario(
            [api.call("getInstanceGroup", name=name)["instance_group"] for name in names],
            api.call("listStorage")["storage"],
            api.call("listInstanceInfo", instance_group_name="")["instance_info"],
        )


# ------------------------------------------------------------------------------------- results


def _result(accesses: Any, outcome: Any, by: Sequence[str]) -> dict[str, Any]:
    from kvcm_ray.optimizer.breakdown import breakdown
    from kvcm_ray.optimizer.replay import totals

    groups = breakdown(accesses, outcome.hits, "group", scenario=outcome.scenario)
    seconds = float(np.ptp(accesses.times_s)) if accesses.requests else 0.0
    return {
        "trace": {
            "requests": accesses.requests,
            "accessed_blocks": len(accesses.blocks),
            "unique_blocks": accesses.unique,
            "seconds": seconds,
        },
        **_totals(totals(accesses, outcome.hits)),
        "load_s": _spread(outcome.load_s[outcome.hits > 0]),
        "write_delay_s": _spread(outcome.write_delay_s[outcome.write_delay_s > 0]),
        "groups": [_group(outcome, row.label, row.totals) for row in groups],
        "storages": [_storage(outcome, number, seconds) for number in range(outcome.tier_hits.shape[1])],
        "parts": {
            kind: [{"label": r.label, **_totals(r.totals)} for r in breakdown(accesses, outcome.hits, kind)]
            for kind in by
        },
    }


def _totals(totals: Any) -> dict[str, Any]:
    return {
        "requests": totals.requests,
        "accessed_blocks": totals.accessed_blocks,
        "hit_blocks": totals.hit_blocks,
        "hit_ratio": totals.hit_ratio,
        "token_hit_ratio": totals.token_hit_ratio,
    }


def _group(outcome: Any, name: str, totals: Any) -> dict[str, Any]:
    number = [group.name for group in outcome.scenario.groups].index(name)
    group, own = outcome.scenario.groups[number], outcome.groups == number
    return {
        "name": name,
        "policy": group.policy,
        "quota_bytes": group.quota_bytes,
        "peak_bytes": int(outcome.occupancy[:, number].sum(axis=1).max(initial=0)),
        **_totals(totals),
        **{
            f"{kind}_blocks": int(getattr(outcome, kind)[own].sum())
            for kind in ("evicted", "expired", "demoted", "promoted")
        },
    }


def _storage(outcome: Any, number: int, seconds: float) -> dict[str, Any]:
    storage = outcome.scenario.storages[number]
    hits, read = int(outcome.tier_hits[:, number].sum()), int(outcome.read[:, number].sum())
    written = int(outcome.written[:, number].sum())
    tiers = [t for group in outcome.scenario.groups for t in group.tiers if t.storage == storage.name]
    limits = [tier.capacity_bytes for tier in tiers]
    capacity = storage.capacity_bytes or (None if None in limits else sum(limits))
    return {
        "name": storage.name,
        "kind": storage.kind,
        "capacity_bytes": capacity,
        "peak_bytes": int(outcome.occupancy[:, :, number].sum(axis=1).max(initial=0)),
        "hit_blocks": hits,
        "read_bytes": read,
        "written_bytes": written,
        "read_busy": _busy(read, storage.read_bytes_per_s, seconds),
        "write_busy": _busy(written, storage.write_bytes_per_s, seconds),
        "price_month": capacity / GIB * storage.price_gib_month if capacity else None,
    }


def _busy(nbytes: int, speed: float, seconds: float) -> float | None:
    """Share of the trace's time that moving so many bytes takes; None if that is not known."""
    return nbytes / speed / seconds if speed and seconds else None


def _spread(values: Any) -> dict[str, float]:
    if not len(values):
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    p50, p99 = np.percentile(values, [50, 99]).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p99": p99}


# --------------------------------------------------------------------------------------- lines


def _lines(r: dict[str, Any]) -> list[str]:
    trace = r["trace"]
    lines = [
        f"trace      {trace['requests']} requests in {human_seconds(trace['seconds'])}, "
        f"{trace['accessed_blocks']} blocks accessed, {trace['unique_blocks']} different",
        f"hits       {r['hit_blocks']} blocks   {r['hit_ratio']:.2%} of blocks, "
        f"{r['token_hit_ratio']:.2%} of tokens",
        f"load       {_times(r['load_s'])}   of requests with hits",
    ]
    if r["write_delay_s"]["mean"]:
        lines.append(f"written    {_times(r['write_delay_s'])}   after the look-up")
    lines += ["", *_group_lines(r["groups"]), "", *_storage_lines(r["storages"])]
    for kind, parts in r["parts"].items():
        rows = [
            [p["label"] or "-", p["requests"], p["accessed_blocks"], p["hit_blocks"], f"{p['hit_ratio']:.2%}"]
            for p in parts
        ]
        lines += ["", *table([kind, "requests", "blocks", "hit blocks", "hits"], rows)]
    return lines


def _group_lines(groups: Sequence[dict[str, Any]]) -> list[str]:
    headings = [
        "group", "policy", "quota", "peak", "hit blocks", "hits", "evicted", "expired", "demoted", "promoted"
    ]  # fmt: skip
    rows = [
        [
            g["name"], g["policy"], _size(g["quota_bytes"]), human_bytes(g["peak_bytes"]), g["hit_blocks"],
            f"{g['hit_ratio']:.2%}", g["evicted_blocks"], g["expired_blocks"], g["demoted_blocks"],
            g["promoted_blocks"],
        ]
        for g in groups
    ]  # fmt: skip
    return table(headings, rows)


def _storage_lines(storages: Sequence[dict[str, Any]]) -> list[str]:
    headings = ["storage", "capacity", "peak", "hit blocks", "read", "busy", "written", "busy"]
    rows = [
        [
            s["name"], _size(s["capacity_bytes"]), human_bytes(s["peak_bytes"]), s["hit_blocks"],
            human_bytes(s["read_bytes"]), _share(s["read_busy"]), human_bytes(s["written_bytes"]),
            _share(s["write_busy"]),
        ]
        for s in storages
    ]  # fmt: skip
    return table(headings, rows)


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else human_bytes(nbytes)


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _times(spread: dict[str, float]) -> str:
    return "   ".join(f"{name} {1000 * value:.3g} ms" for name, value in spread.items())
