"""The debug API: off by default, and exact about which call fails."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcm_ray.errors import InjectedFault, InvalidArgument
from kvcm_ray.serve_app import faults
from kvcm_ray.serve_app.faults import Faults
from kvcm_ray.testing.grpc import Grpc, as_json
from kvcm_ray.testing.http import Http

APIS = frozenset({"GetCacheLocation", "StartWriteCache", "FinishWriteCache"})


def code(answer: dict[str, object]) -> str:
    return str(answer["header"]["status"]["code"])  # type: ignore[index]


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    closed = Http(tmp_path / "data")
    for name in ("injectFault", "removeFault", "clearFaults"):
        assert closed.raw(f"/api/{name}", b"{}").status_code == 404
        assert f"/api/{name}" not in closed.get("/openapi.json").json()["paths"]
    assert closed.app.service.faults is None
    closed.close()


def test_a_fault_over_http_hits_grpc_too(http: Http, rpc: Grpc) -> None:
    answer = http.post("injectFault", api_name="ListStorage")
    assert answer == {
        "header": {
            "status": {
                "code": "OK",
                "message": "Inject fault successfully, api_name: ListStorage, fault_type: internal_error, "
                "fault_trigger_strategy: always",
            },
            "request_id": "",
        }
    }
    for _ in range(2):
        assert code(http.post("listStorage")) == "INTERNAL_ERROR"
        failed = rpc.call("ListStorage")
        assert failed.header.status.message == "ListStorage fail due to fault injection"
        assert not failed.storage
    assert code(as_json(rpc.call("RemoveFault", api_name="ListStorage"))) == "OK"
    assert code(http.post("listStorage")) == "OK"


def test_once_at_a_call_counts_calls_and_not_names_in_trace_ids(http: Http, rpc: Grpc) -> None:
    rpc.call("InjectFault", api_name="CheckHealth", fault_trigger_strategy="ONCE", trigger_at_call=3)
    seen = [code(http.post("checkHealth", trace_id="t_3")) for _ in range(6)]
    assert seen == ["OK", "OK", "INTERNAL_ERROR", "OK", "OK", "OK"]


@pytest.mark.parametrize("at", [0, 1])
def test_once_without_a_number_is_the_next_call(http: Http, at: int) -> None:
    http.post("injectFault", api_name="CheckHealth", fault_trigger_strategy="ONCE", trigger_at_call=at)
    assert [code(http.post("checkHealth")) for _ in range(3)] == ["INTERNAL_ERROR", "OK", "OK"]


def test_the_last_fault_of_an_api_counts(http: Http) -> None:
    http.post("injectFault", api_name="CheckHealth")
    http.post("injectFault", api_name="CheckHealth", fault_trigger_strategy="ONCE", trigger_at_call=2)
    assert [code(http.post("checkHealth")) for _ in range(3)] == ["OK", "INTERNAL_ERROR", "OK"]
    http.post("injectFault", api_name="CheckHealth")
    http.post("injectFault", api_name="ListStorage")
    assert code(http.post("clearFaults")) == "OK"
    assert {code(http.post(name)) for name in ("checkHealth", "listStorage")} == {"OK"}


def test_calls_that_never_get_so_far_are_not_counted(http: Http) -> None:
    """The fault stands where the protocol has it: behind the look-up of the instance."""
    http.register("i1")
    http.post("injectFault", api_name="GetCacheLocation", fault_trigger_strategy="ONCE")
    query = {"block_keys": [1], "query_type": "QT_PREFIX_MATCH"}
    http.raw("/api/getCacheLocation", b"{")
    assert code(http.post("getCacheLocation", instance_id="nope", **query)) == "INSTANCE_NOT_EXIST"
    assert code(http.post("getCacheLocation", instance_id="i1", **query)) == "INTERNAL_ERROR"
    assert code(http.post("getCacheLocation", instance_id="i1", **query)) == "OK"


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({}, "api_name"),
        ({"api_name": "GetCacheLocatoin"}, "GetCacheLocatoin"),
        ({"api_name": "CheckHealth", "fault_type": 7}, "fault_type 7"),
        ({"api_name": "CheckHealth", "fault_trigger_strategy": 2}, "fault_trigger_strategy 2"),
        ({"api_name": "CheckHealth", "trigger_at_call": -1}, "trigger_at_call -1"),
    ],
)
def test_what_cannot_be_injected(http: Http, request_: dict[str, object], word: str) -> None:
    answer = http.post("injectFault", **request_)
    assert code(answer) == "INVALID_ARGUMENT"
    assert word in answer["header"]["status"]["message"]


def test_removing_what_is_not_set(http: Http) -> None:
    answer = http.post("removeFault", api_name="CheckHealth")
    assert answer["header"]["status"] == {
        "code": "INVALID_ARGUMENT", "message": "Remove fault fail, api_name:CheckHealth",
    }  # fmt: skip


# -------------------------------------------------------------------------------- the table alone

_CALLER = """
import sys
from pathlib import Path
from kvcm_ray.errors import InjectedFault
from kvcm_ray.serve_app.faults import Faults

table = Faults(Path(sys.argv[1]), frozenset({"GetCacheLocation"}))
sys.stdin.readline()
failed = 0
for _ in range(500):
    try:
        table.meet("GetCacheLocation")
    except InjectedFault:
        failed += 1
print(failed)
"""


def test_processes_at_once_count_together(tmp_path: Path) -> None:
    """2000 calls of 4 processes: the fault at the last of them fires, one at 2001 does not."""
    table = Faults(tmp_path, APIS)
    for at, expected in ((2000, 1), (2001, 0), (1, 1)):
        table.inject("GetCacheLocation", once=True, at_call=at)
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _CALLER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]  # fmt: skip
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda child: child.communicate("go\n")[0], children))
        assert sum(map(int, outputs)) == expected
    table.close()


def test_a_table_is_shared_and_ends_with_its_file(tmp_path: Path) -> None:
    one, two = Faults(tmp_path, APIS), Faults(tmp_path, APIS)
    for api in APIS:
        one.inject(api, once=False, at_call=0)
    assert two.remove("StartWriteCache")
    assert not two.remove("StartWriteCache")
    two.meet("StartWriteCache")
    for api in APIS - {"StartWriteCache"}:
        with pytest.raises(InjectedFault):
            two.meet(api)
    with pytest.raises(InvalidArgument):
        one.inject("X" * 100, once=False, at_call=0)
    faults.forget(tmp_path)
    three = Faults(tmp_path, APIS)
    for api in APIS:
        three.meet(api)
    for each in (one, two, three):
        each.close()
