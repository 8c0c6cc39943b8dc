"""Entry point of the ``kvcm`` command: the tree of commands, and what an error looks like.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 the manager cannot be reached, 4 a check
found problems, 130 interrupted. A stack trace is shown only with KVCM_DEBUG=1.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence

import click

from kvcm_ray.cli import (
    advise,
    bench,
    capacity,
    demo,
    fsck,
    groups,
    instances,
    lifecycle,
    optimize,
    replay,
    simulate,
    status,
    storages,
    traces,
)
from kvcm_ray.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE, fail
from kvcm_ray.errors import InvalidArgument, KvcmError, Unsupported

EXIT_INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `kvcm up`, or `kvcm demo` to see it work. Every command has --help.",
)
@click.version_option(package_name="kvcm-ray", prog_name="kvcm-ray")
def cli() -> None:
    """KV-cache manager for LLM inference on Ray."""


for _command in (
    lifecycle.up,
    lifecycle.down,
    status.status,
    capacity.capacity,
    advise.advise,
    groups.group,
    storages.storage,
    instances.instance,
    capacity.pin,
    capacity.reclaimer,
    replay.replay,
    optimize.optimize,
    simulate.simulate,
    traces.trace,
    fsck.fsck,
    bench.bench,
    demo.demo,
    lifecycle.version,
):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in arguments
    try:
        result = cli.main(args=arguments, prog_name="kvcm", standalone_mode=False)
    except click.ClickException as error:
        if as_json:
            click.echo(json.dumps({"error": InvalidArgument(error.format_message()).to_dict()}))
        error.show()
        return EXIT_USAGE if isinstance(error, click.UsageError) else EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except KvcmError as error:
        return fail(error, as_json)
    except BrokenPipeError:  # `kvcm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvcm_ray"):
            raise
        missing = f"this command needs {error.name}: pip install 'kvcm-ray[serve]'"
        return fail(Unsupported(missing), as_json)
    except Exception as error:
        if os.environ.get("KVCM_DEBUG"):
            traceback.print_exc()
        message = f"unexpected {type(error).__name__}: {error} (KVCM_DEBUG=1 shows where)"
        return fail(KvcmError(message), as_json)
    return result if isinstance(result, int) else EXIT_OK
