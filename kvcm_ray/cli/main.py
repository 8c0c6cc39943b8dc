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

from kvcm_ray.cli import output
from kvcm_ray.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE, fail
from kvcm_ray.cli.tree import LazyGroup
from kvcm_ray.errors import InvalidArgument, KvcmError, Unsupported

#: name -> (module, attribute, the first line of its help); the order is that of `kvcm --help`.
COMMANDS = {
    "up": ("lifecycle", "up", "Start a manager; in the foreground, until Ctrl-C, unless --detach is given."),
    "down": ("lifecycle", "down", "Stop the manager of a data directory, and nothing else."),
    "restart": (
        "lifecycle", "restart", "Restart the processes of a manager one after another, while requests go on.",
    ),
    "status": ("status", "status", "Show usage of groups, storages and nodes."),
    "account": ("account", "account", "Accounts, their tokens, and who did what."),
    "top": (
        "top", "top", "Show groups live: quota, hit ratio, writes, evictions. With GROUP, its instances.",
    ),
    "tail": (
        "tail", "tail", "Follow what happens: writes, evictions, refusals, faults; look-ups are sampled.",
    ),
    "explain": (
        "explain", "explain",
        "Say why a prompt hits or misses: where its blocks are, or when and why they went.",
    ),
    "doctor": ("doctor", "doctor", "Say what is wrong or will be, why it matters, and what to do about it."),
    "why": ("why", "why", "Explain an error code: what it means, usual causes, what to do."),
    "metrics": ("metrics", "metrics", "Metrics: a summary, and files for Prometheus and Grafana."),
    "capacity": (
        "capacity", "capacity", "Show what holds the quota of a group, or of all groups, tier by tier.",
    ),
    "advise": (
        "advise", "advise", "Tell what a larger or smaller quota would find, for the traffic of a group.",
    ),
    "group": (
        "groups", "group",
        "Instance groups: one quota and one list of storages for a team or a model family.",
    ),
    "storage": ("storages", "storage", "Storages: where blocks' bytes live."),
    "instance": (
        "instances", "instance",
        "Instances: registered model configurations. Their shape never changes, only their user data.",
    ),
    "pin": (
        "capacity", "pin", "Pins: blocks that are never evicted, a shared system prompt for example.",
    ),
    "reclaimer": (
        "capacity", "reclaimer", "Show what the reclaimers do, and change how much they may do.",
    ),
    "config": ("config", "config", "The configuration: where each value comes from, checks, explanations."),
    "snapshot": ("snapshot", "snapshot", "Save the storages, groups and instances to a file, and load them."),
    "replay": ("replay", "replay", "Replay TRACE: look up, read and verify hits, write misses."),
    "optimize": ("optimize", "optimize", "Replay TRACE through policies at many capacities."),
    "simulate": (
        "simulate", "simulate", "Simulate TRACE against the storages, groups and tiers of SCENARIO.",
    ),
    "trace": (
        "traces", "trace",
        "Record and convert traces: which blocks were asked for, in which order; no prompts.",
    ),
    "fsck": (
        "fsck", "fsck", "Check both directions, rows to bytes and bytes to rows, and the counters.",
    ),
    "bench": (
        "bench", "bench", "Measure this machine. Stop other work first, or read ratios only.",
    ),
    "demo": (
        "demo", "demo", "Start a manager, replay an hour of real chat, verify every byte, check, stop.",
    ),
    "completion": ("completion", "completion", "Print the script that completes commands in a shell."),
    "version": ("lifecycle", "version", "Print the version."),
}  # fmt: skip

EXIT_INTERRUPTED = 130


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `kvcm up`, or `kvcm demo` to see it work. Every command has --help.",
)
@click.version_option(package_name="kvcm-ray", prog_name="kvcm-ray")
def cli() -> None:
    """KV-cache manager for LLM inference on Ray."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in arguments
    output.reset()
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
