"""``kvcm top``: the groups, or the instances of one group, live in a terminal.

One call of the API a refresh. Without a terminal it prints a line for each group and refresh. A manager that
goes away is waited for: its last numbers stay on the screen, below a word about it.
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from kvcm_ray.cli.lasting import MANAGER, Lasting, lasting
from kvcm_ray.cli.output import EXIT_OK, human_bytes, note
from kvcm_ray.cli.target import Target, target_options
from kvcm_ray.errors import KvcmError

Json = dict[str, Any]

WIDTHS = (20, 10, 20, 10, 6, 12, 10, 8, 9, 7)  #: of the columns
NAME, BAR, SPARKS_MAX = WIDTHS[0], WIDTHS[2], WIDTHS[5]
NARROW_NAME = 12  #: where the window has no room for bars and sparks
SPARKS = "▁▂▃▄▅▆▇█"
HOME, CLEAR_BELOW, CLEAR_LINE, HIDE, SHOW = "\x1b[H", "\x1b[J", "\x1b[K", "\x1b[?25l", "\x1b[?25h"
OTHER, BACK = "\x1b[?1049h", "\x1b[?1049l"  #: the terminal's second screen, and back


@click.command()
@click.argument("group", required=False)
@click.option("--every", type=click.FloatRange(min=0.2), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many refreshes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, one for each refresh.")
@target_options
def top(group: str | None, every: float, count: int | None, as_json: bool, target: Target) -> int:
    """Show groups live: quota, hit ratio, writes, evictions. With GROUP, its instances.

    In a terminal q ends it. Elsewhere, and with --json, it prints lines; with --count 1 --json exactly one
    object. A manager that goes away is waited for.

    \b
    Examples:
      kvcm top
      kvcm top chat --every 5
      kvcm top --count 3 --json
    """
    on_screen = not as_json and sys.stdout.isatty() and sys.stdin.isatty()
    view = _View(group)
    shown = 0
    with lasting(target, _ignore if on_screen else note) as api, _screen(on_screen) as pressed:
        while True:
            rows = _refreshed(view, api)
            if on_screen:
                _draw(view.heading(api.away), view.rows or ())
            elif rows is not None:
                _print(rows, as_json)
            shown += rows is not None
            if shown == count or pressed(every):
                return EXIT_OK


def _refreshed(view: _View, api: Lasting) -> list[Json] | None:
    """None if the manager is away. Raises what the first refresh raises."""
    try:
        rows = view.refresh(api)
    except KvcmError as error:
        if view.rows is None:
            raise
        api.miss(view.whom, error)
        return None
    api.seen(view.whom)
    view.rows = rows
    return rows


def _ignore(_: str) -> None:
    """The screen itself tells who is away."""


class _View:
    """Turns counters into rates, and remembers the hit ratios for a spark line."""

    def __init__(self, group: str | None) -> None:
        self._group = group
        self.whom = f"group {group!r}" if group else MANAGER
        self.rows: list[Json] | None = None  #: as they were last
        self._last: dict[str, tuple[float, Json]] = {}
        self._ratios: dict[str, deque[float | None]] = {}

    def heading(self, away: Json) -> str:
        what = f"instances of {self._group}" if self._group else "instance groups"
        missing = "".join(f" · {who} is away: {why}" for who, why in away.items())
        return f"kvcm top · {what} · {time.strftime('%H:%M:%S')} · q ends it{missing}"

    def refresh(self, api: Lasting) -> list[Json]:
        if self._group:
            told = api.call("getStatistics", instance_group=self._group)["statistics"][0]
            quota = told["gauges"]["quota_bytes"]
            return [
                self._row(name, told["now_s"], one, {**one, "quota_bytes": quota})
                for name, one in sorted(told["instances"].items(), key=lambda each: -each[1]["used_bytes"])
            ]
        rows = []
        for one in api.call("getStatistics", without_instances=True)["statistics"]:
            if "unavailable" in one:
                rows.append({"name": one["group"], "unavailable": one["unavailable"]})
            else:
                rows.append(self._row(one["group"], one["now_s"], one["counters"], one["gauges"]))
        return rows

    def _row(self, name: str, now_s: float, counters: Json, gauges: Json) -> Json:
        before_s, before = self._last.get(name, (now_s, counters))
        self._last[name] = now_s, counters
        passed = now_s - before_s

        def more(counter: str) -> int:
            return max(int(counters[counter]) - int(before[counter]), 0)  # an actor begins again at 0

        def rate(counter: str) -> float:
            return round(more(counter) / passed, 1) if passed > 0 else 0.0

        asked = more("lookup_tokens")
        ratios = self._ratios.setdefault(name, deque(maxlen=SPARKS_MAX))
        ratios.append(more("hit_tokens") / asked if asked else None)
        total = int(counters["lookup_tokens"])
        return {
            "name": name,
            "used_bytes": gauges["used_bytes"],
            "quota_bytes": gauges["quota_bytes"],
            "blocks": gauges["blocks"],
            "hit_ratio_tokens": int(counters["hit_tokens"]) / total if total else None,
            "recent_hit_ratios": list(ratios),
            "lookups_per_s": rate("lookups"),
            "writes_per_s": rate("writes"),
            "evicted_blocks_per_s": rate("evicted_blocks"),
            "writing_blocks": gauges["writing_blocks"],
        }


# ------------------------------------------------------------------------------------------- showing


def _draw(heading: str, rows: Sequence[Json]) -> None:
    sys.stdout.write(_page(heading, rows, os.get_terminal_size(sys.stdout.fileno())))
    sys.stdout.flush()


def _print(rows: Sequence[Json], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"time_s": time.time(), "rows": rows}))
    else:
        for line in _lines(rows):
            click.echo(line)


def _page(heading: str, rows: Sequence[Json], size: os.terminal_size) -> str:
    wide = size.columns > sum(WIDTHS) + len(WIDTHS)
    titles = ("name", "used", "", "of quota", "hits", "recently", "look-ups/s", "writes/s", "evicted/s")
    table = [_aligned(cells, wide) for cells in ((*titles, "writing"), *map(_cells, rows))]
    lines = [heading, "", *table]
    shown = lines[: size.lines - 1]
    if len(lines) > len(shown):
        shown[-1] = f"... and {len(lines) - len(shown) + 1} more; make the window taller, or name a group"
    return HOME + "".join(f"{line[: size.columns - 1]}{CLEAR_LINE}\n" for line in shown) + CLEAR_BELOW


def _cells(row: Json) -> Sequence[str]:
    if "unavailable" in row:
        return row["name"], row["unavailable"]
    return (
        row["name"], human_bytes(row["used_bytes"]), _bar(row), human_bytes(row["quota_bytes"]),
        _percent(row["hit_ratio_tokens"]), _spark(row["recent_hit_ratios"]),
        *(f"{row[name]:,.1f}" for name in ("lookups_per_s", "writes_per_s", "evicted_blocks_per_s")),
        str(row["writing_blocks"]),
    )  # fmt: skip


def _aligned(cells: Sequence[str], wide: bool) -> str:
    """Names, bars and sparks to the left; a narrow window gets no bars and sparks."""
    name = NAME if wide else NARROW_NAME
    first = cells[0] if len(cells[0]) <= name else cells[0][: name - 1] + "…"
    found = [f"{first:{name}}"]
    for i, (width, cell) in enumerate(zip(WIDTHS[1:], cells[1:], strict=False), 1):
        if i in (2, 5):
            found += [f"{cell:{width}}"] if wide else []
        else:
            found.append(f"{cell:>{width}}")
    return " ".join(found)


def _lines(rows: Sequence[Json]) -> Iterator[str]:
    when = time.strftime("%H:%M:%S")
    for row in rows:
        if "unavailable" in row:
            yield f"{when} {row['name']} {row['unavailable']}"
            continue
        used = f"used {human_bytes(row['used_bytes'])} of {human_bytes(row['quota_bytes'])}"
        yield (
            f"{when} {row['name']} {used}, hits {_percent(row['hit_ratio_tokens'])} of tokens, "
            f"{row['lookups_per_s']:g} look-ups/s, "
            f"{row['writes_per_s']:g} writes/s, {row['evicted_blocks_per_s']:g} evicted/s"
        )


def _bar(row: Json) -> str:
    full = round(BAR * min(row["used_bytes"] / row["quota_bytes"], 1)) if row["quota_bytes"] else 0
    return "█" * full + "░" * (BAR - full)


def _spark(ratios: Sequence[float | None]) -> str:
    return "".join(" " if r is None else SPARKS[min(int(r * len(SPARKS)), len(SPARKS) - 1)] for r in ratios)


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio * 100:.1f}%"


@contextmanager
def _screen(on: bool) -> Iterator[Any]:
    """Yields a function that waits so many seconds and tells whether somebody pressed q."""
    if not on:
        yield lambda seconds: time.sleep(seconds)
        return
    was = termios.tcgetattr(sys.stdin)
    sys.stdout.write(OTHER + HIDE + HOME + CLEAR_BELOW)
    try:
        tty.setcbreak(sys.stdin)
        yield _pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, was)
        sys.stdout.write(SHOW + BACK)
        sys.stdout.flush()


def _pressed(seconds: float) -> bool:
    with selectors.DefaultSelector() as waiting:
        waiting.register(sys.stdin, selectors.EVENT_READ)
        ready = waiting.select(seconds)
    if not ready:
        return False
    keys = os.read(sys.stdin.fileno(), 64)
    return not keys or any(key in keys for key in (b"q", b"Q", b"\x04"))  # nothing: the terminal is gone
