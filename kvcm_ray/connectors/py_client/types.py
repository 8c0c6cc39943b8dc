"""The plain types of the surface: names, members and defaults are those of the contract."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class ClientErrorCode(enum.Enum):
    ER_OK = 0
    ER_INVALID_STUB = 1
    ER_INVALID_GRPCSTATUS = 2
    ER_INVALID_PARAMS = 3
    ER_INVALID_ROLETYPE = 4
    ER_INVALID_CLIENT_CONFIG = 5
    ER_INVALID_STORAGE_CONFIG = 6
    ER_INVALID_SDKWRAPPER_CONFIG = 7
    ER_INVALID_SDKBACKEND_CONFIG = 8
    ER_CONNECT_FAIL = 9
    ER_THREADPOOL_ERROR = 10
    ER_SKIPINIT = 11
    ER_METACLIENT_INIT_ERROR = 12
    ER_TRANSFERCLIENT_INIT_ERROR = 13
    ER_MANAGERCLIENT_INIT_ERROR = 14
    ER_CLIENT_NOT_EXISTS = 15
    ER_SERVICE_NO_STATUS = 50
    ER_SERVICE_INTERNAL_ERROR = 51
    ER_SERVICE_UNSUPPORTED = 52
    ER_SERVICE_INVALID_ARGUMENT = 53
    ER_SERVICE_DUPLICATE_ENTITY = 54
    ER_SERVICE_INSTANCE_NOT_EXIST = 55
    ER_SDK_TIMEOUT = 100
    ER_GETSDK_ERROR = 101
    ER_CREATESDK_ERROR = 102
    ER_SDKINIT_ERROR = 103
    ER_SDKREAD_ERROR = 104
    ER_SDKWRITE_ERROR = 105
    ER_SDKALLOC_ERROR = 106
    ER_INVALID_ADDRESS = 107
    ER_INVALID_LOCAL_BUFFERS = 108
    ER_UNSUPPORTED_MEMORY_TYPE = 109
    ER_UNCONSISTENT_MEMORY_TYPE = 110
    ER_FILE_IO_ERROR = 111
    ER_CUDAMEMCPY_ERROR = 112
    ER_EXTRACT_SLICES_ERROR = 113
    ER_CUDA_STREAM_CREATE_ERROR = 114
    ER_CUDA_STREAM_SYNCHRONIZE_ERROR = 115
    ER_CUDA_STREAM_DESTROY_ERROR = 116
    ER_CUDA_HOST_REGISTER_ERROR = 117


class MemoryType(enum.Enum):
    CPU = 0
    GPU = 1


class RoleType(enum.Enum):
    """Bit flags; kept a plain enumeration, as connectors compare with ``==``."""

    UNKNOWN = 0
    WORKER = 1
    SCHEDULER = 2
    HYBRID = 3


@dataclass(slots=True)
class Iov:
    """A piece of the caller's memory: `size` bytes at address `base`; `ignore` skips so many bytes."""

    type: MemoryType = MemoryType.GPU
    base: int = 0
    size: int = 0
    ignore: bool = False


class BlockBuffer:
    """The memory of one block, in order. Assign a whole list to ``iovs``; reading it gives a copy."""

    __slots__ = ("_iovs",)

    def __init__(self) -> None:
        self._iovs: list[Iov] = []

    @property
    def iovs(self) -> list[Iov]:
        return list(self._iovs)

    @iovs.setter
    def iovs(self, value: list[Iov]) -> None:
        self._iovs = list(value)


@dataclass(slots=True)
class RegistSpan:
    """Memory that a storage may register for RDMA; ours need none."""

    base: int = 0
    size: int = 0


@dataclass(slots=True)
class InitParams:
    role_type: RoleType = RoleType.UNKNOWN
    regist_span: RegistSpan | None = None
    self_location_spec_name: str = ""
    storage_configs: str = ""  #: as registerInstance answered


@dataclass(slots=True)
class ForwardContext:
    metas: dict[str, str] = field(default_factory=dict)
    sw_size: int = -1


class ClientError(Exception):
    """Why a call fails; stays within this package, callers see the code."""

    def __init__(self, code: ClientErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
