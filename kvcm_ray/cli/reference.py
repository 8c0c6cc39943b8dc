"""Reference pages that are made of the code: ``python -m kvcm_ray.cli.reference docs``.

    docs/cli.md            every command, from the tree of commands
    docs/configuration.md  every key, from the settings
    docs/errors/*.md       a page for each error code

A test makes them again and compares.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from kvcm_ray.cli.main import cli
from kvcm_ray.explanations import all_errors, overview, page

COMMON = ("--quiet", "--no-color", "--output", "--curl", "--json", "--url", "--data-dir", "--help")
INTRODUCTION = """\
# Command line

Made by `python -m kvcm_ray.cli.reference docs`; `kvcm COMMAND --help` says the same.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 the manager cannot be reached, 4 a check found
problems, 130 interrupted. Errors go to standard error with a stable code; `kvcm why CODE` explains it.

Every command has:

| option | |
|---|---|
| `-q`, `--quiet` | errors only; a result still goes to `--output`, and JSON to standard output |
| `--no-color` | no colours; so does the variable NO_COLOR |
| `--output PATH` | write the result there instead of to standard output |

Where they make sense:

| option | |
|---|---|
| `--json` | exactly one JSON object on standard output (`top`, `tail`: one a line); nothing else |
| `--url URL`, `--data-dir DIR` | the manager to talk to; else KVCM_URL, KVCM_DATA_DIR, `./kvcm-data` |
| `--curl` | also print each call of the HTTP API as a curl command |

A manager that requires accounts gets the token of KVCM_TOKEN or of the file that KVCM_TOKEN_FILE names.
`eval "$(kvcm completion bash)"` completes commands, options, and names of groups, storages and instances.
"""


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with its path."""
    yield from _below((), cli)


def _below(path: tuple[str, ...], group: click.Group) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group, info_name=path[-1] if path else "kvcm")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _below((*path, name), command)
        else:
            yield (*path, name), command


def cli_page() -> str:
    text = [INTRODUCTION]
    for path, command in commands():
        text += _command(path, command)
    return "\n".join(text).rstrip() + "\n"


def _command(path: tuple[str, ...], command: click.Command) -> list[str]:
    context = click.Context(command, info_name=" ".join(("kvcm", *path)))
    about, _, examples = (command.help or "").partition("\b\n")
    text = [f"## kvcm {' '.join(path)}", "", _plain(about), ""]
    text += [
        "```console",
        f"$ {command.get_usage(context).removeprefix('Usage: ')}".replace("\n", ""),
        "```",
        "",
    ]
    rows = [row for row in (_option(parameter, context) for parameter in command.params) if row]
    if rows:
        text += ["| option | |", "|---|---|", *rows, ""]
    if examples:
        lines = textwrap.dedent(examples).strip().splitlines()[1:]
        text += ["```console", *(f"$ {line.strip()}" for line in lines if line.strip()), "```", ""]
    return text


def _plain(text: str) -> str:
    """Paragraphs without the line breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _option(parameter: click.Parameter, context: click.Context) -> str:
    if not isinstance(parameter, click.Option) or set(parameter.opts) & set(COMMON):
        return ""
    record = parameter.get_help_record(context)
    if record is None:
        return ""
    names, text = (" ".join(part.split()).replace("|", "\\|") for part in record)
    return f"| `{names}` | {text} |"


def configuration_page() -> str:
    from kvcm_ray.config.texts import all_keys, explain

    text = [CONFIGURATION]
    for key in all_keys():
        about = explain(key)
        row = (about.key, about.meaning, about.values, about.default, about.raised)
        text.append("| `" + row[0] + "` | " + " | ".join(cell.replace("|", "\\|") for cell in row[1:]) + " |")
    return "\n".join(text) + "\n"


CONFIGURATION = """\
# Configuration

Made by `python -m kvcm_ray.cli.reference docs`; `kvcm config explain KEY` says the same of one key.

A flag of `kvcm up` beats a `KVCM_*` variable, that beats the file, that beats the default. The file is
`--config FILE`, else KVCM_CONFIG, else `./kvcm.yaml`, else `<data_dir>/kvcm.yaml`. The variable
`KVCM_GROUPS__CHAT__QUOTA=9GiB` is `quota` of the group `chat`; lists are written with commas or as JSON.

```console
$ kvcm config example > kvcm.yaml      # every key, commented
$ kvcm config check kvcm.yaml          # unknown keys, units, ranges, with line numbers
$ kvcm config show --origin            # what counts here and now, and where it comes from
$ kvcm up --config kvcm.yaml
$ kvcm config apply --config kvcm.yaml --dry-run
```

Storages and groups that do not exist are made at the start; on a new data directory everything as it is
declared. What exists and differs is reported and left alone, because somebody may have changed it on
purpose: `kvcm config apply` shows the differences and makes them. Nothing is ever removed.

Log lines of all processes have one form, `log_format`, with the trace_id of the request behind them:

```json
{"time": "2026-01-31T09:30:01.123Z", "level": "WARNING", "logger": "kvcm_ray.serve_app.sealing",
 "message": "session 5f...: not all blocks got headers", "pid": 4711, "trace_id": "abc"}
```

`kvcm up --detach` writes its own to `<data_dir>/manager.log`; the actors' and replicas' are where Ray keeps
the output of its workers, and in its dashboard.

| key | meaning | takes | default | when raised |
|---|---|---|---|---|"""


def pages() -> dict[str, str]:
    """Text by path below ``docs``."""
    found = {"cli.md": cli_page(), "configuration.md": configuration_page(), "errors/index.md": overview()}
    return found | {f"errors/{kind.code}.md": page(kind) for kind in all_errors()}


def main(folder: str = "docs") -> None:
    for name, text in pages().items():
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
