"""The recorded exchanges once over HTTP and once over gRPC, on a manager each: the answers are the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvcm_ray.serve_app.endpoint import Endpoint
from kvcm_ray.serve_app.endpoints import DEBUG, ENDPOINTS
from kvcm_ray.serve_app.grpc.client import rpc as rpc_of
from kvcm_ray.serve_app.grpc.convert import fields_of, fill
from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.serve_app.protojson import BadJson, decode
from kvcm_ray.testing.grpc import Grpc, as_json, grpc_beside
from kvcm_ray.testing.http import Http

DATA = Path(__file__).parents[1] / "http" / "data" / "http_examples.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]
BY_PATH = {endpoint.path: endpoint for endpoint in (*ENDPOINTS, *DEBUG)}
#: What differs from one manager to the next, and from one moment to the next.
VOLATILE = (
    (re.compile(r"_\d{16}\b"), "_N"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{6}/"), "SEGMENT/"),
    (re.compile(r'"(self_node_id|leader_node_id)": "[^"]*"'), r'"\1": ""'),
    (re.compile(r'"\d{13,16}"'), '"TIME"'),
    (re.compile(r"\b[a-z0-9]{32}\b"), "SESSION"),
)


def request_bytes(endpoint: Endpoint, text: str) -> bytes | None:
    """The JSON request as the protobuf message that a gRPC client would send; None if it is not JSON."""
    try:
        request = decode(endpoint.request, text.encode())
    except BadJson:
        return None
    message = rpc_of(endpoint.rpc, endpoint.api).request()
    fill(message, fields_of(request))
    return bytes(message.SerializeToString())


class Side:
    """One of the two managers, with its folder and its own session ids."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self.http = Http(folder / "manager", GatewayOptions(debug_api=True))
        self.http.start_default(folder / "nfs")
        self.sessions: dict[str, str] = {}

    def text_of(self, row: dict[str, Any]) -> str:
        text = row["request"] if isinstance(row["request"], str) else json.dumps(row["request"])
        for theirs, ours in self.sessions.items():
            text = text.replace(theirs, ours)
        return str(text).replace('"/data/', f'"{self.root}/')

    def normal(self, row: dict[str, Any], answer: dict[str, Any]) -> Any:
        recorded = row["response"].get("write_session_id")
        if recorded and answer.get("write_session_id"):
            self.sessions[recorded] = answer["write_session_id"]
        if "metrics" in answer:
            answer["metrics"] = sorted({m["metric_name"] for m in answer["metrics"]})
        text = json.dumps(answer).replace(self.root, "/root")
        for pattern, instead in VOLATILE:
            text = pattern.sub(instead, text)
        return json.loads(text)


def by_grpc(rpc: Grpc, endpoint: Endpoint, body: bytes) -> dict[str, Any]:
    found = rpc_of(endpoint.rpc, endpoint.api)
    return as_json(found.response.FromString(rpc.raw(found.path, body)))


def test_the_same_calls_get_the_same_answers(tmp_path: Path) -> None:
    one, two = Side(tmp_path / "one"), Side(tmp_path / "two")
    compared, wrong = 0, []
    with grpc_beside(two.http) as rpc:
        for number, row in enumerate(ROWS):
            endpoint = BY_PATH.get(row["path"])
            if endpoint is None:
                continue
            body = request_bytes(endpoint, two.text_of(row))
            if body is None:
                continue
            if number == 43:
                for side in (one, two):
                    side.http.write("g", [1, 2, 3, 5, 6, 8])
            ours = one.normal(row, one.http.raw(row["path"], one.text_of(row).encode()).json())
            theirs = two.normal(row, by_grpc(rpc, endpoint, body))
            compared += 1
            if ours != theirs:
                wrong.append(f"{number} {row['title']}\n  HTTP {ours}\n  gRPC {theirs}")
    one.http.close()
    two.http.close()
    assert not wrong, "\n".join(wrong)
    assert compared > 120
