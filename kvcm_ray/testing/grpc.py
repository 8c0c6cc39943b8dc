"""The gRPC services on a real server in this process, beside the HTTP application on the same manager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf import json_format

from kvcm_ray.serve_app.grpc import protos
from kvcm_ray.serve_app.grpc.client import UNLIMITED, rpc
from kvcm_ray.serve_app.grpc.methods import Incoming
from kvcm_ray.serve_app.grpc.servicer import Servicer
from kvcm_ray.testing.http import Http


class Grpc:
    """Synchronous calls on the event loop of `http`."""

    def __init__(self, http: Http, channel: grpc.aio.Channel) -> None:
        self.http = http
        self._channel = channel

    def raw(self, path: str, body: bytes, metadata: dict[str, str] | None = None) -> bytes:
        """The response's bytes. Raises grpc.aio.AioRpcError."""

        async def send() -> bytes:
            answer: bytes = await self._channel.unary_unary(path)(
                body, metadata=tuple((metadata or {}).items()), timeout=30
            )
            return answer

        return self.http.run(send())  # type: ignore[no-any-return]

    def call(
        self, name: str, /, *, package: str = "", metadata: dict[str, str] | None = None, **fields: Any
    ) -> Any:
        """The response message."""
        found = rpc(name, package)
        body = found.request(**fields).SerializeToString()
        return found.response.FromString(self.raw(found.path, body, metadata))


@contextmanager
def grpc_beside(http: Http) -> Iterator[Grpc]:
    """gRPC on the manager of `http`."""
    server, channel = http.run(_start(Servicer(http.app.service)))
    try:
        yield Grpc(http, channel)
    finally:
        http.run(channel.close())
        http.run(server.stop(0))


async def _start(servicer: Servicer) -> tuple[grpc.aio.Server, grpc.aio.Channel]:
    server = grpc.aio.server(options=UNLIMITED)
    for package in protos.PACKAGES:
        handlers = {each.name: _handler(servicer, each.path) for each in protos.rpcs(package)}
        service = protos.rpcs(package)[0].service
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED)


def _handler(servicer: Servicer, path: str) -> grpc.RpcMethodHandler:
    async def answer(incoming: Incoming, context: Any) -> bytes:
        return (await servicer.call(incoming, context)).body

    return grpc.unary_unary_rpc_method_handler(answer, partial(Incoming, path))


def as_json(message: Any) -> dict[str, Any]:
    """A response as HTTP would write it."""
    found: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found
