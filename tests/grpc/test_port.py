"""Which port gRPC gets, and which addresses Serve's servers may have."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvcm_ray.cluster import grpc_port
from kvcm_ray.cluster.environment import free_ports
from kvcm_ray.cluster.launch import check_port
from kvcm_ray.cluster.options import GRPC_PORT, PORT, Options
from kvcm_ray.errors import InUse
from kvcm_ray.serve_app.grpc import loopback
from kvcm_ray.testing.cluster import run_python


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as listener:
        yield listener.getsockname()[1]


def choose(haproxy: bool = True, **options: object) -> tuple[int, str]:
    return grpc_port.choose(Options("x", **options), haproxy=haproxy, check=check_port)  # type: ignore[arg-type]


def test_what_is_asked_for_is_taken_or_refused(taken: int) -> None:
    (free,) = free_ports(1)
    assert choose(grpc_port=free) == (free, "")
    assert choose(grpc_port=-1) == (0, "")
    with pytest.raises(InUse, match=str(taken)):
        choose(grpc_port=taken)


def test_the_default_is_the_protocols_beside_the_protocols_http_port() -> None:
    def nothing_listens(host: str, port: int) -> None: ...

    def taken(host: str, port: int) -> None:
        raise InUse("taken")

    assert grpc_port.choose(Options("x"), haproxy=True, check=nothing_listens) == (GRPC_PORT, "")
    port, sentence = grpc_port.choose(Options("x"), haproxy=True, check=taken)
    assert port not in (0, GRPC_PORT)
    assert str(GRPC_PORT) in sentence
    port, sentence = choose(port=0)
    assert port not in (0, GRPC_PORT, PORT)
    assert not sentence


def test_no_grpc_where_serve_could_not_encrypt_it() -> None:
    port, sentence = choose(haproxy=False, tls_cert="c", tls_key="k")
    assert port == 0
    assert "TLS" in sentence


SHARING = """
    import asyncio, sys
    from ray.serve._private.grpc_util import gRPCGenericServer
    from kvcm_ray.serve_app.grpc import loopback

    if "install" in sys.argv:
        loopback.install()
        loopback.install()

    async def main():
        options = [("grpc.so_reuseport", str(int(False)))]
        one = gRPCGenericServer(None, extra_options=options)
        port = one.add_insecure_port("127.0.0.1:0")
        await one.start()
        two = gRPCGenericServer(None, extra_options=options)
        try:
            two.add_insecure_port(f"127.0.0.1:{port}")
            print("both listen")
        except RuntimeError:
            print("refused")

    asyncio.run(main())
"""


def test_two_servers_of_serve_never_share_a_port() -> None:
    """Serve asks for that with a text where gRPC reads numbers: without us, both get calls."""
    assert run_python(SHARING, "install") == "refused"
    assert run_python(SHARING) == "both listen"


def test_only_the_public_port_gets_the_public_address() -> None:
    assert loopback.narrowed("[::]:6381", "0.0.0.0:6381") == "0.0.0.0:6381"
    assert loopback.narrowed("[::]:40000", "0.0.0.0:6381") == "127.0.0.1:40000"
    assert loopback.narrowed("[::]:0", "127.0.0.1:0") == "127.0.0.1:0"
    assert loopback.narrowed("10.0.0.1:5", "127.0.0.1:5") == "10.0.0.1:5"
