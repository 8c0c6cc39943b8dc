"""How the commands speak: results on standard output, everything else on standard error.

With ``--json`` standard output gets exactly one JSON object; with ``--output`` a file gets what standard
output would; ``-q`` leaves errors only. Errors say what, why and what to do:

    error[KVCM-Q001]: group "chat" is over its quota
      why: The write does not fit the group's quota.
      try: Raise the quota (`kvcm group update`), remove blocks, or write less.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from kvcm_ray.errors import KvcmError, Unavailable

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_PROBLEMS = range(5)

PROGRESS_AFTER_S = 2.0  #: nothing is silent for longer
PROGRESS_LINE_S = 10.0  #: between two lines where there is no terminal


@dataclass(slots=True)
class Manner:
    """How the command that runs now speaks."""

    quiet: bool = False
    plain: bool = False
    curl: bool = False
    file: str | None = None


manner = Manner()


def reset() -> None:
    """Before each command."""
    manner.quiet = manner.plain = manner.curl = False
    manner.file = None


def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Callback of the options that all commands have: ``out_quiet`` sets `manner.quiet`."""
    assert param.name is not None
    setattr(manner, param.name.removeprefix("out_"), value)


@contextlib.contextmanager
def speaking(as_json: bool) -> Iterator[None]:
    """While a command runs, standard output goes where ``--output`` and ``--quiet`` say."""
    with contextlib.ExitStack() as stack:
        if manner.file is not None:
            try:
                file = stack.enter_context(open(manner.file, "w", buffering=1))
            except OSError as error:
                raise click.UsageError(f"cannot write {manner.file}: {error.strerror}") from error
            stack.enter_context(contextlib.redirect_stdout(file))
        elif manner.quiet and not as_json:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {letter: 1024**power for power, letter in enumerate("kmgt", 1)}


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: ``4096``, ``64MiB``, ``1.5GiB``, ``10GB``."""

    name = "bytes"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
        unit = _UNITS.get(found.group(2).lower()) if found else None
        if found is None or unit is None:
            self.fail(f"{value!r} is not a size; write 4096, 64MiB or 1.5GiB", param, ctx)
        return int(float(found.group(1)) * unit)


BYTES = Bytes()


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def emit(data: Mapping[str, Any], as_json: bool, lines: Iterable[str]) -> None:
    """Print a result, as JSON or as text."""
    click.echo(json.dumps(data, default=str) if as_json else "\n".join(lines))


def done(text: str, as_json: bool, **data: Any) -> None:
    """Print that a change was made."""
    emit({"ok": True, **data}, as_json, [text])


def confirm(what: str, yes: bool) -> None:
    """Ask before something is removed. Raises ClickException if the answer is no."""
    if yes:
        return
    try:
        click.confirm(f"Remove {what}?", abort=True, err=True)
    except click.Abort:  # "no", or there is nobody to ask
        raise click.ClickException(f"{what} stays; --yes removes it without a question") from None


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
force_option = click.option("--force", is_flag=True, help="Even if others still use it.")


def note(text: str) -> None:
    """Something the user should see that is not the result."""
    if not manner.quiet:
        click.echo(text, err=True)


def show_call(url: str, path: str, body: Mapping[str, Any], *, secret: bool = False) -> None:
    """With ``--curl``: the HTTP call as a command that does the same. A token is named, not shown."""
    if not manner.curl:
        return
    words = ["curl", "-sS", "-X", "POST", url.rstrip("/") + path, "-H", "Content-Type: application/json"]
    shown = shlex.join([*words, "-d", json.dumps(body, default=str)])
    click.echo(shown + (' -H "Authorization: Bearer $KVCM_TOKEN"' if secret else ""), err=True)


class Progress:
    """How far something is: a bar on a terminal, else a line every ten seconds; both after two."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._told_s = 0, time.monotonic() - PROGRESS_LINE_S + PROGRESS_AFTER_S
        self._bar: Any = None
        if sys.stderr.isatty() and not manner.quiet:
            from tqdm import tqdm

            scaled = unit == "B"
            self._bar = tqdm(
                total=total, desc=what, unit=unit, unit_scale=scaled, file=sys.stderr,
                delay=PROGRESS_AFTER_S, leave=False,
            )  # fmt: skip

    def upto(self, done: int, total: int | None = None, also: str = "") -> None:
        """So much is done by now; of `total`, if that is known only now."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        self.add(done - self._done, also)

    def add(self, count: int = 1, also: str = "") -> None:
        """`also` is shown behind the numbers."""
        self._done += count
        if self._bar is not None:
            if also:
                self._bar.set_postfix_str(also, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._told_s >= PROGRESS_LINE_S:
            self._told_s = time.monotonic()
            of = "" if self._total is None else f" of {self._total}"
            note(f"{self._what}: {self._done}{of} {self._unit}" + (f", {also}" if also else ""))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
    """Show how far something is while it runs. ``total`` in units; None if nobody knows."""
    shown = Progress(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(headings))]
    lines = []
    for line in [list(headings), *cells]:
        padded = [
            cell.rjust(width) if to_right and rows else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def outline(value: Any, indent: str = "") -> list[str]:
    """A JSON value as indented text, without the fields that say nothing."""
    lines = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            nested = outline(inner, indent + "  ")
            lines += [f"{indent}{name}:", *nested] if nested else []
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            for entry in inner:
                lines += [f"{indent}{name}:", *outline(entry, indent + "  ")]
        elif inner not in ("", [], None):
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
            lines.append(f"{indent}{name}: {shown}")
    return lines


def coloured(text: str, *, to_stdout: bool = False, **style: Any) -> str:
    """For standard error, or for standard output."""
    terminal = (sys.stdout if to_stdout else sys.stderr).isatty()
    plain = manner.plain or bool(os.environ.get("NO_COLOR")) or not terminal
    return text if plain else click.style(text, **style)


def fail(error: KvcmError, as_json: bool) -> int:
    """Print an error; returns the exit code."""
    if as_json:
        click.echo(json.dumps({"error": error.to_dict()}, default=str))
    manner.quiet = False  # what went wrong is always said
    note(f"{coloured(f'error[{error.code}]', fg='red', bold=True)}: {error.message}")
    told = {name: value for name, value in error.details.items() if name not in ("wire", "hint")}
    facts = " · ".join(f"{name} {value}" for name, value in told.items())
    if facts:
        note(f"  {facts}")
    why = (type(error).__doc__ or "").strip().partition("\n")[0]
    if why and why != error.message and type(error) is not KvcmError:
        note(f"  why: {why}")
    if error.remedy:
        note(f"  try: {error.remedy}")
    if type(error) is not KvcmError:
        note(f"  more: kvcm why {error.code}")
    return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_FAILED
