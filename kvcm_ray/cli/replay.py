"""``kvcm replay``: a trace against a live manager, with real bytes, every byte read verified."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import click

from kvcm_ray.cli.output import (
    BYTES,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_PROBLEMS,
    Progress,
    emit,
    human_bytes,
    json_option,
    note,
    progress,
)
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.client import AsyncClient, AsyncInstance, connect_async
from kvcm_ray.core.model import ReclaimPolicy
from kvcm_ray.errors import AlreadyExists, InvalidArgument, Unavailable
from kvcm_ray.traces import BUNDLED, TraceRequest, open_trace
from kvcm_ray.traces.replay import CALLS, Replay, Report

PATIENCE_S = 60.0  #: for a manager whose processes are starting again
TOKENS_PER_BLOCK = 512  #: of the bundled traces; only described, nothing here depends on it
POLICIES = {
    "lru": ReclaimPolicy.POLICY_LRU,
    "lfu": ReclaimPolicy.POLICY_LFU,
    "ttl": ReclaimPolicy.POLICY_TTL,
    "adaptive": ReclaimPolicy.POLICY_ADAPTIVE,
}


class Speed(click.ParamType):  # type: ignore[type-arg]
    name = "speed"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | None:
        if value is None or value == "max":
            return None
        try:
            speed = float(value)
        except ValueError:
            speed = 0.0
        if not speed > 0:
            self.fail(f"{value!r} is neither 'max' nor a number above 0", param, ctx)
        return speed


@click.command()
@click.argument("trace")
@click.option("--group", default="default", show_default=True)
@click.option("--instance", help="Registered if it is new; 'replay', or the name of --quota-blocks' group.")
@click.option(
    "--quota-blocks", type=click.IntRange(min=1), metavar="N",
    help="Replay in a group of its own that holds N blocks: like --group, emptied only as far as needed.",
)  # fmt: skip
@click.option("--policy", type=click.Choice(list(POLICIES)), help="What that group evicts by (lru).")
@click.option("--partial-tail", is_flag=True, help="Tell which prompts fill their last block only partly.")
@click.option("--block-bytes", type=BYTES, default="4KiB", show_default=True)
@click.option("--limit", type=click.IntRange(min=0), help="Only the first so many requests.")
@click.option("--speed", type=Speed(), default="max", show_default=True, help="Factor on the trace's pace.")
@click.option(
    "--via", type=click.Choice(["actor", "http"]), default=None,
    help="Metadata by actor handles (the default) or by HTTP (the default with --url).",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(1, 256), default=8, show_default=True,
    help="Requests that may be writing at once; 1 is strictly one at a time.",
)  # fmt: skip
@click.option("--wrap", is_flag=True, help="Begin again at the end, until --seconds are over.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Stop after so many seconds.")
@click.option(
    "--recheck", is_flag=True,
    help="At the end look up what was acknowledged as written; lost_blocks are not there (or evicted).",
)  # fmt: skip
@target_options
@json_option
def replay(trace: str, target: Target, as_json: bool, **options: Any) -> int:
    """Replay TRACE: look up, read and verify hits, write misses.

    TRACE is a file of JSON lines (Mooncake, Qwen-Bailian, Tair events, or what `kvcm trace` makes; .gz or
    not), or the name of a bundled one: conversation, synthetic. Exit code 4 if any byte was wrong, a found
    block could not be read or an acknowledged one is lost, 1 if blocks could not be stored.

    \b
    Examples:
      kvcm replay conversation --limit 1000 --block-bytes 4096
      kvcm replay trace.jsonl --instance test --json
    """
    if options["wrap"] and not options["seconds"]:
        raise click.UsageError("--wrap needs --seconds, or it would never end")
    if options["policy"] and not options["quota_blocks"]:
        raise click.UsageError("--policy needs --quota-blocks; `kvcm group update --policy` is for others")
    if options["block_bytes"] < 1:
        raise click.BadParameter("must be above 0", param_hint="--block-bytes")
    try:
        requests = open_trace(trace, options["limit"])
    except InvalidArgument as error:
        raise click.BadParameter(error.message, param_hint="TRACE") from error
    if options["wrap"]:
        requests = _again_and_again(trace, options["limit"], requests)
    report = asyncio.run(_run(trace, requests, target, options))
    emit(report.to_dict(), as_json, report_lines(report.to_dict()))
    if report.first_error is not None:
        note(f"first trouble: {report.first_error.message}")
    if report.wrong_bytes or report.unreadable_blocks or report.lost_blocks:
        return EXIT_PROBLEMS
    return EXIT_FAILED if report.refused_blocks or report.first_error else EXIT_OK


def _again_and_again(trace: str, limit: int | None, first: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    yield from first
    while True:
        some = False
        for request in open_trace(trace, limit):
            some = True
            yield request
        if not some:
            return


def _address(target: Target, via: str | None) -> str:
    if via == "http" or (via is None and target.url is not None):
        return target.find_url()
    if target.url is not None and target.data_dir is None:
        raise click.UsageError("--via actor needs --data-dir, not --url")
    target.manager()  # raises if none runs there
    return str(target.directory())


async def _run(
    trace: str, requests: Iterator[TraceRequest], target: Target, options: dict[str, Any]
) -> Report:
    block_bytes: int = options["block_bytes"]
    address = _address(target, options["via"])
    group = options["group"]
    if options["quota_blocks"]:
        group = _group_of_blocks(target, group, options)
    async with await connect_async(address) as client:
        instance = await _registered(client, group, options)
        with progress("replaying", _total(trace, options), "requests") as bar:
            run = Replay(
                instance,
                block_bytes,
                options["window"],
                options["speed"],
                time.monotonic() + options["seconds"] if options["seconds"] else None,
                functools.partial(_shown, bar),
                client.flush_touches if options["window"] == 1 else None,
                options["partial_tail"],
            )
            report = await run.run(requests)
        if options["recheck"]:
            await run.count_lost()
        return report


async def _registered(client: AsyncClient, group: str, options: dict[str, Any]) -> AsyncInstance:
    """Waits for processes of the manager that are starting again.

    Raises:
        InvalidArgument: the instance is in another group.
        Unavailable: they do not, for too long. Or what the manager refuses.
    """
    name = options["instance"] or ("replay" if group == options["group"] else group)
    block_bytes = options["block_bytes"]
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            instance = await client.register(
                name, group, block_size=TOKENS_PER_BLOCK, specs={"tp0": block_bytes},
                model_name=f"replay-{block_bytes}",
            )  # fmt: skip
            stored = (await client.instance(name)).info.instance_group_name
            break
        except Unavailable as error:
            if time.monotonic() >= deadline_s:
                raise
            note(f"waiting: {error.message}")
            await asyncio.sleep(1)
    if stored != group:
        raise InvalidArgument(
            f"instance {name!r} is in group {stored!r}, not {group!r}",
            hint="Name another one with --instance.",
        )
    return instance


def _group_of_blocks(target: Target, like: str, options: dict[str, Any]) -> str:
    """Name of the group of exactly --quota-blocks blocks, which is made if it is not there.

    Both water marks are the quota: nothing goes that need not. Readers have no lease, so that room is
    made at once.
    """
    policy = options["policy"] or "lru"
    blocks = options["quota_blocks"]
    name = f"{like}-{policy}-{blocks}x{options['block_bytes']}"
    with open_api(target) as api:
        group = api.call("getInstanceGroup", name=like)["instance_group"]
        group |= {"name": name, "version": 1}
        group["quota"] = {"capacity": blocks * options["block_bytes"], "quota_config": []}
        config = group.setdefault("cache_config", {})
        config["meta_indexer_config"] = {
            "meta_storage_backend_config": {"storage_type": "local"},
            "meta_cache_policy_config": {"type": "lru"},
        }
        config["reclaim_strategy"] = {
            "storage_unique_name": group["storage_candidates"][0],
            "reclaim_policy": POLICIES[policy].name,
            "trigger_strategy": {"used_percentage": 1.0},
            "low_water_percentage": 1.0,
            "delay_before_delete_ms": 0,
        }
        with contextlib.suppress(AlreadyExists):
            api.call("createInstanceGroup", instance_group=group)
    return name


def _total(trace: str, options: dict[str, Any]) -> int | None:
    """Requests to expect, if that is known without reading the file."""
    if options["wrap"]:
        return None
    counts = {"conversation": 12_031, "synthetic": 3_993}
    known = [counts[name] for name, file in BUNDLED.items() if trace == name or trace.endswith(file)]
    bounds = [n for n in (*known, options["limit"]) if n is not None]
    return min(bounds) if bounds else None


def _shown(bar: Progress, report: Report) -> None:
    hits = report.hit_blocks / max(1, report.accessed_blocks)
    rate = report.requests / max(report.seconds, 1e-9)
    bar.upto(report.requests, also=f"{rate:.0f}/s, hits {hits:.1%}, wrong bytes {report.wrong_bytes}")


def report_lines(r: dict[str, Any]) -> list[str]:
    lines = [
        f"requests         {r['requests']}   {r['requests_per_s']:.0f}/s, {r['seconds']:.1f} s",
        f"blocks accessed  {r['accessed_blocks']}",
        f"blocks hit       {r['hit_blocks']}   {r['hit_ratio']:.2%}",
        f"blocks written   {r['written_blocks']}   {human_bytes(r['bytes_written'])}, "
        f"{human_bytes(r['bytes_written_per_s'])}/s",
        f"bytes verified   {human_bytes(r['bytes_read'])}   {human_bytes(r['bytes_read_per_s'])}/s",
        f"wrong bytes      {r['wrong_bytes']}",
        f"unreadable       {r['unreadable_blocks']} blocks",
        f"refused          {r['refused_blocks']} blocks",
    ]
    if r["lost_blocks"] is not None:
        lines.append(f"lost             {r['lost_blocks']} blocks")
    for name in CALLS:
        if r[f"{name}_p50_us"] is not None:
            p50, p99 = r[f"{name}_p50_us"], r[f"{name}_p99_us"]
            lines.append(f"{name:<16} p50 {p50:.0f} us   p99 {p99:.0f} us")
    return lines
