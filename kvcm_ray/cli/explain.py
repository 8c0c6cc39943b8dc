"""``kvcm explain``: why a prompt hit or missed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, TextIO

import click

from kvcm_ray.cli.output import emit, human_bytes, json_option
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.cli.values import human_seconds, keys_of, keys_options

Json = dict[str, Any]

RUNS_MAX = 20
_WHY = {
    "removed": "removed by request",
    "quota": "evicted, because the group's quota had to make room",
    "tier": "evicted, because its tier was full",
    "keys": "evicted, because the instance had as many blocks as it may have",
    "expired": "dropped, because nobody used it for the group's time to live",
    "retired": "dropped, because its instance is being replaced by a newer one",
    "drained": "dropped with its storage, which was drained or taken away",
    "unreadable": "dropped, because its bytes could not be read",
}


@click.command()
@click.argument("instance_id")
@keys_options
@target_options
@json_option
def explain(
    instance_id: str, keys: tuple[int, ...], tokens: TextIO | None, target: Target, as_json: bool
) -> None:
    """Say why a prompt hits or misses: where its blocks are, or when and why they went.

    Token ids are hashed as the protocol hashes them; engines that key blocks by hashes of their own
    (vLLM does) are asked by these keys.

    \b
    Examples:
      kvcm explain llama-8b --key 123 --key 456
      kvcm explain llama-8b --tokens prompt.json
    """
    with open_api(target) as api:
        answer = api.call("explainCache", instance_id=instance_id, **keys_of(keys, tokens))
    told = dict(answer["explanation"])
    emit(told, as_json, _lines(told))


def _lines(told: Json) -> Iterator[str]:
    blocks, matched = told["blocks"], told["matched_blocks"]
    yield (
        f"{matched} of {len(blocks)} blocks are found from the first one on: "
        f"{matched * told['block_size']:,} tokens need no prefill."
    )
    if matched < len(blocks):
        yield f"The first miss is block {matched + 1}: {_fate(blocks[matched], told)}."
    yield ""
    runs = [(state, list(run)) for state, run in groupby(enumerate(blocks, 1), lambda each: _state(each[1]))]
    for state, run in runs[:RUNS_MAX]:
        first, last = run[0][0], run[-1][0]
        yield f"{first}" + (f"-{last}" if last > first else "") + f"  {state}"
    if len(runs) > RUNS_MAX:
        yield f"... and {len(runs) - RUNS_MAX} more stretches; --json tells all"


def _state(block: Json) -> str:
    """What neighbours must have in common to be told as one."""
    if block["state"] == "serving":
        held = [name for name in ("pinned", "moving", "copied") if block.get(name)]
        if block.get("leased_s"):
            held.append("leased")
        return f"on {block['storage']}" + (f" ({', '.join(held)})" if held else "")
    if block["state"] == "writing":
        return f"being written to {block['storage']}"
    return "not known here" if block["why"] == "unknown" else f"gone: {_WHY[block['why']]}"


def _fate(block: Json, told: Json) -> str:
    if block["state"] == "writing":
        return f"it is being written right now (session {block['session_id']}), and is found when that ends"
    if block["why"] == "unknown":
        since = human_seconds(told["known_since_s"])
        return f"never written, or gone for longer than is remembered (the group's actor runs for {since})"
    fate = f"{_WHY[block['why']]}, {human_seconds(block['gone_ago_s'])} ago"
    if block["why"] in ("quota", "tier") and block["more_bytes"]:
        fate += f"; {human_bytes(block['more_bytes'])} more would have kept it"
    return fate
