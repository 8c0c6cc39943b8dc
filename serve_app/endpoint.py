"""What one API call is, and how every call is answered, whatever transport brought it.

`Service.run` is the only path from a request to an outcome: ask the gate, find the instance, inject
faults, handle, map errors, count. `Service.answer` is JSON around it; gRPC has `grpc.servicer`.
Application errors are an outcome with a code in its header; nothing that a client sends leads to a 5xx.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from kvcm_ray import logs, tracing
from kvcm_ray.core.model import InstanceInfo, StorageConfig
from kvcm_ray.errors import (
    Forbidden,
    InjectedFault,
    InstanceMismatch,
    InstanceNotFound,
    InvalidArgument,
    KvcmError,
    Refused,
    SessionNotFound,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from kvcm_ray.serve_app.access.caller import ANYONE, Caller
from kvcm_ray.serve_app.access.gate import Gate
from kvcm_ray.serve_app.access.scope import scoped
from kvcm_ray.serve_app.backend import Backend
from kvcm_ray.serve_app.faults import Faults
from kvcm_ray.serve_app.figures import GroupFigures
from kvcm_ray.serve_app.locations import JSON, Located
from kvcm_ray.serve_app.messages import ErrorCode, Status
from kvcm_ray.serve_app.metrics import Metrics, Series
from kvcm_ray.serve_app.protojson import BadJson, dumps, encode, from_json, parse

log = logging.getLogger(__name__)

TRACE_SUFFIX = "__kvcm_need_span_tracer"
VALIDATION = "missing or invalid fields: "
MESSAGE_MAX = 1000  #: characters of a reason

#: The protocol's own words for some failures; ours follow as a second reason.
_PEER_REASONS: dict[type[KvcmError], str] = {
    SessionNotFound: "write_session_id has been deleted",
    InstanceMismatch: "register instance failed: duplicate instance",
}
#: Everything else is 200.
HTTP_STATUS: dict[type[KvcmError], int] = {Unauthenticated: 401, Forbidden: 403, TooManyRequests: 429}


@dataclass(slots=True)
class Call:
    """What a handler gets."""

    backend: Backend
    metrics: Metrics
    request: Any
    info: InstanceInfo | None  #: of calls about an instance's blocks
    caller: Caller = ANYONE
    faults: Faults | None = None
    figures: GroupFigures | None = None  #: of all groups, those that the caller may not see included
    _storages: Mapping[str, StorageConfig] | None = None

    @property
    def storages(self) -> Mapping[str, StorageConfig]:
        """The same throughout a call, though somebody may remove one meanwhile."""
        if self._storages is None:
            self._storages = self.backend.storages()
        return self._storages

    @property
    def instance(self) -> InstanceInfo:
        assert self.info is not None
        return self.info


#: Response fields by name; ``locations`` may be a `Located`.
Result = dict[str, Any]
Handler = Callable[[Call], Awaitable[Result]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    rpc: str  #: UpperCamelCase, as in messages and metrics
    request: type[Any]
    response: type[Any]
    handle: Handler
    ok: str  #: what success is called; "": the handler says it, as ``message``
    failure: str
    admin: bool = False
    about_blocks: bool = False  #: the instance must exist before anything else is looked at
    debug: bool = False  #: of the debug API, whose answers carry no request_id
    example: dict[str, Any] | None = None

    @property
    def path(self) -> str:
        return f"/api/{self.rpc[0].lower()}{self.rpc[1:]}"

    @property
    def api(self) -> str:
        """Which of the protocol's services it is of."""
        return "debug" if self.debug else "admin" if self.admin else "meta"


@dataclass(slots=True)
class Outcome:
    """How a call ended, before a transport writes it."""

    code: ErrorCode
    message: str
    request_id: str
    tracer_result: str  #: of the meta API
    fields: Result  #: of the response, without the header; empty after a failure
    error: KvcmError | None = None


def because(error: KvcmError, peer_reason: str) -> KvcmError:
    """`error` with the protocol's own word for it, which clients may look for."""
    error.details["peer_reason"] = peer_reason
    return error


class Service:
    """Answers calls on one backend.

    Args:
        gate: who may do what; None: anybody may do anything.
        faults: of the debug API; None: it is off.
    """

    def __init__(
        self, backend: Backend, metrics: Metrics, gate: Gate | None = None, faults: Faults | None = None
    ) -> None:
        self.backend = backend
        self.metrics = metrics
        self.figures = GroupFigures(backend, metrics)
        self.gate = gate
        self.faults = faults

    async def run(self, endpoint: Endpoint, request: Any, caller: Caller = ANYONE) -> Outcome:
        """The outcome of a call; never raises."""
        if not tracing.on:
            return await self._run(endpoint, request, caller)
        about = {"rpc.method": endpoint.rpc, "kvcm.trace_id": request.trace_id}
        with tracing.served(f"kvcm {endpoint.rpc}", about) as span:
            outcome = await self._run(endpoint, request, caller)
            if span is not None:
                span.set_attribute("kvcm.instance_id", getattr(request, "instance_id", ""))
                span.set_attribute("kvcm.code", outcome.code.name)
            return outcome

    async def _run(self, endpoint: Endpoint, request: Any, caller: Caller) -> Outcome:
        started = time.perf_counter()
        logs.set_trace_id(request.trace_id)
        call = Call(scoped(self.backend, caller), self.metrics, request, None, caller, self.faults)
        call.figures = self.figures
        fields: Result = {}
        error: KvcmError | None = None
        try:
            if self.gate is not None:
                self.gate.check(caller, endpoint)
            if endpoint.about_blocks:
                call.info = call.backend.instance(request.instance_id)
            if self.faults is not None and not endpoint.debug:
                self.faults.meet(endpoint.rpc)
            fields = await endpoint.handle(call)
        except KvcmError as caught:
            error = caught
        except Exception as caught:
            log.exception("%s failed", endpoint.rpc)
            error = KvcmError(f"internal error: {type(caught).__name__}: {caught}")
        elapsed = time.perf_counter() - started
        if error is not None:
            logs.failed(log, endpoint.rpc, error)
        elif log.isEnabledFor(logging.DEBUG):
            log.debug("%s: OK after %.1f ms", endpoint.rpc, elapsed * 1000)
        outcome = _outcome(endpoint, request.trace_id, elapsed, fields, error)
        self.metrics.count(_series(endpoint, call.info), elapsed, outcome.code)
        if self.gate is not None:
            self.gate.note(caller, endpoint, request, error)
        return outcome

    async def answer(self, endpoint: Endpoint, body: bytes, caller: Caller = ANYONE) -> tuple[int, bytes]:
        """HTTP status and body for a request body."""
        started = time.perf_counter()
        try:
            request = from_json(endpoint.request, parse(body))
        except BadJson:
            elapsed = time.perf_counter() - started
            self.metrics.count(Series(endpoint.rpc), elapsed, ErrorCode.INVALID_ARGUMENT)
            return 400, b"{}"
        return json_answer(endpoint, await self.run(endpoint, request, caller))


def refusal(endpoint: Endpoint, error: KvcmError) -> Outcome:
    """The outcome of a call whose sender was turned away before anything was read of it."""
    return _outcome(endpoint, "", 0.0, {}, error)


def _outcome(
    endpoint: Endpoint, trace_id: str, elapsed: float, fields: Result, error: KvcmError | None
) -> Outcome:
    request_id = "" if endpoint.debug else f"{trace_id}_{time.time_ns() // 1000}"
    tracer = ""
    if trace_id.endswith(TRACE_SUFFIX) and not endpoint.admin:
        span = {"span_time_us": int(elapsed * 1e6), f"endpoint.py:{endpoint.rpc}": []}
        tracer = dumps(span).decode()
    if error is None:
        message = endpoint.ok or fields.pop("message", "")
        return Outcome(ErrorCode.OK, message, request_id, tracer, fields)
    code = _admin_code(error) if endpoint.admin else ErrorCode[error.wire]
    message = _failure_text(endpoint, error, _told(error, code))
    return Outcome(code, message, request_id, tracer, {}, error)


# ------------------------------------------------------------------------------------------- JSON


def json_answer(endpoint: Endpoint, outcome: Outcome) -> tuple[int, bytes]:
    """HTTP status and body of an outcome."""
    status = _ok_status(outcome.message) if outcome.error is None else _status(outcome.code, outcome.message)
    request_id = dumps(outcome.request_id)
    if endpoint.admin:
        header = b'{"status":%s,"request_id":%s}' % (status, request_id)
    else:
        tracer = dumps(outcome.tracer_result)
        header = b'{"status":%s,"request_id":%s,"tracer_result":%s}' % (status, request_id, tracer)
    tail = _tail(endpoint.response, outcome.fields)
    return HTTP_STATUS.get(type(outcome.error), 200), b'{"header":%s%s}' % (header, tail)  # type: ignore[arg-type]


def _tail(response: type[Any], fields: Result) -> bytes:
    """What follows the header: all other fields of the response."""
    located = fields.get("locations")
    if not isinstance(located, Located):
        return _inside(response(**fields)) if fields else _empty_tail(response)
    others = {name: value for name, value in fields.items() if name != "locations"}
    tail = _inside(response(**others)) if others else _empty_tail(response)
    assert tail.endswith(b'"locations":[]'), "locations are the last field of every response that has them"
    return b"%s%s]" % (tail[:-1], located.encode(JSON))


@cache
def _empty_tail(response: type[Any]) -> bytes:
    return _inside(response())


def _inside(message: Any) -> bytes:
    inside = encode(message)[1:-1]
    return b"," + inside if inside else b""


@lru_cache(256)
def _ok_status(message: str) -> bytes:
    return _status(ErrorCode.OK, message)


def _status(code: ErrorCode, message: str) -> bytes:
    return encode(Status(code, message))


def _series(endpoint: Endpoint, info: InstanceInfo | None) -> Series:
    if info is None:
        return Series(endpoint.rpc)
    return Series(endpoint.rpc, info.instance_group_name, info.instance_id)


def _admin_code(error: KvcmError) -> ErrorCode:
    """The admin API knows few codes; the reason is in the message."""
    if isinstance(error, InvalidArgument | Unavailable | Unsupported | Unauthenticated | Forbidden):
        return ErrorCode[error.wire]
    return ErrorCode.INTERNAL_ERROR


def _failure_text(endpoint: Endpoint, error: KvcmError, told: str) -> str:
    if error.message.startswith(VALIDATION) or isinstance(error, InjectedFault | Refused):
        return error.message
    if endpoint.admin:
        return f"{endpoint.failure} : {told}" if endpoint.failure else told
    if isinstance(error, InstanceNotFound) or not endpoint.failure:
        return told
    peer_reason = error.details.get("peer_reason") or _PEER_REASONS.get(type(error))
    reasons = [r for r in (peer_reason, told) if r]
    return f"{endpoint.failure} : " + dumps({"error_msg": reasons}).decode()


def _told(error: KvcmError, code: ErrorCode) -> str:
    """The message; where the protocol's code does not tell what is wrong, ours stands at its end.

    A message may quote what was sent; it is cut, or it could be as long as the request.
    """
    text = error.message
    if len(text) > MESSAGE_MAX:
        text = f"{text[:MESSAGE_MAX]}..."
    vague = code == ErrorCode.INTERNAL_ERROR and error.code != KvcmError.code
    return f"{text} ({error.code})" if vague else text
