"""The registry actor: `RegistryBody`, and how it reaches the other actors.

It makes the reclaimers and the group actors when it starts, so starting it starts the manager. While it
is dead, groups, engines and HTTP replicas go on; only changes of the configuration wait.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import shutil
from pathlib import Path
from typing import Any

import ray

from kvcm_ray import logs
from kvcm_ray.actors import detached, group, paths, pool, status_line
from kvcm_ray.actors.names import REGISTRY, group_actor_name
from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.sweep import remove_leftovers
from kvcm_ray.errors import KvcmError, Unavailable
from kvcm_ray.storage_adapters import open_storage

log = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 30.0


class RayGroups:
    """`GroupControl` for real actors."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._handles: dict[str, Any] = {}

    def refresh(self, name: str) -> None:
        self._call(name, "refresh")

    def remove(self, name: str) -> None:
        try:
            self._call(name, "retire")
        except Unavailable as error:
            log.warning("group %s is removed without its help: %s", name, error)
        handle = self._handles.pop(name, None)
        if handle is not None:
            ray.kill(handle, no_restart=True)

    def resize(self, reclaimers: int) -> None:
        pool.start(self._data_dir, reclaimers)

    def start(self, name: str) -> Any:
        """The group's actor, starting if it is new."""
        if name not in self._handles:
            handle = group.get_or_create(str(self._data_dir), name)
            self._handles[name] = handle
        return self._handles[name]

    def _call(self, name: str, method: str) -> None:
        """Call once more if the actor was restarting: every method called here may run twice."""
        for attempt in (1, 2):
            handle = self.start(name)
            try:
                ray.get(getattr(handle, method).remote(), timeout=GROUP_TIMEOUT_S)
                return
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                self._handles.pop(name, None)
                if attempt == 2:
                    raise Unavailable(f"{group_actor_name(name)} does not answer: {error}") from error


class Registry:
    """The actor: sync, one call at a time.

    Args:
        data_dir: data directory of the manager.
        reclaimers: size of the pool of reclaimers, until it is set (`set_reclaimer_settings`).
    """

    def __init__(self, data_dir: str, reclaimers: int = RECLAIMERS_DEFAULT) -> None:
        logs.configure()
        folder = paths.resolve(data_dir)
        self._folder = folder
        self._groups = RayGroups(folder)
        self._body = RegistryBody(folder, self._groups)
        self._body.start_reclaimers(reclaimers)
        for name in self._body.contents.groups:
            self._groups.start(name)
        self._sweep_groups()
        status_line.keep(self, self._status)

    def __repr__(self) -> str:
        return f"Registry({self._folder})"

    def _status(self) -> str:
        held = self._body.contents
        return f"{len(held.groups)} groups, {len(held.instances)} instances, {len(held.storages)} storages"

    def call(self, event_id: str, method: str, *args: Any) -> Any:
        """One of `RegistryBody`'s public methods. Raises `KvcmError`."""
        result = self._body.call(event_id, method, *args)
        if method == "remove_group":
            self._sweep_groups()  # its actor may have been dead
        if method == "describe":
            return {**result, **_node_facts()}
        return result

    def wait_ready(self) -> None:
        """Returns once every group and reclaimer answers. Raises `Unavailable`, `KvcmError`."""
        for name in self._body.contents.groups:
            try:
                self._groups.refresh(name)
            except KvcmError as error:
                log.error("group %s is not in order: %s", name, error)

    def _sweep_groups(self) -> None:
        """Erase what removed groups left behind."""
        root = self._folder / "groups"
        known = {paths.group_dir(self._folder, name).name for name in self._body.contents.groups}
        leftovers = [p for p in sorted(root.glob("*")) if p.is_dir() and p.name not in known]
        if not leftovers:
            return
        adapters = []
        for config in self._body.list_storages():
            with contextlib.suppress(KvcmError):
                adapters.append(open_storage(config))
        for path in leftovers:
            try:
                remove_leftovers(path, (), adapters)
                shutil.rmtree(path, ignore_errors=True)
            except KvcmError as error:
                log.warning("leftovers in %s stay for now: %s", path, error)


def _node_facts() -> dict[str, Any]:
    try:
        version = importlib.metadata.version("kvcm-ray")
    except importlib.metadata.PackageNotFoundError:
        version = "0+unknown"
    return {"node_id": ray.get_runtime_context().get_node_id(), "version": version}


def _cause(error: ray.exceptions.RayTaskError) -> KvcmError:
    if isinstance(error, KvcmError):
        return error.cause if isinstance(error.cause, KvcmError) else error
    return KvcmError(f"an actor failed: {error}")


def get_or_create(data_dir: Path, reclaimers: int = RECLAIMERS_DEFAULT) -> Any:
    """Handle of the registry actor of this Ray cluster; it is made if there is none."""
    return detached.get_or_create(Registry, REGISTRY, str(data_dir), reclaimers)
