"""``kvcm up | down | version``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvcm_ray.cli.output import EXIT_OK, emit, json_option, note
from kvcm_ray.errors import Unsupported

if TYPE_CHECKING:
    from kvcm_ray.cluster import Options

DATA_DIR = "kvcm-data"


def _cluster() -> Any:
    """Running a manager needs Ray Serve; the rest of the command line does not."""
    try:
        from kvcm_ray import cluster
    except ImportError as error:
        raise Unsupported(f"running a manager needs {error.name}: pip install 'kvcm-ray[serve]'") from error
    return cluster


#: A flag for every setting of `kvcm_ray.config.settings` that is not a table. None: not given.
SETTING_FLAGS = (
    click.option(
        "--data-dir", type=click.Path(file_okay=False, path_type=Path),
        help=f"Where the manager keeps everything.  [default: {DATA_DIR}]",
    ),
    click.option(
        "--port", type=click.IntRange(0, 65535), help="Of HTTP; 0 picks a free one.  [default: 6382]"
    ),
    click.option("--host", help="Address to listen on.  [default: 127.0.0.1]"),
    click.option(
        "--tier", "tiers", multiple=True, metavar="KIND:SIZE",
        help="shm:SIZE or file:SIZE[:PATH], fastest first; repeat for more. "
        "For a new data directory only.  [default: shm:256MiB, file:8GiB]",
    ),
    click.option(
        "--replicas", type=click.IntRange(1, 64), help="Processes that answer HTTP and gRPC.  [default: 2]"
    ),
    click.option("--reclaimers", type=click.IntRange(1, 64), help="Processes that erase and copy blocks."),
    click.option(
        "--log-format", type=click.Choice(["text", "json"]), help="Of log lines.  [default: text]"
    ),
    click.option(
        "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]"
    ),
    click.option(
        "--accounts/--no-accounts", default=None,
        help="Calls need an account, from now on; needed for a --host other than loopback.  "
        "[default: as the data directory has it, a new one is open]",
    ),
    click.option("--tls-cert", type=click.Path(dir_okay=False), metavar="FILE", help="Speak TLS: PEM file."),
    click.option("--tls-key", type=click.Path(dir_okay=False), metavar="FILE", help="Its key, a PEM file."),
    click.option(
        "--requests-per-second", type=click.FloatRange(min=0),
        help="Of one account, or one address while open, to one replica; 0: no limit.  [default: 0]",
    ),
    click.option(
        "--grpc-port", type=click.IntRange(-1, 65535),
        help="0 picks a free one, -1 is no gRPC.  [default: 6381 if --port is 6382, else a free one]",
    ),
    click.option(
        "--debug-api/--no-debug-api", default=None,
        help="Serve the API that makes calls fail on purpose (injectFault ...).  [default: no]",
    ),
)  # fmt: skip
config_option = click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, exists=True), metavar="FILE",
    help="YAML file (or KVCM_CONFIG, ./kvcm.yaml, <data_dir>/kvcm.yaml).",
)  # fmt: skip


def setting_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--config`` and a flag for each setting; they come as keyword arguments of the settings' names."""
    for option in reversed((config_option, *SETTING_FLAGS)):
        function = option(function)
    return function


def load_settings(config_file: str | None, flags: dict[str, Any]) -> Any:
    """What the flags, the environment and the file say together.

    Raises:
        UsageError: a flag is wrong. InvalidArgument: a variable or the file is.
    """
    try:
        from kvcm_ray.config.sources import look, refusal
    except ImportError as error:
        raise Unsupported(f"this needs {error.name}: pip install 'kvcm-ray[serve]'") from error
    loaded, problems = look(flags, config_file)
    if typed := [problem for problem in problems if problem.where.startswith("--")]:
        raise click.UsageError("\n".join(f"{problem.where}: {problem.message}" for problem in typed))
    if loaded is None:
        raise refusal(problems)
    return loaded


@click.command()
@setting_flags
@click.option(
    "--ray-address", metavar="ADDRESS",
    help="Run inside this Ray cluster (auto: the one of this machine), not in a private one. "
    "Returns when it is ready; HTTP is that cluster's Serve.",
)  # fmt: skip
@click.option("--route-prefix", help="Of the HTTP API inside a Ray cluster.  [default: /kvcm]")
@click.option("--detach", is_flag=True, help="Return when it is ready and leave it running.")
@json_option
def up(
    config_file: str | None, ray_address: str | None, route_prefix: str | None, detach: bool, as_json: bool,
    **flags: Any,
) -> int:  # fmt: skip
    """Start a manager; in the foreground, until Ctrl-C, unless --detach is given.

    A flag beats a KVCM_* variable, that beats the file, that beats the default; `kvcm config show
    --origin` tells which it was.

    \b
    Examples:
      kvcm up --data-dir ./kvcm-data --tier shm:1GiB --tier file:20GiB
      kvcm up --config kvcm.yaml --detach
      kvcm up --ray-address auto         # next to what runs in this machine's Ray cluster
    """
    cluster = _cluster()
    loaded = load_settings(config_file, flags)
    options = cluster.Options(**loaded.settings.launch())
    for sentence in loaded.notes:
        note(f"note: {sentence}")
    if route_prefix and not ray_address:
        raise click.UsageError("--route-prefix goes with --ray-address")
    note(f"starting a manager on {options.data_dir} ...")
    if ray_address:
        manager = _up_inside(options, ray_address, route_prefix)
        _announce(manager, as_json, f"kvcm down{_where(options.data_dir)} stops it")
        return EXIT_OK
    if detach:
        log_file = Path(options.data_dir) / "manager.log"
        begin = log_file.stat().st_size if log_file.exists() else 0
        manager = cluster.up_detached(**loaded.settings.launch())
        _repeat_notes(log_file, begin)
        _announce(manager, as_json, f"kvcm down{_where(options.data_dir)} stops it")
        return EXIT_OK
    cluster.up(
        options, note=note, on_ready=lambda manager: _announce(manager, as_json, "Ctrl-C stops it")
    )
    note("stopped")
    return EXIT_OK


def _repeat_notes(log_file: Path, begin: int) -> None:
    """What the manager in the background said about differences from what was asked for."""
    with log_file.open("rb") as file:
        file.seek(begin)
        for line in file.read().decode(errors="replace").splitlines():
            if line.startswith("note: "):
                note(line)


def _up_inside(options: Options, ray_address: str, route_prefix: str | None) -> Any:
    from kvcm_ray.actors.paths import registry_dir, resolve

    if options.grpc_port not in (None, -1):
        raise click.UsageError(
            "--grpc-port: inside a Ray cluster the ports are those of its Serve, which is started with HTTP "
            "only; use HTTP there, or a manager of its own (without --ray-address)"
        )
    if options.tls_cert:
        raise click.UsageError("--tls-cert: inside a Ray cluster TLS is a matter of its Serve")
    fresh = not registry_dir(resolve(options.data_dir)).exists()
    prefix = {"route_prefix": route_prefix} if route_prefix else {}
    manager = _cluster().up_inside(
        options.data_dir, options.tiers, ray_address=ray_address, replicas=options.replicas,
        reclaimers=options.reclaimers, debug_api=options.debug_api, accounts=options.accounts, **prefix,
    )  # fmt: skip
    from kvcm_ray.actors.handles import RegistryHandle
    from kvcm_ray.config.declared import apply_at_start

    apply_at_start(RegistryHandle(), options.declared, fresh=fresh, note=note)
    return manager


def _announce(manager: Any, as_json: bool, how_to_stop: str) -> None:
    """The one line that ends the start. Flushed: whoever started us may read a pipe."""
    facts = dataclasses.asdict(manager)
    line = (
        f"kvcm serves {manager.url} from {manager.data_dir} (ready in {manager.ready_s:.1f} s); "
        f"try: kvcm status{_where(manager.data_dir)} · {how_to_stop}"
    )
    click.echo(json.dumps(facts) if as_json else line)
    sys.stdout.flush()


def _where(data_dir: Any) -> str:
    """The option that leads to this data directory, if one is needed."""
    found = os.environ.get("KVCM_DATA_DIR") or DATA_DIR
    return "" if os.path.realpath(found) == os.path.realpath(data_dir) else f" --data-dir {data_dir}"


@click.command()
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), envvar="KVCM_DATA_DIR",
    default=DATA_DIR, show_default=True, help="Of the manager (or KVCM_DATA_DIR).",
)  # fmt: skip
@click.option("--purge", is_flag=True, help="Also remove the data directory and its blocks.")
@json_option
def down(data_dir: Path, purge: bool, as_json: bool) -> int:
    """Stop the manager of a data directory, and nothing else.

    Blocks stay: on files for ever, in shared memory until the machine restarts.

    \b
    Examples:
      kvcm down
      kvcm down --data-dir /data/kvcm --purge
    """
    stopped = _cluster().down(data_dir, purge=purge)
    text = f"stopped the manager of {data_dir}" if stopped else f"no manager ran on {data_dir}"
    emit({"stopped": stopped, "data_dir": str(data_dir)}, as_json, [text])
    return EXIT_OK


@click.command()
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), envvar="KVCM_DATA_DIR",
    default=DATA_DIR, show_default=True, help="Of the manager (or KVCM_DATA_DIR).",
)  # fmt: skip
@json_option
def restart(data_dir: Path, as_json: bool) -> int:
    """Restart the processes of a manager one after another, while requests go on.

    New code and settings of the environment are loaded. Ray and the HTTP proxy stay.

    \b
    Example:
      kvcm restart --data-dir /data/kvcm
    """
    note(f"restarting the manager on {data_dir}, process by process ...")
    restarted = _cluster().restart(data_dir)
    emit({"restarted": restarted}, as_json, [f"restarted {', '.join(restarted)}"])
    return EXIT_OK


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version.

    \b
    Example:
      kvcm version --json
    """
    found = metadata.version("kvcm-ray")
    emit({"version": found}, as_json, [f"kvcm-ray {found}"])
