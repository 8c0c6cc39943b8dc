"""What Serve's gRPC ingress registers on its servers, and what it calls on a replica.

Serve names servicers by import path (`servicers`) and calls the deployment's method of the RPC's name.
Four names are in the meta and in the admin service, so a request arrives here as its path and its bytes
(`Incoming`), and the replica parses it: Serve's proxies need to know nothing but the paths.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from kvcm_ray.serve_app.grpc import protos

HEALTH = health.SERVICE_NAME
CHECK, WATCH = f"/{HEALTH}/Check", f"/{HEALTH}/Watch"


@dataclass(frozen=True, slots=True)
class Incoming:
    path: str  #: ``/<package>.<Service>/<Rpc>``
    body: bytes


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A response that is bytes already."""

    body: bytes

    def SerializeToString(self) -> bytes:  # what Serve calls
        return self.body


def servicers(debug_api: bool) -> list[str]:
    """For ``gRPCOptions.grpc_servicer_functions``."""
    names = ["add_meta", "add_admin", *(["add_debug"] if debug_api else []), "add_health"]
    return [f"{__name__}.{name}" for name in names]


def add_meta(servicer: Any, server: Any) -> None:
    _add("meta", server)


def add_admin(servicer: Any, server: Any) -> None:
    _add("admin", server)


def add_debug(servicer: Any, server: Any) -> None:
    _add("debug", server)


def add_health(servicer: Any, server: Any) -> None:
    """The standard health service; its descriptor serves reflection."""
    assert HEALTH in health_pb2.DESCRIPTOR.pool.FindServiceByName(HEALTH).full_name
    check = grpc.unary_unary_rpc_method_handler(_by_serve, partial(Incoming, CHECK))
    watch = grpc.unary_stream_rpc_method_handler(_by_serve, partial(Incoming, WATCH))
    _register(server, HEALTH, {"Check": check, "Watch": watch})


def _add(package: str, server: Any) -> None:
    rpcs = protos.rpcs(package)
    handlers = {
        rpc.name: grpc.unary_unary_rpc_method_handler(_by_serve, partial(Incoming, rpc.path)) for rpc in rpcs
    }
    _register(server, rpcs[0].service, handlers)


def _register(server: Any, service: str, handlers: dict[str, Any]) -> None:
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


async def _by_serve(request: Any, context: Any) -> Any:
    """Stands where Serve puts its own function."""
    raise NotImplementedError


class Methods:
    """A deployment's methods of the RPCs' names, added below. `self.grpc` is a `Servicer`."""

    grpc: Any

    async def Check(self, request: Incoming, grpc_context: Any) -> Outgoing:
        return await self.grpc.check(request, grpc_context)  # type: ignore[no-any-return]

    async def Watch(self, request: Incoming, grpc_context: Any) -> AsyncIterator[Outgoing]:
        async for answer in self.grpc.watch(request):
            yield answer


def _method(name: str) -> Any:
    async def method(self: Methods, request: Incoming, grpc_context: Any) -> Outgoing:
        return await self.grpc.call(request, grpc_context)  # type: ignore[no-any-return]

    method.__name__ = name
    return method


for _package in protos.PACKAGES:
    for _rpc in protos.rpcs(_package):
        setattr(Methods, _rpc.name, _method(_rpc.name))
