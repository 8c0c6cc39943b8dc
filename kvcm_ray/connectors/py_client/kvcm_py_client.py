"""The module that connectors import: what the contract names, and nothing else."""

from kvcm_ray.connectors.py_client.client import TransferClient
from kvcm_ray.connectors.py_client.types import (
    BlockBuffer,
    ClientErrorCode,
    ForwardContext,
    InitParams,
    Iov,
    MemoryType,
    RegistSpan,
    RoleType,
)

__all__ = [
    "BlockBuffer",
    "ClientErrorCode",
    "ForwardContext",
    "InitParams",
    "Iov",
    "MemoryType",
    "RegistSpan",
    "RoleType",
    "TransferClient",
]
