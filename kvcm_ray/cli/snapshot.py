"""``kvcm snapshot``: storages, groups, instances and accounts as one JSON file, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import click

from kvcm_ray.cli.config import agree
from kvcm_ray.cli.output import EXIT_OK, emit, json_option, note, yes_option
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.config.declared import Change, compare
from kvcm_ray.errors import InvalidArgument

Json = dict[str, Any]


@click.group()
def snapshot() -> None:
    """Save the storages, groups and instances to a file, and load them."""


@snapshot.command("save")
@click.argument("target_file", metavar="FILE")
@target_options
@json_option
def snapshot_save(target_file: str, target: Target, as_json: bool) -> None:
    """Write the configuration of a manager to FILE; - is standard output. No blocks, no passwords.

    \b
    Examples:
      kvcm snapshot save before.json
      kvcm snapshot save - | less
    """
    with open_api(target) as api:
        text = api.call("genConfigSnapshot")["config_snapshot"]
    document = json.loads(text)
    counts = {kind: len(document.get(kind) or ()) for kind in ("storages", "groups", "instances", "accounts")}
    if target_file == "-":
        click.echo(text)
        return
    _write(Path(target_file), text)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    emit({"file": target_file, **counts}, as_json, [f"{told} saved to {target_file}"])


def _write(file: Path, text: str) -> None:
    """In one step: an earlier snapshot is not lost to a full disk."""
    draft = file.with_name(file.name + ".new")
    try:
        draft.write_text(text + "\n")
        draft.chmod(0o600)
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InvalidArgument(f"cannot write {file}: {error.strerror}") from error


@snapshot.command("load")
@click.argument("source", metavar="FILE", type=click.File())
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@yes_option
@target_options
@json_option
def snapshot_load(source: TextIO, dry_run: bool, yes: bool, target: Target, as_json: bool) -> int:
    """Add and replace what FILE names; shows each change first, and asks unless --yes is given.

    All of it is done in one step, or nothing. What FILE does not name stays; nothing is removed.

    \b
    Examples:
      kvcm snapshot load before.json --dry-run
      kvcm snapshot load before.json --yes
    """
    text = source.read()
    then = _parse(text, source.name)
    with open_api(target) as api:
        now = json.loads(api.call("genConfigSnapshot")["config_snapshot"])
        changes = compare(now, then)
        if changes and not dry_run:
            for change in changes:
                note(f"  {change}")
            agree(f"Make {len(changes)} changes?", yes)
            api.call("loadConfigSnapshot", config_snapshot=text)
    loaded = bool(changes) and not dry_run
    left = "nothing was changed" if dry_run else "nothing differs"
    last = f"{len(changes)} changes made" if loaded else left
    shown = [str(change) for change in changes] if dry_run else []
    emit({"loaded": loaded, "changes": [_plain(c) for c in changes]}, as_json, [*shown, last])
    return EXIT_OK


def _parse(text: str, name: str) -> Json:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{name} is no snapshot: {error}") from error
    if not isinstance(document, dict) or "kvcm_snapshot" not in document:
        raise InvalidArgument(f"{name} is no snapshot: `kvcm snapshot save` makes one")
    try:
        compare({"kvcm_snapshot": 1}, document)
    except (TypeError, KeyError, AttributeError) as error:
        raise InvalidArgument(f"{name} is no snapshot: a record lacks its name ({error})") from error
    return document


def _plain(change: Change) -> Json:
    return {
        "kind": change.kind, "name": change.name, "new": change.new,
        "fields": [{"path": p, "before": b, "after": a} for p, b, a in change.fields],
    }  # fmt: skip
