"""Where a segment's files lie, and the description beside them.

``<root>/<segment.path>/segment.json`` is written first and atomically, then a sparse ``.dat`` and a
sparse ``.hdr`` for each spec. The description makes a segment known without any index: who owns
it, its specs and slots. It is removed last, so that a half dropped directory is still recognised.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvcm_ray.core.model import Segment, from_plain, to_plain
from kvcm_ray.errors import AlreadyExists, InvalidArgument
from kvcm_ray.storage_adapters.base import FoundSegment, SegmentOwner
from kvcm_ray.storage_adapters.handles import data_path, header_path
from kvcm_ray.storage_adapters.header import HEADER_BYTES

DESCRIPTION = "segment.json"
FORMAT = 1
BLOCK_BYTES = 512  #: unit of st_blocks


def create(root: Path, segment: Segment, owner: SegmentOwner) -> None:
    """Make directory, description and files; leaves alone what is there already.

    Raises:
        AlreadyExists: the directory holds another segment.
        OSError.
    """
    if segment.slots <= 0 or not segment.specs or min(spec.size for spec in segment.specs) <= 0:
        raise InvalidArgument(f"segment {segment.path} has no room: {segment}")
    directory = _directory(root, segment)
    directory.mkdir(parents=True, exist_ok=True)
    found, _ = read_description(directory)
    if found is not None and found != segment:
        raise AlreadyExists(f"{directory} holds another segment: {found}")
    if found is None:
        _write_description(directory, segment, owner)
    for spec in segment.specs:
        _grow(data_path(directory, spec.name), segment.slots * spec.size)
        _grow(header_path(directory, spec.name), segment.slots * HEADER_BYTES)


def _directory(root: Path, segment: Segment) -> Path:
    parts = Path(segment.path).parts
    if not parts or Path(segment.path).is_absolute() or ".." in parts:
        raise InvalidArgument(f"segment path {segment.path!r} leads out of its storage")
    return root / segment.path


def _grow(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _write_description(directory: Path, segment: Segment, owner: SegmentOwner) -> None:
    text = json.dumps({"format": FORMAT, "segment": to_plain(segment), "owner": to_plain(owner)}, indent=1)
    draft = directory / f"{DESCRIPTION}.{os.getpid()}.tmp"
    draft.write_text(text + "\n")
    draft.replace(directory / DESCRIPTION)


def read_description(directory: Path) -> tuple[Segment | None, SegmentOwner | None]:
    """What `create` wrote, or (None, None) if it is missing, damaged or of another format."""
    try:
        data = json.loads((directory / DESCRIPTION).read_bytes())
        if data["format"] != FORMAT:
            return None, None
        return from_plain(Segment, data["segment"]), from_plain(SegmentOwner, data["owner"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def drop(root: Path, segment: Segment) -> int:
    """Remove the directory, description last, and its parent if that is empty; bytes freed."""
    directory = _directory(root, segment)
    freed = stored_bytes(directory)
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(directory.iterdir(), key=lambda p: p.name == DESCRIPTION):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        directory.rmdir()
    with contextlib.suppress(OSError):  # others live there
        if directory.parent != root:
            directory.parent.rmdir()
    return freed


def stored_bytes(directory: Path) -> int:
    """Bytes allocated for the files of a directory, 0 if it is gone."""
    total = 0
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(directory) as entries,
    ):
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
    return total


def find(root: Path) -> Iterator[FoundSegment]:
    """Every segment directory below `root`, in path order."""
    for place, directories, files in os.walk(root):
        directories.sort()
        if not any(f == DESCRIPTION or f.endswith(".hdr") for f in files):  # others have *.dat, too
            continue
        directories.clear()
        directory = Path(place)
        segment, owner = read_description(directory)
        path = directory.relative_to(root).as_posix()
        if segment is not None and segment.path != path:
            segment = None  # moved or copied here by somebody: its headers do not fit this place
        yield FoundSegment(path, segment, owner, stored_bytes(directory))
