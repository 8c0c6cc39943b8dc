"""Short form of tests/crash/test_kill_group.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.cluster import Manager
from kvcm_ray.testing.killing import kill_group_rounds


@pytest.mark.ray
def test_five_kills_lose_nothing(running: Manager) -> None:
    tally = kill_group_rounds(Path(running.data_dir), "default", rounds=5)
    assert tally.kills == 5
    assert tally.acknowledged > 100
    assert not tally.refused
