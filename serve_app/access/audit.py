"""The audit log: one JSON line for every administrative call, in ``audit.log`` of the data directory.

    {"time":"2026-01-31T12:00:00.123Z","account":"ada","role":"admin","from":"10.1.2.3","call":"AddStorage",
     "what":{"storage.global_unique_name":"nfs"},"result":"OK","trace_id":"t"}

All replicas append to one file, each line with one write, so lines never mix. Only fields that
`rules.RULES` names get in, cut to a length; passwords, tokens and snapshots are not among them. A full
file is renamed and the oldest removed, so all of it stays below 20 MiB.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvcm_ray.actors.paths import audit_file

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 4 << 20
FILES_KEPT = 4  #: beside the one that is written
VALUE_LENGTH_MAX = 200
TAIL_MAX = 10_000  #: lines


class AuditLog:
    """Writes and reads the audit log of a data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.path = audit_file(data_dir)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; a full disk is logged and does not fail the call that is told of."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, **entry}, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            log.error("an entry of the audit log is lost (%s): %s", error, line.decode().rstrip())

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            full = os.fstat(descriptor).st_size + len(line) > FILE_BYTES_MAX
            if not full:
                os.write(descriptor, line)
        finally:
            os.close(descriptor)
        if full:
            self._rotate(len(line))
            self._append(line)

    def _rotate(self, room: int) -> None:
        """Rename the files, unless another replica did meanwhile."""
        with (self.path.parent / f"{self.path.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists() and self.path.stat().st_size + room <= FILE_BYTES_MAX:
                return
            for number in range(FILES_KEPT, 0, -1):
                newer = self._numbered(number - 1)
                if newer.exists():
                    newer.replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def tail(self, count: int) -> list[dict[str, Any]]:
        """The last entries, oldest first; lines that a crash cut short are left out."""
        lines: list[bytes] = []
        for number in range(FILES_KEPT + 1):
            file = self._numbered(number)
            if len(lines) >= count or not file.exists():
                break
            lines = file.read_bytes().splitlines() + lines
        return [entry for entry in map(_parsed, lines[-count:]) if entry]


def shown(value: Any) -> Any:
    """A field's value as it stands in the log."""
    if isinstance(value, str):
        return value if len(value) <= VALUE_LENGTH_MAX else value[:VALUE_LENGTH_MAX] + "..."
    if isinstance(value, tuple | list):
        return [shown(item) for item in value[:20]]
    name = getattr(value, "name", None)  # of an enum
    return name if name is not None else value


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
