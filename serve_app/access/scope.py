"""The manager as a caller with a scope sees it: what is outside of the scope is not there.

Handlers ask a `Backend` for groups, instances and reports. A caller with a scope gets this one, which
answers from the same facts without the groups of others. So a foreign instance is refused by the very
code that refuses an unknown one, in the same words, after the same look-up in memory, and lists leave it
out. Nothing here asks another process about what the caller may not see.

Instance ids are global on the wire. If a user could register any id, a refusal would tell that another
tenant has it. So the ids of new instances that users with a scope register begin with the name of their
group and a slash, which no other tenant's do; what is refused depends on the id alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceGroup, InstanceInfo, StorageConfig
from kvcm_ray.core.requests import Reply, Request, Touch
from kvcm_ray.errors import Forbidden, GroupNotFound, InstanceNotFound, InvalidArgument
from kvcm_ray.index import IndexReader
from kvcm_ray.serve_app.access.caller import Caller
from kvcm_ray.serve_app.backend import Backend, unknown_instance
from kvcm_ray.serve_app.locations import LocationEncoder

SEPARATOR = "/"  #: between group and the rest of an instance id


def scoped(backend: Backend, caller: Caller) -> Backend:
    """What the caller sees of `backend`."""
    return backend if caller.groups is None else ScopedBackend(backend, caller.groups)


class ScopedBackend(Backend):
    """A view for one call: it owns nothing."""

    def __init__(self, whole: Backend, groups: frozenset[str]) -> None:
        self._whole = whole
        self._scope = groups
        self.view = whole.view  # of all; handlers do not read it
        self.sealer = whole.sealer

    # -------------------------------------------------------------------------------------- facts

    def groups(self) -> Mapping[str, InstanceGroup]:
        known = self._whole.groups()
        return {name: known[name] for name in sorted(self._scope) if name in known}

    def instances(self) -> Mapping[str, InstanceInfo]:
        known = self._whole.instances()
        return {i: info for i, info in known.items() if info.instance_group_name in self._scope}

    def instance(self, instance_id: str) -> InstanceInfo:
        info = self._whole.instance(instance_id)
        if info.instance_group_name not in self._scope:
            raise unknown_instance(instance_id)
        return info

    def storages(self) -> Mapping[str, StorageConfig]:
        """All: blocks of the caller's own are on them."""
        return self._whole.storages()

    def reader(self, info: InstanceInfo) -> IndexReader:
        return self._whole.reader(info)

    def encoder(self, info: InstanceInfo) -> LocationEncoder:
        return self._whole.encoder(info)

    # ------------------------------------------------------------------------------------ by actors

    async def call(self, info: InstanceInfo, request: Request) -> Reply:
        return await self._whole.call(info, request)

    async def ask(self, group: str, method: str, *args: Any) -> dict[str, Any]:
        return await self._whole.ask(self.group(group).name, method, *args)

    async def health(self) -> dict[str, str]:
        return await self._whole.health()

    async def registry(self, method: str, *args: Any) -> Any:
        """Only what users may change. Raises as the registry does."""
        if method == "register_instance":
            return await self._whole.registry(method, self._registration(args[0]))
        if method in ("remove_instance", "rollback_instance"):
            return await self._whole.registry(method, self.instance(args[0]).instance_id)
        if method == "describe":
            return await self._whole.registry(method)
        raise Forbidden(f"an account with a scope may not ask the registry to {method}")

    def _registration(self, info: InstanceInfo) -> InstanceInfo:
        """What the registry is asked, if the caller may ask.

        Raises:
            GroupNotFound, InstanceNotFound: as if groups and instances of others were unknown.
            InvalidArgument: a new id does not begin with the group's name.
        """
        group, known = info.instance_group_name, self.instances()
        if group not in self.groups():
            raise GroupNotFound(f"no instance group {group!r}")
        if info.instance_id in known:
            return info if info.supersedes in known else dataclasses.replace(info, supersedes="")
        if not info.instance_id.startswith(group + SEPARATOR):
            raise InvalidArgument(
                f"instance_id {info.instance_id!r} does not begin with {group + SEPARATOR!r}, as the ids of "
                "new instances do that an account with a scope registers",
                hint="Choose such an id, or let an admin register the instance once.",
            )
        if info.supersedes and info.supersedes not in known:
            raise InstanceNotFound(f"supersedes: instance {info.supersedes!r} is not registered")
        return info

    # ------------------------------------------------------------------------------------- the rest

    async def seal(
        self, info: InstanceInfo, session_id: str, success: BlockMask, storages: Mapping[str, StorageConfig]
    ) -> None:
        await self._whole.seal(info, session_id, success, storages)

    def touch(self, info: InstanceInfo, touch: Touch) -> None:
        self._whole.touch(info, touch)

    async def send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        await self._whole.send_touches(group, touches)

    async def flush_touches(self) -> None:
        await self._whole.flush_touches()
