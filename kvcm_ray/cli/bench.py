"""``kvcm bench``: the figures of docs/performance.md, measured on this machine.

Each benchmark starts what it needs in a temporary directory and removes it again; only ``http`` uses
the manager that is named or runs here, if there is one.
"""

from __future__ import annotations

import dataclasses
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
    "metrics": "`GET /metrics` with many groups",
    "data": "block bytes in and out of each kind of storage, beside the bare copies",
}
CAPACITY = "hit blocks of a trace through a live manager that holds so many blocks"
OPTIMIZER = "the optimizer: hits against known ones, curves, sweeps, whole commands"
ENGINE = "a real engine with the cache and without; needs the engines' environment (`make setup-engines`)"
SERVE_LLM = "routers of Ray Serve LLM, on real engines; needs the engines' environment (`make setup-engines`)"
PAGED = "pages of an engine's cache into blocks and back, on the CPU or a GPU, beside plain copies"
GRPC = "look-ups over gRPC, beside the same over HTTP"
SLOW_RATIO_MAX = 5.0  #: of the p99 beside slow clients and beside none
SLOW = "what a good client notices of 200 slow ones"
RECLAIM = "making room, and what look-ups and writes notice of it"


@click.group()
def bench() -> None:
    """Measure this machine. Stop other work first, or read ratios only."""


def _help(name: str, what: str) -> str:
    return f"Measure {what}.\n\n\b\nExample:\n  kvcm bench {name} --json"


def _add(name: str, what: str) -> None:
    @bench.command(name, help=_help(name, what))
    @click.option("--quick", is_flag=True, help="Seconds instead of a minute; rougher.")
    @target_options
    @json_option
    def command(quick: bool, target: Target, as_json: bool) -> None:
        note(f"measuring {what} ...")
        result = _run(name, quick, target)
        emit(result, as_json, lines(result))


for _name, _what in NAMES.items():
    _add(_name, _what)


@bench.command("capacity", help=_help("capacity", CAPACITY))
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


@bench.command("grpc", help=_help("grpc", GRPC))
@click.option("--quick", is_flag=True, help="Seconds instead of a minute; rougher.")
@click.option("--grpc-address", metavar="HOST:PORT", help="Goes with --url.")
@target_options
@json_option
def grpc(as_json: bool, quick: bool, grpc_address: str | None, target: Target) -> None:
    note(f"measuring {GRPC} ...")
    with _some_manager(target) as manager:
        address = grpc_address or manager["grpc"]
        if not address:
            raise Unsupported("that manager has no gRPC port; name it with --grpc-address if it has")
        result = _benchmark("grpc")(manager["url"], address, **({"seconds": 0.5} if quick else {}))
    emit(result, as_json, lines(result))


@bench.command("slow-clients", help=_help("slow-clients", SLOW))
@click.option("--quick", is_flag=True, help="One short round; rougher.")
@click.option("--clients", type=click.IntRange(min=1), help="Slow ones at a time. [default: 200]")
@target_options
@json_option
def slow_clients(as_json: bool, quick: bool, clients: int | None, target: Target) -> int:
    note(f"measuring {SLOW} ...")
    more = {"rounds": 1, "seconds": 2.0} if quick else {}
    with _some_manager(target) as manager:
        result = _benchmark("slow_clients")(manager["url"], **_given({"clients": clients}), **more)
    emit(result, as_json, lines(result))
    return EXIT_OK if result["ratio"] < SLOW_RATIO_MAX else EXIT_PROBLEMS


@bench.command("reclaim", help=_help("reclaim", RECLAIM))
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


@bench.command("optimizer", help=_help("optimizer", OPTIMIZER))
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


@bench.command("engine", help=_help("engine", ENGINE))
@click.option("--quick", is_flag=True, help="Fewer prompts and pairs; rougher.")
@click.option(
    "--model", default="tiny", show_default=True, metavar="tiny|smollm2|FOLDER",
    help="A random one, the real weights of SmolLM2-135M, or those in a folder.",
)  # fmt: skip
@click.option("--prompts", type=click.IntRange(min=1), help="Whose outputs are compared. [default: 200]")
@json_option
def engine(as_json: bool, **options: Any) -> int:
    note(f"measuring {ENGINE} ...")
    result = _benchmark("engine")(**_given(options), report=note)
    emit(result, as_json, lines(result))
    same = result["outputs_identical"] and result["second_outputs_identical"]
    return EXIT_OK if same else EXIT_PROBLEMS


@bench.command("serve-llm", help=_help("serve-llm", SERVE_LLM))
@click.option(
    "--model", default="smollm2", show_default=True, metavar="tiny|smollm2|FOLDER",
    help="Random weights with the tokenizer of SmolLM2, its real weights, or a folder with a chat template.",
)  # fmt: skip
@click.option("--replicas", type=click.IntRange(min=2), help="[default: 2]")
@click.option("--rounds", type=click.IntRange(min=1), help="Of the load, in each row. [default: 2]")
@click.option("--alone/--shared-only", default=None, help="Also measure both routers without a shared cache.")
@json_option
def serve_llm(as_json: bool, **options: Any) -> None:
    note(f"measuring {SERVE_LLM} ...")
    result = _benchmark("serve_llm")(**_given(options), report=note)
    emit(result, as_json, lines(result))


@bench.command("paged", help=_help("paged", PAGED))
@click.option("--quick", is_flag=True, help="One layout and fewer rounds; rougher.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N")
@click.option(
    "--way", "ways", multiple=True, type=click.Choice(["numpy", "torch", "triton"]),
    help="Only this one; may be repeated. [default: what is chosen for the device, and torch]",
)  # fmt: skip
@json_option
def paged(as_json: bool, **options: Any) -> None:
    note(f"measuring {PAGED} ...")
    result = _benchmark("paged")(**_given(options))
    emit(result, as_json, lines(result))


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
        with _some_manager(target) as manager:
            return dict(run(manager["url"], **({"seconds": 0.5} if quick else {})))
    return dict(run(quick=quick))


@contextmanager
def _some_manager(target: Target) -> Iterator[dict[str, Any]]:
    """``url`` and ``grpc`` of the manager that was named or runs here; of one for this purpose if there is
    none."""
    if target.url:
        yield {"url": target.url, "grpc": None}
        return
    if (target.directory() / "manager.json").exists():
        yield target.manager()
        return
    from kvcm_ray import cluster

    directory = Path(tempfile.mkdtemp(prefix="kvcm-bench-"))
    try:
        yield dataclasses.asdict(cluster.up_detached(directory / "data", 0))
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
