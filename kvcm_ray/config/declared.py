"""Storages and groups that a configuration declares: made when they do not exist, else compared.

Both ways go through the registry's snapshot (`kvcm_ray.actors.snapshot`): what exists is read as one, what
is declared is laid over it, and what differs is loaded as one, in one commit. On a new data directory that
is done at once. Later only what is missing is made, and each difference is told with the command that
applies it: somebody may have changed the group on purpose while the manager ran.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvcm_ray.config.group_form import fill, new_group
from kvcm_ray.errors import InvalidArgument

Json = dict[str, Any]

NAMES = {
    "storages": "global_unique_name", "groups": "name", "instances": "instance_id",
    "accounts": "user_name", "reclaimers": "",
}  # fmt: skip
#: Fields that say nothing about what somebody wanted.
SILENT = frozenset({"version", "uid", "password_hash", "created_ms"})
APPLY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Change:
    """One record that is new, or differs from what is there."""

    kind: str  #: "storage", "group", "instance", "account" or "reclaimer"
    name: str
    new: bool
    fields: tuple[tuple[str, Any, Any], ...] = ()  #: (path, before, after)

    def __str__(self) -> str:
        if self.new:
            return f"new {self.kind} {self.name}"
        told = ", ".join(f"{path} {_show(before)} -> {_show(after)}" for path, before, after in self.fields)
        return f"{self.kind} {self.name}: {told}"


def desired(now: Json, declared: Mapping[str, Any]) -> Json:
    """A snapshot of what is declared: every declared record, laid over the one that exists.

    Args:
        now: the registry's snapshot.
        declared: {"storages": {name: {kind, path}}, "groups": {name: options of `kvcm group`}}.

    Raises:
        InvalidArgument: a new group lacks its quota, or a storage that it names does not exist.
    """
    storages = _by_name(now, "storages")
    for name, entry in declared.get("storages", {}).items():
        kind, other = ("shm", "nfs") if entry["kind"] == "shm" else ("nfs", "shm")
        body = copy.deepcopy(storages.get(name, {"global_unique_name": name}))
        body[kind] = {**(body.get(kind) or {}), "root_path": entry["path"]}
        body[other] = None
        storages[name] = body
    groups = _by_name(now, "groups")
    for name, options in declared.get("groups", {}).items():
        groups[name] = _group(name, groups.get(name), options, storages)
    return {
        "kvcm_snapshot": now["kvcm_snapshot"],
        "storages": [storages[name] for name in declared.get("storages", {})],
        "groups": [groups[name] for name in declared.get("groups", {})],
    }


def _group(name: str, known: Json | None, options: Mapping[str, Any], storages: Mapping[str, Any]) -> Json:
    named = options.get("storages") or (known or {}).get("storage_candidates") or list(storages)
    if known is None and not options.get("quota"):
        raise InvalidArgument(f"groups.{name}: a new group needs a quota")
    for storage in options.get("storages") or ():
        if storage not in storages:
            there = ", ".join(storages) or "none"
            raise InvalidArgument(f"groups.{name}: no storage is named {storage!r}; there are {there}")
    body = copy.deepcopy(known) if known is not None else new_group(name, named[0])
    fill(body, {"storages": named, **options})
    return body


def compare(now: Json, then: Json) -> list[Change]:
    """What loading the snapshot `then` changes where `now` is the case; loading removes nothing."""
    return [change for kind in NAMES for change in _compare_kind(kind, now, then)]


def _compare_kind(kind: str, now: Json, then: Json) -> Iterator[Change]:
    known = _by_name(now, kind)
    for name, body in _by_name(then, kind).items():
        single = kind.removesuffix("s")
        if name not in known:
            yield Change(single, name, True)
        elif fields := tuple(_differences(known[name], body)):
            yield Change(single, name, False, fields)


def _differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in after:
            if name not in SILENT:
                yield from _differences(before.get(name), after[name], f"{path}.{name}" if path else name)
    elif before != after:
        yield path, before, after


def _by_name(document: Json, kind: str) -> dict[str, Json]:
    name = NAMES[kind]
    return {str(entry[name]) if name else "settings": entry for entry in document.get(kind) or ()}


def _only(document: Json, changes: list[Change]) -> Json:
    """The snapshot with only the records that `changes` names."""
    wanted = {(f"{change.kind}s", change.name) for change in changes}
    parts = {
        kind: [body for name, body in _by_name(document, kind).items() if (kind, name) in wanted]
        for kind in NAMES
    }
    return {"kvcm_snapshot": document["kvcm_snapshot"], **{k: v for k, v in parts.items() if v}}


def _show(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else "-" if value is None else str(value)


def apply_at_start(
    registry: Any, declared: Mapping[str, Any], *, fresh: bool, note: Callable[[str], None]
) -> None:
    """Make what is declared and missing; on a new data directory everything as it is declared.

    Args:
        registry: a `RegistryHandle`.
        note: takes a sentence for each difference that is left as it is.

    Raises:
        InvalidArgument: what is declared is refused; nothing of it was made.
    """
    if not declared:
        return
    now = json.loads(registry.call_sync("save_snapshot"))
    then = desired(now, declared)
    changes = compare(now, then)
    do = changes if fresh else [change for change in changes if change.new]
    if do:
        document = json.dumps(_only(then, do))
        registry.call_sync("load_snapshot", document, timeout_s=APPLY_TIMEOUT_S)
    for change in changes:
        if change not in do:
            note(f"note: {change} is declared, and stays as it is; `kvcm config apply` changes it")
