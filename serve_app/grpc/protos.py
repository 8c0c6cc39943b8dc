"""Message classes and services of the .proto files in this folder.

The classes are made when they are first asked for, from a descriptor set that protoc compiled
(``descriptors.binpb``; `python -m kvcm_ray.serve_app.grpc.protos` compiles it again and needs
grpcio-tools). Generated Python code would do the same, but refuses a protobuf runtime older than the
protoc that made it, and the runtime here is the engine's to choose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FOLDER = Path(__file__).parent
COMPILED = FOLDER / "descriptors.binpb"
PACKAGES = ("meta", "admin", "debug")
PREFIX = "kv_cache_manager.proto"
IMPORT_FOLDER = "kvcm_ray/serve_app/grpc"  #: in front of the file names, unique in a process's pool


class Rpc(NamedTuple):
    """One method of one service."""

    package: str  #: meta, admin or debug
    service: str  #: full name
    name: str
    request: type[Any]
    response: type[Any]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


@cache
def _pool() -> Any:
    pool = descriptor_pool.Default()
    files = descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes())
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@cache
def message(package: str, name: str) -> type[Any]:
    """A message class, e.g. ``message("meta", "GetCacheLocationRequest")``. KeyError if there is none."""
    found = _pool().FindMessageTypeByName(f"{PREFIX}.{package}.{name}")
    cls: type[Any] = message_factory.GetMessageClass(found)
    return cls


@cache
def rpcs(package: str) -> tuple[Rpc, ...]:
    """The methods of a package's service."""
    return tuple(_rpcs(package))


def _rpcs(package: str) -> Iterator[Rpc]:
    file = _pool().FindFileByName(f"{IMPORT_FOLDER}/{package}.proto")
    for service in file.services_by_name.values():
        for method in service.methods:
            types = (method.input_type.name, method.output_type.name)
            yield Rpc(package, service.full_name, method.name, *(message(package, t) for t in types))


def compile_protos() -> bytes:
    """The descriptor set of the .proto files as they are now. Needs grpcio-tools."""
    import tempfile

    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        files = [f"{IMPORT_FOLDER}/{name}.proto" for name in PACKAGES]
        root = FOLDER.parents[2] if FOLDER.parent.parent.name == "kvcm_ray" else FOLDER.parents[1]
        arguments = ["protoc", f"-I{root}", f"--descriptor_set_out={target}", *files]
        if protoc.main(arguments):
            raise RuntimeError("protoc refused the .proto files; its reasons stand above")
        return target.read_bytes()


if __name__ == "__main__":
    COMPILED.write_bytes(compile_protos())
    sys.stdout.write(f"wrote {COMPILED}\n")
