"""What one API call is, and how every call is answered.

`Service.answer` is the only path from a body to a response: parse, find the instance, check,
handle, map errors, count. Application errors are HTTP 200 with a code in the header; nothing that a
client sends leads to a 5xx.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvcm_ray.core.model import InstanceInfo, StorageConfig
from kvcm_ray.errors import (
    InstanceMismatch,
    InstanceNotFound,
    InvalidArgument,
    KvcmError,
    SessionNotFound,
    Unavailable,
    Unsupported,
)
from kvcm_ray.serve_app.backend import Backend
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


@dataclass(slots=True)
class Call:
    """What a handler gets."""

    backend: Backend
    metrics: Metrics
    request: Any
    info: InstanceInfo | None  #: of calls about an instance's blocks
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


#: Response fields, or the ready bytes that follow the header (``,"locations":[...]``).
Result = dict[str, Any] | bytes
Handler = Callable[[Call], Awaitable[Result]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    rpc: str  #: UpperCamelCase, as in messages and metrics
    request: type[Any]
    response: type[Any]
    handle: Handler
    ok: str
    failure: str
    admin: bool = False
    about_blocks: bool = False  #: the instance must exist before anything else is looked at
    example: dict[str, Any] | None = None

    @property
    def path(self) -> str:
        return f"/api/{self.rpc[0].lower()}{self.rpc[1:]}"


def because(error: KvcmError, peer_reason: str) -> KvcmError:
    """`error` with the protocol's own word for it, which clients may look for."""
    error.details["peer_reason"] = peer_reason
    return error


class Service:
    """Answers calls on one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self.backend = backend
        self.metrics = metrics
        self._ok: dict[str, bytes] = {}

    async def answer(self, endpoint: Endpoint, body: bytes) -> tuple[int, bytes]:
        """HTTP status and body for a request body."""
        started = time.perf_counter()
        try:
            request = from_json(endpoint.request, parse(body))
        except BadJson:
            self.metrics.count(Series(endpoint.rpc), time.perf_counter() - started, failed=True)
            return 400, b"{}"
        info: InstanceInfo | None = None
        error: KvcmError | None = None
        try:
            if endpoint.about_blocks:
                info = self.backend.instance(request.instance_id)
            result = await endpoint.handle(Call(self.backend, self.metrics, request, info))
            tail = result if isinstance(result, bytes) else _tail(endpoint, result)
        except KvcmError as caught:
            error = caught
        except Exception as caught:
            log.exception("%s failed", endpoint.rpc)
            error = KvcmError(f"internal error: {type(caught).__name__}: {caught}")
        elapsed = time.perf_counter() - started
        self.metrics.count(_series(endpoint, info), elapsed, failed=error is not None)
        if error is not None:
            tail = _tail(endpoint, {})
        header = _header(endpoint, self._status(endpoint, error), request.trace_id, elapsed)
        return 200, b'{"header":%s%s}' % (header, tail)

    def _status(self, endpoint: Endpoint, error: KvcmError | None) -> bytes:
        if error is not None:
            code = _admin_code(error) if endpoint.admin else ErrorCode[error.wire]
            return encode(Status(code, _failure_text(endpoint, error, _told(error, code))))
        known = self._ok.get(endpoint.rpc)
        if known is None:
            known = self._ok[endpoint.rpc] = encode(Status(ErrorCode.OK, endpoint.ok))
        return known


def _tail(endpoint: Endpoint, fields: dict[str, Any]) -> bytes:
    """What follows the header: all other fields of the response."""
    inside = encode(endpoint.response(**fields))[1:-1]
    return b"," + inside if inside else b""


def _series(endpoint: Endpoint, info: InstanceInfo | None) -> Series:
    if info is None:
        return Series(endpoint.rpc)
    return Series(endpoint.rpc, info.instance_group_name, info.instance_id)


def _header(endpoint: Endpoint, status: bytes, trace_id: str, elapsed: float) -> bytes:
    """`MetaHeader` or `AdminHeader` as JSON."""
    request_id = dumps(f"{trace_id}_{time.time_ns() // 1000}")
    if endpoint.admin:
        return b'{"status":%s,"request_id":%s}' % (status, request_id)
    tracer = b'""'
    if trace_id.endswith(TRACE_SUFFIX):
        span = {"span_time_us": int(elapsed * 1e6), f"endpoint.py:{endpoint.rpc}": []}
        tracer = dumps(dumps(span).decode())
    return b'{"status":%s,"request_id":%s,"tracer_result":%s}' % (status, request_id, tracer)


def _admin_code(error: KvcmError) -> ErrorCode:
    """The admin API knows few codes; the reason is in the message."""
    if isinstance(error, InvalidArgument | Unavailable | Unsupported):
        return ErrorCode[error.wire]
    return ErrorCode.INTERNAL_ERROR


def _failure_text(endpoint: Endpoint, error: KvcmError, told: str) -> str:
    if error.message.startswith(VALIDATION):
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
