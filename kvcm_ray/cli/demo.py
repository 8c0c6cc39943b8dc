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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import EXIT_FAILED, EXIT_OK, coloured, human_bytes, note
from kvcm_ray.cli.replay import report_lines

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
def demo(seconds: float, trace: str, keep: bool) -> int:
    """Start a manager, replay an hour of real chat, verify every byte, check, stop."""
    directory = Path(tempfile.mkdtemp(prefix="kvcm-demo-"))
    data_dir = directory / "data"
    verdict = ""
    try:
        up = _kvcm("up", "--detach", "--port", "0", *_tiers(), at=data_dir)
        note(f"  serving on {up['url']} after {up['ready_s']:.1f} s")
        report = _replay(trace, seconds, data_dir)
        status = _kvcm("status", at=data_dir)
        _show_status(status)
        fsck = _kvcm("fsck", "--deep", at=data_dir)
        note(f"  {fsck['blocks']} blocks checked, nothing lost, nothing left over")
        verdict = _verdict(report, fsck)
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


def _replay(trace: str, seconds: float, data_dir: Path) -> dict[str, Any]:
    arguments = ["replay", trace, "--block-bytes", str(BLOCK_BYTES), "--seconds", f"{seconds:g}"]
    report = _kvcm(*arguments, "--wrap", at=data_dir, timeout_s=seconds + SLACK_S)
    for line in report_lines(report):
        note(f"  {line}")
    return report


def _verdict(report: dict[str, Any], fsck: dict[str, Any]) -> str:
    """Why the demo failed; "" if it did not."""
    wrong = {name: report[name] for name in ("wrong_bytes", "unreadable_blocks", "refused_blocks")} | {
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


def _kvcm(*arguments: str, at: Path, timeout_s: float = UP_TIMEOUT_S) -> dict[str, Any]:
    """Run a command as a user would; its JSON. Its progress and errors go to standard error."""
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
    if done.returncode != EXIT_OK:
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
