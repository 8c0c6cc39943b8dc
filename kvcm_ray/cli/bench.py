"""``kvcm bench``: the figures of docs/performance.md, measured on this machine.

Each benchmark starts what it needs in a temporary directory and removes it again; only ``http`` uses
the manager that is named or runs here, if there is one.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import emit, json_option, note, table
from kvcm_ray.cli.target import Target, target_options
from kvcm_ray.errors import Unsupported

NAMES = {
    "lookup": "prefix look-ups in process, beside a flat index and a TCP ping-pong",
    "write": "start and finish of writes through the group actor, metadata only",
    "http": "look-ups over HTTP, beside an echo application",
    "data": "block bytes in and out of each kind of storage, beside the bare copies",
}


@click.group()
def bench() -> None:
    """Measure this machine. Stop other work first, or read ratios only."""


def _add(name: str, what: str) -> None:
    @bench.command(name, help=f"Measure {what}.")
    @click.option("--quick", is_flag=True, help="Seconds instead of a minute; rougher.")
    @target_options
    @json_option
    def command(quick: bool, target: Target, as_json: bool) -> None:
        note(f"measuring {what} ...")
        result = _run(name, quick, target)
        emit(result, as_json, lines(result))


for _name, _what in NAMES.items():
    _add(_name, _what)


def _run(name: str, quick: bool, target: Target) -> dict[str, Any]:
    """The result of ``kvcm_ray.benchmarks.<name>.run``."""
    try:
        run = importlib.import_module(f"kvcm_ray.benchmarks.{name}").run
        if name == "lookup":
            size = {"blocks": 100_000, "queries": 200} if quick else {}
            return dict(run(report=note, **size))
        if name == "http":
            with _some_manager(target) as url:
                return dict(run(url, **({"seconds": 0.5} if quick else {})))
        return dict(run(quick=quick))
    except ImportError as error:
        raise Unsupported(f"bench {name} needs {error.name}: pip install 'kvcm-ray[serve]'") from error


@contextmanager
def _some_manager(target: Target) -> Iterator[str]:
    """URL of the manager that was named or runs here; of one for this purpose if there is none."""
    if target.url or (target.directory() / "manager.json").exists():
        yield target.find_url()
        return
    from kvcm_ray import cluster

    directory = Path(tempfile.mkdtemp(prefix="kvcm-bench-"))
    try:
        yield cluster.up_detached(directory / "data", 0).url
    finally:
        cluster.down(directory / "data", purge=True)
        shutil.rmtree(directory, ignore_errors=True)


def lines(result: dict[str, Any]) -> list[str]:
    """Lists of rows as tables, the rest below them."""
    out: list[str] = []
    rest = []
    for name, value in result.items():
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            rest.append(f"{name}: {_short(value)}")
            continue
        headings = list(dict.fromkeys(key for row in value for key in row))
        if name != "rows":
            out.append(f"{name}:")
        out += [*table(headings, [[_short(row.get(key, "")) for key in headings] for row in value]), ""]
    return [*out, *rest]


def _short(value: Any) -> Any:
    return round(value, 2 if abs(value) < 100 else 1) if isinstance(value, float) else value
