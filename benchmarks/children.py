"""Processes that benchmarks measure with: started, ready, told to go at the same time, heard.

Such a program connects, prints "ready", waits for a line on standard input, does its work and prints
one JSON object. A second line tells those to stop that run until then.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvcm_ray.errors import Unavailable

READY_TIMEOUT_S = 60.0


class Children:
    """Some running programs; made by `children`."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def tell(self, line: str) -> None:
        """Send all of them a line."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def answers(self, timeout_s: float) -> list[dict[str, Any]]:
        """What they print at their end, `timeout_s` (and some time to start and end) from now.

        Raises:
            Unavailable: one of them failed; it said why on standard error.
        """
        found = [process.communicate(timeout=timeout_s + READY_TIMEOUT_S)[0] for process in self._processes]
        if any(process.returncode for process in self._processes):
            raise Unavailable("a client of the benchmark failed; it said why on standard error")
        return [json.loads(text) for text in found]

    def await_ready(self) -> None:
        for process in self._processes:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise Unavailable("a client of the benchmark did not start")


@contextmanager
def children(module: str, commands: Sequence[Sequence[object]]) -> Iterator[Children]:
    """One process of ``python -m module`` for each list of arguments, all of them ready.

    Raises:
        Unavailable: one did not start.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for arguments in commands
    ]  # fmt: skip
    try:
        started = Children(processes)
        started.await_ready()
        yield started
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_children(module: str, commands: Sequence[Sequence[object]], timeout_s: float) -> list[dict[str, Any]]:
    """Run programs side by side; what they print. Raises Unavailable."""
    with children(module, commands) as started:
        started.tell("go")
        return started.answers(timeout_s)
