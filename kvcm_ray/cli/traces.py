"""``kvcm trace``: record the traffic of a group, look into trace files, and make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import BYTES, done, emit, human_bytes, json_option, note, table
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.cli.values import SECONDS, human_seconds

Json = dict[str, Any]

UNITS = ("bytes", "words")


@click.group()
def trace() -> None:
    """Record and convert traces: which blocks were asked for, in which order; no prompts."""


# ------------------------------------------------------------------------------------ recordings


@trace.command("record")
@click.argument("group")
@click.option("--instance", default="", help="Only what is asked of this instance.")
@click.option("--seconds", type=SECONDS, default="0", help="End after so long: 90, 10m, 2h. [until stopped]")
@click.option("--max-bytes", type=BYTES, default="1GiB", show_default=True, help="End when the file is full.")
@click.option(
    "--sample-rate", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Share of the blocks behind the first one of each prompt; a power of 1/2, or the next below.",
)  # fmt: skip
@target_options
@json_option
def record(group: str, target: Target, as_json: bool, **options: Any) -> None:
    """Begin to write the look-ups and writes of GROUP into a file on the manager's machine.

    It is a valid trace at any time; `kvcm trace list` says how far it is, `kvcm trace stop` ends it.

    \b
    Example:
      kvcm trace record chat --seconds 10m
    """
    with open_api(target) as api:
        found = api.call(
            "startRecording",
            instance_group=group,
            instance_id=options["instance"],
            seconds=options["seconds"],
            max_bytes=options["max_bytes"],
            sample_rate=options["sample_rate"],
        )["recording"]
    emit(found, as_json, [f"recording into {found['file']}"])


@trace.command("stop")
@click.argument("group")
@target_options
@json_option
def stop(group: str, target: Target, as_json: bool) -> None:
    """End the recording of GROUP.

    \b
    Example:
      kvcm trace stop chat
    """
    with open_api(target) as api:
        found = api.call("stopRecording", instance_group=group)["recording"]
    emit(found, as_json, [f"{found['file']}: {_recorded(found)}"])
    if found["missing_requests"]:
        note(f"{found['missing_requests']} requests are missing: the disk was too slow, or the file full")


@trace.command("list")
@click.argument("group", default="")
@target_options
@json_option
def list_(group: str, target: Target, as_json: bool) -> None:
    """List the recordings of GROUP, or of all groups.

    \b
    Example:
      kvcm trace list chat
    """
    with open_api(target) as api:
        found = api.call("listRecordings", instance_group=group)["recordings"]
    rows = [
        (
            each["group"],
            each["state"],
            each.get("requests", "-"),
            human_seconds(each.get("seconds")),
            human_bytes(each.get("bytes", 0)),
            each["file"],
        )
        for each in found
    ]
    headings = ("group", "state", "requests", "time", "size", "file")
    emit({"recordings": found}, as_json, table(headings, rows))


def _recorded(found: Json) -> str:
    ratio = found["hit_blocks"] / max(1, found["accessed_blocks"])
    return (
        f"{found['look_ups']} look-ups of {found['accessed_blocks']} blocks ({ratio:.1%} found), "
        f"{found['writes']} writes in {human_seconds(found['seconds'])}, {human_bytes(found['bytes'])} "
        f"({found['state']})"
    )


# ----------------------------------------------------------------------------------------- files


@trace.command("info")
@click.argument("file")
@json_option
def info(file: str, as_json: bool) -> None:
    """Say what is in a trace: FILE, or the name of a bundled one.

    \b
    Example:
      kvcm trace info conversation
    """
    from kvcm_ray.optimizer.contents import contents

    found = contents(file)
    emit(found, as_json, _info_lines(found))


def _info_lines(found: Json) -> list[str]:
    tokens = found["block_tokens"]
    lines = [
        f"format           {found['format']}, {f'{tokens} tokens a block' if tokens else 'tokens unknown'}",
        f"requests         {found['requests']}   {found['look_ups']} look up, {found['writes']} write",
        f"time             {human_seconds(found['seconds'])}   {found['requests_per_s']:.3g} requests/s",
        f"blocks accessed  {found['accessed_blocks']}   by look-ups, {found['mean_blocks']:.1f} each, "
        f"{found['longest_blocks']} at most",
        f"unique blocks    {found['unique_blocks']}   the footprint"
        + (f", {found['unique_blocks'] * tokens} tokens" if tokens else ""),
        f"repeats          {found['repeated_requests']} look-ups ask for just what an earlier one asked for",
    ]
    if found["prompt_tokens"]:
        lines.append(f"tokens           {found['prompt_tokens']} in, {found['output_tokens']} out")
    if found["turns"]:
        lines.append(f"turns            up to {found['turns']}, {found['first_turns']} are the first")
    for title, counts in (("instance", found["instances"]), ("class", found["classes"])):
        if len(counts) > 1:
            lines += [f"{title:<16} {name or '(none)'}: {count} requests" for name, count in counts.items()]
    if found["sample_level"]:
        lines.append(f"sampled          one of {1 << found['sample_level']} blocks, and all first ones")
    if (recording := found["recording"]) is not None:
        lines.append(
            f"recording        {recording['state']}, {recording['missing_requests']} requests missing"
        )
    return lines


@trace.command("convert")
@click.argument("file")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def convert(file: str, out: Path, as_json: bool) -> None:
    """Write FILE, a trace of any known format, in our own format to OUT; gzip if that ends in .gz.

    \b
    Example:
      kvcm trace convert other.csv trace.jsonl.gz
    """
    from kvcm_ray.traces import resolve, writing

    writing.convert(resolve(file), out)
    done(f"wrote {out}, {human_bytes(out.stat().st_size)}", as_json, file=str(out), bytes=out.stat().st_size)


@trace.command("anonymize")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--block-size", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens a block."
)
@click.option(
    "--salt", default="", envvar="KVCM_SALT", show_envvar=True,
    help="Secret, to make the keys of several logs match. [random, and kept nowhere]",
)  # fmt: skip
@click.option(
    "--unit", type=click.Choice(UNITS), default="bytes", show_default=True,
    help="What counts as a token of text: 4 bytes, or a word.",
)  # fmt: skip
@click.option(
    "--tokenizer", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json to use instead.",
)  # fmt: skip
@click.option("--keep-times", is_flag=True, help="Do not let the first request be at time 0.")
@json_option
def anonymize(file: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Make a trace without prompts of a log of prompts.

    FILE is JSON lines, .gz or not, each with token_ids, prompt, text, or messages, and if wanted timestamp
    (seconds), output_tokens, turn, instance, model, class. OUT has keyed hashes of the blocks; lengths,
    times and repetitions are still seen in it.

    \b
    Example:
      kvcm trace anonymize prompts.jsonl trace.jsonl.gz --block-size 16
    """
    from kvcm_ray.optimizer import anonymize as module

    cut = {"bytes": module.by_bytes, "words": module.by_words}[options["unit"]]
    if options["tokenizer"] is not None:
        cut = module.tokenizer(options["tokenizer"])
    maker = module.Anonymizer(options["block_size"], options["salt"], cut, not options["keep_times"])
    maker.run(file, out)
    done(f"wrote {out}, {human_bytes(out.stat().st_size)}", as_json, file=str(out), bytes=out.stat().st_size)
