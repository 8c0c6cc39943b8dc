"""The byte quota of a group: a ceiling over all its blocks, in total and by storage type.

A block's bytes are *reserved* while it is written and *used* from then on, until the deletion of
its bytes is confirmed; used bytes whose deletion is pending are counted a second time as *pending*.
Only `reserve` can refuse, and it is the only place where anything is compared with a capacity.
Lowering a capacity below what is held refuses new reservations and touches nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcm_ray.core.model import InstanceGroup, StorageType
from kvcm_ray.errors import QuotaExceeded


def quota_type(storage_type: StorageType) -> StorageType:
    """The type whose quota entry applies: both kinds of 3FS share one."""
    if storage_type is StorageType.ST_VCNS_3FS:
        return StorageType.ST_3FS
    return storage_type


@dataclass(slots=True)
class Account:
    """Bytes held of one storage type."""

    used: int = 0  #: readable or waiting for deletion
    reserved: int = 0  #: in sessions
    pending: int = 0  #: the part of `used` that waits for deletion

    @property
    def held(self) -> int:
        return self.used + self.reserved


class Quota:
    """Counts bytes of one group. `nbytes` is never negative."""

    def __init__(self, group: InstanceGroup) -> None:
        self.accounts: dict[StorageType, Account] = {}
        self.configure(group)

    def configure(self, group: InstanceGroup) -> None:
        #: bytes over all types; 0 = nothing may be written
        self.capacity = group.quota_bytes
        #: types without an entry are bounded by `capacity` only
        self.capacities: dict[StorageType, int] = {}
        for entry in group.quota.quota_config if group.quota else ():
            kind = quota_type(StorageType(entry.storage_type))
            self.capacities[kind] = min(entry.capacity, self.capacities.get(kind, entry.capacity))

    def account(self, kind: StorageType) -> Account:
        return self.accounts.setdefault(quota_type(kind), Account())

    def total(self) -> Account:
        accounts = self.accounts.values()
        return Account(
            sum(a.used for a in accounts),
            sum(a.reserved for a in accounts),
            sum(a.pending for a in accounts),
        )

    def ceiling(self, kind: StorageType) -> int:
        """Bytes that blocks of this type can ever use."""
        return min(self.capacity, self.capacities.get(quota_type(kind), self.capacity))

    def refusal(self, kind: StorageType, nbytes: int, ahead_bytes: int = 0) -> QuotaExceeded | None:
        """The error that `reserve` would raise; None if there is room, and some for `ahead_bytes`
        more."""
        kind = quota_type(kind)
        limit = self.capacities.get(kind)
        own, total = self.accounts.get(kind, Account()), self.total()
        if limit is not None and own.held + nbytes + ahead_bytes > limit:
            return _refused(kind.name, limit, own, nbytes, ahead_bytes)
        if total.held + nbytes + ahead_bytes > self.capacity:
            return _refused("total", self.capacity, total, nbytes, ahead_bytes)
        return None

    def reserve(self, kind: StorageType, nbytes: int) -> None:
        """Set `nbytes` apart for blocks to be written.

        Raises:
            QuotaExceeded: they do not fit the total or the type's quota.
        """
        if refusal := self.refusal(kind, nbytes):
            raise refusal
        self.account(kind).reserved += nbytes

    def commit(self, kind: StorageType, nbytes: int) -> None:
        """Reserved bytes hold a block now."""
        account = self.account(kind)
        account.reserved -= nbytes
        account.used += nbytes
        assert account.reserved >= 0, "committed more than was reserved"

    def condemn(self, kind: StorageType, nbytes: int) -> None:
        """Used bytes wait for deletion."""
        account = self.account(kind)
        account.pending += nbytes
        assert account.pending <= account.used, "more bytes pending than used"

    def release(self, kind: StorageType, nbytes: int) -> None:
        """Bytes waiting for deletion are gone."""
        account = self.account(kind)
        account.used -= nbytes
        account.pending -= nbytes
        assert 0 <= account.pending <= account.used, "released more bytes than were pending"

    def forget(self) -> None:
        """Count from zero, for a recount."""
        self.accounts.clear()


def _refused(quota: str, capacity: int, account: Account, asked: int, ahead: int) -> QuotaExceeded:
    message = (
        f"quota {quota} of {capacity} bytes has no room for {asked} more: {account.used} used "
        f"({account.pending} of them wait for deletion), {account.reserved} reserved"
    )
    if ahead:
        message += f", {ahead} asked for by writes that waited before"
    return QuotaExceeded(
        message,
        quota=quota,
        capacity=capacity,
        used=account.used,
        reserved=account.reserved,
        pending_delete=account.pending,
        asked=asked,
        **({"ahead": ahead} if ahead else {}),
    )
