"""Calls over real gRPC in this process: what differs from HTTP, and what goes wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvcm_ray.core.model import AccessSettings
from kvcm_ray.serve_app.grpc import protos
from kvcm_ray.serve_app.grpc.locations import Proto
from kvcm_ray.serve_app.grpc.servicer import routes
from kvcm_ray.serve_app.locations import JSON
from kvcm_ray.serve_app.messages import CacheLocation, LocationSpec
from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.testing.grpc import Grpc, as_json, grpc_beside
from kvcm_ray.testing.http import Http


def test_every_rpc_answers_with_a_header_that_has_a_status(rpc: Grpc) -> None:
    """What the protocol's C++ client insists on, also of an empty request."""
    for path, route in routes().items():
        answer = route.response.FromString(rpc.raw(path, b""))
        assert answer.HasField("header"), path
        assert answer.header.HasField("status"), path
        assert answer.header.status.code, path


def test_rpcs_of_both_services_go_to_the_right_one(rpc: Grpc) -> None:
    codes = {}
    for package in ("meta", "admin"):
        answer = rpc.call("GetInstanceInfo", package=package, trace_id="t", instance_id="nope")
        codes[package] = as_json(answer)["header"]["status"]
    assert codes["meta"]["code"] == "INSTANCE_NOT_EXIST"
    assert codes["admin"]["code"] == "INTERNAL_ERROR"
    assert codes["admin"]["message"].startswith("Failed to get instance info")


def test_admin_registration_answers_without_storage_configs(rpc: Grpc, http: Http) -> None:
    fields = {
        "instance_group": "default", "instance_id": "i1", "block_size": 16,
        "model_deployment": {"model_name": "m", "dtype": "FP8"},
        "location_spec_infos": [{"name": "tp0", "size": 1024}],
    }  # fmt: skip
    assert (
        as_json(rpc.call("RegisterInstance", package="admin", **fields))["header"]["status"]["code"] == "OK"
    )
    again = rpc.call("RegisterInstance", package="meta", **fields)
    assert '"global_unique_name":"nfs_01"' in again.storage_configs
    other = rpc.call("RegisterInstance", package="admin", **(fields | {"block_size": 32}))
    assert as_json(other)["header"]["status"]["code"] == "INTERNAL_ERROR"


def test_a_write_and_its_look_up(rpc: Grpc, http: Http) -> None:
    http.register("i1", ("tp0", "tp1"))
    keys = [*range(99), -(2**63), 2**63 - 1]
    started = rpc.call("StartWriteCache", instance_id="i1", block_keys=keys, write_timeout_seconds=30)
    assert len(started.write_session_id) == 32
    assert started.block_mask.WhichOneof("info") == "offset"
    finished = rpc.call(
        "FinishWriteCache", instance_id="i1", write_session_id=started.write_session_id,
        success_blocks={"offset": len(keys)},
    )  # fmt: skip
    assert as_json(finished)["header"]["status"]["code"] == "OK"
    found = rpc.call("GetCacheLocation", instance_id="i1", block_keys=keys, query_type="QT_PREFIX_MATCH")
    assert list(found.locations) == list(started.locations)
    assert as_json(found)["locations"] == http.prefix("i1", keys)


def test_a_mask_of_bools_and_a_mask_that_is_there_but_empty(rpc: Grpc, http: Http) -> None:
    http.register("i1")
    http.write("i1", [1, 3])
    started = rpc.call("StartWriteCache", instance_id="i1", block_keys=[1, 2, 3], write_timeout_seconds=30)
    assert list(started.block_mask.bool_masks.values) == [True, False, True]
    assert len(started.locations) == 1
    none = rpc.call("FinishWriteCache", instance_id="i1", write_session_id=started.write_session_id)
    assert "success_blocks" in none.header.status.message  # absent is invalid
    empty = rpc.call(
        "FinishWriteCache", instance_id="i1", write_session_id=started.write_session_id,
        success_blocks={"bool_masks": {"values": [True]}},
    )  # fmt: skip
    assert as_json(empty)["header"]["status"]["code"] == "OK"


def test_sixteen_thousand_keys(rpc: Grpc, http: Http) -> None:
    http.register("i1")
    keys = list(range(16_384))
    http.write("i1", keys)
    found = rpc.call("GetCacheLocation", instance_id="i1", block_keys=keys, query_type="QT_PREFIX_MATCH")
    assert len(found.locations) == len(keys)
    assert as_json(found)["locations"] == http.prefix("i1", keys)


def test_the_trace_id_may_come_as_metadata(rpc: Grpc) -> None:
    by_metadata = rpc.call("CheckHealth", metadata={"x-trace-id": "abc"})
    assert by_metadata.header.request_id.startswith("abc_")
    by_both = rpc.call("CheckHealth", metadata={"x-trace-id": "abc"}, trace_id="t")
    assert by_both.header.request_id.startswith("t_")


def test_a_span_tree_for_those_who_ask(rpc: Grpc, http: Http) -> None:
    http.register("i1")
    answer = rpc.call(
        "GetCacheLocation",
        trace_id="t__kvcm_need_span_tracer",
        instance_id="i1",
        block_keys=[1],
        query_type=2,
    )
    assert '"span_time_us"' in answer.header.tracer_result


def test_a_body_that_is_no_message(rpc: Grpc) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        rpc.raw("/kv_cache_manager.proto.meta.MetaService/GetCacheLocation", b"\xff\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_method(rpc: Grpc) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        rpc.raw("/kv_cache_manager.proto.kv_meta.MetaService/Get", b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_what_only_http_has_is_left_out(rpc: Grpc, http: Http) -> None:
    """Additions of ours have no field in the protocol's messages."""
    http.ok("disableStorage", storage_unique_name="nfs_01")
    assert "storage_state" in http.ok("listStorage")
    assert [s.global_unique_name for s in rpc.call("ListStorage").storage] == ["nfs_01"]


def test_calls_are_counted_beside_those_of_http(rpc: Grpc, http: Http) -> None:
    for _ in range(3):
        rpc.call("ListStorage")
    http.ok("listStorage")
    counted = {
        m.metric_tags[0].tag_value: m.metric_value.int_value
        for m in rpc.call("GetMetrics").metrics
        if m.metric_name == "service.query_counter" and len(m.metric_tags) == 1
    }
    assert counted["ListStorage"] == 4


# ---------------------------------------------------------------------------------- credentials


def test_a_manager_with_accounts(rpc: Grpc, http: Http) -> None:
    http.ok("addAccount", user_name="root", password="a longer password", role="ROLE_ADMIN")
    http.ok("addAccount", user_name="engine", password="a long password", role="ROLE_USER")
    token = http.ok("createToken", user_name="engine", label="t")["secret"]
    http.run(http.backend.registry("set_access", AccessSettings(True)))

    def status(**metadata: str) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            rpc.call("ListAccount", metadata=metadata)
        assert caught.value.details()
        return caught.value.code()

    assert status() == grpc.StatusCode.UNAUTHENTICATED
    assert status(authorization="Bearer nonsense") == grpc.StatusCode.UNAUTHENTICATED
    assert status(authorization=f"Bearer {token}") == grpc.StatusCode.PERMISSION_DENIED
    allowed = rpc.call("CheckHealth", metadata={"authorization": f"Bearer {token}"})
    assert as_json(allowed)["header"]["status"]["code"] == "OK"


def test_a_caller_over_its_limit(tmp_path: Path) -> None:
    http = Http(tmp_path / "data", GatewayOptions(requests_per_second=0.001, burst=2))
    with grpc_beside(http) as rpc:
        for _ in range(2):
            rpc.call("CheckHealth")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            rpc.call("CheckHealth")
    http.close()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "limit" in str(caught.value.details())


# ---------------------------------------------------------------------------- locations as bytes


@pytest.mark.parametrize("field", [2, 4, 17])
def test_locations_are_the_same_in_both_forms(http: Http, field: int) -> None:
    """Names with characters that either form escapes, numbers of 1 to 10 digits."""
    http.register("i%1", ("tp%0", "tp<ü>"))
    http.write("i%1", [1, 2])
    info = http.backend.instance("i%1")
    reader, encoder = http.backend.reader(info), http.backend.encoder(info)
    found = reader.match(np.array([1, 2], np.int64)).locations
    stretch = encoder.prefix(found, reader.segment, http.backend.storages()).stretches[0]
    numbers = np.array([0, 9, 10, 127, 128, 4_294_967_295], np.uint32)
    pairs = np.array(list(itertools.product(numbers, numbers)), np.uint32)
    form, slots, generations = Proto(field), pairs[:, 0].copy(), pairs[:, 1].copy()
    assert stretch.segment is not None
    assert stretch.storage is not None
    for names in ((), ("tp%0",), ("nothing",)):
        as_bytes = form.fill(form.prepare(stretch.segment, stretch.storage, names), slots, generations)
        as_text = JSON.fill(JSON.prepare(stretch.segment, stretch.storage, names), slots, generations)
        assert parsed(field, as_bytes) == _json_list(as_text)


def test_placeholders_and_odd_locations() -> None:
    odd = CacheLocation(spec_size=2, location_specs=(LocationSpec("a"), LocationSpec("", "u")))
    for location in (CacheLocation(), odd):
        assert parsed(2, Proto(2).plain(location)) == _json_list(JSON.plain(location))


def parsed(field: int, data: bytes) -> list[dict[str, object]]:
    """The elements of the repeated field, read as an unknown one would be: tag by tag."""
    location = protos.message("meta", "CacheLocation")
    tag, at, found = field << 3 | 2, 0, []
    while at < len(data):
        number, at = _varint(data, at)
        assert number == tag
        size, at = _varint(data, at)
        found.append(as_json(location.FromString(data[at : at + size])))
        at += size
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _json_list(inside: bytes) -> list[dict[str, object]]:
    return list(json.loads(b"[%s]" % inside))
