"""``kvcm fsck``: check that indexes, storages and counters agree; with --repair make them."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import click

from kvcm_ray.cli.config import agree
from kvcm_ray.cli.output import (
    EXIT_OK,
    EXIT_PROBLEMS,
    emit,
    human_bytes,
    json_option,
    note,
    progress,
    yes_option,
)
from kvcm_ray.cli.status import usage_of
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.errors import Unavailable


@click.command()
@click.option("--deep", is_flag=True, help="Also read every block and check its checksum.")
@click.option("--repair", is_flag=True, help="Make them agree; the manager must be stopped.")
@click.option("--dry-run", is_flag=True, help="With --repair: only say what would be done.")
@click.option(
    "--lost", multiple=True, metavar="STORAGE",
    help="With --repair: give up the blocks of a storage that is gone for good.",
)  # fmt: skip
@yes_option
@target_options
@json_option
def fsck(
    deep: bool, repair: bool, dry_run: bool, lost: tuple[str, ...], yes: bool, target: Target, as_json: bool
) -> int:
    """Check both directions, rows to bytes and bytes to rows, and the counters.

    Works on a data directory of this machine, whether its manager runs or not, and changes nothing unless
    --repair is given. Exit code 4 if anything is wrong (with --repair: still wrong).

    \b
    Examples:
      kvcm fsck --deep
      kvcm fsck --repair --dry-run
      kvcm fsck --repair --yes
    """
    if target.url is not None and target.data_dir is None:
        raise click.UsageError("fsck reads files: give --data-dir, not a URL")
    if (dry_run or lost) and not repair:
        raise click.UsageError("--dry-run and --lost go with --repair")
    directory = target.directory()
    repaired = _repair(directory, deep, lost, dry_run, yes) if repair else None
    code, found, lines = _check(directory, deep, target)
    if repaired is not None:
        found["repairs"], lines = repaired[0], [*repaired[1], *lines]
    emit(found, as_json, lines)
    return code


def _repair(
    directory: Path, deep: bool, lost: tuple[str, ...], dry_run: bool, yes: bool
) -> tuple[dict[str, object], list[str]]:
    """Say what there is to do, ask, do it; the fields of `Repairs` and sentences about them."""
    from kvcm_ray.repair import repair

    plan = repair(directory, do=False, deep=deep, lost=lost)
    lines = [f"would be done: {line}" for line in plan.lines()] or ["there is nothing to repair"]
    if plan.anything and not dry_run:
        for line in lines:
            note(line)
        agree("Repair it?", yes)
        plan = repair(directory, deep=deep, lost=lost)
        lines = [f"repaired: {line}" for line in plan.lines()]
    return {**asdict(plan), "dry_run": dry_run}, [*lines, *plan.notes]


def _check(directory: Path, deep: bool, target: Target) -> tuple[int, dict[str, object], list[str]]:
    from kvcm_ray.cli.counters import contradictions  # these need the index and the storages
    from kvcm_ray.fsck import check

    with contextlib.ExitStack() as stack:
        api = _running(target, stack)
        with progress("checking", unit="blocks") as bar:
            report = check(directory, deep=deep, done=lambda so_far: bar.upto(so_far.blocks))
        if api is not None:
            for sentence in contradictions(directory, lambda: usage_of(api)):
                report.counters_ok = False
                report.note(sentence)
    lines = [
        f"{report.blocks} blocks in {report.instances} instances, {report.copies} of them in two places"
        + ("" if api else " (the manager is not running: its counters were not asked)"),
        f"orphans            {human_bytes(report.orphan_bytes)}",
        f"dangling locations {report.dangling_locations} ({report.dangling_copies} of them copies)",
        f"without a header   {report.unverified_locations} (plain protocol clients write none)",
        f"corrupt records    {report.corrupt_records}",
        f"counters           {'ok' if report.counters_ok else 'WRONG'}",
        *report.notes,
    ]
    code = EXIT_OK if report.ok else EXIT_PROBLEMS
    return code, {**report.to_dict(), "running": api is not None}, lines


def _running(target: Target, stack: contextlib.ExitStack) -> Api | None:
    """The API of the manager that runs on the data directory, None if none does."""
    with contextlib.suppress(Unavailable):
        api = stack.enter_context(open_api(Target(None, target.directory())))
        api.call("checkHealth")
        return api
    return None
