"""The ASGI application: who calls, then a plain handler for the hot calls, FastAPI for everything else.

    POST /api/<name>       the protocol (endpoints.py)
    GET  /healthz          ready? 200, or 503 naming what is not ok; /healthz/live: alive?
    GET  /metrics          Prometheus' text (metrics_text.py)
    GET  /console          the console (pages.py); / leads there
    GET  /docs, /openapi.json

Nothing is read of a request's body, and no page is looked for, before the gate (`access.gate`) knows the
caller. The hot calls skip FastAPI's routing, which costs more than the calls themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline

from kvcm_ray import tracing
from kvcm_ray.core.limits import REQUEST_BYTES_MAX
from kvcm_ray.errors import Refused
from kvcm_ray.serve_app.access.caller import ADMIN
from kvcm_ray.serve_app.access.gate import Gate
from kvcm_ray.serve_app.access.http import Headers, refusal_headers, sender_of
from kvcm_ray.serve_app.backend import Backend
from kvcm_ray.serve_app.endpoint import HTTP_STATUS, Endpoint, Service, json_answer, refusal
from kvcm_ray.serve_app.endpoints import DEBUG, ENDPOINTS, HOT
from kvcm_ray.serve_app.faults import Faults
from kvcm_ray.serve_app.messages import ErrorCode, MetaHeader, MetaResponse, Status
from kvcm_ray.serve_app.metrics import Metrics, Series
from kvcm_ray.serve_app.metrics_text import Page
from kvcm_ray.serve_app.openapi import operation
from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.serve_app.pages import add_pages
from kvcm_ray.serve_app.protojson import dumps, encode

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_APIS = frozenset(endpoint.rpc for endpoint in ENDPOINTS)
BODY_TIMEOUT_S = 30.0  #: for a body that does not come with its head


class TooLarge(Exception):
    """The body is larger than REQUEST_BYTES_MAX."""


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class TooSlow(Exception):
    """The body was not there within BODY_TIMEOUT_S."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises `TooLarge`, `TooSlow`, `ClientGone`."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > REQUEST_BYTES_MAX:
            raise TooLarge
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(receive)
    except TimeoutError:
        raise TooSlow from None


async def _read(receive: Receive) -> bytes:
    chunks, size = [], 0
    while (message := await receive())["type"] == "http.request":
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > REQUEST_BYTES_MAX:
            raise TooLarge
        if not message.get("more_body"):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    raise ClientGone


async def respond(
    service: Service, gate: Gate, endpoint: Endpoint, scope: Scope, receive: Receive
) -> tuple[int, bytes, Headers]:
    """Status, body and headers of the answer to one call."""
    try:
        headers, peer = sender_of(scope)
        if tracing.on:
            tracing.accept(_traceparent(scope))
        caller = await gate.identify(headers, peer)
        body = await read_body(scope, receive)
    except Refused as error:
        service.metrics.count(Series(endpoint.rpc), 0.0, ErrorCode[error.wire])
        status, body = json_answer(endpoint, refusal(endpoint, error))
        return status, body, refusal_headers(error)
    except TooLarge:
        return 413, _plain_refusal(f"the body is larger than {REQUEST_BYTES_MAX} bytes"), []
    except TooSlow:
        return 408, _plain_refusal(f"the body was not complete after {BODY_TIMEOUT_S:g} s"), [CLOSE]
    return *await service.answer(endpoint, body, caller), []


def _traceparent(scope: Scope) -> str:
    name = tracing.HEADER.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


CLOSE = (b"connection", b"close")


def _plain_refusal(text: str) -> bytes:
    return encode(MetaResponse(MetaHeader(Status(ErrorCode.INVALID_ARGUMENT, text))))


class HotPath:
    """ASGI application that answers the hot calls itself and passes the rest on."""

    def __init__(self, service: Service, gate: Gate, rest: FastAPI) -> None:
        self.service = service
        self.gate = gate
        self.rest = rest
        self._endpoints = {endpoint.path: endpoint for endpoint in HOT}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.rest(scope, receive, send)
            return
        endpoint = self._endpoints.get(scope["path"])
        if endpoint is None or scope["method"] != "POST":
            await self._others(scope, receive, send)
            return
        with suppress(ClientGone):
            status, body, headers = await respond(self.service, self.gate, endpoint, scope, receive)
            kind = [] if status == 400 else [(b"content-type", b"application/json")]
            await _send(send, status, body, [*kind, *headers])

    async def _others(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The other calls ask the gate themselves; pages are asked for here."""
        if scope["method"] != "POST":
            try:
                caller = await self.gate.visitor(_page(scope), *sender_of(scope))
            except Refused as error:
                body = dumps({"error": error.to_dict()})
                headers = [(b"content-type", b"application/json"), *refusal_headers(error)]
                await _send(send, HTTP_STATUS.get(type(error), 403), body, headers)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self.rest(scope, receive, send)


def _page(scope: Scope) -> str:
    """The path without the prefix under which a Ray cluster serves us."""
    return str(scope["path"]).removeprefix(str(scope.get("root_path", ""))) or "/"


async def _send(send: Send, status: int, body: bytes, headers: Headers) -> None:
    headers = [(b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def build_app(backend: Backend, metrics: Metrics, options: GatewayOptions | None = None) -> HotPath:
    """The application on one backend."""
    options = options or GatewayOptions()
    gate = Gate(backend.view, options.requests_per_second, options.burst)
    faults = Faults(backend.view.data_dir, _APIS) if options.debug_api else None
    service = Service(backend, metrics, gate, faults)
    rest = FastAPIOffline(  # the page's scripts come from here, not from a CDN: clusters are offline
        redoc_url=None,
        title="kvcm-ray",
        version=version("kvcm-ray"),
        description="KV-cache manager for LLM inference; speaks the Tair KVCM protocol.",
        redirect_slashes=False,
    )
    for endpoint in (*ENDPOINTS, *(DEBUG if options.debug_api else ())):
        rest.add_api_route(
            endpoint.path,
            _route(service, gate, endpoint),
            methods=["POST"],
            name=endpoint.rpc,
            summary=endpoint.rpc,
            tags=[endpoint.api],
            openapi_extra=operation(endpoint),
        )
    backend.count = metrics.add
    page = Page(service.figures, metrics, backend.storages)
    rest.add_api_route("/metrics", _metrics(page), methods=["GET"], name="metrics", tags=["metrics"])
    ready = _ready(backend)
    for path, state in (("/healthz", ready), ("/healthz/ready", ready), ("/healthz/live", _live)):
        rest.add_api_route(path, state, methods=["GET"], name=state.__name__, tags=["health"])
        rest.add_api_route(path, state, methods=["HEAD"], include_in_schema=False)  # load balancers
    add_pages(rest)
    return HotPath(service, gate, rest)


def _route(service: Service, gate: Gate, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            status, body, headers = await respond(service, gate, endpoint, request.scope, request.receive)
        except ClientGone:
            return Response(status_code=400)
        response = Response(body, status, media_type=None if status == 400 else "application/json")
        response.raw_headers += headers
        return response

    answer.__doc__ = endpoint.handle.__doc__
    return answer


def _metrics(page: Page) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        """All metrics in Prometheus' text format."""
        content_type, text = await page.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return metrics


def _ready(backend: Backend) -> Callable[[Request], Awaitable[Response]]:
    async def ready(request: Request) -> Response:
        """200 if every dependency is ok, else 503; the body names each of them, to admins."""
        health = await backend.health()
        ok = all(state == "ok" for state in health.values())
        told: dict[str, Any] = {"live": True, "ready": ok}
        if request.state.caller.role == ADMIN:
            told["dependencies"] = health
        return Response(dumps(told), 200 if ok else 503, media_type="application/json")

    return ready


async def _live() -> Response:
    """This process answers."""
    return Response(dumps({"live": True}), media_type="application/json")
