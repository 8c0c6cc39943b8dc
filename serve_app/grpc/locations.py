"""``locations`` as protobuf bytes, filled in like their JSON form (`serve_app.locations`).

A location's bytes depend on its numbers only through their digits: the lengths in front of its parts
are constant for a count of digits, so there is one template for each such count.

    tag length  type  spec_size  (tag length  name  tag length URI)*
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.model import Segment, StorageConfig
from kvcm_ray.core.uri import uri_parts
from kvcm_ray.serve_app.locations import Form, chosen, digits
from kvcm_ray.serve_app.messages import CacheLocation

_TYPE, _SPEC_SIZE, _SPECS = 1, 2, 3  #: fields of CacheLocation
_NAME, _URI = 1, 2  #: fields of LocationSpec
Spec = tuple[bytes, bytes, int]  #: name, URI (with two ``%b`` for the numbers), its length without them


def varint(value: int) -> bytes:
    """A number of 0 or more."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """A number field; nothing for the default."""
    return varint(field << 3) + varint(value) if value else b""


def head(field: int, length: int) -> bytes:
    """What stands in front of `length` bytes of a string or a message."""
    return varint(field << 3 | 2) + varint(length)


class _Templates(dict[int, bytes]):
    """Of one segment: the location's bytes for a count of digits, made when it first occurs."""

    def __init__(self, field: int, before: bytes, specs: list[Spec]) -> None:
        super().__init__()
        self.columns = len(specs)
        self._field, self._before, self._specs = field, before, specs

    def __missing__(self, digits: int) -> bytes:
        parts, length = [_escaped(self._before)], len(self._before)
        for name, uri, constant in self._specs:
            named = head(_NAME, len(name)) + name if name else b""
            uri_head = head(_URI, constant + digits)
            size = len(named) + len(uri_head) + constant + digits
            spec_head = head(_SPECS, size)
            parts += [_escaped(spec_head + named + uri_head), uri]
            length += len(spec_head) + size
        self[digits] = _escaped(head(self._field, length)) + b"".join(parts)
        return self[digits]


class Proto:
    """Locations as elements of the repeated field `field`."""

    separator = b""

    def __init__(self, field: int) -> None:
        self._field = field

    def prepare(self, segment: Segment, storage: StorageConfig, names: tuple[str, ...]) -> _Templates:
        before = number(_TYPE, storage.storage_type) + number(_SPEC_SIZE, len(segment.specs))
        specs = []
        for spec in chosen(segment.specs, names):
            texts = [text.encode() for text in uri_parts(storage, segment, spec.name, spec.size)]
            uri = b"%b".join(map(_escaped, texts))
            specs.append((spec.name.encode(), uri, sum(map(len, texts))))
        return _Templates(self._field, before, specs)

    def fill(
        self, prepared: _Templates, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint32]
    ) -> bytes:
        columns = prepared.columns
        pairs = zip(digits(slots), digits(generations), strict=True)
        return b"".join([prepared[len(s) + len(g)] % ((s, g) * columns) for s, g in pairs])

    def plain(self, location: CacheLocation) -> bytes:
        inside = number(_TYPE, location.type) + number(_SPEC_SIZE, location.spec_size)
        for spec in location.location_specs:
            name, uri = spec.name.encode(), spec.uri.encode()
            text = (head(_NAME, len(name)) + name if name else b"") + (
                head(_URI, len(uri)) + uri if uri else b""
            )
            inside += head(_SPECS, len(text)) + text
        return head(self._field, len(inside)) + inside


def _escaped(data: bytes) -> bytes:
    return data.replace(b"%", b"%%")


@cache
def proto_form(field: int) -> Form:
    """The form for the field of this number; always the same object."""
    return Proto(field)


def locations_field(response: type[Any]) -> int:
    return int(response.DESCRIPTOR.fields_by_name["locations"].number)
