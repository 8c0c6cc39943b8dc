"""Short form of tests/crash/test_kill_reclaim.py: nine kills of processes, three of actors."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.cluster import Manager
from kvcm_ray.testing.kill_labs import RayLab, process_lab
from kvcm_ray.testing.killing_reclaim import kill_rounds


def test_killed_processes_leave_no_trace(tmp_path: Path) -> None:
    with process_lab(tmp_path / "data") as lab:
        tally = kill_rounds(lab, rounds=9, check_every=9)
    assert tally.kills == {"group": 3, "reclaimer": 3, "both": 3}
    assert tally.written > 100
    assert tally.reclaimed["evicted_blocks"] > 0
    assert tally.reclaimed["demoted_blocks"] > 0


@pytest.mark.ray
def test_killed_actors_leave_no_trace(running: Manager) -> None:
    lab = RayLab(Path(running.data_dir))
    tally = kill_rounds(lab, rounds=3, check_every=3, pause_s=0.5)
    assert tally.kills == {"group": 1, "reclaimer": 1, "both": 1}
    assert tally.written > 100
    lab.close()
