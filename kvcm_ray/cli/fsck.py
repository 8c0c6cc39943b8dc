"""``kvcm fsck``: check that indexes, storages and counters agree."""

from __future__ import annotations

import contextlib

import click

from kvcm_ray.cli.output import EXIT_OK, EXIT_PROBLEMS, emit, human_bytes, json_option
from kvcm_ray.cli.status import usage_of
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.errors import Unavailable


@click.command()
@click.option("--deep", is_flag=True, help="Also read every block and check its checksum.")
@target_options
@json_option
def fsck(deep: bool, target: Target, as_json: bool) -> int:
    """Check both directions, rows to bytes and bytes to rows, and the counters.

    Works on a data directory of this machine, whether its manager runs or not, and changes nothing.
    Exit code 4 if anything is wrong.
    """
    if target.url is not None and target.data_dir is None:
        raise click.UsageError("fsck reads files: give --data-dir, not a URL")
    from kvcm_ray.cli.counters import contradictions  # these need the index and the storages
    from kvcm_ray.fsck import check

    directory = target.directory()
    with contextlib.ExitStack() as stack:
        api = _running(target, stack)
        report = check(directory, deep=deep)
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
    emit({**report.to_dict(), "running": api is not None}, as_json, lines)
    return EXIT_OK if report.ok else EXIT_PROBLEMS


def _running(target: Target, stack: contextlib.ExitStack) -> Api | None:
    """The API of the manager that runs on the data directory, None if none does."""
    with contextlib.suppress(Unavailable):
        api = stack.enter_context(open_api(Target(None, target.directory())))
        api.call("checkHealth")
        return api
    return None
