"""The registry as one JSON document: ``{"kvcm_snapshot": 1, "storages": [...], "groups": [...], ...}``.

Records are `core.model.to_plain` maps. No secret is in it: no password hash, no token, and passwords in URIs
of storages and groups are masked. Instance uids, which name directories of one manager, are left out too,
and so is whether accounts are required: a snapshot never opens or closes a manager.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

from kvcm_ray.actors.accounts import check_account
from kvcm_ray.actors.registry_store import Contents, Record
from kvcm_ray.actors.validate import (
    check_group,
    check_instance,
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
_CREDENTIALS = re.compile(r"(\w://)[^/@\s]+@")


def dump(contents: Contents) -> str:
    accounts = [dataclasses.replace(a, password_hash="") for a in contents.accounts.values()]
    instances = [dataclasses.replace(i, uid="") for i in contents.instances.values()]
    document = {
        "kvcm_snapshot": FORMAT,
        "storages": masked(to_plain(list(contents.storages.values()))),
        "groups": masked(to_plain(list(contents.groups.values()))),
        "instances": to_plain(instances),
        "accounts": to_plain(accounts),
        "reclaimers": to_plain([contents.reclaimer] if contents.reclaimer else []),
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def masked(plain: Any) -> Any:
    """`plain` with ``***`` in place of what stands before the @ of a URI."""
    if isinstance(plain, str):
        return _CREDENTIALS.sub(r"\1***@", plain)
    if isinstance(plain, list):
        return [masked(value) for value in plain]
    return {name: masked(value) for name, value in plain.items()} if isinstance(plain, dict) else plain


def plan(text: str, now: Contents) -> list[Record]:
    """The records to put, all checked. See `RegistryBody.load_snapshot` for the rules and errors."""
    document = _parse(text)
    storages = [_storage(s, now) for s in _records(document, "storages", StorageConfig, check_storage)]
    groups = [_group(g, now) for g in _records(document, "groups", InstanceGroup, check_group)]
    names = {g.name for g in groups} | set(now.groups)
    infos = _records(document, "instances", InstanceInfo, check_instance)
    instances = [i for i in (_instance(info, now, names) for info in infos) if i is not None]
    accounts = _records(document, "accounts", Account, check_account)
    new = [dataclasses.replace(a, password_hash="") for a in accounts if a.user_name not in now.accounts]
    pools = _records(document, "reclaimers", ReclaimerSettings, check_reclaimer)
    return [*storages, *groups, *instances, *new, *pools[:1]]


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


def _storage(storage: StorageConfig, now: Contents) -> StorageConfig:
    known = now.storages.get(storage.global_unique_name)
    return known if known is not None and _same(known, storage) else storage


def _same(known: Any, record: Any) -> bool:
    """Whether `record` is what a snapshot of `known` says: then masked passwords in it are the known ones."""
    return bool(masked(to_plain(known)) == to_plain(record))


def _group(group: InstanceGroup, now: Contents) -> InstanceGroup:
    known = now.groups.get(group.name)
    if known is not None and _same(known, group):
        return known
    if known is None or group.version > known.version:
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
