"""The JSON dialect: every rule of reading and writing, and round trips of arbitrary messages."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.core.model import Double, InstanceGroup, Int32, Int64, StorageConfig, StorageType
from kvcm_ray.serve_app import admin_messages as a
from kvcm_ray.serve_app import lenient, protojson
from kvcm_ray.serve_app import messages as m
from kvcm_ray.serve_app.endpoints import ENDPOINTS
from kvcm_ray.serve_app.protojson import BadJson, decode, encode, from_json, plan, to_json, width

I64 = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Inner:
    name: str = ""


@dataclass(frozen=True, slots=True)
class Everything:
    a_string: str = ""
    a_bool: bool = False
    small: Int32 = 0
    large_number: Int64 = 0
    ratio: Double = 0.0
    kind: StorageType = StorageType.ST_UNSPECIFIED
    inner: Inner | None = None
    many: tuple[Int64, ...] = ()
    names: tuple[str, ...] = ()
    kinds: tuple[StorageType, ...] = ()
    inners: tuple[Inner, ...] = ()
    left: Int32 | None = field(default=None, metadata={"oneof": "side"})
    right: Inner | None = field(default=None, metadata={"oneof": "side"})
    hidden: str = field(default="x", metadata={"wire": False})


def read(text: str) -> Everything:
    return decode(Everything, text.encode())


# -------------------------------------------------------------------------------------- writing


def test_defaults_are_written_in_field_order_and_unset_messages_are_not() -> None:
    assert encode(Everything()) == (
        b'{"a_string":"","a_bool":false,"small":0,"large_number":"0","ratio":0,'
        b'"kind":"ST_UNSPECIFIED","many":[],"names":[],"kinds":[],"inners":[]}'
    )


def test_int64_is_a_string_and_int32_a_number() -> None:
    plain = to_json(Everything(small=7, large_number=I64[0], many=(1, I64[1])))
    assert plain["small"] == 7
    assert plain["large_number"] == "-9223372036854775808"
    assert plain["many"] == ["1", "9223372036854775807"]


def test_a_set_oneof_member_is_written_even_with_its_default() -> None:
    assert b'"left":0' in encode(Everything(left=0))
    assert b'"right":{"name":""}' in encode(Everything(right=Inner()))
    assert encode(m.BlockMask(offset=0)) == b'{"offset":0}'
    assert encode(m.BlockMask(bool_masks=m.BoolMasks())) == b'{"bool_masks":{"values":[]}}'


def test_enums_are_names_or_numbers_without_one() -> None:
    assert to_json(Everything(kind=StorageType.ST_NFS))["kind"] == "ST_NFS"
    assert to_json(Everything(kind=7))["kind"] == 7  # type: ignore[arg-type]


def test_angle_brackets_are_escaped() -> None:
    assert b'"a_string":"\\u003ca\\u003e"' in encode(Everything(a_string="<a>"))


def test_hidden_fields_do_not_travel() -> None:
    assert b"hidden" not in encode(Everything())
    assert read('{"hidden":"y"}').hidden == "x"


# -------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"large_number":5}', {"large_number": 5}),
        ('{"largeNumber":5}', {"large_number": 5}),
        ('{"largeNumber":"-9223372036854775808"}', {"large_number": I64[0]}),
        ('{"large_number":9223372036854775807}', {"large_number": I64[1]}),
        ('{"large_number":9007199254740993}', {"large_number": 9007199254740993}),
        ('{"large_number":3.0}', {"large_number": 3}),
        ('{"large_number":1e3}', {"large_number": 1000}),
        ('{"small":"-12"}', {"small": -12}),
        ('{"ratio":"0.5"}', {"ratio": 0.5}),
        ('{"ratio":1}', {"ratio": 1.0}),
        ('{"unknown":{"deep":[1]},"inner":{"x":1,"name":"n"}}', {"inner": Inner("n")}),
        ('{"kind":"ST_NFS"}', {"kind": StorageType.ST_NFS}),
        ('{"kind":4}', {"kind": StorageType.ST_NFS}),
        ('{"kind":"4"}', {"kind": StorageType.ST_NFS}),
        ('{"kind":77}', {"kind": 77}),
        ('{"kind":"st_nfs"}', {}),
        ('{"kind":"BOGUS"}', {}),
        ('{"kinds":["ST_NFS","BOGUS",1]}', {"kinds": (StorageType.ST_NFS, StorageType.ST_3FS)}),
        ('{"a_string":null,"inner":null,"many":null,"left":null}', {}),
        ('{"a_bool":"true"}', {"a_bool": True}),
        ('{"a_bool":"false"}', {"a_bool": False}),
        ('{"many":3}', {"many": (3,)}),
        ('{"many":"3"}', {"many": (3,)}),
        ('{"inners":{"name":"n"}}', {"inners": (Inner("n"),)}),
        ('{"left":0,"right":null}', {"left": 0}),
        ("{'a_string':'it\\'s'}", {"a_string": "it's"}),
        ("{a_string:'x',small:1}", {"a_string": "x", "small": 1}),
        ('{"many":[1,2,],}', {"many": (1, 2)}),
        (" {a_bool : true , } ", {"a_bool": True}),
        ("{a_string:'\\u00e9\\ud83d\\ude00'}", {"a_string": "é😀"}),
        ('{"a_string":"1","a_string":"2"}', {"a_string": "2"}),
    ],
)
def test_accepted(text: str, expected: dict[str, Any]) -> None:
    assert read(text) == Everything(**expected)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "}", "hello", "[]", "null", '"x"', "1", "true", '{"a":1} x', '{"a":1}{}',
        '{"a" 1}', "{'a':}", "{a:b}", "{1:2}", '{"a":01}', '{"a":+1}', '{"a":0x10}', '{"a":.5}',
        "{a:'\\x'}", "{a:'\n'}", "{a:'", "{a:'\\ud800'}", '{"a_string":"\\ud800"}', "{,}", "[,]",
        '{"a_bool":1}', '{"a_bool":0}', '{"a_bool":"True"}', '{"a_bool":"1"}', '{"a_bool":[]}',
        '{"a_string":5}', '{"a_string":true}', '{"a_string":[]}', '{"a_string":{}}',
        '{"small":[1]}', '{"small":true}', '{"small":""}', '{"small":"x"}', '{"small":1.5}',
        '{"small":2147483648}', '{"small":-2147483649}', '{"small":"2147483648"}', '{"small":{}}',
        '{"large_number":9223372036854775808}', '{"large_number":"9223372036854775808"}',
        '{"large_number":-9223372036854775809}', '{"large_number":1e19}', '{"large_number":NaN}',
        '{"large_number":"1.0"}', '{"ratio":"x"}', '{"ratio":true}', '{"ratio":1e999}',
        '{"ratio":"NaN"}', '{"ratio":"Infinity"}', '{"ratio":[]}', '{"many":["x"]}',
        '{"many":[null]}', '{"many":[[1]]}', '{"many":[true]}', '{"many":"abc"}', '{"many":{}}',
        '{"inner":[]}', '{"inner":"x"}', '{"inner":{"name":1}}', '{"inners":["x"]}',
        '{"left":1,"right":{}}', '{"kind":true}', '{"kind":1.5}', '{"kind":4294967296}',
        '{"kind":{}}',
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(BadJson):
        read(text)


def test_bytes_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(BadJson):
        decode(Everything, b'{"a_string":"\xff"}')


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("lenient_syntax", [False, True])
def test_nesting_is_bounded(opening: str, lenient_syntax: bool) -> None:
    closing = "]" if opening == "[" else "}"
    comma = "," if lenient_syntax else ""
    deep = f'{{"unknown":{opening * 99}1{closing * 99}{comma}}}'
    assert read(deep) == Everything()
    with pytest.raises(BadJson):
        read(f'{{"unknown":{opening * 101}1{closing * 101}{comma}}}')


def test_wide_is_not_deep() -> None:
    assert read('{"unknown":[' + ",".join(["[]"] * 500) + "]}") == Everything()


def test_very_long_numbers_and_texts_do_not_hurt() -> None:
    with pytest.raises(BadJson):
        read('{"small":' + "1" * 5000 + "}")
    with pytest.raises(BadJson):
        read("{small:" + "1" * 5000 + "}")
    with pytest.raises(BadJson):
        read('{"small":"' + "1" * 5000 + '"}')


def test_block_keys_are_exact_arrays() -> None:
    text = b'{"block_keys":[-9223372036854775808,"9223372036854775807",0,1.0]}'
    keys = decode(m.BlocksRequest, text).block_keys
    assert keys.dtype == np.int64
    assert keys.tolist() == [I64[0], I64[1], 0, 1]
    for wrong in (
        b"[9223372036854775808]",
        b"[true]",
        b"[null]",
        b"[1.5]",
        b'["x"]',
        b"{}",
        b'"a"',
    ):
        with pytest.raises(BadJson):
            decode(m.BlocksRequest, b'{"block_keys":' + wrong + b"}")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) |
                    st.dictionaries(st.text(), c), max_leaves=8))  # fmt: skip
def test_the_lenient_reader_agrees_with_strict_json(value: Any) -> None:
    text = json.dumps(value)
    if "\\ud" not in text:
        assert lenient.loads(text) == value


@given(st.text(max_size=40))
def test_the_lenient_reader_only_raises_its_own_error(text: str) -> None:
    with contextlib.suppress(lenient.LenientError):
        lenient.loads(text)


# ----------------------------------------------------------------------------------- round trips

MESSAGES = sorted(
    {Everything, InstanceGroup, StorageConfig, a.Metric}
    | {e.request for e in ENDPOINTS}
    | {e.response for e in ENDPOINTS},
    key=lambda c: c.__name__,
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    hint, _ = protojson.strip_optional(hint)
    kind = width(hint)
    if kind in ("int32", "int64"):
        bits = int(kind[3:]) - 1
        return st.integers(-(1 << bits), (1 << bits) - 1)
    if kind == "double":
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind == "int64[]":
        numbers = st.lists(st.integers(*I64), max_size=4)
        return numbers.map(lambda v: np.array(v, np.int64))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is dict:
        return st.dictionaries(st.text(max_size=4), st.none() | st.integers(*I64) | st.booleans(), max_size=3)
    if hint in (str, bool):
        return st.text(max_size=8) if hint is str else st.booleans()
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return st.sampled_from(hint) | st.integers(1000, 2000)
    return st.deferred(lambda: instances(hint))


@st.composite
def instances(draw: st.DrawFn, cls: type[Any]) -> Any:
    arguments: dict[str, Any] = {}
    taken: set[str] = set()
    for part in plan(cls).fields:
        if part.oneof in taken or not draw(st.booleans()):
            continue
        arguments[part.name] = draw(values(part.hint))
        taken |= {part.oneof} - {""}
    return cls(**arguments)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda c: c.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_round_trip(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(instances(cls))
    text = encode(message)
    again = decode(cls, text)
    assert encode(again) == text
    camel = {protojson.camel_case(k): v for k, v in orjson.loads(text).items()}
    assert encode(from_json(cls, camel)) == text
    assert dataclasses.is_dataclass(again)
