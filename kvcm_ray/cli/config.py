"""``kvcm config``: what a manager is started with: each value's origin, checks, explanations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.lifecycle import load_settings, setting_flags
from kvcm_ray.cli.output import (
    EXIT_OK,
    EXIT_PROBLEMS,
    emit,
    json_option,
    note,
    table,
    yes_option,
)
from kvcm_ray.cli.target import Target, open_api, target_of
from kvcm_ray.config.declared import compare, desired


@click.group()
def config() -> None:
    """The configuration: where each value comes from, checks, explanations."""


@config.command("show")
@setting_flags
@click.option("--origin", is_flag=True, help="Also where each value comes from.")
@json_option
def config_show(config_file: str | None, origin: bool, as_json: bool, **flags: Any) -> None:
    """Show the configuration that `kvcm up` would use with the same flags, here and now.

    \b
    Examples:
      kvcm config show --origin
      KVCM_PORT=7000 kvcm config show --origin --config kvcm.yaml
    """
    from kvcm_ray.config.texts import effective

    loaded = load_settings(config_file, flags)
    rows = list(effective(loaded))
    found = {
        "file": str(loaded.file) if loaded.file else None,
        "settings": {key: value for key, value, _ in rows},
        "origins": {key: where for key, _, where in rows},
    }
    shown = [(key, json.dumps(value) if isinstance(value, list | dict) else str(value), where)
             for key, value, where in rows]  # fmt: skip
    if origin:
        lines = table(("key", "value", "from"), shown)
    else:
        lines = [f"{key}: {value}" for key, value, _ in shown]
    for sentence in loaded.notes:
        note(f"note: {sentence}")
    emit(found, as_json, lines)


@config.command("check")
@click.argument("file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
@json_option
def config_check(file: Path, as_json: bool) -> int:
    """Check a configuration file: keys, values, units and ranges. Exit code 4 if anything is wrong.

    \b
    Example:
      kvcm config check kvcm.yaml
    """
    from kvcm_ray.config.sources import look

    loaded, problems = look(config=file, environ={})
    found = [{"where": p.where, "key": p.key, "message": p.message} for p in problems]
    good = [f"{file} is good: {len(loaded.origins)} keys"] if loaded else []
    emit({"ok": not found, "problems": found}, as_json, [str(p) for p in problems] or good)
    return EXIT_PROBLEMS if problems else EXIT_OK


@config.command("explain")
@click.argument("key", required=False)
@json_option
def config_explain(key: str | None, as_json: bool) -> None:
    """Explain KEY: meaning, unit, range, default, what happens when it is raised. Without KEY list all.

    \b
    Examples:
      kvcm config explain groups.high_water
      kvcm config explain
    """
    from dataclasses import asdict

    from kvcm_ray.config import texts

    if key is not None:
        found = texts.explain(key)
        emit(asdict(found), as_json, found.lines())
        return
    abouts = [texts.explain(each) for each in texts.all_keys()]
    rows = [(about.key, about.default, about.meaning) for about in abouts]
    emit({"keys": [asdict(about) for about in abouts]}, as_json, table(("key", "default", "meaning"), rows))


@config.command("example")
def config_example() -> None:
    """Print a commented configuration file with every key.

    \b
    Example:
      kvcm config example > kvcm.yaml
    """
    from kvcm_ray.config.texts import example

    click.echo(example(), nl=False)


@config.command("apply")
@setting_flags
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@yes_option
@click.option("--url", metavar="URL", help="Manager to talk to (or KVCM_URL).")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with a token, of managers that require accounts (or KVCM_TOKEN_FILE).",
)
@json_option
def config_apply(
    config_file: str | None,
    dry_run: bool,
    yes: bool,
    url: str | None,
    token_file: Path | None,
    as_json: bool,
    **flags: Any,
) -> int:
    """Give a running manager the storages and groups that the configuration declares.

    Shows each difference first, and asks unless --yes is given. Nothing is removed. What only counts at
    the start of a manager (port, replicas, ...) needs a restart and is not compared.

    \b
    Examples:
      kvcm config apply --config kvcm.yaml --dry-run
      kvcm config apply --config kvcm.yaml --yes
    """
    settings = load_settings(config_file, flags).settings
    with open_api(_target(url, settings, token_file)) as api:
        now = json.loads(api.call("genConfigSnapshot")["config_snapshot"])
        then = desired(now, settings.declared())
        changes = compare(now, then)
        if changes and not dry_run:
            for change in changes:
                note(f"  {change}")
            agree(f"Apply {len(changes)} changes?", yes)
            api.call("loadConfigSnapshot", config_snapshot=json.dumps(then))
    done = bool(changes) and not dry_run
    text = "applied" if done else "nothing was changed" if dry_run else "nothing differs"
    found = [{"kind": c.kind, "name": c.name, "new": c.new, "fields": list(c.fields)} for c in changes]
    lines = [*(map(str, changes) if dry_run else ()), text]
    emit({"applied": done, "changes": found}, as_json, lines)
    return EXIT_OK


def agree(question: str, yes: bool) -> None:
    """Ask before something is changed. Raises ClickException if the answer is no, or nobody answers."""
    if yes:
        return
    try:
        click.confirm(question, abort=True, err=True)
    except click.Abort:
        raise click.ClickException("nothing was changed; --yes does it without a question") from None


def _target(url: str | None, settings: Any, token_file: Path | None) -> Target:
    """By URL if one is given, by option or environment; else the settings' data directory."""
    url = url or os.environ.get("KVCM_URL") or None
    return target_of(url, None if url else Path(settings.data_dir), token_file)
