"""A tree of commands whose modules are imported when a command is run, and what all commands have.

`kvcm --help` and completion show a line for each command; importing all of them for that would take half
a second. So the root knows each command's module and its line, and a test compares the line with the
command's own. Every command gets ``-q``, ``--no-color`` and ``--output`` here, and a mistyped command
gets the nearest one as an answer.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvcm_ray.cli import output
from kvcm_ray.cli.completion import add_completers

#: name -> (module below kvcm_ray.cli, attribute, the line of `kvcm --help`)
Table = Mapping[str, tuple[str, str, str]]

NEAR = 0.6


class SuggestingGroup(click.Group):
    """A group that answers a mistyped command with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), 3, NEAR)
            meant = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
            ctx.fail(f"No such command {name!r}.{meant}")
        return super().resolve_command(ctx, args)


class LazyGroup(SuggestingGroup):
    """The root. `table` is in the order of the help page."""

    def __init__(self, *args: Any, table: Table, **more: Any) -> None:
        super().__init__(*args, **more)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        if cmd_name not in self.commands:
            module, attribute, _ = self.table[cmd_name]
            command = getattr(import_module(f"kvcm_ray.cli.{module}"), attribute)
            self.commands[cmd_name] = equip(command, (cmd_name,))
        return self.commands[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self.table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=line)
            for name, (_, _, line) in self.table.items()
            if name.startswith(incomplete)
        ]


def equip(command: click.Command, path: tuple[str, ...]) -> click.Command:
    """Give the command of a path, and all below it, what every command has."""
    if isinstance(command, click.Group):
        if type(command) is click.Group:
            command.__class__ = SuggestingGroup
        for name, inner in command.commands.items():
            equip(inner, (*path, name))
        return command
    add_completers(path, command)
    taken = {name for parameter in command.params for name in parameter.opts}
    if "--no-color" in taken:  # it has two names
        return command
    mine = [option for option in _common() if not taken & set(option.opts)]
    command.params = [*command.params, *mine]
    if "--url" in taken:
        command.params.append(_curl())
    if command.callback is not None:
        command.callback = _speaking(command.callback)
    return command


def _common() -> list[click.Option]:
    return [
        click.Option(
            ["-q", "--quiet", "out_quiet"], is_flag=True, expose_value=False, callback=output.keep,
            help="Print errors only; a result still goes to --output, and JSON to standard output.",
        ),
        click.Option(
            ["--no-color", "out_plain"], is_flag=True, expose_value=False, callback=output.keep,
            help="No colours (or NO_COLOR).",
        ),
        click.Option(
            ["--output", "out_file"], type=click.Path(dir_okay=False), metavar="PATH",
            expose_value=False, callback=output.keep, help="Write the result there.",
        ),
    ]  # fmt: skip


def _curl() -> click.Option:
    return click.Option(
        ["--curl", "out_curl"], is_flag=True, expose_value=False, callback=output.keep,
        help="Also print each call of the HTTP API as a curl command.",
    )  # fmt: skip


def _speaking(callback: Callable[..., Any]) -> Callable[..., Any]:
    """The command, its standard output sent where the options say."""

    @functools.wraps(callback)
    def run(*args: Any, **options: Any) -> Any:
        with output.speaking(bool(options.get("as_json"))):
            return callback(*args, **options)

    return run
