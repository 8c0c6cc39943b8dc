"""The registry as one JSON document: ``{"kvcm_snapshot": 1, "storages": [...], "groups": [...], ...}``.

Records are `core.model.to_plain` maps. Password hashes and instance uids are left out: the first are
secrets, the second name directories of one manager.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable
from typing import Any

from kvcm_ray.actors.registry_store import Contents, Record
from kvcm_ray.actors.validate import (
    check_group,
    check_instance,
    check_name,
    check_reclaimer,
    check_storage,
)
from kvcm_ray.core.model import (
    Account,
    InstanceGroup,
    InstanceInfo,
    ReclaimerSettings,
    StorageConfig,
    from_plain,
    to_plain,
)
from kvcm_ray.errors import InstanceMismatch, InvalidArgument

FORMAT = 1


def dump(contents: Contents) -> str:
    accounts = [dataclasses.replace(a, password_hash="") for a in contents.accounts.values()]
    instances = [dataclasses.replace(i, uid="") for i in contents.instances.values()]
    document = {
        "kvcm_snapshot": FORMAT,
        "storages": to_plain(list(contents.storages.values())),
        "groups": to_plain(list(contents.groups.values())),
        "instances": to_plain(instances),
        "accounts": to_plain(accounts),
        "reclaimers": to_plain([contents.reclaimer] if contents.reclaimer else []),
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def plan(text: str, now: Contents) -> list[Record]:
    """The records to put, all checked. See `RegistryBody.load_snapshot` for the rules and errors."""
    document = _parse(text)
    storages = _records(document, "storages", StorageConfig, check_storage)
    groups = [_group(g, now) for g in _records(document, "groups", InstanceGroup, check_group)]
    names = {g.name for g in groups} | set(now.groups)
    infos = _records(document, "instances", InstanceInfo, check_instance)
    instances = [i for i in (_instance(info, now, names) for info in infos) if i is not None]
    accounts = _records(document, "accounts", Account, lambda a: check_name("user_name", a.user_name))
    kept = [
        dataclasses.replace(a, password_hash=now.accounts[a.user_name].password_hash)
        if a.user_name in now.accounts
        else dataclasses.replace(a, password_hash="")
        for a in accounts
    ]
    pools = _records(document, "reclaimers", ReclaimerSettings, check_reclaimer)
    return [*storages, *groups, *instances, *kept, *pools[:1]]


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"not a snapshot: {error}") from error
    if not isinstance(document, dict) or document.get("kvcm_snapshot") != FORMAT:
        raise InvalidArgument(f'not a snapshot: no member "kvcm_snapshot" with value {FORMAT}')
    return document


def _records(document: dict[str, Any], member: str, cls: type, check: Callable[[Any], None]) -> list[Any]:
    found = []
    for position, plain in enumerate(document.get(member, [])):
        try:
            record: Any = from_plain(cls, plain)
            check(record)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InvalidArgument(f"snapshot: {member}[{position}] is malformed: {error}") from error
        found.append(record)
    return found


def _group(group: InstanceGroup, now: Contents) -> InstanceGroup:
    known = now.groups.get(group.name)
    if known is None or known == group or group.version > known.version:
        return group
    return dataclasses.replace(group, version=known.version + 1)


def _instance(info: InstanceInfo, now: Contents, groups: set[str]) -> InstanceInfo | None:
    """The record to put; None if it is registered already."""
    known = now.instances.get(info.instance_id)
    if known is not None:
        if not known.same_shape(info):
            raise InstanceMismatch(
                f"instance {info.instance_id!r} is registered with another shape: {known.difference(info)}"
            )
        return None
    if info.instance_group_name not in groups:
        raise InvalidArgument(
            f"snapshot: instance {info.instance_id!r} is of unknown group {info.instance_group_name!r}"
        )
    return dataclasses.replace(info, uid=secrets.token_hex(4))
