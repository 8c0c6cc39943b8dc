"""How the commands speak: results on standard output, everything else on standard error.

With ``--json`` standard output gets exactly one JSON object. Errors say what, why and what to do:

    error[KVCM-Q001]: group "chat" is over its quota
      why: The write does not fit the group's quota.
      try: Raise the quota (`kvcm group update`), remove blocks, or write less.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from kvcm_ray.errors import KvcmError, Unavailable

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_PROBLEMS = range(5)

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
    click.echo(text, err=True)


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


def coloured(text: str, **style: Any) -> str:
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    return text if plain else click.style(text, **style)


def fail(error: KvcmError, as_json: bool) -> int:
    """Print an error; returns the exit code."""
    if as_json:
        click.echo(json.dumps({"error": error.to_dict()}, default=str))
    note(f"{coloured(f'error[{error.code}]', fg='red', bold=True)}: {error.message}")
    told = {name: value for name, value in error.details.items() if name not in ("wire", "hint")}
    facts = " · ".join(f"{name} {value}" for name, value in told.items())
    if facts:
        note(f"  {facts}")
    why = (type(error).__doc__ or "").strip()
    if why and why != error.message and type(error) is not KvcmError:
        note(f"  why: {why}")
    if error.remedy:
        note(f"  try: {error.remedy}")
    return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_FAILED
