"""Advice for real traffic: a part of a trace goes through a real manager, which is asked for advice."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.cli.main import main
from kvcm_ray.client import connect
from kvcm_ray.cluster import Manager
from kvcm_ray.core.model import InstanceGroupQuota
from kvcm_ray.optimizer import hit_curve, load
from kvcm_ray.testing.blocks import instance

pytestmark = pytest.mark.ray

BLOCK = 64
REQUESTS = 400
FACTORS = [0.0625, 0.125, 0.25, 0.5, 1.0]


@pytest.fixture
def group(registry: RegistryHandle) -> Iterator[str]:
    """A group that holds all there is, with an instance of the same name."""
    name = f"a-{secrets.token_hex(4)}"
    base = registry.call_sync("get_group", "default")
    quota = InstanceGroupQuota(16 << 20, ())
    registry.call_sync("create_group", dataclasses.replace(base, name=name, quota=quota, version=1))
    registry.call_sync("register_instance", instance(name, name, BLOCK))
    yield name
    registry.call_sync("remove_group", name, True)


def test_the_advice_is_what_the_exact_curve_says(
    running: Manager, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = load("synthetic").part(0, REQUESTS)
    with connect(running.data_dir) as client:
        cache = client.instance(group)
        for request in range(trace.requests):
            keys = trace.keys[trace.blocks[trace.offsets[request] : trace.offsets[request + 1]]]
            cache.match(keys)
            cache.put(keys, {"tp0": bytes(BLOCK * len(keys))})
    _wait_for_look_ups(group, trace.requests)
    quota = GroupHandle(group).ask_sync("capacity")["quota_bytes"]
    factors = [trace.unique * BLOCK * share / quota for share in FACTORS]
    told = ",".join(f"{factor:.9f}" for factor in factors)
    capsys.readouterr()
    assert main(["advise", group, "--factor", told, "--url", running.url, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    exact = hit_curve(trace).ratio([round(trace.unique * share) for share in FACTORS])
    assert np.abs([row["hit_ratio"] for row in advice["rows"]] - exact).max() < 0.02
    assert advice["measured_hit_ratio"] == pytest.approx(exact[-1], abs=0.02)
    assert advice["observed"]["accessed_blocks"] == len(trace.blocks)
    assert advice["block_bytes"] == BLOCK


def _wait_for_look_ups(group: str, count: int) -> None:
    """Clients report what they looked up a little later."""
    deadline = time.monotonic() + 20
    while GroupHandle(group).ask_sync("advice", [1.0])["observed"]["requests"] < count:
        assert time.monotonic() < deadline, "not all look-ups were reported"
        time.sleep(0.05)
