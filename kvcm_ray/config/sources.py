"""Where values come from: flags, then ``KVCM_*`` variables, then one YAML file, then defaults.

    flag  --port 7000                       KVCM_PORT=7000
    file  groups: {chat: {quota: 8GiB}}     KVCM_GROUPS__CHAT__QUOTA=8GiB      lists: a,b or JSON

The file is ``--config``, else KVCM_CONFIG, else ``./kvcm.yaml``, else ``<data_dir>/kvcm.yaml``; the first
that is named or there. Names of storages and groups in variables may be in capitals. Every problem is
found at once and told with the line, variable or flag that it is in.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvcm_ray.client.connect import DATA_DIR
from kvcm_ray.config.settings import Group, Settings, Storage
from kvcm_ray.errors import InvalidArgument

FILE_NAME = "kvcm.yaml"
PREFIX = "KVCM_"
#: Variables of ours that are no settings of a manager.
# fmt: off
OTHERS = frozenset({
    "ADDRESS", "CA_FILE", "CONFIG", "DEBUG", "HAPROXY", "HAPROXY_BINARY", "MANAGER_ID", "MODELS", "PASSWORD",
    "SALT", "TOKEN", "TOKEN_FILE", "URL", "USER",
})
# fmt: on
#: Fields that hold paths: in a file they are relative to the file.
PATHS = ("data_dir", "tls_cert", "tls_key", "audit_log")
NEAR = 0.6

Path_ = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from."""

    kind: str  #: "flag", "environment", "file" or "default"
    where: str = ""  #: ``--port``, ``KVCM_PORT`` or ``kvcm.yaml:3``

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".strip()


@dataclass(frozen=True, slots=True)
class Problem:
    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


@dataclass(slots=True)
class Loaded:
    """The configuration as a manager would be started with it."""

    settings: Settings
    file: Path | None
    origins: dict[str, Origin]  #: by ``groups.chat.quota``; what is not here is a default
    notes: list[str] = field(default_factory=list)

    def origin(self, key: str) -> Origin:
        return self.origins.get(key, Origin("default"))


@dataclass(slots=True)
class _Layers:
    """Values of all sources laid over one another."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path_, Origin] = field(default_factory=dict)

    def put(self, path: Path_, value: Any, origin: Origin) -> None:
        at = self.values
        for part in path[:-1]:
            inner = at.get(part)
            if not isinstance(inner, dict):
                inner = at[part] = {}
            at = inner
        at[path[-1]] = value
        self.origins[path] = origin


def load(
    flags: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """All sources together.

    Args:
        flags: fields of `Settings`; None and empty tuples were not given.
        config: the file, if it is given.

    Raises:
        InvalidArgument: names every value that is wrong, and where it is.
    """
    loaded, problems = look(flags, config, environ)
    if loaded is None:
        raise refusal(problems)
    return loaded


def refusal(problems: Sequence[Problem]) -> InvalidArgument:
    """All problems as one error."""
    hint = "`kvcm config check FILE` lists them too, `kvcm config explain KEY` says what a key takes."
    return InvalidArgument("\n  ".join(map(str, problems)), hint=hint)


def look(
    flags: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Loaded | None, list[Problem]]:
    """As `load`, with the problems as a list; None if there are any."""
    variables = os.environ if environ is None else environ
    given = {name: value for name, value in (flags or {}).items() if value not in (None, (), [])}
    layers, problems, notes = _Layers(), [], []
    file = _find(given, config, variables)
    if file is not None:
        problems += _read_file(file, layers)
    notes += _read_environment(variables, layers)
    for name, value in given.items():
        plain = list(value) if isinstance(value, tuple) else os.fspath(value) if name == "data_dir" else value
        layers.put((name,), plain, Origin("flag", f"--{name.replace('_', '-')}"))
    try:
        settings = Settings.model_validate(layers.values)
    except ValidationError as error:
        problems += [_problem(each, layers) for each in error.errors()]
    if problems:
        return None, sorted(problems, key=_line)
    origins = {".".join(path): origin for path, origin in layers.origins.items()}
    return Loaded(settings, file, origins, notes), []


def _find(
    flags: Mapping[str, Any], config: str | os.PathLike[str] | None, variables: Mapping[str, str]
) -> Path | None:
    if named := config or variables.get("KVCM_CONFIG"):
        return Path(named)
    directory = flags.get("data_dir") or variables.get("KVCM_DATA_DIR") or DATA_DIR
    places = (Path(FILE_NAME), Path(directory) / FILE_NAME)
    return next((place for place in places if place.is_file()), None)


# ------------------------------------------------------------------------------------ the file


def _read_file(file: Path, layers: _Layers) -> list[Problem]:
    try:
        node = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    except OSError as error:
        return [Problem(str(file), "", f"cannot be read: {error.strerror}")]
    except UnicodeDecodeError:
        return [Problem(str(file), "", "is not text")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        return [Problem(f"{file}{line}", "", f"is not YAML: {getattr(error, 'problem', error)}")]
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        return [Problem(f"{file}:{node.start_mark.line + 1}", "", "must hold keys and values")]
    problems: list[Problem] = []
    _walk(node, (), file, layers, problems)
    _resolve_paths(file, layers)
    return problems


def _walk(node: Any, path: Path_, file: Path, layers: _Layers, problems: list[Problem]) -> None:
    """Put every value of a mapping with the line it is in."""
    seen: set[str] = set()
    for name_node, value_node in node.value:
        line = name_node.start_mark.line + 1
        name = str(name_node.value)
        here = (*path, name)
        if name in seen:
            problems.append(Problem(f"{file}:{line}", ".".join(here), "is there twice"))
        seen.add(name)
        origin = Origin("file", f"{file}:{line}")
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            layers.origins[here] = origin
            _walk(value_node, here, file, layers, problems)
            continue
        loader = yaml.SafeLoader("")
        value = loader.construct_object(value_node, deep=True)
        if value is not None or len(here) > 1:
            nothing: Any = {} if len(here) == 2 else None  # `chat:` alone is a group without options
            layers.put(here, nothing if value is None else value, origin)


def _resolve_paths(file: Path, layers: _Layers) -> None:
    for name in PATHS:
        value = layers.values.get(name)
        if isinstance(value, str) and value:
            whole = file.parent / Path(value).expanduser()
            layers.values[name] = os.path.normpath(whole)


# ----------------------------------------------------------------------------- the environment


def _read_environment(variables: Mapping[str, str], layers: _Layers) -> list[str]:
    """Put what is set; returns sentences about variables that look like settings and are none."""
    notes = []
    for variable in sorted(variables):
        if not variable.startswith(PREFIX) or not variables[variable]:
            continue
        parts = variable.removeprefix(PREFIX).split("__")
        first = parts[0].lower()
        if first not in Settings.model_fields:
            notes += _unknown_variable(variable, parts[0])
            continue
        path = _path_of(first, parts[1:], layers)
        layers.put(path, _from_text(path, variables[variable]), Origin("environment", variable))
    return notes


def _unknown_variable(variable: str, first: str) -> list[str]:
    if first in OTHERS:
        return []
    near = difflib.get_close_matches(first.lower(), Settings.model_fields, 1, 0.8)
    return [f"{variable} is no setting; did you mean {PREFIX}{near[0].upper()}?"] if near else []


def _path_of(first: str, rest: list[str], layers: _Layers) -> Path_:
    """Names of storages and groups as the file has them, if it does; else in small letters."""
    if not rest:
        return (first,)
    names = layers.values.get(first)
    known = {name.lower(): name for name in names} if isinstance(names, dict) else {}
    return (first, known.get(rest[0].lower(), rest[0].lower()), *(part.lower() for part in rest[1:]))


def _from_text(path: Path_, text: str) -> Any:
    """Lists and objects may be written as JSON, lists also with commas."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text  # what it should have been says the check of its type
    return [part.strip() for part in text.split(",")] if path[-1] in ("tiers", "storages") else text


# ------------------------------------------------------------------------------------ problems


def _problem(error: Any, layers: _Layers) -> Problem:
    path = tuple(str(part) for part in error["loc"])
    above = (path[:length] for length in range(len(path), 0, -1))
    origin = next((layers.origins[each] for each in above if each in layers.origins), None)
    where = origin.where if origin else "configuration"
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return Problem(where, key, _unknown_key(path))
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    shown = "" if isinstance(value, dict | list) or repr(value) in message else f", got {value!r}"
    return Problem(where, key, message[:1].lower() + message[1:] + shown)


def _line(problem: Problem) -> tuple[str, int]:
    """By file and line."""
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)


def _unknown_key(path: Path_) -> str:
    fields = {1: Settings.model_fields, 3: (Group if path[0] == "groups" else Storage).model_fields}
    known = fields.get(len(path), {})
    near = difflib.get_close_matches(path[-1].replace("-", "_"), known, 1, NEAR)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; there are {', '.join(known)}"
