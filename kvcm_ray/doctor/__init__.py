"""What is wrong with a manager and its machine, or soon will be: sentences, evidence, a command to run.

    look(Place(...)) -> [Checked]     every check with what it saw, and the problems it found

`data_dir` looks at files, `machine` at the machine, `live` asks the manager if one answers. A check never
changes anything, never raises, and says what it could not look at. Problems have a weight, by what they
cost: 1 data is lost or nothing works, 2 writes are refused or fail soon, 3 slower than need be, 4 untidy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from kvcm_ray.doctor import data_dir, live, machine
from kvcm_ray.doctor.findings import Checked, Place, Problem
from kvcm_ray.errors import KvcmError

__all__ = ["Checked", "Place", "Problem", "look", "problems", "to_dict"]

CHECKS: tuple[Callable[[Place], Checked], ...] = (
    live.answers,
    data_dir.registry,
    data_dir.network_file_system,
    machine.leftovers,
    machine.secrets,
    machine.room_to_start,
    data_dir.storages,
    data_dir.indexes,
    data_dir.room,
    live.reclaiming,
    machine.open_files,
    data_dir.map_headroom,
    live.waiting,
    live.incarnations,
    machine.clock,
    data_dir.readers,
    data_dir.unowned_bytes,
    machine.fsync_cost,
    live.version_skew,
    machine.haproxy,
)


def look(place: Place) -> Iterator[Checked]:
    """Run all checks, one after another."""
    for check in CHECKS:
        try:
            yield check(place)
        except (KvcmError, OSError) as error:
            yield Checked(check.__name__, f"could not look: {error}")


def problems(checked: list[Checked]) -> list[Problem]:
    """All problems, those with the worst consequences first."""
    return sorted((p for each in checked for p in each.problems), key=lambda p: p.weight)


def to_dict(checked: list[Checked]) -> dict[str, Any]:
    """Plain JSON form."""
    found = problems(checked)
    return {
        "ok": not found,
        "problems": [asdict(problem) for problem in found],
        "checks": [{"name": c.name, "ok": not c.problems, "saw": c.saw} for c in checked],
    }
