"""``kvcm demo``: a manager from nothing, a real trace with real bytes, a check, and all of it gone.

It runs the very commands that it prints, as a user would, in a directory of its own. Exit code 0
only if every byte was right, the check found nothing and every command did what it should.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.chaos import Chaos
from kvcm_ray.cli.output import EXIT_FAILED, EXIT_OK, EXIT_PROBLEMS, coloured, human_bytes, note
from kvcm_ray.cli.replay import PATIENCE_S, report_lines

BLOCK_BYTES = 4096
#: All 182 790 different blocks of the trace, of 4 KiB, with room to spare.
ROOM_BYTES = 1 << 30
SHM = "/dev/shm"
UP_TIMEOUT_S = 180
SLACK_S = 120


class Step(Exception):
    """A command did not do what it should."""


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True)
@click.option("--trace", default="conversation", show_default=True)
@click.option("--keep", is_flag=True, help="Leave the data directory behind.")
@click.option("--chaos", is_flag=True, help="Kill a process of the manager every few seconds, with -9.")
def demo(seconds: float, trace: str, keep: bool, chaos: bool) -> int:
    """Start a manager, replay an hour of real chat, verify every byte, check, stop.

    \b
    Examples:
      kvcm demo --seconds 20
      kvcm demo --chaos          # writes that were acknowledged survive, bytes are never wrong
    """
    directory = Path(tempfile.mkdtemp(prefix="kvcm-demo-"))
    data_dir = directory / "data"
    verdict = ""
    try:
        up = _kvcm("up", "--detach", "--port", "0", *_tiers(), at=data_dir)
        note(f"  serving on {up['url']} after {up['ready_s']:.1f} s")
        with Chaos(up["manager_id"], note) if chaos else nullcontext() as killer:
            report = _replay(trace, seconds, data_dir, chaos=chaos)
        _show_status(_status(data_dir, PATIENCE_S if chaos else 0))
        fsck = _kvcm("fsck", "--deep", at=data_dir)
        note(f"  {fsck['blocks']} blocks checked, nothing lost, nothing left over")
        verdict = _verdict(report, fsck, killer)
    except Step as error:
        verdict = str(error)
    finally:
        verdict = _stop(data_dir, keep) or verdict  # whatever has been started
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    if verdict:
        note(coloured(f"demo FAILED: {verdict}", fg="red", bold=True))
        return EXIT_FAILED
    note(coloured("demo ok: every byte read was the byte that was written", fg="green", bold=True))
    return EXIT_OK


def _replay(trace: str, seconds: float, data_dir: Path, *, chaos: bool) -> dict[str, Any]:
    """With chaos writes may be refused, and look-ups miss, while the process that they need is dead; what
    is lost is told by the verdict."""
    arguments = ["replay", trace, "--block-bytes", str(BLOCK_BYTES), "--seconds", f"{seconds:g}", "--wrap"]
    codes = {EXIT_OK}
    if chaos:
        arguments.append("--recheck")
        codes |= {EXIT_FAILED, EXIT_PROBLEMS}
    report = _kvcm(*arguments, at=data_dir, timeout_s=seconds + SLACK_S, codes=codes)
    if "requests" not in report:
        raise Step(f"kvcm replay: {report['error']['message']}")
    for line in report_lines(report):
        note(f"  {line}")
    return report


def _verdict(report: dict[str, Any], fsck: dict[str, Any], killer: Chaos | None) -> str:
    """Why the demo failed; "" if it did not."""
    counted = ["wrong_bytes", "unreadable_blocks"]
    if killer is None:
        counted.append("refused_blocks")
    else:
        counted.append("lost_blocks")  # nothing is evicted: what was acknowledged must all be there
        kills = ", ".join(f"{count} x {kind}" for kind, count in sorted(killer.kills.items()))
        note(f"  killed: {kills or 'nothing'}; acknowledged and lost: {report['lost_blocks']}")
        if not killer.kills:
            return "nothing was killed"
    wrong = {name: report[name] for name in counted} | {
        name: fsck[name] for name in ("orphan_bytes", "dangling_locations", "corrupt_records")
    }
    found = [f"{name} is {value}" for name, value in wrong.items() if value]
    if not report["hit_blocks"]:
        found.append("the cache never hit")
    return ", ".join(found if fsck["counters_ok"] else [*found, "counters are wrong"])


def _stop(data_dir: Path, keep: bool) -> str:
    try:
        _kvcm("down", *([] if keep else ["--purge"]), at=data_dir)
    except Step as error:
        return str(error)
    return ""


def _kvcm(
    *arguments: str, at: Path, timeout_s: float = UP_TIMEOUT_S, codes: Collection[int] = (EXIT_OK,)
) -> dict[str, Any]:
    """Run a command as a user would; its JSON. Its progress and errors go to standard error.

    Raises:
        Step: it ended with a code that is not in `codes`, or not in time.
    """
    shown = ["kvcm", *arguments, "--data-dir", str(at)]
    note(coloured(f"$ {' '.join(shown)}", bold=True))
    command = [sys.executable, "-m", "kvcm_ray.cli", *shown[1:], "--json"]
    environment = {k: v for k, v in os.environ.items() if k not in ("KVCM_URL", "KVCM_DATA_DIR")}
    begin_s = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise Step(f"{' '.join(shown)} took longer than {timeout_s:.0f} s") from None
    if done.returncode not in codes:
        raise Step(_why(shown, done.returncode, done.stdout))
    answer = json.loads(done.stdout or b"{}")
    return {"wall_s": time.monotonic() - begin_s, **answer}


def _why(command: Sequence[str], code: int, output: bytes) -> str:
    """What a failed command said, with its findings if it had any."""
    try:
        answer = json.loads(output)
    except ValueError:
        answer = {}
    told = answer.get("error", {}).get("message", "")
    counted = ", ".join(
        f"{name} {answer[name]}"
        for name in ("wrong_bytes", "unreadable_blocks", "refused_blocks", "notes")
        if answer.get(name)
    )
    return f"{' '.join(command[:2])} ended with {code}: {told or counted or 'see above'}"


def _status(data_dir: Path, patience_s: float) -> dict[str, Any]:
    """Asked again for so long: what was killed last may be starting still. Raises Step."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            status = _kvcm("status", at=data_dir)
            if all(group["available"] for group in status["groups"]) or time.monotonic() >= deadline:
                return status
        except Step:
            if time.monotonic() >= deadline:
                raise
        time.sleep(1)


def _show_status(status: dict[str, Any]) -> None:
    for group in status["groups"]:
        used, quota = human_bytes(group["used_bytes"]), human_bytes(group["quota_bytes"])
        note(f"  group {group['name']}: {used} of {quota}, {group['blocks']} blocks")


def _tiers() -> list[str]:
    """Shared memory if the machine has enough of it, else files."""
    try:
        free = shutil.disk_usage(SHM).free
    except OSError:
        free = 0
    tier = "shm" if free >= 2 * ROOM_BYTES else "file"
    return ["--tier", f"{tier}:{ROOM_BYTES >> 20}MiB"]
