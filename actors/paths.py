"""Where things are below a data directory ``D``. The only module that spells these paths.

    D/manager.json, D/lock       the running manager (kvcm_ray.cluster)
    D/registry/                  LMDB of storages, groups, instances, accounts
    D/groups/<group>/<instance>-<uid>/    index of one instance
    D/tiers/<storage>/           default place of file tiers
    D/traces/                    recordings
    D/admin-token                a token with the role admin, where accounts are required
    D/audit.log, D/audit.log.N   who changed what; the higher N, the older
    /dev/shm/kvcm-<hash of D>/<storage>/  default place of shm tiers
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kvcm_ray.core.model import InstanceInfo, safe_name

SHM = Path("/dev/shm")


def resolve(data_dir: str | os.PathLike[str]) -> Path:
    """Absolute path without links: one data directory has one name, whatever the caller wrote."""
    return Path(os.path.realpath(os.path.expanduser(data_dir)))


def manager_file(data_dir: Path) -> Path:
    """Facts about the running manager; absent while none runs."""
    return data_dir / "manager.json"


def registry_dir(data_dir: Path) -> Path:
    return data_dir / "registry"


def group_dir(data_dir: Path, group: str) -> Path:
    return data_dir / "groups" / safe_name(group)


def index_dir(data_dir: Path, info: InstanceInfo) -> Path:
    """Directory of the instance's index. It holds the uid, so it is never used twice."""
    name = f"{safe_name(info.instance_id)}-{info.uid}"
    return group_dir(data_dir, info.instance_group_name) / name


def data_dir_hash(data_dir: Path) -> str:
    return hashlib.blake2b(str(data_dir).encode(), digest_size=6).hexdigest()


def shm_dir(data_dir: Path) -> Path:
    return SHM / f"kvcm-{data_dir_hash(data_dir)}"


def tier_dir(data_dir: Path, storage: str) -> Path:
    return data_dir / "tiers" / safe_name(storage)


def traces_dir(data_dir: Path) -> Path:
    return data_dir / "traces"


def admin_token_file(data_dir: Path) -> Path:
    return data_dir / "admin-token"


def audit_file(data_dir: Path) -> Path:
    return data_dir / "audit.log"
