"""The ASGI application: a plain handler for the hot calls in front of FastAPI for everything else.

    POST /api/<name>       the protocol (endpoints.py)
    GET  /healthz          ready? 200, or 503 naming what is not ok; /healthz/live: alive?
    GET  /docs, /openapi.json

The hot calls skip FastAPI's routing, which costs more than the calls themselves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline

from kvcm_ray.core.limits import REQUEST_BYTES_MAX
from kvcm_ray.serve_app.backend import Backend
from kvcm_ray.serve_app.endpoint import Endpoint, Service
from kvcm_ray.serve_app.endpoints import ENDPOINTS, HOT
from kvcm_ray.serve_app.messages import ErrorCode, MetaHeader, MetaResponse, Status
from kvcm_ray.serve_app.metrics import Metrics
from kvcm_ray.serve_app.openapi import operation
from kvcm_ray.serve_app.protojson import dumps, encode

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(Exception):
    """The body is larger than REQUEST_BYTES_MAX."""


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises `TooLarge`, `ClientGone`."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > REQUEST_BYTES_MAX:
            raise TooLarge
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body = message.get("body", b"")
        if len(body) > REQUEST_BYTES_MAX:
            raise TooLarge
        return bytes(body)
    chunks, size = [], 0
    while message["type"] == "http.request":
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > REQUEST_BYTES_MAX:
            raise TooLarge
        if not message.get("more_body"):
            return b"".join(chunks)
        message = await receive()
    raise ClientGone


async def respond(service: Service, endpoint: Endpoint, scope: Scope, receive: Receive) -> tuple[int, bytes]:
    """Status and body of the answer to one call."""
    try:
        body = await read_body(scope, receive)
    except TooLarge:
        text = f"the body is larger than {REQUEST_BYTES_MAX} bytes"
        return 413, encode(MetaResponse(MetaHeader(Status(ErrorCode.INVALID_ARGUMENT, text))))
    return await service.answer(endpoint, body)


class HotPath:
    """ASGI application that answers the hot calls itself and passes the rest on."""

    def __init__(self, service: Service, rest: FastAPI) -> None:
        self.service = service
        self.rest = rest
        self._endpoints = {endpoint.path: endpoint for endpoint in HOT}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope.get("path", "")) if scope["type"] == "http" else None
        if endpoint is None or scope["method"] != "POST":
            await self.rest(scope, receive, send)
            return
        with suppress(ClientGone):
            status, body = await respond(self.service, endpoint, scope, receive)
            headers = [(b"content-length", b"%d" % len(body))]
            if status != 400:
                headers.append((b"content-type", b"application/json"))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def build_app(backend: Backend, metrics: Metrics) -> HotPath:
    """The application on one backend."""
    service = Service(backend, metrics)
    rest = FastAPIOffline(  # the page's scripts come from here, not from a CDN: clusters are offline
        redoc_url=None,
        title="kvcm-ray",
        version=version("kvcm-ray"),
        description="KV-cache manager for LLM inference; speaks the Tair KVCM protocol.",
        redirect_slashes=False,
    )
    for endpoint in ENDPOINTS:
        rest.add_api_route(
            endpoint.path,
            _route(service, endpoint),
            methods=["POST"],
            name=endpoint.rpc,
            summary=endpoint.rpc,
            tags=["admin" if endpoint.admin else "meta"],
            openapi_extra=operation(endpoint),
        )
    ready = _ready(backend)
    for path, state in (("/healthz", ready), ("/healthz/ready", ready), ("/healthz/live", _live)):
        rest.add_api_route(path, state, methods=["GET"], name=state.__name__, tags=["health"])
        rest.add_api_route(path, state, methods=["HEAD"], include_in_schema=False)  # load balancers
    return HotPath(service, rest)


def _route(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            status, body = await respond(service, endpoint, request.scope, request.receive)
        except ClientGone:
            return Response(status_code=400)
        return Response(body, status, media_type=None if status == 400 else "application/json")

    answer.__doc__ = endpoint.handle.__doc__
    return answer


def _ready(backend: Backend) -> Callable[[], Awaitable[Response]]:
    async def ready() -> Response:
        """200 if every dependency is ok, else 503; the body names each of them."""
        health = await backend.health()
        ok = all(state == "ok" for state in health.values())
        body = dumps({"live": True, "ready": ok, "dependencies": health})
        return Response(body, 200 if ok else 503, media_type="application/json")

    return ready


async def _live() -> Response:
    """This process answers."""
    return Response(dumps({"live": True}), media_type="application/json")
