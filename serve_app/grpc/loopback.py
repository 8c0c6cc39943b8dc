"""Keeps the gRPC servers of a manager's Ray Serve off outer addresses, and off each other's ports.

Serve binds them to every address of the machine and has no setting for that. `kvcm up` says in
`VARIABLE` which address they may have instead: that of its own gRPC port for a proxy, loopback for the
replicas' and the proxies' inner ports. Without the variable (somebody else's Serve) addresses stay.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "KVCM_GRPC_LISTEN"  #: "HOST:PORT" of gRPC; port 0: it is off
_EVERYWHERE = "[::]:"
_SHARED_PORT = "grpc.so_reuseport"


def environment(host: str, port: int) -> dict[str, str]:
    """For the processes of a manager. Serve calls `for_proxies` in every proxy before it listens."""
    return {
        VARIABLE: f"{host}:{port}",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.for_proxies",
    }


def for_proxies() -> list[Any]:
    """Installs it; adds no HTTP middleware."""
    install()
    return []


def install() -> None:
    """From now on, in this process."""
    from grpc.aio._server import Server

    if getattr(Server.add_insecure_port, "kvcm", False):
        return
    public = os.environ.get(VARIABLE)
    make, bind = Server.__init__, Server.add_insecure_port

    def __init__(self: Any, *arguments: Any, options: Any = None, **more: Any) -> None:
        make(self, *arguments, options=alone(options), **more)

    def add_insecure_port(self: Any, address: str) -> int:
        return int(bind(self, address if public is None else narrowed(address, public)))

    add_insecure_port.kvcm = True  # type: ignore[attr-defined]
    Server.__init__ = __init__
    Server.add_insecure_port = add_insecure_port


def alone(options: Any) -> list[tuple[str, Any]]:
    """The options, with Serve's "0" for sharing a port as the number that gRPC reads.

    gRPC ignores the text, and then lets servers share a port: replicas of two managers would, and the
    kernel would give each of them some of the other's calls.
    """
    return [(name, int(value) if name == _SHARED_PORT else value) for name, value in options or ()]


def narrowed(address: str, public: str) -> str:
    """The address to bind instead of `address`."""
    if not address.startswith(_EVERYWHERE):
        return address
    host, _, public_port = public.rpartition(":")
    port = address.removeprefix(_EVERYWHERE)
    return f"{host}:{port}" if port == public_port else f"127.0.0.1:{port}"
