"""``kvcm demo --chaos``: kills processes of a manager while it works, and keeps count.

Only actors and replicas of ours, by pid, one after another; what they were doing must go on without them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from kvcm_ray.cluster import processes

#: What a process's title contains, and what it is called; each kind in turn.
VICTIMS = {
    "GroupActor": "group actor",
    "Reclaimer": "reclaimer",
    "gateway": "HTTP replica",
    "Registry": "registry",
}
FIRST_S, EVERY_S = 3.0, 5.0


class Chaos:
    """Kills with -9 in a thread, for as long as the context is open.

    Args:
        manager_id: whose processes.
        say: takes a sentence for each kill.
    """

    def __init__(self, manager_id: str, say: Callable[[str], None], seed: int = 0) -> None:
        self._manager_id = manager_id
        self._say = say
        self._random = random.Random(seed)
        self._turns = itertools.cycle(VICTIMS.values())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.kills: Counter[str] = Counter()

    def __enter__(self) -> Chaos:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = FIRST_S
        while not self._stop.wait(wait_s):
            wait_s = EVERY_S
            living = [(name, pid) for pid in processes.members(self._manager_id) if (name := _role(pid))]
            if not living:
                continue
            there = {name for name, _ in living}
            kind = next(name for name in itertools.islice(self._turns, len(VICTIMS)) if name in there)
            pid = self._random.choice([pid for name, pid in living if name == kind])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.kills[kind] += 1
                self._say(f"  kill -9 {pid}, a {kind}; {self.kills.total()} so far")


def _role(pid: int) -> str:
    """What a process is; "" if it is none that is killed here."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
    return next((role for part, role in VICTIMS.items() if title.startswith("ray::") and part in title), "")
