"""``kvcm up | down | version``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import EXIT_OK, emit, json_option, note
from kvcm_ray.client.connect import DATA_DIR
from kvcm_ray.errors import InvalidArgument, Unsupported

PORT = 6382

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="KVCM_DATA_DIR",
    default=DATA_DIR,
    show_default=True,
    help="Where the manager keeps everything (or KVCM_DATA_DIR).",
)


def _cluster() -> Any:
    """Running a manager needs Ray Serve; the rest of the command line does not."""
    try:
        from kvcm_ray import cluster
    except ImportError as error:
        raise Unsupported(f"running a manager needs {error.name}: pip install 'kvcm-ray[serve]'") from error
    return cluster


@click.command()
@data_dir_option
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="KIND:SIZE",
    help="shm:SIZE or file:SIZE[:PATH], fastest first; repeat for more. "
    "For a new data directory only.  [default: shm:256MiB, file:8GiB]",
)
@click.option("--replicas", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option(
    "--ray-address", metavar="ADDRESS",
    help="Run inside this Ray cluster (auto: the one of this machine), not in a private one. "
    "Returns when it is ready; HTTP is that cluster's Serve.",
)  # fmt: skip
@click.option("--route-prefix", help="Of the HTTP API inside a Ray cluster.  [default: /kvcm]")
@click.option("--detach", is_flag=True, help="Return when it is ready and leave it running.")
@json_option
def up(
    data_dir: Path, port: int, host: str, tiers: tuple[str, ...], replicas: int, ray_address: str | None,
    route_prefix: str | None, detach: bool, as_json: bool,
) -> int:  # fmt: skip
    """Start a manager; in the foreground, until Ctrl-C, unless --detach is given.

    kvcm up --data-dir ./kvcm-data --tier shm:1GiB --tier file:20GiB
    kvcm up --ray-address auto         # next to what runs in this machine's Ray cluster
    """
    cluster = _cluster()
    try:
        cluster.parse_tiers(tiers, data_dir)
    except InvalidArgument as error:
        raise click.BadParameter(error.message, param_hint="--tier") from error
    if route_prefix and not ray_address:
        raise click.UsageError("--route-prefix goes with --ray-address")
    note(f"starting a manager on {data_dir} ...")
    if ray_address:
        prefix = {"route_prefix": route_prefix} if route_prefix else {}
        manager = cluster.up_inside(data_dir, tiers, ray_address=ray_address, replicas=replicas, **prefix)
        _announce(manager, data_dir, as_json, f"kvcm down{_where(data_dir)} stops it")
        return EXIT_OK
    if detach:
        manager = cluster.up_detached(data_dir, port, tiers, host=host, replicas=replicas)
        _announce(manager, data_dir, as_json, f"kvcm down{_where(data_dir)} stops it")
        return EXIT_OK
    cluster.up(
        cluster.Options(data_dir, port, tiers, host, replicas), note=note,
        on_ready=lambda manager: _announce(manager, data_dir, as_json, "Ctrl-C stops it"),
    )  # fmt: skip
    note("stopped")
    return EXIT_OK


def _announce(manager: Any, data_dir: Path, as_json: bool, how_to_stop: str) -> None:
    """The one line that ends the start. Flushed: whoever started us may read a pipe."""
    facts = dataclasses.asdict(manager)
    line = (
        f"kvcm serves {manager.url} from {manager.data_dir} (ready in {manager.ready_s:.1f} s); "
        f"try: kvcm status{_where(data_dir)} · {how_to_stop}"
    )
    click.echo(json.dumps(facts) if as_json else line)
    sys.stdout.flush()


def _where(data_dir: Path) -> str:
    """The option that leads to this data directory, if one is needed."""
    if str(data_dir) in (DATA_DIR, os.environ.get("KVCM_DATA_DIR", "")):
        return ""
    return f" --data-dir {data_dir}"


@click.command()
@data_dir_option
@click.option("--purge", is_flag=True, help="Also remove the data directory and its blocks.")
@json_option
def down(data_dir: Path, purge: bool, as_json: bool) -> int:
    """Stop the manager of a data directory, and nothing else.

    Blocks stay: on files for ever, in shared memory until the machine restarts.
    """
    stopped = _cluster().down(data_dir, purge=purge)
    text = f"stopped the manager of {data_dir}" if stopped else f"no manager ran on {data_dir}"
    emit({"stopped": stopped, "data_dir": str(data_dir)}, as_json, [text])
    return EXIT_OK


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    found = metadata.version("kvcm-ray")
    emit({"version": found}, as_json, [f"kvcm-ray {found}"])
