"""The registry's facts in any process of the node, without a call.

Reads the registry's LMDB environment and keeps what it read until the registry commits again, so that
asking on every request costs a microsecond. Works while the registry actor is dead.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from kvcm_ray.actors import paths
from kvcm_ray.actors.registry_store import Contents, RegistryStore
from kvcm_ray.core.model import Account, InstanceGroup, InstanceInfo, ReclaimerSettings, StorageConfig
from kvcm_ray.errors import GroupNotFound, InstanceNotFound


class RegistryView:
    """Storages, groups, instances and accounts of the manager of a data directory; thread-safe.

    The returned mappings are shared: do not change them.

    Raises:
        Unavailable: no manager was ever started on `data_dir`.
    """

    def __init__(self, data_dir: str | os.PathLike[str]) -> None:
        self.data_dir: Path = paths.resolve(data_dir)
        self._store = RegistryStore(paths.registry_dir(self.data_dir), write=False)
        self._contents: Contents | None = None
        self._lock = threading.Lock()

    def contents(self) -> Contents:
        """All of it, from one moment."""
        contents = self._contents
        if contents is None or contents.txn_id != self._store.txn_id():
            with self._lock:
                contents = self._contents = self._store.read()
        return contents

    def storages(self) -> dict[str, StorageConfig]:
        return self.contents().storages

    def groups(self) -> dict[str, InstanceGroup]:
        return self.contents().groups

    def group(self, name: str) -> InstanceGroup:
        """Raises `GroupNotFound`."""
        found = self.contents().groups.get(name)
        if found is None:
            raise GroupNotFound(f"no instance group {name!r}")
        return found

    def instances(self) -> dict[str, InstanceInfo]:
        return self.contents().instances

    def instance(self, instance_id: str) -> InstanceInfo:
        """Raises `InstanceNotFound`."""
        found = self.contents().instances.get(instance_id)
        if found is None:
            raise InstanceNotFound(f"instance {instance_id!r} is not registered")
        return found

    def accounts(self) -> dict[str, Account]:
        return self.contents().accounts

    def accounts_required(self) -> bool:
        return self.contents().access.required

    def reclaimer_settings(self) -> ReclaimerSettings:
        return self.contents().reclaimer or ReclaimerSettings()

    def index_path(self, info: InstanceInfo) -> Path:
        """Directory of the instance's index, for `kvcm_ray.index.IndexReader`."""
        return paths.index_dir(self.data_dir, info)

    def close(self) -> None:
        self._store.close()
