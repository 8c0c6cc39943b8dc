"""JSON in the dialect of the Tair KVCM protocol, driven by dataclass annotations.

A message is a frozen dataclass. Its annotations say the wire type: ``str``, ``bool``, ``Int32``,
``Int64``, ``Double``, an ``IntEnum``, another message (``M | None``: may be unset), ``tuple[X,
...]`` (repeated), ``Int64Array`` (repeated int64 as a numpy array, for block keys and tokens) and
``dict[str, Any]`` (a JSON object of any shape, as it is). Field metadata: ``{"oneof": group}`` marks
members of a oneof, ``{"wire": False}`` hides a field, ``{"extension": True}`` marks one that the
protocol lacks: it is written only when it differs from its default.

Reading is lenient: snake_case or camelCase names, unknown fields and unknown enum names ignored,
null is "unset", numbers in strings, one scalar for a repeated field, single quotes, unquoted keys
and trailing commas. Writing always shows defaults, leaves out unset messages, and writes int64 as
strings.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
import types
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import orjson

from kvcm_ray.serve_app import lenient

T = TypeVar("T")
Int64Array = Annotated[npt.NDArray[np.int64], "int64[]"]
Decoder = Callable[[Any], Any]
Encoder = Callable[[Any], Any]

_INT_TEXT = re.compile(r"[+-]?[0-9]{1,40}")
_IGNORED = object()  #: an enum name we do not know: the field keeps its default
_BITS = {"int32": 31, "int64": 63}


class BadJson(ValueError):
    """The body is not a JSON object of the expected message; the wire answers 400 ``{}``."""


# ------------------------------------------------------------------------------------- parsing


def parse(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The body as a dict.

    Raises:
        BadJson: bad syntax, not an object, or nested deeper than 100.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _parse_leniently(bytes(body))
    else:
        _check_depth(bytes(body), value)
    if type(value) is not dict:
        raise BadJson("the body is not a JSON object")
    return value


def _parse_leniently(body: bytes) -> Any:
    try:
        return lenient.loads(body.decode())
    except (lenient.LenientError, UnicodeDecodeError) as error:
        raise BadJson(str(error)) from error


def _check_depth(body: bytes, value: Any) -> None:
    if body.count(b"{") + body.count(b"[") <= lenient.DEPTH_MAX:
        return
    level, depth = [value], 0
    while level:
        if depth > lenient.DEPTH_MAX:
            raise BadJson(f"nested deeper than {lenient.DEPTH_MAX}")
        nested = [v.values() if type(v) is dict else v for v in level if type(v) in (dict, list)]
        level = [v for inner in nested for v in inner if type(v) in (dict, list)]
        depth += 1


def dumps(value: Any) -> bytes:
    """Plain JSON values as bytes, ``<`` and ``>`` escaped (they occur inside strings only)."""
    return orjson.dumps(value).replace(b"<", b"\\u003c").replace(b">", b"\\u003e")


# ------------------------------------------------------------------------------ public interface


def decode(cls: type[T], body: bytes) -> T:
    """Parse `body` as a message.

    Raises:
        BadJson: see `parse` and `from_json`.
    """
    return from_json(cls, parse(body))


def from_json(cls: type[T], value: Any) -> T:
    """A message from plain JSON values.

    Raises:
        BadJson: a value has the wrong type or range, or two members of a oneof are given.
    """
    return plan(cls).decode(value)  # type: ignore[no-any-return]


def encode(message: Any) -> bytes:
    return dumps(to_json(message))


def to_json(message: Any) -> dict[str, Any]:
    """A message as plain JSON values, in field order."""
    return plan(type(message)).encode(message)


@dataclasses.dataclass(slots=True)
class FieldPlan:
    """How one field travels."""

    name: str
    hint: Any
    oneof: str
    decode: Decoder
    encode: Encoder
    omit_none: bool
    omitted: Any = _IGNORED  #: the value that is not written


class MessagePlan:
    """Compiled codec of one message class."""

    def __init__(self, cls: type[Any]) -> None:
        self.cls = cls
        self.fields = list(_field_plans(cls))
        self._by_name = {n: f for f in self.fields for n in (f.name, camel_case(f.name))}

    def decode(self, value: Any) -> Any:
        if type(value) is not dict:
            raise BadJson(f"{self.cls.__name__} must be an object")
        arguments: dict[str, Any] = {}
        oneofs: dict[str, str] = {}
        for key, item in value.items():
            field = self._by_name.get(key)
            if field is None or item is None:
                continue
            if field.oneof and oneofs.setdefault(field.oneof, field.name) != field.name:
                raise BadJson(f"{oneofs[field.oneof]} and {field.name} exclude each other")
            try:
                decoded = field.decode(item)
            except BadJson as error:
                raise BadJson(f"{field.name}: {error}") from None
            if decoded is not _IGNORED:
                arguments[field.name] = decoded
        return self.cls(**arguments)

    def encode(self, message: Any) -> dict[str, Any]:
        result = {}
        for field in self.fields:
            value = getattr(message, field.name)
            if value is None and field.omit_none:
                continue
            if field.omitted is not _IGNORED and value == field.omitted:
                continue
            result[field.name] = field.encode(value)
        return result


_plans: dict[type[Any], MessagePlan] = {}


def plan(cls: type[Any]) -> MessagePlan:
    """The compiled codec of a message class; made at its first use."""
    known = _plans.get(cls)
    if known is None:
        known = _plans[cls] = MessagePlan(cls)
    return known


def camel_case(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def _field_plans(cls: type[Any]) -> list[FieldPlan]:
    hints = get_type_hints(cls, include_extras=True)
    plans = []
    for field in dataclasses.fields(cls):
        if not field.metadata.get("wire", True):
            continue
        hint, optional = strip_optional(hints[field.name])
        decoder, encoder = _codec(hint)
        oneof = field.metadata.get("oneof", "")
        omitted = field.default if field.metadata.get("extension") else _IGNORED
        plans.append(FieldPlan(field.name, hint, oneof, decoder, encoder, optional, omitted))
    return plans


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """``X | None`` as ``(X, True)``, anything else as ``(hint, False)``."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        return next(a for a in get_args(hint) if a is not type(None)), True
    return hint, False


def width(hint: Any) -> str:
    """``int32``, ``int64``, ``double`` or ``int64[]`` of an annotated hint, else ""."""
    return str(get_args(hint)[1]) if get_origin(hint) is Annotated else ""


# ---------------------------------------------------------------------------------- value codecs


def _codec(hint: Any) -> tuple[Decoder, Encoder]:
    kind = width(hint)
    if kind == "int32":
        return functools.partial(_integer, bits=31), int
    if kind == "int64":
        return functools.partial(_integer, bits=63), str
    if kind == "double":
        return _double, _number_out
    if kind == "int64[]":
        return _int64_array, lambda array: [str(v) for v in array.tolist()]
    if get_origin(hint) is tuple:
        return _repeated(*_codec(get_args(hint)[0]))
    if get_origin(hint) is dict:
        return _object, dict
    if hint is str:
        return _string, str
    if hint is bool:
        return _bool, bool
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return functools.partial(_enum, hint), functools.partial(_enum_out, hint)
    return _nested(hint)


def _nested(hint: Any) -> tuple[Decoder, Encoder]:
    """Late bound, so that a message may be declared after the one that holds it."""
    return (lambda value: plan(hint).decode(value)), (lambda value: plan(hint).encode(value))


def _repeated(decoder: Decoder, encoder: Encoder) -> tuple[Decoder, Encoder]:
    def decode_all(value: Any) -> tuple[Any, ...]:
        items = value if type(value) is list else [value]
        if None in items:
            raise BadJson("null inside a list")
        return tuple(v for v in map(decoder, items) if v is not _IGNORED)

    return decode_all, lambda values: [encoder(v) for v in values]


def _integer(value: Any, bits: int) -> int:
    kind = type(value)
    digits = kind is str and _INT_TEXT.fullmatch(value.strip())
    if digits or (kind is float and value.is_integer() and abs(value) < 2.0**63):
        value = int(value)
    elif kind is not int:
        raise BadJson("not an integer")
    if not -(1 << bits) <= value < 1 << bits:
        raise BadJson(f"{value} does not fit {bits + 1} bits")
    return value  # type: ignore[no-any-return]


def _int64_array(value: Any) -> npt.NDArray[np.int64]:
    items = value if type(value) is list else [value]
    if set(map(type, items)) - {int}:
        items = [_integer(v, 63) for v in items]
    try:
        return np.array(items, np.int64)
    except OverflowError as error:
        raise BadJson("a number does not fit 64 bits") from error


def _double(value: Any) -> float:
    if type(value) is str:
        try:
            value = float(value)
        except ValueError:
            raise BadJson("not a number") from None
    elif type(value) not in (int, float):
        raise BadJson("not a number")
    try:
        value = float(value)
    except OverflowError:
        raise BadJson("the number is out of range") from None
    if not math.isfinite(value):
        raise BadJson("the number is not finite")
    return value  # type: ignore[no-any-return]


def _number_out(value: float) -> int | float:
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise BadJson("not an object")
    return value


def _string(value: Any) -> str:
    if type(value) is not str:
        raise BadJson("not a string")
    return value


def _bool(value: Any) -> bool:
    if type(value) is bool:
        return value
    if value in ("true", "false") and type(value) is str:
        return bool(value == "true")
    raise BadJson("not a bool")


def _enum(cls: type[enum.IntEnum], value: Any) -> Any:
    if type(value) is str and not _INT_TEXT.fullmatch(value.strip()):
        return cls.__members__.get(value, _IGNORED)
    number = _integer(value, 31)
    try:
        return cls(number)
    except ValueError:
        return number  # kept as it is, and written back as a number


def _enum_out(cls: type[enum.IntEnum], value: int) -> str | int:
    try:
        return cls(value).name
    except ValueError:
        return int(value)
