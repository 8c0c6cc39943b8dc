"""Handles: how a process talks to the actors.

`GroupHandle` lets concurrent calls ride together. A call costs about a millisecond of CPU whatever it
carries, so requests that come while `CALLS_IN_FLIGHT_MAX` calls are out wait and go together in the next
one. A request whose actor is restarting is sent again, with the same event id, until its deadline; the
group makes sure that this has the effect of sending it once. A write that is refused for want of room
waits, in a call of its own, while the group makes some; the refusal is its answer if that takes too long.

Handles are thread-safe, have an async and a blocking form, and need a connected Ray (`join`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)

from kvcm_ray import logs, tracing
from kvcm_ray.actors.names import NAMESPACE, REGISTRY, group_actor_name
from kvcm_ray.core.reclaim import want_of
from kvcm_ray.core.requests import Reply, Request, StartWrite
from kvcm_ray.errors import Fenced, GroupNotFound, KvcmError, Unavailable

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
CALLS_IN_FLIGHT_MAX = 2  #: more make calls smaller, and a call costs the same however full it is
CALL_REQUESTS_MAX = 256
RETRY_FIRST_S, RETRY_LAST_S = 0.02, 0.3
#: Left of a caller's time when a waiting write is answered, so that the caller learns the reason.
ANSWER_S = 0.2


@dataclass(slots=True)
class _Pending:
    request: Request
    deadline: float
    pause_s: float = RETRY_FIRST_S
    trace: str = ""  #: see `kvcm_ray.tracing.carried`
    trace_id: str = field(default_factory=logs.trace_id)
    future: Future[Reply] = field(default_factory=Future)

    def answer(self, answer: Reply | KvcmError) -> None:
        try:
            if isinstance(answer, KvcmError):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)
        except InvalidStateError:
            pass  # its caller gave up


class GroupHandle:
    """Calls of one group's actor.

    Args:
        group: name of the group.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._lock = threading.Lock()
        self._waiting: deque[_Pending] = deque()
        self._calls = 0
        self._actor: Any = None
        self._flush_due: set[asyncio.AbstractEventLoop] = set()

    async def call(self, request: Request, timeout_s: float = TIMEOUT_S) -> Reply:
        """The reply. Raises the `KvcmError` that the group answers with, `Unavailable` after
        `timeout_s`, `GroupNotFound` if there is no actor for the group."""
        pending = self._enqueue(request, timeout_s)
        self._pump_soon(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(pending.future)
        except TimeoutError:
            raise self._late(timeout_s) from None

    def call_sync(self, request: Request, timeout_s: float = TIMEOUT_S) -> Reply:
        """Blocking twin of `call`."""
        return self.wait(self.start(request, timeout_s), timeout_s)

    def start(self, request: Request, timeout_s: float = TIMEOUT_S) -> Future[Reply]:
        """Send without waiting; many of these in a row ride together. See `wait`."""
        pending = self._enqueue(request, timeout_s)
        self._pump()
        return pending.future

    def wait(self, future: Future[Reply], timeout_s: float = TIMEOUT_S) -> Reply:
        """The reply of a `start`. Raises like `call`."""
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            future.cancel()
            raise self._late(timeout_s) from None

    async def ask(self, method: str, *args: Any, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """What a method of `GroupActor` answers: `usage`, `capacity`, `advice` ... Raises like `call`."""
        return dict(await _call_async(lambda: self._remote(method, args), self._forget, timeout_s))

    def ask_sync(self, method: str, *args: Any, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Blocking twin of `ask`."""
        return dict(_call_sync(lambda: self._remote(method, args), self._forget, timeout_s))

    # --------------------------------------------------------------------------------- internals

    def _late(self, timeout_s: float) -> Unavailable:
        return Unavailable(f"group {self.group!r} did not answer within {timeout_s:g} s")

    def _enqueue(self, request: Request, timeout_s: float) -> _Pending:
        pending = _Pending(request, time.monotonic() + timeout_s)
        if tracing.on:
            pending.trace = tracing.carried()
        with self._lock:
            self._waiting.append(pending)
        return pending

    def _pump_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send at the end of this turn of the loop, so that a `gather` of calls rides in one."""
        if loop in self._flush_due:
            return
        self._flush_due.add(loop)

        def flush() -> None:
            self._flush_due.discard(loop)
            self._pump()

        loop.call_soon(flush)

    def _pump(self) -> None:
        """Send what waits, as far as calls may be out."""
        while True:
            with self._lock:
                if not self._waiting or self._calls >= CALLS_IN_FLIGHT_MAX:
                    return
                self._calls += 1
                count = min(len(self._waiting), CALL_REQUESTS_MAX)
                batch = [self._waiting.popleft() for _ in range(count)]
            self._send(batch)

    def _send(self, batch: list[_Pending]) -> None:
        batch = [p for p in batch if not p.future.cancelled()]
        try:
            traces = [p.trace for p in batch] if tracing.on else []
            more = {"traces": traces} if any(traces) else {}
            if any(trace_ids := [p.trace_id for p in batch]):
                more["trace_ids"] = trace_ids
            ref = self._find().submit.remote([p.request for p in batch], **more)
        except KvcmError as error:
            self._returned()
            for pending in batch:
                pending.answer(error)
            return
        except RayError as error:
            self._returned()
            self._again(batch, error)
            return
        ref.future().add_done_callback(lambda future: self._done(batch, future))

    def _done(self, batch: list[_Pending], future: Any) -> None:
        """Called by a thread of Ray's."""
        self._returned()
        try:
            answers = future.result()
        except RayTaskError as error:
            known = _cause(error)
            for pending in batch:
                pending.answer(known)
        except Exception as error:
            self._forget()
            self._again(batch, error)
        else:
            stale = []
            for pending, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Fenced):
                    stale.append(pending)
                elif _waits(pending, answer):
                    self._wait(pending, answer)
                else:
                    pending.answer(answer)
            if stale:
                self._forget()
                self._again(stale, Fenced())
        self._pump()

    def _wait(self, pending: _Pending, refusal: KvcmError) -> None:
        """Let a write wait for room, in a call that no other request has to wait for."""
        wait_ms = int((pending.deadline - time.monotonic() - ANSWER_S) * 1_000)
        try:
            ref = self._find().submit_waiting.remote(
                pending.request, wait_ms, pending.trace, pending.trace_id
            )
        except (KvcmError, RayError):
            pending.answer(refusal)
            return
        pending.future.add_done_callback(lambda future: ray.cancel(ref) if future.cancelled() else None)
        ref.future().add_done_callback(lambda future: self._waited(pending, future))

    def _waited(self, pending: _Pending, future: Any) -> None:
        """Called by a thread of Ray's."""
        try:
            answer = future.result()
        except TaskCancelledError:
            return
        except RayTaskError as error:
            pending.answer(_cause(error))
        except Exception as error:
            self._forget()
            self._again([pending], error)
        else:
            if isinstance(answer, Fenced):
                self._forget()
                self._again([pending], answer)
            else:
                pending.answer(answer)

    def _returned(self) -> None:
        with self._lock:
            self._calls -= 1

    def _again(self, batch: list[_Pending], error: Exception) -> None:
        """Send once more after a pause, those whose deadline allows it."""
        now = time.monotonic()
        retry = []
        for pending in batch:
            if now + pending.pause_s >= pending.deadline:
                pending.answer(Unavailable(f"group {self.group!r} cannot be reached: {error}"))
            else:
                retry.append(pending)
        if not retry:
            return
        pause_s = max(p.pause_s for p in retry)
        for pending in retry:
            pending.pause_s = min(pending.pause_s * 2, RETRY_LAST_S)

        def resume() -> None:
            with self._lock:
                self._waiting.extendleft(reversed(retry))
            self._pump()

        timer = threading.Timer(pause_s, resume)
        timer.daemon = True
        timer.start()

    def _find(self) -> Any:
        if self._actor is None:
            name = group_actor_name(self.group)
            self._actor = _get_actor(name, GroupNotFound(f"no instance group {self.group!r}"))
        return self._actor

    def _remote(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._find(), method).remote(*args)

    def _forget(self) -> None:
        self._actor = None


def _waits(pending: _Pending, answer: Reply | KvcmError) -> bool:
    """Whether the answer refuses a write that may succeed later, with time enough left."""
    if not isinstance(answer, KvcmError) or not isinstance(pending.request, StartWrite):
        return False
    if time.monotonic() + ANSWER_S >= pending.deadline or pending.future.cancelled():
        return False
    return want_of(pending.request.instance_id, answer) is not None


class RegistryHandle:
    """Calls of the registry actor.

    Every method of `RegistryBody` can be called: ``await handle.add_storage(config)``, or blocking,
    ``handle.call_sync("add_storage", config)``. Changes carry an event id, so that sending one again
    while the actor restarts does not do it twice.
    """

    def __init__(self) -> None:
        self._actor: Any = None

    async def call(self, method: str, *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Raises the registry's `KvcmError`, or `Unavailable` after `timeout_s`."""
        event_id = secrets.token_hex(16)
        return await _call_async(
            lambda: self._find().call.remote(event_id, method, *args), self._forget, timeout_s
        )

    def call_sync(self, method: str, *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Blocking twin of `call`."""
        event_id = secrets.token_hex(16)
        return _call_sync(lambda: self._find().call.remote(event_id, method, *args), self._forget, timeout_s)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **options: self.call(method, *args, **options)

    def _find(self) -> Any:
        if self._actor is None:
            self._actor = _get_actor(REGISTRY, Unavailable("no registry actor in this Ray cluster"))
        return self._actor

    def _forget(self) -> None:
        self._actor = None


# ------------------------------------------------------------------------- calls with repetition


def _call_sync(send: Callable[[], Any], forget: Callable[[], None], timeout_s: float) -> Any:
    attempts = _Attempts(timeout_s, forget)
    while True:
        try:
            return ray.get(send(), timeout=attempts.left_s())
        except Exception as error:
            time.sleep(attempts.pause_after(error))


async def _call_async(send: Callable[[], Any], forget: Callable[[], None], timeout_s: float) -> Any:
    attempts = _Attempts(timeout_s, forget)
    while True:
        try:
            async with asyncio.timeout(attempts.left_s()):
                return await send()
        except Exception as error:
            await asyncio.sleep(attempts.pause_after(error))


class _Attempts:
    """Which failures are worth another attempt, and how long to pause before it."""

    def __init__(self, timeout_s: float, forget: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._forget = forget
        self._pause_s = RETRY_FIRST_S

    def left_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def pause_after(self, error: Exception) -> float:
        """Raises the error, as a `KvcmError`, if it is final or the time is over."""
        if isinstance(error, RayTaskError):
            raise _cause(error) from None
        if isinstance(error, KvcmError):
            raise error
        if isinstance(error, GetTimeoutError | TimeoutError):
            raise Unavailable(f"no answer within {self._timeout_s:g} s") from error
        if not isinstance(error, RayActorError):
            raise error
        self._forget()
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, RETRY_LAST_S)
        if pause_s >= self.left_s():
            raise Unavailable(f"not reached within {self._timeout_s:g} s: {error}") from error
        return pause_s


def _get_actor(name: str, absent: KvcmError) -> Any:
    if not ray.is_initialized():
        raise Unavailable("this process is not connected to a manager's Ray cluster")
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        raise absent from error


def _cause(error: RayTaskError) -> KvcmError:
    """The `KvcmError` that an actor raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, KvcmError):
        return cause
    if isinstance(error, KvcmError):
        return error
    log.error("an actor failed", exc_info=error)
    what = f"{type(cause).__name__}: {cause}" if cause is not None else str(error).splitlines()[-1]
    return KvcmError(f"an actor failed: {what}")
