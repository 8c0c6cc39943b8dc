"""``index.json`` beside the data file: the index was set up, in which boot, and is it complete.

With durability ``process`` commits are not synced, so after another boot (power loss, panic) the
file may hold pages of different ages. Such an index is not trusted: it is moved aside, a new one is
made, marked incomplete, and `kvcm_ray.index.rebuild` fills it from block headers. With durability
``commit`` the index is trusted in any boot.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from kvcm_ray.core.model import Durability
from kvcm_ray.errors import Corrupt, StorageIOError, Unsupported
from kvcm_ray.index.codec import FORMAT_VERSION
from kvcm_ray.index.preflight import DATA_FILE, REMEDY, data_file

IDENTITY_FILE = "index.json"
ASIDE_FOLDER = "untrusted"  #: the last index that was moved aside
_MOVED = (DATA_FILE, "lock.mdb", IDENTITY_FILE)


@dataclass(frozen=True, slots=True)
class Identity:
    format: int
    boot: str
    durability: str
    complete: bool  #: False until a rebuild is done


def boot_id() -> str:
    """Identity of this boot of the machine; the same in all its processes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_identity(path: Path) -> Identity | None:
    """None if the index was never set up.

    Raises:
        Unsupported: made by another version.
        Corrupt: not readable.
    """
    file = path / IDENTITY_FILE
    try:
        plain = json.loads(file.read_bytes())
        identity = Identity(**{name: plain[name] for name in Identity.__slots__})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Corrupt(f"{file} is damaged: {error}") from error
    if identity.format != FORMAT_VERSION:
        raise Unsupported(
            f"the index at {path} has format {identity.format}; this version reads {FORMAT_VERSION}: "
            f"use the version that made it, or {REMEDY}"
        )
    return identity


def write_identity(path: Path, identity: Identity) -> None:
    """Replaces the file in one step, synced: it is written a few times in the life of an index."""
    file, draft = path / IDENTITY_FILE, path / (IDENTITY_FILE + ".new")
    try:
        with draft.open("w") as handle:
            json.dump(asdict(identity), handle)
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageIOError(f"cannot write {file}: {error}") from error


def trusted(identity: Identity, boot: str) -> bool:
    """Whether the data file may be used as it is."""
    return identity.boot == boot or identity.durability == Durability.COMMIT


def set_aside(path: Path) -> Path:
    """Move the files of an index into a folder beside them; an earlier one there is deleted.

    Nobody may have the index open. The identity goes last: killed in between, it happens again.

    Raises:
        StorageIOError.
    """
    aside = path / ASIDE_FOLDER
    if data_file(path).exists():
        shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for name in _MOVED:
            if (path / name).exists():
                (path / name).replace(aside / name)
    except OSError as error:
        raise StorageIOError(f"cannot move the index at {path} aside: {error}") from error
    return aside
