"""Values on the command line that click does not know, and times for people.

A fraction is ``0.9`` or ``90%``; a time is a number of seconds or ``30s``, ``5m``, ``2h``, ``1d``; a
rate is a size, with or without ``/s``. Blocks are named by keys, or by token ids in a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click

from kvcm_ray.cli.output import BYTES

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Fraction(click.ParamType):  # type: ignore[type-arg]
    """Between 0 and 1."""

    name = "fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", str(value).strip())
        fraction = float(found[1]) / (100 if found[2] else 1) if found else -1.0
        if not 0 <= fraction <= 1:
            self.fail(f"{value!r} is not a fraction; write 0.9 or 90%", param, ctx)
        return fraction


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """Whole seconds."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is not a time; write 90, 90s, 5m, 2h or 1d", param, ctx)
        seconds = float(found[1]) * _SECONDS[found[2]]
        if seconds != int(seconds):  # cut short it could be 0, and 0 says "never" in many places
            self.fail(f"{value!r} is not a whole number of seconds", param, ctx)
        return int(seconds)


class Rate(click.ParamType):  # type: ignore[type-arg]
    """Bytes a second."""

    name = "bytes/s"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        return BYTES.convert(str(value).strip().removesuffix("/s"), param, ctx)


FRACTION, SECONDS, RATE = Fraction(), Seconds(), Rate()


def human_seconds(seconds: float | None) -> str:
    """One unit is enough: ``41 s``, ``12 min``, ``3.5 h``, ``9 d``; "-" for None."""
    if seconds is None:
        return "-"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if size < 3600 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.0f} d"


def keys_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--key`` and ``--tokens``; see `keys_of`."""
    for option in (
        click.option(
            "--tokens",
            type=click.File(),
            help="File with the prompt's token ids: a JSON list, or numbers and blanks; - is standard input.",
        ),
        click.option("--key", "keys", type=int, multiple=True, help="Block key; repeat for more."),
    ):
        function = option(function)
    return function


def keys_of(keys: Sequence[int], tokens: TextIO | None) -> dict[str, list[int]]:
    """The fields of a request about these blocks; the manager hashes the tokens.

    Raises:
        UsageError: neither or both are given, or the file holds no token ids.
    """
    if bool(keys) == (tokens is not None):
        raise click.UsageError("give either --key or --tokens")
    if tokens is None:
        return {"block_keys": list(keys)}
    text = tokens.read()
    try:
        numbers = json.loads(text) if text.lstrip().startswith("[") else text.split()
        return {"token_ids": [int(number) for number in numbers]}
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"--tokens: not a list of token ids: {error}") from error
