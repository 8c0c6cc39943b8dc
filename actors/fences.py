"""How often a stale incarnation of a group was kept from writing, over all incarnations.

A fenced incarnation ends at once, so it leaves a byte in a file; whoever runs then counts them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


class Fences:
    """
    Args:
        folder: of the group.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fenced"

    def note(self) -> None:
        """A batch of this incarnation was refused. Raises nothing: the process is about to end."""
        with contextlib.suppress(OSError), self._path.open("ab") as file:
            file.write(b"1")

    def count(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0
