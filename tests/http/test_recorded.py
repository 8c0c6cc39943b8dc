"""Recorded exchanges of a compatible server, replayed in order on the real application.

Paths, ids and times are compared by form, everything else by value. Where we answer differently
on purpose, `DIFFERENCES` turns the recorded answer into ours and says why; the test fails as well
if such a difference goes away. Two more hold everywhere: placeholders have type ST_UNSPECIFIED
(recorded: an uninitialised number), and the meta of a missing block has no id (recorded: the one
before it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.core.model import StorageConfig, ThreeFSSpec
from kvcm_ray.errors import Unsupported
from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.storage_adapters import open_storage
from kvcm_ray.testing.http import Http

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "http_examples.jsonl").read_text().splitlines()
]
Json = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    why: str
    change: Callable[[Json], Json]


def status(code: str, message: str = "") -> Callable[[Json], Json]:
    """The recorded answer with another code, and with another message if one is given."""

    def change(answer: Json) -> Json:
        answer["header"]["status"]["code"] = code
        if message:
            answer["header"]["status"]["message"] = message
        return answer

    return change


def meta_header(answer: Json) -> Json:
    answer["header"]["tracer_result"] = ""
    return answer


def serving(answer: Json) -> Json:
    answer["metas"] = [{"status": "CLS_SERVING", "id": "ID"} for _ in answer["metas"]]
    return answer


def unknown_instance(answer: Json) -> Json:
    answer["header"]["request_id"] = "t_N"
    answer["header"]["status"]["message"] = "instance 'nope' is not registered"
    return answer


LOCATION: Json = {
    "type": "ST_NFS", "spec_size": 1, "location_specs": [{"name": "tp0", "uri": "nfs 1024"}],
}  # fmt: skip


def started(keys: int) -> Callable[[Json], Json]:
    def change(answer: Json) -> Json:
        status("OK", "Write cache session started successfully")(answer)
        return {
            "header": answer["header"],
            "write_session_id": "SESSION",
            "block_mask": {"offset": 0},
            "locations": [LOCATION] * keys,
        }

    return change


def found(*positions: int) -> Callable[[Json], Json]:
    """These of the recorded placeholders are locations here."""

    def change(answer: Json) -> Json:
        for i in positions:
            answer["locations"][i]["type"] = "ST_NFS"
            for spec in answer["locations"][i]["location_specs"]:
                spec["uri"] = "nfs 1024"
        return answer

    return change


def registered(storage: str) -> Callable[[Json], Json]:
    def change(answer: Json) -> Json:
        status("OK", "Instance registered successfully")(answer)
        config = {
            "type": "file", "is_available": True, "global_unique_name": storage,
            "storage_spec": {"root_path": "/data/gold_nfs2/", "key_count_per_file": 4},
        }  # fmt: skip
        return answer | {"storage_configs": [config]}

    return change


def without_3fs(answer: Json) -> Json:
    kept = [s for s in answer["storage"] if s["global_unique_name"] != "3fs_01"]
    return answer | {"storage": kept}


def _opens_3fs() -> bool:
    """Whether this version has an adapter for a mounted 3FS."""
    try:
        open_storage(StorageConfig("x", threefs=ThreeFSSpec(mountpoint="/", root_dir="x"))).close()
    except Unsupported:
        return False
    return True


QUERY_TYPE = "an unknown query type is the caller's mistake"
NO_SHARDS = "our index has no lock shards that max_key_count could be too small for"
DIFFERENCES: dict[int, Difference] = {
    32: Difference(
        "a mask of the wrong length leaves the session usable",
        status("OK", "Write cache session finished successfully"),
    ),
    33: Difference("so its blocks are readable after the right one", serving),
    50: Difference(QUERY_TYPE, status("INVALID_ARGUMENT")),
    51: Difference(QUERY_TYPE, status("INVALID_ARGUMENT")),
    55: Difference(QUERY_TYPE, status("INVALID_ARGUMENT")),
    56: Difference(QUERY_TYPE, status("INVALID_ARGUMENT")),
    80: Difference("an unknown instance has a plain message and a request_id", unknown_instance),
    87: Difference("removeCache honours block_mask, so block 5 is still there", found(0)),
    90: Difference("an unknown instance has a plain message and a request_id", unknown_instance),
    91: Difference("a path that both ports serve answers as the meta API", meta_header),
    113: Difference("a storage without an adapter is UNSUPPORTED", status("UNSUPPORTED")),
    126: Difference(
        "storage candidates must exist", status("INTERNAL_ERROR", "Failed to create instance group")
    ),
    133: Difference(NO_SHARDS, registered("gold_nfs")),
    134: Difference("max_instance_count is enforced", lambda answer: answer),
    135: Difference(NO_SHARDS, started(10)),
    136: Difference("the limit of 10 keys is reached", status("INTERNAL_ERROR")),
    137: Difference("the limit of 10 keys is reached", status("INTERNAL_ERROR")),
    138: Difference(
        "a group with instances is removed only if forced",
        status("INTERNAL_ERROR", "Failed to remove instance group"),
    ),
    139: Difference("gg1 was registered", status("OK", "Instance removed successfully")),
}
if not _opens_3fs():
    DIFFERENCES |= {
        112: Difference(
            "a storage without an adapter is UNSUPPORTED",
            status("UNSUPPORTED", "Failed to add storage"),
        ),
        114: Difference("see 112", without_3fs),
        121: Difference("see 112", without_3fs),
    }
#: Rows whose recorded error_msg is empty or names another reason; ours is not compared.
OTHER_REASON = {50, 51, 55, 56, 133, 134, 136, 137}


# --------------------------------------------------------------------------- comparable by value

VOLATILE = {
    "elector_last_loop_time_ms",
    "info_updated_time",
    "self_leader_expiration_time",
    "self_node_id",
    "leader_node_id",
}


def comparable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        if "location_specs" in value and not any(s["uri"] for s in value["location_specs"]):
            value = value | {"type": "ST_UNSPECIFIED"}
        return {k: comparable(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [comparable(v, key) for v in value]
    if key == "reclaim_step_size":
        return int(value)  # recorded as a number; a string where the field has 64 bits
    if not isinstance(value, str):
        return value
    if key in VOLATILE:
        return type(value).__name__
    if key == "request_id":
        return re.sub(r"_\d{16}$", "_N", value)
    if key == "write_session_id" and re.fullmatch("[a-z0-9]{32}", value):
        return "SESSION"
    if key == "uri" and value:
        size = re.fullmatch(r"file://nfs_01/.*[?&]size=(\d+)", value)
        gold = re.fullmatch(r"file://gold_nfs/.*[?&]size=(\d+)", value)
        return f"nfs {(size or gold).group(1)}" if size or gold else value
    if key == "storage_configs" and value:
        return json.loads(value)
    return comparable_meta(json.loads(value)) if key == "metas" else value


def comparable_meta(meta: Json) -> Json:
    missing = meta["status"] == "CLS_NOT_FOUND"
    assert missing or meta["id"]
    return {"status": meta["status"]} | ({} if missing else {"id": "ID"})


def message_agrees(recorded: str, ours: str, code: str, any_reason: bool) -> bool:
    """The same text; after a failure, more reasons may follow the recorded ones."""
    if recorded == ours:
        return True
    if code == "OK":
        return False
    mark = ' : {"error_msg":'
    if mark not in recorded:
        return ours.startswith(f"{recorded} : ")
    prefix, reasons = recorded.split(mark)
    our_prefix, _, our_reasons = ours.partition(mark)
    expected = [] if any_reason else json.loads(reasons[:-1])
    return prefix == our_prefix and json.loads(our_reasons[:-1])[: len(expected)] == expected


class Replay:
    def __init__(self, http: Http, root: str) -> None:
        self.http = http
        self.root = root
        self.sessions: dict[str, str] = {}

    def send(self, row: Json) -> tuple[int, Any]:
        request = row["request"]
        text = request if isinstance(request, str) else json.dumps(request)
        for theirs, ours in self.sessions.items():
            text = text.replace(theirs, ours)
        text = text.replace('"/data/', f'"{self.root}/')
        response = self.http.raw(row["path"], text.encode())
        answer = json.loads(response.text.replace(f"{self.root}/", "/data/"))
        recorded = row["response"].get("write_session_id")
        if recorded and answer.get("write_session_id"):
            self.sessions[recorded] = answer["write_session_id"]
        return response.status_code, answer


@pytest.fixture
def replay(tmp_path: Path) -> Any:
    http = Http(tmp_path / "manager", GatewayOptions(debug_api=True))
    http.start_default(tmp_path / "nfs")
    yield Replay(http, str(tmp_path))
    http.close()


def test_recorded_exchanges(replay: Replay) -> None:
    wrong = []
    for number, row in enumerate(ROWS):
        if number == 43:  # the recording prepared its second instance in between
            replay.http.write("g", [1, 2, 3, 5, 6, 8])
        code, answer = replay.send(row)
        expected = comparable(row["response"])
        if number in DIFFERENCES:
            before = json.dumps(expected)
            expected = DIFFERENCES[number].change(expected)
            assert json.dumps(expected) != before or number == 134
        ours = comparable(answer)
        problem = _compare(number, row["status"], expected, code, ours)
        if problem:
            wrong.append(f"{number} {row['title']}: {problem}")
    assert not wrong, "\n".join(wrong)


def _compare(number: int, status_code: int, expected: Json, code: int, ours: Json) -> str:
    if code != status_code:
        return f"HTTP {code} instead of {status_code}"
    if "header" in expected:
        recorded, answered = expected["header"]["status"], ours["header"]["status"]
        texts = recorded.pop("message"), answered.pop("message")
        if not message_agrees(*texts, answered["code"], number in OTHER_REASON):
            return f"message {texts[1]!r} instead of {texts[0]!r}"
    if json.dumps(expected) != json.dumps(ours):  # the order of the fields counts as well
        return f"\n    expected {json.dumps(expected)}\n    got      {json.dumps(ours)}"
    return ""
