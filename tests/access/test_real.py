"""A real manager: accounts and TLS from the start to the commands, by HTTP and gRPC, and after a restart."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from kvcm_ray import cluster
from kvcm_ray.cli.main import main
from kvcm_ray.client import connect
from kvcm_ray.errors import Unauthenticated
from kvcm_ray.serve_app.grpc.client import GrpcClient
from kvcm_ray.testing.certificates import Certificate, make_certificate
from kvcm_ray.testing.cluster import SMALL_TIERS

pytestmark = pytest.mark.ray


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Certificate]]:
    made = make_certificate(tmp_path)
    monkeypatch.setenv("KVCM_CA_FILE", str(made.cert))
    tls = {"tls_cert": str(made.cert), "tls_key": str(made.key)}
    manager = cluster.up_detached(tmp_path / "data", 0, SMALL_TIERS, replicas=2, accounts=True, **tls)
    try:
        yield manager, made
    finally:
        cluster.down(tmp_path / "data", purge=True)


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json."""
    assert main([*words, "--json"]) == code
    return dict(json.loads(capsys.readouterr().out))


def test_accounts_and_tls(
    guarded: tuple[Any, Certificate], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, made = guarded
    here = ("--data-dir", manager.data_dir)
    assert manager.url.startswith("https://127.0.0.1:")
    assert run(capsys, "status", *here)["healthy"]  # the token of the data directory is found by itself
    assert run(capsys, "status", "--url", manager.url, code=1)["error"]["code"] == "KVCM-P001"

    run(capsys, "account", "add", "engines", "--group", "default", *here)
    secret = run(capsys, "account", "token", "create", "engines", *here)["token"]
    by_token = ("--url", manager.url, "--token", secret)
    assert run(capsys, "status", *by_token)["groups"][0]["name"] == "default"
    refused = run(capsys, "account", "list", *by_token, code=1)
    assert refused["error"]["code"] == "KVCM-P002"

    _client(manager.url, secret)
    _grpc(manager.grpc, made, secret)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{manager.url}/healthz", trust_env=False)  # nobody known signed the certificate
    with pytest.raises(httpx.HTTPError):
        httpx.get(manager.url.replace("https", "http") + "/healthz", trust_env=False)

    audit = run(capsys, "account", "audit", *here)["entries"]
    assert [(e["call"], e["account"], e["result"]) for e in audit] == [
        ("AddAccount", "admin", "OK"),
        ("CreateToken", "admin", "OK"),
        ("", "", "KVCM-P001"),  # the wrong token
        ("AddStorage", "engines", "KVCM-P002"),
    ]
    assert {e["from"] for e in audit} == {"127.0.0.1"}
    _again_without_haproxy(manager, made, secret, monkeypatch)


def _client(url: str, secret: str) -> None:
    with connect(url, token=secret, raise_errors=True) as client:
        instance = client.register("default/i1", block_size=16, specs={"kv": 64})
        assert int(instance.put([1, 2], bytes(128))) == 2
        assert instance.match_length([1, 2, 3]) == 2
    with pytest.raises(Unauthenticated), connect(url, token="kvcm_wrong") as client:
        client.instance("default/i1")


def _grpc(address: str, made: Certificate, secret: str) -> None:
    credentials = grpc.ssl_channel_credentials(made.cert.read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        found = GrpcClient(channel, secret).call("GetInstanceInfo", instance_id="default/i1")
        assert (found.header.status.message, found.instance_group) == ("", "default")
        with pytest.raises(grpc.RpcError) as refused:
            GrpcClient(channel).call("CheckHealth")
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as refused:
            GrpcClient(channel, secret).call("AddStorage")
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


def _again_without_haproxy(
    manager: Any, made: Certificate, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accounts and tokens outlive a restart that says nothing of them; Serve itself speaks TLS."""
    cluster.down(manager.data_dir)
    monkeypatch.setenv("KVCM_HAPROXY", "0")
    tls = {"tls_cert": str(made.cert), "tls_key": str(made.key)}
    again = cluster.up_detached(manager.data_dir, 0, SMALL_TIERS, replicas=1, **tls)
    assert again.grpc is None
    with httpx.Client(
        verify=ssl.create_default_context(cafile=made.cert), trust_env=False, base_url=again.url
    ) as http:
        assert http.post("/api/checkHealth", json={}).status_code == 401
        header = {"Authorization": f"Bearer {secret}"}
        assert http.post("/api/checkHealth", json={}, headers=header).json()["is_health"]
        assert http.post("/api/addStorage", json={}, headers=header).status_code == 403
    assert "accounts are required" in (Path(manager.data_dir) / "manager.log").read_text()
