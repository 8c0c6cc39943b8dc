"""A small gRPC client: every RPC by its name, with keyword arguments.

    with connect("127.0.0.1:6381") as kvcm:
        answer = kvcm.call("GetCacheLocation", instance_id="i1", block_keys=[1, 2], query_type=2)

For scripts, tests and benchmarks; programs in other languages use the .proto files of this folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import grpc

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app.grpc import protos

#: Answers to thousands of keys are larger than gRPC's default of 4 MiB.
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@cache
def rpc(name: str, package: str = "") -> protos.Rpc:
    """An RPC by its name; of the meta service if that and the admin service have it.

    Raises:
        InvalidArgument: there is none.
    """
    for each in (package,) if package else protos.PACKAGES:
        for found in protos.rpcs(each):
            if found.name == name:
                return found
    raise InvalidArgument(f"no service has an RPC {name!r}; names are like GetCacheLocation")


class GrpcClient:
    """On a channel that somebody else closes.

    Args:
        token: of an account, where the manager requires one.
    """

    def __init__(self, channel: grpc.Channel, token: str = "") -> None:
        self._channel = channel
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    def call(
        self,
        name: str,
        /,
        *,
        package: str = "",
        timeout_s: float = 30.0,
        wait_for_ready: bool = False,
        **fields: Any,
    ) -> Any:
        """The response message, whatever the status in its header is.

        Raises:
            grpc.RpcError: the call did not get there, or its sender was turned away.
        """
        found = rpc(name, package)
        stub = self._channel.unary_unary(
            found.path, request_serializer=found.request.SerializeToString,
            response_deserializer=found.response.FromString,
        )  # fmt: skip
        return stub(
            found.request(**fields), timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait_for_ready
        )


@contextmanager
def connect(address: str, *, token: str = "", root_certificate: Path | None = None) -> Iterator[GrpcClient]:
    """A client of the manager at ``HOST:PORT``, which `kvcm up --json` calls ``grpc``.

    Args:
        root_certificate: PEM file that the manager's certificate is checked with; without it the
            connection is plain text.
    """
    if root_certificate is None:
        channel = grpc.insecure_channel(address, options=UNLIMITED)
    else:
        credentials = grpc.ssl_channel_credentials(root_certificate.read_bytes())
        channel = grpc.secure_channel(address, credentials, options=UNLIMITED)
    with channel:
        yield GrpcClient(channel, token)
