"""Location URIs: ``file://<storage><root>/<segment path>/<spec>.dat?blkid=<slot>&gen=<g>&size=<bytes>``.

A client of the Tair KVCM protocol reads ``size`` bytes at ``blkid * size`` of the path and ignores
``gen``; our own clients use it to check the block header (design D4). Parameters are sorted by name
and nothing is percent-encoded, as that protocol wants it. Shared memory is a file below /dev/shm and
has the same form, so that every client that can open a file can use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcm_ray.core.model import Segment, StorageConfig, safe_name
from kvcm_ray.errors import InvalidArgument


def uri_parts(storage: StorageConfig, segment: Segment, spec: str, size: int) -> tuple[str, str, str]:
    """The constant pieces around slot and generation: ``a + slot + b + generation + c``."""
    name = safe_name(spec)
    head = f"file://{storage.global_unique_name}{storage.root_path}/{segment.path}/{name}.dat?blkid="
    return head, "&gen=", f"&size={size}"


def location_uri(
    storage: StorageConfig, segment: Segment, spec: str, size: int, slot: int, generation: int
) -> str:
    a, b, c = uri_parts(storage, segment, spec, size)
    return f"{a}{slot}{b}{generation}{c}"


@dataclass(frozen=True, slots=True)
class ParsedUri:
    storage: str
    path: str  #: absolute path of the data file
    slot: int
    generation: int
    size: int


def parse_uri(uri: str) -> ParsedUri:
    """Split a location URI made by `location_uri` (or by a compatible manager: gen is then 0).

    Raises:
        InvalidArgument: not such a URI.
    """
    scheme, sep, rest = uri.partition("://")
    location, _, query = rest.partition("?")
    storage, slash, path = location.partition("/")
    try:
        params = dict(pair.split("=", 1) for pair in query.split("&") if pair)
        slot, size = int(params.get("blkid", 0)), int(params["size"])
        generation = int(params.get("gen", 0))
    except (ValueError, KeyError) as error:
        raise InvalidArgument(f"not a location URI: {uri!r}") from error
    if not (sep and slash and storage and scheme == "file"):
        raise InvalidArgument(f"not a location URI of a file or shm storage: {uri!r}")
    return ParsedUri(storage, "/" + path, slot, generation, size)
