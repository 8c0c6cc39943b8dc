"""The status line of an actor: what it is at, in its process's title, for `ps` and Ray's node page.

    ray::GroupActor chat 1.2 of 8.0 GiB, 71% hits, 3 sessions

Ray reads an actor's ``repr`` once, when it is made, so that can only name it; and Ray titles a process anew
after every call, ``ray::`` and the name of the actor's class. So a thread gives that class another name every
few seconds, and the process its title in between. Calls pay nothing. The title always begins with the name
that the class was written with, by which processes of a manager are told apart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)

PERIOD_S = 5.0
WINDOW_S = 30.0  #: of a hit ratio
LENGTH_MAX = 120


def keep(actor: object, status: Callable[[], str]) -> None:
    """Show `status()` of this process's only actor from now on, in a daemon thread."""
    cls = type(actor)
    name = cls.__name__
    thread = threading.Thread(target=_run, args=(cls, name, status), name="status-line", daemon=True)
    thread.start()


def group_status(name: str, history: Callable[[float], Future[dict[str, Any]]]) -> Callable[[], str]:
    """The words for an instance group; `history` as `GroupService.history`."""
    return lambda: f"{name} {of_rows(history(time.time() - WINDOW_S).result(PERIOD_S)['rows'])}"


def of_rows(rows: Mapping[str, Sequence[Any]]) -> str:
    """What the last rows of a group's history say."""
    if not rows["time_s"]:
        return "starting"
    words = [_filled(rows["used_bytes"][-1], rows["quota_bytes"][-1])]
    if asked := sum(rows["lookup_blocks"]):
        words.append(f"{sum(rows['hit_blocks']) / asked:.0%} hits")
    words.append(f"{rows['sessions'][-1]} sessions")
    return ", ".join(words)


def _filled(used: int, quota: int) -> str:
    """``1.2 of 8.0 GiB``: both in the unit of the second."""
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if quota >> shift:
            return f"{used / (1 << shift):.1f} of {quota / (1 << shift):.1f} {unit}"
    return f"{used} of {quota} bytes"


def _run(cls: type, name: str, status: Callable[[], str]) -> None:
    pause = threading.Event()
    while True:
        try:
            _show(cls, f"{name} {status()}"[:LENGTH_MAX])
        except Exception as error:  # the next time may do; the actor goes on anyway
            log.debug("no status line of %s: %r", name, error)
        pause.wait(PERIOD_S)


def _show(cls: type, text: str) -> None:
    text = "".join(c if c.isprintable() else "?" for c in text)
    cls.__name__ = text
    from ray import _raylet  # here: a manager starts from a process that has not imported Ray

    # Ray's own, because a second one would write to memory that is no title any more.
    show = getattr(_raylet, "setproctitle", None)
    if show is not None:
        show(f"ray::{text}")
