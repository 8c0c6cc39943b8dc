"""Lists of capacities on the command line, in blocks or in bytes.

``1000,5000`` are these; ``1000..200000`` are 40 from the one to the other, evenly on a logarithmic axis;
``1000..200000:20`` are 20. A size with a unit, ``8GiB``, counts bytes; how many blocks that is depends on
the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from kvcm_ray.cli.output import BYTES

POINTS = 40
POINTS_MAX = 10_000
NUMBER_MAX = 1 << 53  #: blocks or bytes, eight PiB; as `optimizer.analysis.CAPACITY_MAX`


@dataclass(frozen=True, slots=True)
class Range:
    """`points` capacities from one to another; one is its own range of one."""

    least: int
    most: int
    points: int
    in_bytes: tuple[bool, bool]  #: whether `least` and `most` are bytes


class Capacities(click.ParamType):  # type: ignore[type-arg]
    """A list of `Range`."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Range]:
        if not isinstance(value, str):
            return list(value)
        return [self._range(part.strip(), param, ctx) for part in value.split(",")]

    def _range(self, text: str, param: Any, ctx: Any) -> Range:
        first, dots, rest = text.partition("..")
        last, colon, count = rest.partition(":")
        if not first or (dots and not last) or (colon and not _whole(count)):
            self.fail(f"{text!r} is neither a capacity nor a range such as 1000..200000:40", param, ctx)
        least, bytes_least = self._one(first.strip(), param, ctx)
        most, bytes_most = self._one(last.strip(), param, ctx) if dots else (least, bytes_least)
        points = int(count or POINTS) if dots else 1
        if not 1 <= points <= POINTS_MAX:
            self.fail(f"{text!r}: from 1 to {POINTS_MAX} points, not {points}", param, ctx)
        if bytes_least == bytes_most and least > most:
            self.fail(f"{text!r} ends before it begins", param, ctx)
        return Range(least, most, points, (bytes_least, bytes_most))

    def _one(self, text: str, param: Any, ctx: Any) -> tuple[int, bool]:
        """(the number, whether it counts bytes)."""
        if _whole(text):
            number, in_bytes = int(text), False
        elif re.fullmatch(r"[0-9].*[A-Za-z]+", text):
            number, in_bytes = BYTES.convert(text, param, ctx), True
        else:
            self.fail(f"{text!r} is not a capacity; write 5000 (blocks) or 64GiB", param, ctx)
        if number < 1:
            self.fail(f"{text!r}: a capacity is at least one block", param, ctx)
        if number > NUMBER_MAX:
            self.fail(f"{text!r} is more than any cache holds", param, ctx)
        return number, in_bytes


def _whole(text: str) -> bool:
    """Whether it is a number in ASCII digits; ``isdigit`` alone takes ones that `int` does not."""
    return text.isascii() and text.isdigit()


def in_blocks(ranges: Sequence[Range], block_bytes: float | None) -> list[int]:
    """The capacities in blocks, increasing.

    Raises:
        BadParameter: a capacity in bytes where nothing says how large a block is, or below one block; or
            a range that ends before it begins.
    """
    from kvcm_ray.optimizer.analysis import spread

    found: set[int] = set()
    for part in ranges:
        least, most = (
            _blocks(number, block_bytes) if in_bytes else number
            for number, in_bytes in zip((part.least, part.most), part.in_bytes, strict=True)
        )
        if least > most:
            raise _bad(f"a range from {least} to {most} blocks ends before it begins")
        found.update(spread(least, most, part.points).tolist())
    return sorted(found)


def _blocks(size: int, block_bytes: float | None) -> int:
    if block_bytes is None:
        raise _bad(
            "a capacity in bytes needs the size of a block: give --model, for a trace that says how many "
            "tokens a block has (or --block-tokens)"
        )
    if size < block_bytes:
        raise _bad(f"{size} bytes are less than one block of {block_bytes:.0f}")
    return int(size // block_bytes)


def _bad(text: str) -> click.BadParameter:
    return click.BadParameter(text, param_hint="--capacity")
