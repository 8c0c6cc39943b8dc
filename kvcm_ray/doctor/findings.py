"""What checks look at and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcm_ray.actors import paths
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster.facts import Manager, Owner, read_manager, read_owner
from kvcm_ray.errors import KvcmError

LOST, REFUSED, SLOW, UNTIDY = 1, 2, 3, 4  #: weights


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    weight: int
    check: str
    sentence: str  #: what is wrong and what follows of it
    evidence: str  #: what was measured
    command: str  #: to run now


@dataclass(frozen=True, slots=True)
class Checked:
    """A check that was made."""

    name: str
    saw: str  #: in a few words, also when all is well
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Where trouble begins; tests use others."""

    fsync_s: float = 0.050
    map_ratio: float = 0.8
    open_files: int = 4096
    clock_step_s: float = 5.0
    future_s: float = 60.0
    stale_commits: int = 1000  #: a reader so far behind keeps pages from being used again
    sample_blocks: int = 50_000
    settle_s: float = 0.5
    wait_s: float = 1.0
    start_s: float = 60.0  #: actors that start so much later than the manager were started again
    recent_s: float = 3600.0


@dataclass
class Place:
    """A data directory of this machine, and the manager that runs on it if one does.

    Args:
        call: the HTTP API of the manager (name, fields) -> answer; None: there is nobody to ask.
        url: where it should answer.
    """

    data_dir: Path | None
    call: Callable[..., dict[str, Any]] | None = None
    url: str = ""
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def folder(self) -> Path | None:
        """The data directory, if there is one."""
        found = paths.resolve(self.data_dir) if self.data_dir is not None else None
        return found if found is not None and found.is_dir() else None

    @cached_property
    def view(self) -> RegistryView | None:
        """The registry, if it can be read."""
        if self.folder is None:
            return None
        try:
            view = RegistryView(self.folder)
            view.contents()
        except KvcmError:
            return None
        return view

    @cached_property
    def manager(self) -> Manager | None:
        """What ``manager.json`` says, whether the process lives or not."""
        return read_manager(self.folder) if self.folder else None

    @cached_property
    def owner(self) -> Owner | None:
        return read_owner(self.folder) if self.folder else None

    @property
    def runs(self) -> bool:
        """Somebody owns the data directory now, or answers."""
        return self.call is not None or bool(self.owner and self.owner.alive)

    @property
    def where(self) -> str:
        """The option that leads here, for commands."""
        return f" --data-dir {self.data_dir}" if self.data_dir is not None else f" --url {self.url}"

    def close(self) -> None:
        if self.view is not None:
            self.view.close()


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
