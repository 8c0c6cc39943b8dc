"""``kvcm advise`` and /api/getAdvice, on a manager behind HTTP in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvcm_ray.client import connect
from kvcm_ray.core.order import LATE_S
from kvcm_ray.serve_app.backend import TOUCH_PERIOD_S
from kvcm_ray.testing.served import Served

Kvcm = Callable[..., Any]

BLOCK = 64
KEYS = {
    "group", "policy", "quota_bytes", "used_bytes", "observed", "block_bytes", "footprint_bytes",
    "sample_rate", "tracked_blocks", "measured_hit_ratio", "infinite_hit_ratio", "rows", "knee_bytes",
}  # fmt: skip


@pytest.fixture
def chat(kvcm: Kvcm) -> Iterator[str]:
    """A group for 8 blocks with an instance "m"."""
    assert (
        kvcm("group", "create", "chat", "--quota", "512B", "--storage", "memory", "--policy", "lru").code == 0
    )
    shape = ("--group", "chat", "--block-size", "4", "--spec", f"tp0={BLOCK}")
    assert kvcm("instance", "register", "m", *shape).code == 0
    yield "chat"
    assert kvcm("group", "remove", "chat", "--force", "--yes").code == 0


def cycle(manager: Served, prompts: int, rounds: int) -> None:
    """So many prompts of two blocks each, looked up and written one after the other, over and over."""
    with connect(manager.url) as client:
        cache = client.instance("m")
        for step in range(prompts * rounds):
            keys = np.array([10, 11]) + 100 * (step % prompts)
            cache.match(keys)
            cache.put(keys, {"tp0": bytes(2 * BLOCK)})
    time.sleep(TOUCH_PERIOD_S + LATE_S)  # until all is reported and counted


def test_a_cycle_that_twice_the_quota_would_hold(kvcm: Kvcm, manager: Served, chat: str) -> None:
    cycle(manager, prompts=6, rounds=5)
    advice = kvcm("advise", chat, "--json").json
    assert advice.keys() >= KEYS
    assert advice["observed"]["accessed_blocks"] == 60
    assert [row["quota_bytes"] for row in advice["rows"]] == [256, 512, 1024, 2048]
    assert [row["blocks"] for row in advice["rows"]] == [4, 8, 16, 32]
    assert [row["hit_ratio"] for row in advice["rows"]] == pytest.approx([0, 0, 0.8, 0.8], abs=0.01)
    assert [row["change"] for row in advice["rows"]] == pytest.approx([0, 0, 0.8, 0.8], abs=0.01)
    assert (advice["sample_rate"], advice["footprint_bytes"]) == (1, 12 * BLOCK)
    text = kvcm("advise", chat, "--factor", "2x,0.5").out
    for words in (
        "30 look-ups of 60 blocks",
        "2x the quota (1.0 KiB) would find 80.0 of 100 blocks more: 80.0 %.",
        "0.5x the quota (256 B) would change little.",
        "So few look-ups say little",
        "All blocks seen so far take 768 B",
    ):
        assert words in text


def test_before_there_was_any_traffic(kvcm: Kvcm, chat: str) -> None:
    assert "nothing to go by yet" in kvcm("advise", chat).out
    advice = kvcm("advise", chat, "--json").json
    assert advice["measured_hit_ratio"] is None
    assert advice["rows"][0]["hit_ratio"] is None


@pytest.mark.parametrize("factor", ["", "x", "0", "-1,2", "inf"])
def test_factors_that_are_none(kvcm: Kvcm, factor: str) -> None:
    ran = kvcm("advise", "default", "--factor", factor)
    assert ran.code == 2
    assert "multiple" in ran.err


def test_refused(kvcm: Kvcm) -> None:
    assert (kvcm("advise", "ghost").code, "KVCM-N002" in kvcm("advise", "ghost").err) == (1, True)
