"""Between our messages (dataclasses, shared by all transports) and protobuf's.

Reading makes a dataclass of a protobuf message: fields of the dataclass that the protocol lacks keep
their defaults, as do protobuf fields that are not set. Writing fills a protobuf message from response
fields and leaves out what it has no field for (our additions; HTTP has them).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, get_args, get_origin

import numpy as np

from kvcm_ray.serve_app.protojson import FieldPlan, plan, width

Read = Callable[[Any], Any]

# ------------------------------------------------------------------------------------- reading


def from_proto(cls: type[Any], message: Any) -> Any:
    """`message` as an instance of our class `cls`."""
    arguments = {}
    for name, has_presence, read in _reader(cls, message.DESCRIPTOR):
        if not has_presence or message.HasField(name):
            arguments[name] = read(getattr(message, name))
    return cls(**arguments)


@cache
def _reader(cls: type[Any], descriptor: Any) -> tuple[tuple[str, bool, Read], ...]:
    """Name, whether it may be unset, and conversion of every field that both sides have."""
    fields = []
    for field in plan(cls).fields:
        theirs = descriptor.fields_by_name.get(field.name)
        if theirs is not None:
            fields.append((field.name, theirs.has_presence, _read(field)))
    return tuple(fields)


def _read(field: FieldPlan) -> Read:
    if width(field.hint) == "int64[]":
        return _numbers
    if get_origin(field.hint) is tuple:
        return partial(_read_all, _read_one(get_args(field.hint)[0]))
    return _read_one(field.hint)


def _read_one(hint: Any) -> Read:
    if dataclasses.is_dataclass(hint):
        return partial(from_proto, hint)
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return partial(_read_enum, hint)
    return lambda value: value


def _read_all(read: Read, values: Any) -> tuple[Any, ...]:
    return tuple(map(read, values))


def _read_enum(cls: type[enum.IntEnum], number: int) -> int:
    try:
        return cls(number)
    except ValueError:
        return number  # kept as it is, as in JSON


def _numbers(values: Any) -> Any:
    return np.fromiter(values, np.int64, len(values))


# ------------------------------------------------------------------------------------- writing


def fill(message: Any, fields: Mapping[str, Any]) -> None:
    """Set those of `fields` that the protobuf message has."""
    theirs = message.DESCRIPTOR.fields_by_name
    for name, value in fields.items():
        field = theirs.get(name)
        if field is not None and value is not None:
            _set(message, field, value)


def _set(message: Any, field: Any, value: Any) -> None:
    if field.message_type is None:
        if field.is_repeated:
            getattr(message, field.name).extend(value)
        else:
            setattr(message, field.name, value)
    elif field.is_repeated:
        for item in value:
            fill(getattr(message, field.name).add(), fields_of(item))
    else:
        inner = getattr(message, field.name)
        inner.SetInParent()
        fill(inner, fields_of(value))


def fields_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _names(type(value))}


@cache
def _names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(_wire_names(cls))


def _wire_names(cls: type[Any]) -> Iterator[str]:
    for field in plan(cls).fields:
        yield field.name
