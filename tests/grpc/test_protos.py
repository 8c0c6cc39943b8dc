"""The .proto files are the protocol's, number by number, and what is compiled is what they say.

``data/wire.txt`` holds the protocol as facts, one a line:
    <package> rpc <Service>/<Rpc> <Request> <Response>
    <package> enum <Enum> NAME=NUMBER ...
    <package> message <Message> NUMBER:name:[*]type[@oneof] ...        (* = repeated)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from kvcm_ray.serve_app.grpc import protos

FACTS = [line.split() for line in (Path(__file__).parent / "data" / "wire.txt").read_text().splitlines()]
_SCALARS = {
    FieldDescriptor.TYPE_STRING: "string", FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32", FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_DOUBLE: "double",
}  # fmt: skip


def file_of(package: str) -> Any:
    return protos.rpcs(package)[0].request.DESCRIPTOR.file


def facts_of(package: str) -> list[list[str]]:
    file = file_of(package)
    found = []
    for service in file.services_by_name.values():
        for method in service.methods:
            types = [method.input_type.name, method.output_type.name]
            assert not method.client_streaming
            assert not method.server_streaming
            found.append([package, "rpc", f"{service.name}/{method.name}", *types])
    for enum in file.enum_types_by_name.values():
        found.append([package, "enum", enum.name, *(f"{v.name}={v.number}" for v in enum.values)])
    for message in file.message_types_by_name.values():
        found.append([package, "message", message.name, *map(fact_of, message.fields)])
    return found


def fact_of(field: Any) -> str:
    inner = field.message_type or field.enum_type
    kind = inner.name if inner else _SCALARS[field.type]
    oneof = f"@{field.containing_oneof.name}" if field.containing_oneof else ""
    return f"{field.number}:{field.name}:{'*' if field.is_repeated else ''}{kind}{oneof}"


@pytest.mark.parametrize("package", protos.PACKAGES)
def test_services_messages_and_numbers_are_the_protocols(package: str) -> None:
    expected = sorted(fact for fact in FACTS if fact[0] == package)
    assert expected
    assert sorted(facts_of(package)) == expected
    assert file_of(package).package == f"kv_cache_manager.proto.{package}"


def test_repeated_numbers_are_packed_and_no_number_is_zigzag() -> None:
    request = protos.message("meta", "GetCacheLocationRequest")(block_keys=[-1, 3])
    packed = b"\x22\x0b" + b"\xff" * 9 + b"\x01" + b"\x03"
    assert request.SerializeToString() == packed


def test_an_offset_of_zero_is_on_the_wire() -> None:
    mask = protos.message("meta", "BlockMask")
    assert mask(offset=0).SerializeToString() == b"\x08\x00"
    assert mask().SerializeToString() == b""


def test_compiling_the_protos_again_gives_what_is_committed() -> None:
    pytest.importorskip("grpc_tools")
    assert protos.compile_protos() == protos.COMPILED.read_bytes(), (
        "run: python -m kvcm_ray.serve_app.grpc.protos"
    )
