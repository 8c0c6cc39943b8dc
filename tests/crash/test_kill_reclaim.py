"""500 kill -9 of group and reclaimers while two tiers evict, demote and promote (promises R2, R3, R4).

Nine tenths of them kill plain processes, which are back in milliseconds; the rest kills real actors.
Everything else is the same: the same bodies on real indexes and storages, the same load, the same
checks. ``KVCM_CRASH_RECLAIM_KILLS`` sets the number.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import shared_manager
from kvcm_ray.testing.kill_labs import RayLab, process_lab
from kvcm_ray.testing.killing_reclaim import kill_rounds

KILLS = int(os.environ.get("KVCM_CRASH_RECLAIM_KILLS", "500"))
OF_ACTORS = KILLS // 10


@pytest.mark.crash
@pytest.mark.timeout(300 + 2 * KILLS)
def test_killed_processes_leave_no_trace(tmp_path: Path) -> None:
    with process_lab(tmp_path / "data") as lab:
        tally = kill_rounds(lab, KILLS - OF_ACTORS)
    print(f"processes: {tally}")
    assert tally.kills.total() == KILLS - OF_ACTORS


@pytest.mark.crash
@pytest.mark.ray
@pytest.mark.timeout(300 + 20 * OF_ACTORS)
def test_killed_actors_leave_no_trace() -> None:
    lab = RayLab(Path(shared_manager().data_dir))
    tally = kill_rounds(lab, OF_ACTORS, check_every=25, pause_s=0.5)
    print(f"actors: {tally}")
    assert tally.kills.total() == OF_ACTORS
    lab.close()
