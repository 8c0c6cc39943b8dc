"""A group and its reclaimers as plain processes that start in milliseconds and can be killed.

The bodies are the real ones (`GroupService`, `ReclaimerBody`) on real indexes and storages; sockets stand
in for Ray. ``python -m kvcm_ray.testing.crash_child`` is a nursery: it has everything imported, and
forks a child for each line of JSON that it reads. It answers with the child's process id, and ends its
children when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from kvcm_ray.actors.chores import ErasureDone, MoveDone
from kvcm_ray.actors.reclaimer import ReclaimerBody
from kvcm_ray.actors.service import GroupService
from kvcm_ray.actors.view import RegistryView

ENDED_EXIT_CODE = 75
PATIENCE_S = 5.0  #: for a reclaimer that is being started again
_PR_SET_PDEATHSIG = 1
_BROKEN = (OSError, EOFError)


def address_of(folder: str | Path, name: str) -> str:
    """Socket of a child."""
    return str(Path(folder) / f"{name}.sock")


# --------------------------------------------------------------------------------------- children


class SocketPool:
    """`Pool` of reclaimer processes: a thread for each, which calls it once at a time."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._queues: dict[int, queue.SimpleQueue[_Call]] = {}

    def erase(
        self, number: int, size: int, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        def finished(result: Any, problem: str) -> None:
            erased, own = result or ([], "")
            done(erased, problem or own)

        self._call(number, ("erase", (index_path, trash_ids)), finished)

    def move(self, number: int, size: int, index_path: str, session_id: str, done: MoveDone) -> None:
        def finished(result: Any, problem: str) -> None:
            done(result.get(session_id) if result else None, problem)

        self._call(number, ("move", (index_path, [session_id])), finished)

    def _call(self, number: int, call: _Request, done: _Done) -> None:
        if number not in self._queues:
            self._queues[number] = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(number,), daemon=True).start()
        self._queues[number].put((call, done))

    def _run(self, number: int) -> None:
        caller = Caller(address_of(self._folder, f"reclaimer-{number}"))
        while True:
            call, done = self._queues[number].get()
            try:
                done(caller.call(call, PATIENCE_S), "")
            except _BROKEN as error:  # died at it: as Ray tells it
                done(None, f"reclaimer {number}: {error!r}")


_Request = tuple[str, tuple[Any, ...]]
_Done = Callable[[Any, str], None]
_Call = tuple[_Request, _Done]


class Caller:
    """A connection to a child, made when it is needed. Not for several threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: Connection | None = None

    def call(self, request: _Request, patience_s: float) -> Any:
        """The answer, or the error that the method raised.

        Raises:
            OSError, EOFError: the child died meanwhile, or is not there within `patience_s`.
        """
        connection, self._connection = self._send(request, patience_s), None
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            result = connection.recv()
            stack.pop_all()
        self._connection = connection  # a broken one is not used again
        if isinstance(result, _Raised):
            raise result.error
        return result

    def _send(self, request: _Request, patience_s: float) -> Connection:
        """Send to the present incarnation: the one that was connected may have died while idle."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(request)
                return self._connection
            self._connection.close()
        connection = self._connect(patience_s)
        connection.send(request)
        return connection

    def _connect(self, patience_s: float) -> Connection:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return Client(self._address)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _serve(address: str, methods: dict[str, Callable[..., Any]], ready: Callable[[], None]) -> None:
    """Answer calls for ever, each connection in a thread of its own."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)
    listener = Listener(address, backlog=64)
    ready()
    while True:
        connection = listener.accept()
        threading.Thread(target=_answer, args=(connection, methods), daemon=True).start()


def _answer(connection: Connection, methods: dict[str, Callable[..., Any]]) -> None:
    with contextlib.suppress(*_BROKEN):
        while True:
            name, arguments = connection.recv()
            try:
                result = methods[name](*arguments)
            except Exception as error:
                result = _Raised(error)
            connection.send(result)


def run_group(folder: str, data_dir: str, group: str, ready: Callable[[], None]) -> None:
    service = GroupService(
        RegistryView(data_dir), group, SocketPool(folder), lambda why: os._exit(ENDED_EXIT_CODE)
    )
    methods = {
        "submit": lambda requests: service.submit(requests).result(),
        "submit_waiting": lambda request, wait_ms: service.submit_waiting(request, wait_ms).result(),
        "usage": lambda: service.usage().result(),
        "capacity": lambda: service.capacity().result(),
    }
    _serve(address_of(folder, f"group-{group}"), methods, ready)


def run_reclaimer(folder: str, data_dir: str, number: int, ready: Callable[[], None]) -> None:
    body, turn = ReclaimerBody(RegistryView(data_dir)), threading.Lock()

    def one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with turn:
                return method(*arguments)

        return call

    methods = {"erase": one_at_a_time(body.erase), "move": one_at_a_time(body.move)}
    _serve(address_of(folder, f"reclaimer-{number}"), methods, ready)


# ---------------------------------------------------------------------------------------- nursery


def main() -> None:
    """Lines ``["group", folder, data dir, name]``, ``["reclaimer", folder, data dir, number]`` and
    ``["kill", pid]``; each is answered with a process id when it is done."""
    children: set[int] = set()
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        if kind == "kill":
            (pid,) = arguments
            assert pid in children, "only children are killed"
            children.remove(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            pid = _fork(run_group if kind == "group" else run_reclaimer, arguments)
            children.add(pid)
        print(pid, flush=True)


def _fork(run: Callable[..., None], arguments: Sequence[Any]) -> int:
    """Process id of a child that serves already."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(read)
        try:
            run(*arguments, lambda: os.close(write))
        finally:
            os._exit(1)
    os.close(write)
    os.read(read, 1)  # ends when the child serves, or dies
    os.close(read)
    return pid


if __name__ == "__main__":
    main()
