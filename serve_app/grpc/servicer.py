"""A gRPC call from its bytes to the bytes of its answer, on the same `Service` as HTTP.

The gRPC status of a call that was handled is OK, whatever its outcome: that is in the header. Only a
caller who is turned away gets a status of gRPC's, and so does a body that is no such message.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from kvcm_ray import tracing
from kvcm_ray.core.limits import REQUEST_BYTES_MAX
from kvcm_ray.errors import Forbidden, KvcmError, Refused, TooManyRequests, Unauthenticated
from kvcm_ray.serve_app.access.caller import ANYONE, Caller
from kvcm_ray.serve_app.endpoint import Endpoint, Outcome, Service
from kvcm_ray.serve_app.endpoints import DEBUG, ENDPOINTS
from kvcm_ray.serve_app.grpc import protos
from kvcm_ray.serve_app.grpc.convert import fill, from_proto
from kvcm_ray.serve_app.grpc.locations import locations_field, proto_form
from kvcm_ray.serve_app.grpc.methods import HEALTH, Incoming, Outgoing
from kvcm_ray.serve_app.locations import Located
from kvcm_ray.serve_app.messages import ErrorCode
from kvcm_ray.serve_app.metrics import Series

STATUS: dict[type[KvcmError], grpc.StatusCode] = {
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    TooManyRequests: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
NOTHING = Outgoing(b"")
WATCH_PERIOD_S = 1.0
_LOOPBACK = ("127.", "::1", "::ffff:127.")

#: What the admin service calls the four that it shares with the meta service: messages of success and
#: failure, where HTTP has the meta API's.
_SHARED = {
    "GetInstanceInfo": ("", "Failed to get instance info"),
    "RegisterInstance": ("Instance registered successfully", "Failed to register instance"),
    "GetCacheMeta": ("Cache metadata retrieved successfully", "Failed to get cache metadata"),
    "RemoveCache": ("Cache removed successfully", "Failed to remove cache"),
}


class Route(NamedTuple):
    endpoint: Endpoint
    request: type[Any]
    response: type[Any]


def routes() -> dict[str, Route]:
    """Every RPC path and what answers it."""
    by_name = {endpoint.rpc: endpoint for endpoint in (*ENDPOINTS, *DEBUG)}
    found = {}
    for package in protos.PACKAGES:
        for rpc in protos.rpcs(package):
            endpoint = by_name[rpc.name]
            if package == "admin" and not endpoint.admin:
                ok, failure = _SHARED[rpc.name]
                endpoint = dataclasses.replace(endpoint, admin=True, ok=ok, failure=failure)
            found[rpc.path] = Route(endpoint, rpc.request, rpc.response)
    return found


class Servicer:
    """Of one replica."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._routes = routes()
        self._services = {path.split("/")[1] for path in self._routes} | {"", HEALTH}

    async def call(self, incoming: Incoming, context: Any) -> Outgoing:
        """The response; after `context` was given a status, nothing."""
        route = self._routes[incoming.path]
        try:
            caller, trace_id = await self._sender(context)
            request = _request(route, incoming.body, trace_id)
        except Refused as error:
            self._service.metrics.count(Series(route.endpoint.rpc), 0.0, ErrorCode.INVALID_ARGUMENT)
            return _refuse(context, STATUS[type(error)], error.message)
        except (DecodeError, ValueError) as error:
            self._service.metrics.count(Series(route.endpoint.rpc), 0.0, ErrorCode.INVALID_ARGUMENT)
            return _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        outcome = await self._service.run(route.endpoint, request, caller)
        if refused := STATUS.get(type(outcome.error)):  # type: ignore[arg-type]
            return _refuse(context, refused, outcome.message)
        return Outgoing(written(route.response, outcome))

    async def _sender(self, context: Any) -> tuple[Caller, str]:
        """Who calls, and the trace id that the call's metadata carry."""
        metadata, peer = sender_of(context)
        if tracing.on:
            tracing.accept(metadata.get(tracing.HEADER, ""))
        gate = self._service.gate
        caller = ANYONE if gate is None else await gate.identify(metadata, peer)
        return caller, metadata.get("x-trace-id", "")

    # ----------------------------------------------------------------------------------- health

    async def check(self, incoming: Incoming, context: Any) -> Outgoing:
        name = health_pb2.HealthCheckRequest.FromString(incoming.body).service
        if name not in self._services:
            return _refuse(context, grpc.StatusCode.NOT_FOUND, f"no service is named {name!r}")
        return _health(await self._state())

    async def watch(self, incoming: Incoming) -> AsyncIterator[Outgoing]:
        """The state now and whenever it changes, until the client goes."""
        name = health_pb2.HealthCheckRequest.FromString(incoming.body).service
        told: int | None = None
        while True:
            known = name in self._services
            state = await self._state() if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if state != told:
                told = state
                yield _health(state)
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _state(self) -> int:
        states = await self._service.backend.health()
        serving = all(state == "ok" for state in states.values())
        response = health_pb2.HealthCheckResponse
        return int(response.SERVING if serving else response.NOT_SERVING)


def _health(state: int) -> Outgoing:
    return Outgoing(health_pb2.HealthCheckResponse(status=state).SerializeToString())  # type: ignore[arg-type]


def sender_of(context: Any) -> tuple[dict[str, str], str]:
    """The metadata that we read, and the sender's address, as `access.http` has them of HTTP."""
    peer = str(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
    found: dict[str, str] = {}
    for name, value in context.invocation_metadata():
        if name == "authorization":
            found[name] = "" if name in found else str(value)
        elif name in ("x-trace-id", tracing.HEADER):
            found[name] = str(value)
        elif name == "x-forwarded-for" and peer.startswith(_LOOPBACK):
            peer = str(value).rpartition(",")[2].strip()[:64] or peer
    return found, peer


def _request(route: Route, body: bytes, trace_id: str) -> Any:
    """Raises DecodeError, or ValueError for one that is too large."""
    if len(body) > REQUEST_BYTES_MAX:
        raise ValueError(f"the request is larger than {REQUEST_BYTES_MAX} bytes")
    request = from_proto(route.endpoint.request, route.request.FromString(body))
    if trace_id and not request.trace_id:
        request = dataclasses.replace(request, trace_id=trace_id)
    return request


def _refuse(context: Any, status: grpc.StatusCode, why: str) -> Outgoing:
    context.set_code(status)
    context.set_details(why)
    return NOTHING


def written(response: type[Any], outcome: Outcome) -> bytes:
    """The response message of an outcome, as bytes."""
    message = response()
    header = message.header
    header.status.code = outcome.code
    header.status.message = outcome.message
    header.request_id = outcome.request_id
    if outcome.tracer_result:
        header.tracer_result = outcome.tracer_result
    located = outcome.fields.get("locations")
    if not isinstance(located, Located):
        fill(message, outcome.fields)
        return bytes(message.SerializeToString())
    others: Mapping[str, Any] = {k: v for k, v in outcome.fields.items() if k != "locations"}
    fill(message, others)
    return bytes(message.SerializeToString()) + located.encode(proto_form(locations_field(response)))
