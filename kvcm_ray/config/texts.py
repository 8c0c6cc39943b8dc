"""The configuration in words: what a key means, an example file with all of them, what counts now.

All of it is made of the fields of `kvcm_ray.config.settings`.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvcm_ray.config.settings import Group, Settings, Storage
from kvcm_ray.config.sources import PREFIX, Loaded
from kvcm_ray.errors import InvalidArgument

TABLES: dict[str, type[BaseModel]] = {"storages": Storage, "groups": Group}
SECRET = re.compile(r"(password|secret|token)$")
#: What the example shows of a table, and values that its keys might have.
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "storages": ("disk1", {"kind": "file", "path": "/mnt/nvme1/kv"}),
    "groups": (
        "chat",
        {
            "quota": "8GiB", "file_quota": "6GiB", "memory_quota": "2GiB", "storages": ["shm_01", "disk1"],
            "prefer": "order", "policy": "adaptive", "high_water": "95%", "high_water_bytes": 0,
            "low_water": "90%", "ttl": "1d", "period": 0, "step": 0, "step_percent": 0,
            "delete_delay_ms": 1000, "max_instances": 100, "max_keys": 1000000,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Explanation:
    """What there is to say about a key."""

    key: str
    meaning: str
    values: str  #: type, range, unit
    default: str
    raised: str  #: what happens when it is raised; "" if that is obvious
    variable: str
    flag: str  #: of ``kvcm up``, "" without one

    def lines(self) -> list[str]:
        named = {
            "takes": self.values, "default": self.default, "when raised": self.raised,
            "variable": self.variable, "flag": self.flag,
        }  # fmt: skip
        told = (f"  {name:<12} {text}" for name, text in named.items() if text)
        return [f"{self.key}: {self.meaning}", *told]


def all_keys() -> list[str]:
    """Every key, ``NAME`` standing for the name of a storage or group."""
    found = [name for name in Settings.model_fields if name not in TABLES]
    for table, model in TABLES.items():
        found += [table, *(f"{table}.NAME.{name}" for name in model.model_fields)]
    return found


def explain(key: str) -> Explanation:
    """What there is to say about a key; ``groups.chat.quota`` may also be written ``groups.quota``.

    Raises:
        InvalidArgument: there is no such key; says which is nearest.
    """
    parts = key.replace("-", "_").split(".")
    table = TABLES.get(parts[0])
    if table is not None and len(parts) in (2, 3) and parts[-1] in table.model_fields:
        return _explanation(f"{parts[0]}.NAME.{parts[-1]}", table.model_fields[parts[-1]])
    if len(parts) == 1 and parts[0] in Settings.model_fields:
        return _explanation(parts[0], Settings.model_fields[parts[0]])
    near = difflib.get_close_matches(key, all_keys(), 1, 0.4)
    raise InvalidArgument(
        f"there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        hint="`kvcm config explain` lists all keys.",
    )


def _explanation(key: str, field: FieldInfo) -> Explanation:
    extra = field.json_schema_extra
    about: dict[str, Any] = extra if isinstance(extra, dict) else {}
    simple = "." not in key and key not in TABLES
    flag = {"tiers": "--tier"}.get(key, f"--{key.replace('_', '-')}") if simple else ""
    return Explanation(
        key, field.description or "", _values(key, field, str(about.get("unit", ""))), _default(field),
        str(about.get("raised", "")), PREFIX + key.upper().replace(".", "__"), flag,
    )  # fmt: skip


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        return "none; it must be given"
    return "as the manager has it" if value is None else "none" if value in ([], {}, "") else _yaml(value)


def _values(key: str, field: FieldInfo, unit: str) -> str:
    if key in TABLES:
        return f"a table: NAME: {{{', '.join(TABLES[key].model_fields)}}}"
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    for kind in kinds:
        choices = choices or (get_args(kind) if get_origin(kind) is Literal else ())
    if choices:
        return "one of " + ", ".join(map(str, choices))
    listed = get_origin(field.annotation) is list or any(get_origin(kind) is list for kind in kinds)
    text = unit or ("a list" if listed else {bool: "true or false", int: "a number"}.get(kinds[0], "text"))
    return ", ".join([text, *_bounds(field)])


def _bounds(field: FieldInfo) -> Iterator[str]:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for limit in field.metadata:
        for name, word in words.items():
            if (bound := getattr(limit, name, None)) is not None:
                yield f"{word} {bound}"


def example() -> str:
    """A file with every key: those of the manager at their defaults, tables commented out."""
    lines = [
        "# Configuration of a kvcm-ray manager; `kvcm up --config FILE`. A flag of `kvcm up` beats a",
        "# KVCM_* variable, that beats this file, that beats the defaults, which are shown here.",
    ]
    for name, field in Settings.model_fields.items():
        about = explain(name)
        lines += ["", *_comment(about)]
        if name not in TABLES:
            value = field.get_default(call_default_factory=True, validated_data={})
            shown = "" if value is None else f" {_yaml(value)}"
            lines.append(f"{name}:{shown}")
            continue
        entry, values = EXAMPLES[name]
        lines += [f"# {name}:", f"#   {entry}:"]
        for key in TABLES[name].model_fields:
            told = explain(f"{name}.{key}")
            lines += [f"#     # {line}" for line in textwrap.wrap(told.meaning, 88)]
            lines.append(f"#     {key}: {_yaml(values[key])}")
    return "\n".join(lines) + "\n"


def _comment(about: Explanation) -> list[str]:
    text = f"{about.meaning} ({about.values})"
    if about.raised:
        text += f". When raised: {about.raised}"
    return [f"# {line}" for line in textwrap.wrap(text, 96)]


def _yaml(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_./%-]+", value):
        return value
    return json.dumps(value)


def effective(loaded: Loaded) -> Iterator[tuple[str, Any, str]]:
    """(key, value, origin) of everything that counts; secrets are masked."""
    plain = loaded.settings.model_dump(exclude_none=True)
    for key, value in _leaves(plain):
        shown = "***" if SECRET.search(key) and value else value
        yield key, shown, str(loaded.origin(key))


def _leaves(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value:
            yield from _leaves(value, key)
        else:
            yield key, value
