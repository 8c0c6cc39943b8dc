"""What the registry actor does, without Ray: storages, groups, instances and accounts.

Order of every change: validate, touch the storage if one is named, commit (fsynced), then let the group
actors read the registry again. A group actor that misses the last step reads the registry when it
starts, so it cannot stay wrong. A call repeated with its event id changes nothing a second time.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvcm_ray.actors import accounts, paths, snapshot, upgrades
from kvcm_ray.actors.registry_store import Contents, Record, RegistryStore
from kvcm_ray.actors.validate import (
    check_apart,
    check_group,
    check_instance,
    check_reclaimer,
    check_storage,
)
from kvcm_ray.core.model import (
    AccessSettings,
    Account,
    AccountRole,
    InstanceGroup,
    InstanceInfo,
    LocationSpecGroup,
    ReclaimerSettings,
    StorageConfig,
    Token,
)
from kvcm_ray.errors import (
    AlreadyExists,
    GroupNotFound,
    InstanceLimitReached,
    InstanceNotFound,
    InUse,
    KvcmError,
    StorageIOError,
    StorageNotFound,
    VersionConflict,
)
from kvcm_ray.storage_adapters import open_storage

#: Calls that change something; a handle gives them an event id.
CHANGES = frozenset(
    ["add_storage", "update_storage", "enable_storage", "disable_storage", "set_draining",
    "remove_storage", "create_group", "update_group", "remove_group", "register_instance",
    "rollback_instance", "remove_instance", "add_account", "update_account", "delete_account",
    "add_token", "revoke_token", "set_access", "load_snapshot", "set_reclaimer_settings"]
)  # fmt: skip
READS = frozenset(
    ["list_storages", "get_group", "list_groups", "get_instance", "list_instances", "list_accounts",
    "list_tokens", "save_snapshot", "describe", "reclaimer_settings"]
)  # fmt: skip


class GroupControl(Protocol):
    """How the registry reaches the group actors."""

    def refresh(self, group: str) -> None:
        """The group's actor exists and has read the registry. Raises `Unavailable`."""

    def remove(self, group: str) -> None:
        """End the group's actor after it has erased its instances."""

    def resize(self, reclaimers: int) -> None:
        """The pool has that many reclaimers, and none is left of a pool of another size."""


class RegistryBody:
    """The only writer of the registry. One thread at a time.

    Args:
        data_dir: data directory of the manager.
        control: reaches the group actors.
    """

    def __init__(self, data_dir: Path, control: GroupControl) -> None:
        self.data_dir = data_dir
        self._control = control
        self._store = RegistryStore(paths.registry_dir(data_dir), write=True)
        self._now = self._store.read()
        self._event_id = ""

    def close(self) -> None:
        self._store.close()

    def call(self, event_id: str, method: str, *args: Any) -> Any:
        """Run a method once for each event id; a repeated change answers None (or the instance)."""
        if method not in CHANGES and method not in READS:
            raise AttributeError(f"the registry has no method {method!r}")
        if method in CHANGES and method != "register_instance" and self._store.done(event_id):
            self._refresh(self._now.groups)
            return None
        self._event_id = event_id if method in CHANGES else ""
        try:
            return getattr(self, method)(*args)
        finally:
            self._event_id = ""

    def refresh_all(self) -> None:
        """Make sure that every group has its actor."""
        self._refresh(self._now.groups)

    # --------------------------------------------------------------------------------- storages

    def add_storage(self, config: StorageConfig) -> None:
        """Raises `InvalidArgument`, `Unsupported`, `AlreadyExists`, or `StorageIOError` if the root
        cannot be made or written; then nothing is kept."""
        check_storage(config)
        if config.global_unique_name in self._now.storages:
            raise AlreadyExists(f"storage {config.global_unique_name!r} exists")
        check_apart(config, self._now.storages.values())
        _open_root(config)
        self._put_storage(dataclasses.replace(config, is_available=True, is_draining=False))

    def update_storage(self, config: StorageConfig, force: bool = False) -> None:
        """Replace a storage's parameters. Moving the root of one that holds blocks needs `force`:
        those blocks are misses from then on."""
        check_storage(config)
        known = self._storage(config.global_unique_name)
        if config.root_path != known.root_path and not force and _holds_segments(known):
            raise InUse(f"storage {known.global_unique_name!r} holds blocks below {known.root_path}")
        check_apart(config, self._now.storages.values())
        _open_root(config)
        self._put_storage(
            dataclasses.replace(config, is_available=known.is_available, is_draining=known.is_draining)
        )

    def enable_storage(self, name: str) -> None:
        self._put_storage(dataclasses.replace(self._storage(name), is_available=True))

    def disable_storage(self, name: str) -> None:
        """No new blocks go there, and its blocks count as misses until it is enabled again."""
        self._put_storage(dataclasses.replace(self._storage(name), is_available=False))

    def set_draining(self, name: str, draining: bool) -> None:
        """While a storage drains no blocks go there, and those on it move to the other candidates of
        their group, or are evicted where it has none with room. They stay readable until then."""
        self._put_storage(dataclasses.replace(self._storage(name), is_draining=draining))

    def remove_storage(self, name: str, force: bool = False) -> None:
        """Raises `InUse` unless forced, if a group names it or blocks are on it."""
        config = self._storage(name)
        users = [g.name for g in self._now.groups.values() if name in g.storage_candidates]
        if users and not force:
            raise InUse(f"storage {name!r} is a candidate of group {', '.join(sorted(users))}")
        if not force and _holds_segments(config):
            raise InUse(
                f"storage {name!r} holds blocks below {config.root_path}; "
                f"`kvcm storage drain {name} --wait` empties it, force gives them up"
            )
        self._commit(drop=[(StorageConfig, name)])
        self._refresh(self._now.groups)

    def list_storages(self) -> list[StorageConfig]:
        """In name order."""
        return [self._now.storages[name] for name in sorted(self._now.storages)]

    # ----------------------------------------------------------------------------------- groups

    def create_group(self, group: InstanceGroup) -> None:
        """Raises `InvalidArgument`, `AlreadyExists`, or `StorageNotFound` for an unknown candidate."""
        check_group(group)
        self._check_candidates(group.storage_candidates)
        if group.name in self._now.groups:
            raise AlreadyExists(f"instance group {group.name!r} exists")
        self._commit(put=[group])
        self._refresh([group.name])

    def update_group(self, group: InstanceGroup, current_version: int) -> None:
        """Replace the whole group if nobody else changed it meanwhile.

        Raises:
            VersionConflict: the stored version is not `current_version`, or the new one is not larger.
            StorageNotFound: a candidate that is new to the group is not registered.
        """
        check_group(group)
        before = self.get_group(group.name)
        stored = before.version
        if stored != current_version or group.version <= stored:
            raise VersionConflict(
                f"group {group.name!r} has version {stored}; current_version was {current_version} and "
                f"the new version {group.version}",
                stored=stored,
            )
        # A storage removed by force may still be named; only what is new has to exist.
        self._check_candidates(set(group.storage_candidates) - set(before.storage_candidates))
        self._commit(put=[group])
        self._refresh([group.name])

    def _check_candidates(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            if name not in self._now.storages:
                raise StorageNotFound(f"storage candidate {name!r} is not registered")

    def remove_group(self, name: str, force: bool = False) -> None:
        """Raises `InUse` unless forced, if it has instances; forced, they are removed too."""
        self.get_group(name)
        instances = [i.instance_id for i in self.list_instances(name)]
        if instances and not force:
            raise InUse(f"group {name!r} has {len(instances)} instances, {instances[0]!r} among them")
        self._commit(drop=[(InstanceGroup, name), *((InstanceInfo, i) for i in instances)])
        self._control.remove(name)

    def get_group(self, name: str) -> InstanceGroup:
        found = self._now.groups.get(name)
        if found is None:
            raise GroupNotFound(f"no instance group {name!r}")
        return found

    def list_groups(self) -> list[InstanceGroup]:
        """In name order."""
        return [self._now.groups[name] for name in sorted(self._now.groups)]

    # -------------------------------------------------------------------------------- instances

    def register_instance(self, info: InstanceInfo) -> InstanceInfo:
        """Register, or find the same registration; returns what is stored.

        The same shape with another `model_deployment.user_data` replaces the user data. The instance
        that it supersedes retires from now on; see `kvcm_ray.actors.upgrades`.

        Raises:
            InstanceMismatch: the id is registered with another shape or model version.
            GroupNotFound, InstanceLimitReached: only for an id that is new.
            InstanceNotFound, InvalidArgument, UpgradeConflict: `supersedes` cannot be.
        """
        check_instance(info)
        known = self._now.instances.get(info.instance_id)
        if known is None:
            stored = self._new_instance(info)
        else:
            stored = upgrades.registered_again(known, info, self._now.instances)
        put = [stored] if stored != known else []
        if stored.supersedes != (known.supersedes if known else ""):
            put.append(upgrades.retire(self._now.instances, stored, int(time.time())))
        if put:
            self._commit(put=put)
        if stored.instance_group_name in self._now.groups:
            self._refresh([stored.instance_group_name])
        return stored

    def rollback_instance(self, instance_id: str) -> None:
        """End an upgrade: the instance that this one supersedes serves on, and this one retires.

        Raises:
            InstanceNotFound, UpgradeConflict: see `kvcm_ray.actors.upgrades.rolled_back`.
        """
        pair = upgrades.rolled_back(self._now.instances, instance_id, int(time.time()))
        self._commit(put=pair)
        if pair[0].instance_group_name in self._now.groups:
            self._refresh([pair[0].instance_group_name])

    def _new_instance(self, info: InstanceInfo) -> InstanceInfo:
        group = self.get_group(info.instance_group_name)
        count = len(self.list_instances(group.name))
        if 0 < group.max_instance_count <= count:
            raise InstanceLimitReached(
                f"group {group.name!r} holds {count} instances; max_instance_count is "
                f"{group.max_instance_count}"
            )
        groups = (
            LocationSpecGroup(g.name, tuple(sorted(set(g.spec_names))))
            for g in sorted(info.location_spec_groups, key=lambda g: g.name)
        )
        return dataclasses.replace(
            info,
            quota_group_name=group.global_quota_group_name,
            location_spec_groups=tuple(groups),
            uid=secrets.token_hex(4),
            retiring_since_s=0,
            retiring_seconds=0,
        )

    def get_instance(self, instance_id: str) -> InstanceInfo:
        found = self._now.instances.get(instance_id)
        if found is None:
            raise InstanceNotFound(f"instance {instance_id!r} is not registered")
        return found

    def list_instances(self, group: str | None = None) -> list[InstanceInfo]:
        """Of one group, or of all for None, by id; an unknown group has none."""
        infos = (self._now.instances[name] for name in sorted(self._now.instances))
        return [i for i in infos if group is None or i.instance_group_name == group]

    def remove_instance(self, instance_id: str) -> None:
        """Unregister, then erase its blocks and its index."""
        info = self.get_instance(instance_id)
        freed = upgrades.after_removal(self._now.instances, info)
        self._commit(put=freed, drop=[(InstanceInfo, instance_id)])
        if info.instance_group_name in self._now.groups:
            self._refresh([info.instance_group_name])

    # ------------------------------------------------------------------------------- reclaimers

    def reclaimer_settings(self) -> ReclaimerSettings:
        return self._now.reclaimer or ReclaimerSettings()

    def start_reclaimers(self, size: int) -> None:
        """Start the pool of the settings; with `size` reclaimers if there are no settings yet."""
        if self._now.reclaimer is None:
            self._commit(put=[ReclaimerSettings(size)])
        self._control.resize(self.reclaimer_settings().reclaimers)

    def set_reclaimer_settings(self, settings: ReclaimerSettings) -> None:
        """Acts at once, on what is in progress too. Raises `InvalidArgument`."""
        check_reclaimer(settings)
        self._commit(put=[settings])
        self._control.resize(settings.reclaimers)
        self._refresh(self._now.groups)

    # --------------------------------------------------------------------------------- accounts

    def add_account(
        self, name: str, password: str, role: AccountRole, instance_groups: Sequence[str] = ()
    ) -> None:
        """Raises `AlreadyExists`, `InvalidArgument`. An empty password is none: tokens only."""
        self._commit(put=[accounts.added(self._now, name, password, role, instance_groups)])

    def update_account(
        self, name: str, password: str = "", role: AccountRole | None = None, groups: Sequence[str] = ()
    ) -> None:
        """Change what is given. Raises `AccountNotFound`, `InvalidArgument`, `InUse`: the last admin."""
        self._commit(put=[accounts.changed(self._now, name, password, role, groups)])

    def delete_account(self, name: str) -> None:
        """With its tokens. Raises `AccountNotFound`, `InUse`: it is the last admin."""
        self._commit(drop=accounts.removed(self._now, name))

    def list_accounts(self) -> list[Account]:
        """In name order, without their password hashes."""
        known = (self._now.accounts[name] for name in sorted(self._now.accounts))
        return [dataclasses.replace(a, password_hash="") for a in known]

    def add_token(self, token: Token) -> None:
        """Raises `AccountNotFound`, `LimitReached`. Tokens long expired are forgotten."""
        stale = accounts.checked_token(self._now, token, int(time.time()))
        self._commit(put=[token], drop=stale)

    def revoke_token(self, token_id: str) -> None:
        """Raises `NotFound`."""
        self._commit(drop=[(Token, accounts.digest_of(self._now, token_id))])

    def list_tokens(self) -> list[Token]:
        """The newest last, without their digests."""
        known = sorted(self._now.tokens.values(), key=lambda t: (t.created_s, t.token_id))
        return [dataclasses.replace(t, digest="") for t in known]

    def set_access(self, settings: AccessSettings) -> None:
        """Require accounts, or not. Raises `InvalidArgument` if nobody could get in."""
        accounts.check_access(self._now, settings)
        self._commit(put=[settings])

    # --------------------------------------------------------------------------------- snapshots

    def save_snapshot(self) -> str:
        """All storages, groups, instances, accounts (without passwords) and reclaimer settings as JSON."""
        return snapshot.dump(self._now)

    def load_snapshot(self, text: str) -> None:
        """Add or replace everything that the snapshot names, in one commit; nothing is removed.

        Everything is checked before anything is changed. A group's version never goes back. An
        instance that is registered must have the same shape; a new one gets an empty index. An account
        that exists stays as it is, so nobody is locked out and nobody let in; a new one has no password.

        Raises:
            InvalidArgument: not a snapshot, or a record in it is refused.
            InstanceMismatch: an instance is registered with another shape.
        """
        records = snapshot.plan(text, self._now)
        for record in records:
            if isinstance(record, StorageConfig):
                _open_root(record)
        self._commit(put=records)
        self._control.resize(self.reclaimer_settings().reclaimers)
        self._refresh(self._now.groups)

    def describe(self) -> dict[str, Any]:
        return {
            "data_dir": str(self.data_dir),
            "pid": os.getpid(),
            "storages": len(self._now.storages),
            "groups": len(self._now.groups),
            "instances": len(self._now.instances),
            "corrupt_records": self._store.corrupt_records,
        }

    # --------------------------------------------------------------------------------- internals

    @property
    def contents(self) -> Contents:
        return self._now

    def _storage(self, name: str) -> StorageConfig:
        found = self._now.storages.get(name)
        if found is None:
            raise StorageNotFound(f"no storage {name!r}")
        return found

    def _put_storage(self, config: StorageConfig) -> None:
        self._commit(put=[config])
        self._refresh(self._now.groups)

    def _commit(self, put: Iterable[Record] = (), drop: Iterable[tuple[type, str]] = ()) -> None:
        self._store.write(put, drop, self._event_id)
        self._now = self._store.read()

    def _refresh(self, groups: Iterable[str]) -> None:
        problems: list[KvcmError] = []
        for name in list(groups):
            try:
                self._control.refresh(name)
            except KvcmError as error:  # the other groups need to know all the same
                problems.append(error)
        if problems:
            raise problems[0]


def _open_root(config: StorageConfig) -> None:
    """Make the root and prove that it can be written."""
    open_storage(config).close()
    root = Path(config.root_path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".kvcm-probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageIOError(
            f"storage {config.global_unique_name!r}: cannot write below {root}: {error}"
        ) from error


def _holds_segments(config: StorageConfig) -> bool:
    adapter = open_storage(config)
    try:
        return next(iter(adapter.list_segments()), None) is not None
    finally:
        adapter.close()
