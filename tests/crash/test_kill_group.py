"""kill -9 of the group actor at random moments under write load with real bytes (promises R1, R4).

Every acknowledged block is found with its bytes after every kill, and fsck finds nothing at the end.
``KVCM_CRASH_ROUNDS`` sets the number of kills.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import shared_manager
from kvcm_ray.testing.killing import kill_group_rounds

ROUNDS = int(os.environ.get("KVCM_CRASH_ROUNDS", "50"))


@pytest.mark.crash
@pytest.mark.ray
@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_killed_group_actor_loses_nothing() -> None:
    tally = kill_group_rounds(Path(shared_manager().data_dir), "default", ROUNDS)
    print(f"kills {tally.kills}, acknowledged blocks {tally.acknowledged}, lost {tally.lost}")
    assert not tally.refused
