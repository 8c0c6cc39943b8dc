"""The pool of reclaimer actors: starting one of a size, and reaching its members.

Names of reclaimers hold the size of their pool. So a group that has not heard of another size yet
reaches nobody, which it takes as a failure and tries again, instead of the wrong one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from kvcm_ray.actors import detached
from kvcm_ray.actors.chores import ErasureDone, MoveDone
from kvcm_ray.actors.names import NAMESPACE, reclaimer_name
from kvcm_ray.actors.reclaimer import Reclaimer

log = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0


def start(data_dir: Path, size: int) -> None:
    """Make the pool have `size` reclaimers; those of a pool of another size end first."""
    wanted = [reclaimer_name(number, size) for number in range(size)]
    prefix = reclaimer_name(0, 0).partition(":")[0] + ":"
    for found in ray.util.list_named_actors(all_namespaces=True):
        name = found["name"]
        if found["namespace"] == NAMESPACE and name.startswith(prefix) and name not in wanted:
            _end(name)
    for number, name in enumerate(wanted):
        detached.get_or_create(Reclaimer, name, str(data_dir), number, size)


def _end(name: str) -> None:
    """Kill an actor for good, and wait until it is dead."""
    try:
        handle = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return
    ray.kill(handle, no_restart=True)
    with contextlib.suppress(RayError):  # that it died is the answer
        ray.get(handle.pid.remote(), timeout=END_TIMEOUT_S)


class RayPool:
    """`Pool` of real actors."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def erase(
        self, number: int, size: int, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        def finished(result: tuple[list[int], str] | None, problem: str) -> None:
            erased, own = result or ([], "")
            done(erased, problem or own)

        self._call(reclaimer_name(number, size), "erase", (index_path, trash_ids), finished)

    def move(self, number: int, size: int, index_path: str, session_id: str, done: MoveDone) -> None:
        def finished(result: dict[str, Any] | None, problem: str) -> None:
            done(result.get(session_id) if result else None, problem)

        self._call(reclaimer_name(number, size), "move", (index_path, [session_id]), finished)

    def _call(
        self, name: str, method: str, arguments: tuple[Any, ...], done: Callable[[Any, str], None]
    ) -> None:
        """`done` is called once, with the result, or with None and what went wrong."""

        def failed(error: Exception) -> None:
            self._handles.pop(name, None)
            done(None, f"{name}: {error}")

        def finished(future: Any) -> None:
            try:
                result = future.result()
            except Exception as error:
                failed(error)
            else:
                done(result, "")

        try:
            if name not in self._handles:
                self._handles[name] = ray.get_actor(name, namespace=NAMESPACE)
            ref = getattr(self._handles[name], method).remote(*arguments)
        except Exception as error:
            failed(error)
        else:
            ref.future().add_done_callback(finished)
