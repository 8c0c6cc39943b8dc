"""gRPC through Ray Serve's ingress: with HAProxy and two replicas, and through Serve's own proxy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvcm_ray import cluster
from kvcm_ray.cluster import Manager
from kvcm_ray.serve_app.grpc.client import GrpcClient, connect
from kvcm_ray.testing.cluster import SMALL_TIERS
from kvcm_ray.testing.grpc import as_json
from kvcm_ray.testing.http import registration

pytestmark = pytest.mark.ray

SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "kv_cache_manager.proto.admin.AdminService",
    "kv_cache_manager.proto.meta.MetaService",
}
DEBUG_SERVICE = "kv_cache_manager.proto.debug.DebugService"


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("manager") / "data"
    try:
        yield cluster.up_detached(folder, 0, SMALL_TIERS, replicas=2, debug_api=True)
    finally:
        cluster.down(folder, purge=True)


@pytest.fixture(scope="module")
def kvcm(manager: Manager) -> Iterator[GrpcClient]:
    assert manager.grpc is not None
    with connect(manager.grpc) as client:
        yield client


def status(answer: Any) -> str:
    return str(as_json(answer)["header"]["status"]["code"])


def written(kvcm: GrpcClient, instance: str, keys: list[int]) -> Any:
    """Locations of blocks of a new instance."""
    assert status(kvcm.call("RegisterInstance", **registration(instance))) == "OK"
    started = kvcm.call("StartWriteCache", instance_id=instance, block_keys=keys, write_timeout_seconds=30)
    assert status(started) == "OK", started.header
    finished = kvcm.call(
        "FinishWriteCache", instance_id=instance, write_session_id=started.write_session_id,
        success_blocks={"offset": len(keys)},
    )  # fmt: skip
    assert status(finished) == "OK"
    return started.locations


def test_a_write_and_its_look_up_by_either_transport(kvcm: GrpcClient, manager: Manager) -> None:
    locations = written(kvcm, "i1", list(range(200)))
    query = {"instance_id": "i1", "block_keys": list(range(200)), "query_type": "QT_PREFIX_MATCH"}
    for _ in range(10):  # both replicas
        assert list(kvcm.call("GetCacheLocation", **query).locations) == list(locations)
    answer = httpx.post(f"{manager.url}/api/getCacheLocation", json=query).json()
    assert answer["locations"] == as_json(kvcm.call("GetCacheLocation", **query))["locations"]


def test_sixteen_thousand_keys(kvcm: GrpcClient) -> None:
    keys = list(range(16_384))
    locations = written(kvcm, "i2", keys)
    found = kvcm.call("GetCacheLocation", instance_id="i2", block_keys=keys, query_type="QT_PREFIX_MATCH")
    assert list(found.locations) == list(locations)


def test_an_unknown_instance_is_no_failure_of_the_call(kvcm: GrpcClient) -> None:
    query = {"instance_id": "nope", "block_keys": [1], "query_type": "QT_PREFIX_MATCH"}
    answer = kvcm.call("GetCacheLocation", **query)
    assert status(answer) == "INSTANCE_NOT_EXIST"
    assert answer.header.request_id
    assert status(kvcm.call("GetInstanceInfo", package="admin", instance_id="nope")) == "INTERNAL_ERROR"


def test_a_deadline_that_has_passed(kvcm: GrpcClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        kvcm.call("GetMetrics", timeout_s=0.00001)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert status(kvcm.call("GetMetrics")) == "OK"


def test_health(manager: Manager) -> None:
    assert manager.grpc is not None
    with grpc.insecure_channel(manager.grpc) as channel:
        check_health(channel)


def check_health(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", *sorted(SERVICES - {"grpc.reflection.v1alpha.ServerReflection"})):
        assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == serving
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    for service, expected in (("", serving), ("nope", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)):
        stream = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert next(stream).status == expected
        stream.cancel()


def test_reflection(manager: Manager) -> None:
    assert manager.grpc is not None
    with grpc.insecure_channel(manager.grpc) as channel:
        check_reflection(channel, SERVICES | {DEBUG_SERVICE})


def check_reflection(channel: grpc.Channel, services: set[str]) -> None:
    """What grpcurl asks for: the services, and the file that declares one."""
    reflection = ProtoReflectionDescriptorDatabase(channel)
    assert set(reflection.get_services()) == services
    file = reflection.FindFileContainingSymbol("kv_cache_manager.proto.meta.MetaService")
    (service,) = file.service
    assert [method.name for method in service.method][:2] == ["RegisterInstance", "GetInstanceInfo"]
    assert len(service.method) == 8


def test_it_listens_on_loopback_only(manager: Manager) -> None:
    pids = set(cluster.leftovers(manager))
    listening = {
        connection.laddr
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids
    }
    assert {address.port for address in listening} >= {_port(manager.url), _port(str(manager.grpc))}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("at", [1, 40, 200])
def test_a_fault_at_a_call_of_all_replicas(kvcm: GrpcClient, manager: Manager, at: int) -> None:
    """200 calls at once, half of them over HTTP: one fails, wherever they go; none if it is set beyond."""
    kvcm.call("InjectFault", api_name="ListStorage", fault_trigger_strategy="ONCE", trigger_at_call=at)
    with httpx.Client(base_url=manager.url) as client, ThreadPoolExecutor(8) as pool:

        def one(number: int) -> str:
            if number % 2:
                return status(kvcm.call("ListStorage"))
            return str(client.post("/api/listStorage", json={}).json()["header"]["status"]["code"])

        codes = list(pool.map(one, range(at - 1)))
        assert codes == ["OK"] * (at - 1)
        codes = list(pool.map(one, range(200)))
    assert sorted(set(codes)) == ["INTERNAL_ERROR", "OK"]
    assert codes.count("INTERNAL_ERROR") == 1
    assert status(kvcm.call("RemoveFault", api_name="ListStorage")) == "OK"


def test_a_replica_is_killed(kvcm: GrpcClient, manager: Manager) -> None:
    """No call fails that is sent again when the connection broke, as the protocol's clients do."""
    written(kvcm, "i3", [1, 2, 3])
    victim = next(pid for pid in cluster.leftovers(manager) if _is_replica(pid))
    again, until, killed = 0, time.monotonic() + 5, False
    while time.monotonic() < until:
        again += _found(kvcm, "i3")
        if not killed:
            os.kill(victim, signal.SIGKILL)
            killed = True
    assert again < 10
    assert status(kvcm.call("CheckHealth")) == "OK"


def _is_replica(pid: int) -> bool:
    try:
        return "ServeReplica" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False


def _found(kvcm: GrpcClient, instance: str) -> int:
    """Look up; how often that had to be sent again."""
    for attempt in range(3):
        try:
            answer = kvcm.call(
                "GetCacheLocation", instance_id=instance, block_keys=[1, 2, 3], query_type="QT_PREFIX_MATCH",
                timeout_s=5, wait_for_ready=True,
            )  # fmt: skip
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            continue
        assert status(answer) == "OK"
        assert len(answer.locations) == 3
        return attempt
    raise AssertionError("a look-up failed three times in a row")


def test_without_haproxy_and_without_the_debug_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCM_HAPROXY", "0")
    manager = cluster.up_detached(tmp_path / "data", 0, SMALL_TIERS, replicas=2, grpc_port=0)
    try:
        assert manager.grpc is not None
        with connect(manager.grpc) as kvcm:
            assert list(written(kvcm, "i1", [1, 2]))
            assert _found_in_meta_and_admin(kvcm) == ["INSTANCE_NOT_EXIST", "INTERNAL_ERROR"]
            with pytest.raises(grpc.RpcError) as caught:
                kvcm.call("InjectFault", api_name="CheckHealth")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        with grpc.insecure_channel(manager.grpc) as channel:
            check_health(channel)
            check_reflection(channel, SERVICES)
        test_it_listens_on_loopback_only(manager)
    finally:
        cluster.down(tmp_path / "data", purge=True)


def _found_in_meta_and_admin(kvcm: GrpcClient) -> list[str]:
    return [status(kvcm.call("GetInstanceInfo", package=p, instance_id="nope")) for p in ("meta", "admin")]
