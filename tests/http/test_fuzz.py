"""Nothing that a client sends leads to a 5xx, and every answer is a JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcm_ray.serve_app.endpoints import ENDPOINTS
from kvcm_ray.serve_app.protojson import plan
from kvcm_ray.testing import wire_fuzz
from kvcm_ray.testing.http import Http, registration
from kvcm_ray.testing.served import served

PATHS = [endpoint.path for endpoint in ENDPOINTS]
IDS = ["i1", "i2", "default", "nfs_01", "", "ghost", "é", "a/../b", "x" * 300, "\x00"]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(IDS)
    | st.text(max_size=10)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


def likely(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values that get past the codec more often than not."""
    special = {
        "instance_id": st.sampled_from(IDS),
        "block_keys": st.lists(st.integers(-3, 12), max_size=6),
        "token_ids": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
        "query_type": st.integers(0, 4),
        "block_mask": st.just({"offset": 1}) | st.just({"bool_masks": {"values": [True, False]}}),
        "success_blocks": st.just({"offset": 1}) | st.just({"bool_masks": {"values": [True]}}),
        "sw_size": st.integers(-1, 5),
        "strategy": st.integers(0, 5),
        "location_spec_names": st.lists(st.sampled_from(["tp0", "tp1", ""]), max_size=2),
        "location_spec_group_names": st.just([])
        | st.lists(st.sampled_from(["g", "x"]), max_size=3),
    }
    if name == "storage":
        # Real folders would be made for whatever path is asked for.
        spec = {"global_unique_name": st.sampled_from(IDS), "mooncake": anything, "local": anything}
        return st.fixed_dictionaries({}, optional=spec)
    return special.get(name, anything)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    endpoint = draw(st.sampled_from(ENDPOINTS))
    body = {}
    for part in plan(endpoint.request).fields:
        if draw(st.integers(0, 4)):
            strategy = likely(part.name, part.hint)
            body[part.name] = draw(strategy if draw(st.integers(0, 5)) else anything)
    if "nfs" in json.dumps(body.get("storage")) or "shm" in json.dumps(body.get("storage")):
        del body["storage"]
    return endpoint.path, body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Http]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    server = Http(folder / "data")
    server.start_default(folder / "nfs")
    server.register(
        "i1", ("tp0", "tp1"), location_spec_groups=[{"name": "g", "spec_names": ["tp0"]}]
    )
    server.write("i1", [1, 2, 3])
    yield server
    server.close()


def check(server: Http, path: str, body: bytes) -> None:
    response = server.raw(path, body)
    assert response.status_code in (200, 400), (path, body, response.text)
    answer = response.json()
    assert isinstance(answer, dict)
    if response.status_code == 200:
        header = answer["header"]
        assert header["status"]["code"] != "UNSPECIFIED"
        assert "internal error" not in header["status"]["message"], (path, body, header)
    else:
        assert answer == {}


FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(request=requests())
def test_plausible_requests(server: Http, request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    check(server, path, json.dumps(body).encode())


@FUZZ
@given(path=st.sampled_from(PATHS), body=anything)
def test_any_json(server: Http, path: str, body: Any) -> None:
    check(server, path, json.dumps(body).encode())


@FUZZ
@given(
    path=st.sampled_from(PATHS), body=st.binary(max_size=60) | st.text(max_size=60).map(str.encode)
)
def test_any_bytes(server: Http, path: str, body: bytes) -> None:
    check(server, path, body)


@FUZZ
@given(path=st.text(max_size=20), method=st.sampled_from(["GET", "PUT", "DELETE", "POST", "HEAD"]))
def test_any_path(server: Http, path: str, method: str) -> None:
    response = server.run(server.client.request(method, f"/api/{quote(path)}", content=b"{}"))
    assert response.status_code < 500
    if method != "HEAD":
        assert isinstance(response.json(), dict)


def test_the_manager_still_works_afterwards(server: Http) -> None:
    server.register("after")
    server.write("after", [100, 101])
    assert len(server.prefix("after", [100, 101])) == 2


def test_bytes_that_are_no_requests(tmp_path: Path) -> None:
    """Of each kind some; many are in ``test_fuzz_heavy.py``."""
    with served(tmp_path / "data") as running:
        found = wire_fuzz.send_all(running.url, wire_fuzz.attempts(1, 300))
        assert not wire_fuzz.failures(found), found
        assert {what.split()[0] for what in found} >= {"whole", "chunked", "pipelined", "slow", "binary"}
        assert found["whole 200"], "what is in order gets its answer"
        answer = httpx.post(f"{running.url}/api/registerInstance", json=registration("after")).json()
        assert answer["header"]["status"]["code"] == "OK"
