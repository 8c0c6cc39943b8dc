"""Every error that kvcm-ray raises on purpose.

    KvcmError
     ├─ InvalidArgument          the request itself is wrong; nothing was changed
     ├─ NotFound
     │   ├─ StorageNotFound
     │   ├─ GroupNotFound
     │   ├─ InstanceNotFound
     │   ├─ SessionNotFound
     │   ├─ AccountNotFound
     │   └─ RecordingNotFound    the group is not recorded now
     ├─ Conflict
     │   ├─ AlreadyExists
     │   ├─ InstanceMismatch     same instance id, another shape
     │   ├─ VersionConflict
     │   ├─ InUse                refuse to remove what others still use
     │   ├─ UpgradeConflict      instances do not supersede one another like that
     │   └─ RecordingUnderWay    a group has one recording at a time
     ├─ LimitReached
     │   ├─ QuotaExceeded        a byte quota of the group
     │   ├─ KeyLimitReached      max_key_count of an instance
     │   ├─ InstanceLimitReached max_instance_count of a group
     │   └─ NoStorageAvailable   no candidate storage is enabled and has room
     ├─ StorageError
     │   ├─ StorageFull          the device, tmpfs or index map is full
     │   ├─ StorageIOError       any other I/O failure of a storage
     │   └─ SegmentMissing       a segment file vanished or is shorter than its table says
     ├─ Corrupt                  a record failed its checksum or a file is truncated
     ├─ Fenced                   a newer incarnation of this group owns the index
     ├─ Unavailable              the manager (or one actor) cannot be reached in time
     ├─ Unsupported
     ├─ Refused                  the manager does not do this for this caller, or not now
     │   ├─ Unauthenticated      no credentials, or wrong or expired ones
     │   ├─ Forbidden            who asks is known and may not do this
     │   └─ TooManyRequests      this caller asks faster than its limit
     └─ InjectedFault            somebody asked for this failure through the debug API

Each class carries a stable ``code`` (for scripts), the ``wire`` ErrorCode name of the HTTP and gRPC
protocol, whether a retry can help, and a ``hint``: what to do about it. Errors cross process
boundaries by pickle; ``details`` holds plain JSON values only.
"""

from __future__ import annotations

from typing import Any, ClassVar


class KvcmError(Exception):
    """Base of all errors raised on purpose by kvcm-ray."""

    code: ClassVar[str] = "KVCM-000"
    wire: ClassVar[str] = "INTERNAL_ERROR"
    retryable: ClassVar[bool] = False
    hint: ClassVar[str] = ""

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.message: str = str(self.args[0])
        self.details: dict[str, Any] = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)

    @property
    def remedy(self) -> str:
        """What to do about this one: ``details["hint"]`` if it was raised with one, else `hint`."""
        return str(self.details.get("hint", self.hint))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, as printed by ``kvcm --json``."""
        return {
            "code": self.code,
            "error": type(self).__name__,
            "message": self.message,
            "hint": self.remedy,
            "details": {name: value for name, value in self.details.items() if name != "hint"},
        }


def _rebuild(cls: type[KvcmError], message: str, details: dict[str, Any]) -> KvcmError:
    return cls(message, **details)


class InvalidArgument(KvcmError):
    """The request is malformed or a value is out of range."""

    code, wire = "KVCM-A001", "INVALID_ARGUMENT"
    hint = "Correct the field that the message names and send the request again."


class NotFound(KvcmError):
    """The named thing does not exist."""

    code = "KVCM-N000"


class StorageNotFound(NotFound):
    """No storage of that name is registered."""

    code = "KVCM-N001"
    hint = "`kvcm storage list` shows the names; add one with `kvcm storage create`."


class GroupNotFound(NotFound):
    """No instance group of that name exists."""

    code = "KVCM-N002"
    hint = "`kvcm group list` shows the names; make one with `kvcm group create`."


class InstanceNotFound(NotFound):
    """No instance of that id is registered."""

    code, wire = "KVCM-N003", "INSTANCE_NOT_EXIST"
    hint = "Register it first (registerInstance, or `kvcm instance create`)."


class SessionNotFound(NotFound):
    """The write session is unknown, expired or already finished."""

    code = "KVCM-N004"
    hint = "Start a new write; raise write_timeout_seconds if the bytes take longer than that."


class AccountNotFound(NotFound):
    """No account of that name exists."""

    code = "KVCM-N005"
    hint = "listAccount shows the names."


class RecordingNotFound(NotFound):
    """The group is not being recorded."""

    code = "KVCM-N006"
    hint = "`kvcm trace list` shows the recordings that ended; `kvcm trace record` begins one."


class Conflict(KvcmError):
    """The request contradicts the present state."""

    code = "KVCM-C000"


class AlreadyExists(Conflict):
    """Something of that name exists already."""

    code = "KVCM-C001"
    hint = "Use the update call, or remove it first."


class InstanceMismatch(Conflict):
    """The instance id is registered with another shape."""

    code, wire = "KVCM-C002", "DUPLICATE_ENTITY"
    hint = "Use another instance_id for another model, dtype, block size or parallelism."


class VersionConflict(Conflict):
    """The group was changed by somebody else in the meantime."""

    code = "KVCM-C003"
    hint = "Read the group again and send its version as current_version, a larger one as version."


class InUse(Conflict):
    """It is still used by others."""

    code = "KVCM-C004"
    hint = "Remove its users first, or force it."


class UpgradeConflict(Conflict):
    """The instances do not supersede one another like that."""

    code = "KVCM-C005"
    hint = "`kvcm instance list` shows which instance supersedes which; only the newest can be rolled back."


class RecordingUnderWay(Conflict):
    """The group is being recorded already."""

    code = "KVCM-C006"
    hint = "`kvcm trace stop` ends the recording, `kvcm trace list` shows how far it is."


class LimitReached(KvcmError):
    """A configured limit is reached."""

    code = "KVCM-Q000"


class QuotaExceeded(LimitReached):
    """The write does not fit the group's quota."""

    code = "KVCM-Q001"
    hint = "Raise the quota (`kvcm group update`), remove blocks, or write less."


class KeyLimitReached(LimitReached):
    """The instance holds as many blocks as its max_key_count allows."""

    code = "KVCM-Q002"
    hint = "Raise meta_indexer_config.max_key_count of the group, or remove blocks."


class InstanceLimitReached(LimitReached):
    """The group holds as many instances as its max_instance_count allows."""

    code = "KVCM-Q003"
    hint = "Raise max_instance_count of the group, or remove an instance."


class NoStorageAvailable(LimitReached):
    """No candidate storage of the group is registered and enabled."""

    code = "KVCM-Q004"
    hint = "`kvcm storage list`; enable one, or add one to the group's storage_candidates."


class StorageError(KvcmError):
    """A storage failed."""

    code = "KVCM-S000"


class StorageFull(StorageError):
    """The device, the tmpfs or the index map has no room left."""

    code, retryable = "KVCM-S001", True
    hint = "Free space on the path that the message names, or lower the quota; reads go on."


class StorageIOError(StorageError):
    """Reading or writing a storage failed."""

    code = "KVCM-S002"
    hint = "See the path and errno in the message; the blocks there count as misses."


class SegmentMissing(StorageError):
    """A segment file vanished or is shorter than it must be."""

    code = "KVCM-S003"
    hint = "Its blocks are misses now; `kvcm fsck` lists them."


class Corrupt(KvcmError):
    """A record failed its checksum, or a file is truncated."""

    code = "KVCM-I001"
    hint = "`kvcm fsck` says how far it goes; a removed index is rebuilt from block headers."


class Fenced(KvcmError):
    """A newer incarnation of this group owns the index."""

    code, retryable = "KVCM-I002", True
    hint = "Nothing was changed. Clients reach the newer incarnation by themselves."


class Unavailable(KvcmError):
    """The manager cannot be reached in time."""

    code, wire, retryable = "KVCM-U001", "SERVICE_NOT_READY", True
    hint = "`kvcm status`; start one with `kvcm up`. Treat it as a cache miss meanwhile."


class Unsupported(KvcmError):
    """Not supported by this manager."""

    code, wire = "KVCM-U002", "UNSUPPORTED"


class Refused(KvcmError):
    """The manager does not do this for this caller, or not now."""

    code, wire = "KVCM-P000", "INVALID_ARGUMENT"


class Unauthenticated(Refused):
    """The request carries no credentials that this manager accepts."""

    code = "KVCM-P001"
    hint = "Give a token (--token-file, KVCM_TOKEN_FILE or `Authorization: Bearer ...`) or user and password."


class Forbidden(Refused):
    """The account may not do this."""

    code = "KVCM-P002"
    hint = "Use an account with the role admin, or one whose instance groups include this one."


class TooManyRequests(Refused):
    """The caller asks more often than its limit allows."""

    code, retryable = "KVCM-P003", True
    hint = "Wait as long as Retry-After says, or have the limit raised."


class InjectedFault(KvcmError):
    """A fault that was asked for through the debug API."""

    code = "KVCM-D001"
    hint = "Take the fault back (removeFault of the debug API), or start the manager without --debug-api."
