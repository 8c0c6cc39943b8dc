"""The advice of a group in this process: of a known trace, and of traffic that really came by."""

from __future__ import annotations

import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.actors.advisor import Advisor, _knee
from kvcm_ray.actors.observer import Observer
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.core.order import LATE_S
from kvcm_ray.core.requests import BlockLocations, Touch, WriteStarted
from kvcm_ray.core.reuse import ReuseEstimate
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import Accesses, hit_curve, load
from kvcm_ray.testing.blocks import BLOCK_BYTES, instance, some_keys, start_request
from kvcm_ray.testing.observed import observed_of, parts

SIZE = 4096
FACTORS = (0.5, 1.0, 2.0, 4.0)


@cache
def trace(name: str) -> Accesses:
    return load(name)


def capacity(quota_blocks: int, **others: int) -> dict[str, Any]:
    quota = quota_blocks * SIZE
    base = {"group": "chat", "policy": "lru", "quota_bytes": quota, "used_bytes": 0}
    return base | {"high_bytes": quota, "low_bytes": quota} | others


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_the_advice_for_a_known_trace(name: str) -> None:
    advisor = Advisor(ReuseEstimate(4096))
    for part in parts(observed_of(trace(name)), 2000):
        advisor.feed(part)
    exact = hit_curve(trace(name))
    for quota in (1000, 5000, 10_000, 30_000):
        report = advisor.report(capacity(quota), {"m": SIZE}, FACTORS)
        assert [row["factor"] for row in report["rows"]] == list(FACTORS)
        assert [row["blocks"] for row in report["rows"]] == [int(quota * factor) for factor in FACTORS]
        ratios = np.array([row["hit_ratio"] for row in report["rows"]])
        assert np.abs(ratios - exact.ratio([row["blocks"] for row in report["rows"]])).max() < 0.02
        changes = [row["change"] for row in report["rows"]]
        assert changes == pytest.approx(ratios - ratios[1], abs=2e-6)
    assert report["infinite_hit_ratio"] == pytest.approx(exact.infinite / exact.accessed, abs=0.02)
    assert report["footprint_bytes"] == pytest.approx(trace(name).unique * SIZE, rel=0.05)
    assert 0 < report["knee_bytes"] < report["footprint_bytes"]
    assert report["observed"]["requests"] == trace(name).requests
    assert report["observed"]["seconds"] == pytest.approx(np.ptp(trace(name).times_s))


def test_the_loop_never_waits_for_it() -> None:
    advisor = Advisor()
    with advisor._lock:  # it counts what came just now
        loop = threading.Thread(target=advisor.weigh, args=({"m": SIZE},), daemon=True)
        loop.start()
        loop.join(5)
        assert not loop.is_alive()
    advisor.feed(next(parts(observed_of(trace("conversation")), 100)))
    assert advisor.report(capacity(1000), {"m": SIZE})["block_bytes"] == SIZE


def test_a_group_that_is_emptied_to_a_low_mark_holds_less_than_its_quota() -> None:
    advisor = Advisor()
    advisor.feed(observed_of(trace("synthetic").part(0, 1000)))
    full = advisor.report(capacity(10_000), {"m": SIZE}, [0.7])
    marks = capacity(10_000, high_bytes=8_000 * SIZE, low_bytes=6_000 * SIZE)
    assert advisor.report(marks, {"m": SIZE}, [1.0])["rows"][0]["hit_ratio"] == full["rows"][0]["hit_ratio"]


def test_a_group_that_nobody_asked_yet() -> None:
    report = Advisor().report(capacity(100), {"m": SIZE}, FACTORS)
    assert report["observed"]["requests"] == 0
    assert [row["hit_ratio"] for row in report["rows"]] == [None] * 4
    assert (report["measured_hit_ratio"], report["knee_bytes"], report["footprint_bytes"]) == (None, None, 0)
    assert Advisor().report(capacity(0), {}, FACTORS)["rows"] == []


@pytest.mark.parametrize("factors", [[], [0.0], [-1.0], [float("nan")], [float("inf")], [1.0] * 65])
def test_factors_that_are_none(factors: list[float]) -> None:
    with pytest.raises(InvalidArgument, match="multiple"):
        Advisor().report(capacity(100), {}, factors)


def test_by_way_of_an_observer() -> None:
    """Look-ups and writes as the group's loop notes them."""
    advisor = Advisor()
    observer = Observer([advisor])
    keys = some_keys(4)
    started = WriteStarted("s" * 32, np.zeros(4, np.bool_), BlockLocations.empty(4), {}, "", 0)
    none = keys[:0]
    observer.note([Touch("m", none, 4, missed=keys), start_request("m", keys)], [None, started])
    observer.note([Touch("m", keys, 4, missed=none), Touch("m", keys[:1], 4, chained=False)], [None, None])
    observer.stop()
    report = advisor.report(capacity(4), {"m": SIZE}, [1.0])
    assert report["observed"] | {"seconds": 0} == {
        "requests": 2, "accessed_blocks": 8, "seconds": 0, "half_life_s": 7200,
    }  # fmt: skip
    assert report["measured_hit_ratio"] == pytest.approx(0.5, abs=1e-4)
    assert report["rows"][0]["hit_ratio"] == pytest.approx(0.5, abs=0.01)


def test_the_advice_of_a_service(registry: RegistryBody, groups: Any, tmp_path: Path) -> None:
    registry.register_instance(instance("m"))
    service = groups.services["default"]
    keys = some_keys(8)
    for _ in range(3):
        service.submit([Touch("m", keys[:0], 8, missed=keys), start_request("m", keys)]).result(10)
    time.sleep(LATE_S)  # reports of look-ups may come so late
    advice = service.advice([1.0, 2.0]).result(10)
    assert advice["observed"]["accessed_blocks"] == 24
    assert advice["block_bytes"] == BLOCK_BYTES
    assert advice["quota_bytes"] == service.capacity().result(10)["quota_bytes"]
    assert advice["rows"][0]["hit_ratio"] == pytest.approx(2 / 3, abs=0.01)
    with pytest.raises(InvalidArgument, match="factor -1"):
        service.advice([-1.0]).result(10)


def test_a_service_ends_while_it_is_asked_for_advice(registry: RegistryBody, groups: Any) -> None:
    registry.register_instance(instance("m"))
    service = groups.services.pop("default")
    asked = [service.advice([1.0]) for _ in range(50)]
    service.stop()
    assert all(future.cancelled() or future.result(0)["rows"] is not None for future in asked)


def test_a_curve_without_a_bend_has_its_knee_at_the_end() -> None:
    edges = 2.0 ** np.arange(5)
    assert _knee(edges, np.array([0.0, 0.1, 0.2, 0.3, 0.9])) == 16
    assert _knee(edges, np.array([0.0, 0.1, 0.8, 0.9, 0.9])) == 4
    assert _knee(edges, np.zeros(5)) is None
