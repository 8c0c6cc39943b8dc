"""``kvcm optimize``: what more cache, or another policy, would be worth for the traffic of a trace.

Nothing runs for it: a trace is replayed in this process, or in Ray tasks with ``--ray``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvcm_ray.cli.capacities import Capacities, in_blocks
from kvcm_ray.cli.money import money_of, money_options
from kvcm_ray.cli.output import emit, json_option, progress
from kvcm_ray.cli.values import FRACTION, SECONDS
from kvcm_ray.core.model import safe_name
from kvcm_ray.errors import InvalidArgument

if TYPE_CHECKING:
    from kvcm_ray.optimizer.accesses import Accesses
    from kvcm_ray.optimizer.analysis import Analysis, Progress


class Policies(click.ParamType):  # type: ignore[type-arg]
    """Names, separated by commas."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        from kvcm_ray.optimizer.replay import POLICIES

        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
        for name in names:
            if name not in POLICIES:
                self.fail(f"there is no policy {name!r}; there are {', '.join(POLICIES)}", param, ctx)
        return names


@click.command()
@click.argument("trace")
@click.option(
    "--capacity", "capacities", type=Capacities(), metavar="LIST",
    help="Blocks or sizes: 1000,5000 or 1000..200000[:POINTS] or 64GiB..1TiB. "
    "[default: 40 from a 64th of the footprint to all of it]",
)  # fmt: skip
@click.option(
    "--policy", "policies", type=Policies(), metavar="LIST",
    help="lru, lfu, ttl, adaptive, lru_head_first. The knee is that of the first. "
    "[default: lru,lfu,adaptive; of a sample lru]",
)  # fmt: skip
@click.option(
    "--partial-tail", is_flag=True, help="Policies know which prompts fill their last block partly."
)
@click.option("--ttl", type=SECONDS, default=0, help="Blocks that nobody touches for so long are gone.")
@click.option("--rate", type=FRACTION, help="Estimate from this share of the blocks; lru only.")
@click.option("--block-tokens", type=click.IntRange(min=1), help="Tokens of a block, if the trace is silent.")
@money_options
@click.option("--target", type=FRACTION, help="Find the cheapest that reaches this hit ratio.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for files and charts.")
@click.option("--group", metavar="NAME", help="Write what `kvcm group update NAME --from` takes to --out.")
@click.option("--ray", "ray_address", metavar="ADDRESS", help="Replay in Ray tasks: auto, local, or where.")
@json_option
def optimize(trace: str, as_json: bool, **options: Any) -> None:
    """Replay TRACE through policies at many capacities.

    TRACE is a file (Mooncake, Qwen-Bailian, Tair event log or our own, .gz or not), or the name of a
    bundled trace: conversation, synthetic.

    \b
    kvcm optimize conversation
    kvcm optimize conversation --capacity 1000..200000 --policy lru,adaptive --out report
    kvcm optimize conversation --model llama-3-70b --gpu h100 --gpu-price 3 --target 30%
    """
    if options["group"] and not options["out"]:
        raise click.UsageError("--group writes a file for `kvcm group update`: say where with --out")
    if options["group"] and not options["model"]:
        raise click.UsageError("--group needs --model: a quota is in bytes, and it says how large a block is")
    if options["out"]:
        from kvcm_ray.optimizer.report import files

        files.prepare(options["out"])
    with progress("replaying", unit="points") as bar:
        analysis = _analysed(trace, options, bar.upto)
    found = analysis.to_dict()
    if options["out"]:
        found["files"] = [str(path) for path in _written(analysis, options)]
    emit(found, as_json, lines(analysis, found.get("files", []), options["group"]))


def _analysed(trace: str, options: dict[str, Any], tell: Progress) -> Analysis:
    from kvcm_ray.optimizer.analysis import analyse, block_bytes, label_of

    model, costs = money_of(options)
    source, block_tokens = _opened(trace, options)
    capacities = None
    if options["capacities"] is not None:
        capacities = in_blocks(options["capacities"], block_bytes(model, costs, block_tokens))
    found = analyse(
        source, capacities=capacities, policies=options["policies"], partial_first=options["partial_tail"],
        ttl_s=options["ttl"], rate=options["rate"], block_tokens=block_tokens, model=model, costs=costs,
        budget_usd_per_hour=options["budget"], target_hit_ratio=options["target"],
        ray_address=options["ray_address"], progress=tell,
    )  # fmt: skip
    return replace(found, label=label_of(trace))


def _opened(trace: str, options: dict[str, Any]) -> tuple[str | Accesses, int]:
    """(the trace in memory, or its name if it is to be streamed; tokens of a block).

    Raises:
        BadParameter: there is no such trace, it is not one, or its blocks have other tokens.
    """
    from kvcm_ray.optimizer.analysis import tokens_of_block
    from kvcm_ray.optimizer.dataset import load

    try:
        source = load(trace) if options["rate"] is None else trace
    except InvalidArgument as error:
        raise click.BadParameter(error.message, param_hint="TRACE") from error
    try:
        return source, tokens_of_block(source, options["block_tokens"] or 0)
    except InvalidArgument as error:
        hint = "TRACE" if isinstance(source, str) else "--block-tokens"
        raise click.BadParameter(error.message, param_hint=hint) from error


def _written(analysis: Analysis, options: dict[str, Any]) -> list[Path]:
    update = analysis.group_update() if options["group"] else None
    written = analysis.write(options["out"])
    if update is not None:
        written.append(options["out"] / f"group-{safe_name(options['group'])}.json")
        written[-1].write_text(json.dumps(update, indent=1) + "\n", encoding="utf-8")
    return written


def lines(analysis: Analysis, files: Sequence[str], group: str | None) -> list[str]:
    """For people."""
    from kvcm_ray.optimizer.report import text

    rows = text.shown(analysis)
    found = [
        analysis.about,
        "",
        *text.aligned(text.headings(analysis), [text.cells(analysis, r) for r in rows]),
    ]
    if len(rows) < len(analysis.rows):
        found.append(f"({len(rows)} of {len(analysis.rows)} rows; --json and --out have them all)")
    for by, parts in text.parts(analysis).items():
        found += ["", *text.aligned([f"by {by}", *text.PART_HEADINGS], parts[:12])]
    found += ["", *text.sentences(analysis)]
    if files:
        folder = Path(files[0]).parent
        found += ["", f"{len(files)} files in {folder}; begin with {folder / 'report.html'}"]
        found += [shlex.join(["kvcm", "group", "update", group, "--from", files[-1]])] if group else []
    return found
