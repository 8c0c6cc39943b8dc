"""``kvcm bench``: the figures of docs/performance.md, measured on this machine.

Each benchmark starts what it needs in a temporary directory and removes it again; only ``http`` uses
the manager that is named or runs here, if there is one.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import EXIT_OK, EXIT_PROBLEMS, emit, json_option, note, table
from kvcm_ray.cli.replay import POLICIES
from kvcm_ray.cli.target import Target, target_options
from kvcm_ray.errors import Unsupported

NAMES = {
    "lookup": "prefix look-ups in process, beside a flat index and a TCP ping-pong",
    "write": "start and finish of writes through the group actor, metadata only",
    "http": "look-ups over HTTP, beside an echo application",
    "data": "block bytes in and out of each kind of storage, beside the bare copies",
}
CAPACITY = "hit blocks of a trace through a live manager that holds so many blocks"
OPTIMIZER = "the optimizer: hits against known ones, curves, sweeps, whole commands"
RECLAIM = "making room, and what look-ups and writes notice of it"


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


@bench.command("capacity", help=f"Measure {CAPACITY}.")
@click.option("--quick", is_flag=True, help="Only the first 1000 requests.")
@click.option("--trace", default="conversation", show_default=True, help="File, or a bundled trace.")
@click.option(
    "--policy", "policies", multiple=True, type=click.Choice(list(POLICIES)),
    help="May be repeated. [default: lru and adaptive]",
)  # fmt: skip
@click.option(
    "--capacity", "capacities", multiple=True, type=click.IntRange(min=1), metavar="BLOCKS",
    help="May be repeated. [default: 5000 and 10000]",
)  # fmt: skip
@click.option("--requests", type=click.IntRange(min=1), help="Only the first so many.")
@click.option("--partial-tail", is_flag=True, help="Tell which prompts fill their last block only partly.")
@json_option
def capacity(as_json: bool, **options: Any) -> None:
    note(f"measuring {CAPACITY} ...")
    result = _benchmark("capacity")(**_given(options), report=note)
    emit(result, as_json, lines(result))


@bench.command("reclaim", help=f"Measure {RECLAIM}.")
@click.option("--quick", is_flag=True, help="A tenth of the blocks; rougher.")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(["rows", "lookups", "writes"]),
    help="Only this part; may be repeated. [default: all]",
)  # fmt: skip
@click.option(
    "--reclaimers", multiple=True, type=click.IntRange(1, 64),
    help="Size of the pool in the rows; may be repeated. [default: 1, 2 and 4]",
)  # fmt: skip
@click.option(
    "--soak", "soak_s", type=click.FloatRange(min=0.1), metavar="SECONDS",
    help="Instead: 8 writers against a small quota for so long; exit code 4 if anything is wrong after.",
)  # fmt: skip
@json_option
def reclaim(as_json: bool, **options: Any) -> int:
    note(f"measuring {RECLAIM} ...")
    result = _benchmark("reclaim")(**_given(options), report=note)
    emit(result, as_json, lines(result.get("soak", result)))
    bad = ("bytes_above_quota", "orphan_bytes", "dangling_locations", "corrupt_records", "wrong_bytes")
    return EXIT_PROBLEMS if any(result.get("soak", {}).get(name) for name in bad) else EXIT_OK


@bench.command("optimizer", help=f"Measure {OPTIMIZER}.")
@click.option("--quick", is_flag=True, help="Fewer settings and repetitions; rougher.")
@click.option(
    "--huge", is_flag=True, help="Also a trace of 100 M accesses: gigabytes of temporary files, minutes."
)
@json_option
def optimizer(as_json: bool, quick: bool, huge: bool) -> int:
    note(f"measuring {OPTIMIZER} ...")
    result = _benchmark("optimizer")(quick=quick, huge=huge, report=note)
    emit(result, as_json, lines(result))
    return EXIT_OK if result["oracle_equal"] == result["oracle_rows"] else EXIT_PROBLEMS


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; the others have their defaults in the benchmark."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _benchmark(name: str) -> Callable[..., dict[str, Any]]:
    """``kvcm_ray.benchmarks.<name>.run``."""
    try:
        run: Callable[..., dict[str, Any]] = importlib.import_module(f"kvcm_ray.benchmarks.{name}").run
    except ImportError as error:
        raise Unsupported(f"bench {name} needs {error.name}: pip install 'kvcm-ray[serve]'") from error
    return run


def _run(name: str, quick: bool, target: Target) -> dict[str, Any]:
    run = _benchmark(name)
    if name == "lookup":
        size = {"blocks": 100_000, "queries": 200} if quick else {}
        return dict(run(report=note, **size))
    if name == "http":
        with _some_manager(target) as url:
            return dict(run(url, **({"seconds": 0.5} if quick else {})))
    return dict(run(quick=quick))


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
