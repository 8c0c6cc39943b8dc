"""Requests come out in the order of their times, however late they were reported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcm_ray.core.observed import Observed
from kvcm_ray.core.order import LATE_S, InOrder, joined, selected

READ, WRITE = False, True
Step = tuple[float, bool, list[int]]


def observed(steps: list[Step]) -> Observed:
    n = len(steps)
    return Observed(
        instance_ids=["m"] * n,
        times_s=np.array([time_s for time_s, _, _ in steps], np.float64),
        writes=np.array([write for _, write, _ in steps], np.bool_),
        partial=np.zeros(n, np.bool_),
        found=np.arange(n),  # tells requests from one another
        counts=np.array([len(keys) for _, _, keys in steps], np.int64),
        keys=np.array([key for _, _, keys in steps for key in keys], np.int64),
    )


def test_a_look_up_that_was_reported_late_goes_before_its_write() -> None:
    order = InOrder()
    late = observed(
        [(10.1, WRITE, [1, 2]), (10.2, WRITE, [1, 3]), (10.0, READ, [1, 2, 9]), (10.15, READ, [1])]
    )
    made = order.feed(late, now_s=11)
    assert made is not None
    assert made.found.tolist() == [2, 0, 3, 1]
    assert made.keys.tolist() == [1, 2, 9, 1, 2, 1, 1, 3]
    assert not order.holds


def test_the_latest_are_held_back() -> None:
    order = InOrder()
    assert order.feed(observed([(5.0, WRITE, [1])]), now_s=5.0 + LATE_S / 2) is None
    assert order.holds
    made = order.feed(observed([(4.9, READ, [1])]), now_s=5.0 + LATE_S)
    assert made is not None
    assert made.writes.tolist() == [READ, WRITE]
    assert order.feed(None, now_s=99) is None


def test_a_clock_that_is_set_back_holds_nothing_back() -> None:
    order = InOrder()
    assert order.feed(observed([(5000.0, WRITE, [1])]), now_s=5000.0) is None
    made = order.feed(observed([(1000.0, READ, [1])]), now_s=1000.0)
    assert made is not None
    assert made.times_s.tolist() == [1000.0, 5000.0]
    assert order.feed(observed([(1001.0, READ, [1])]), now_s=1001.0) is None


def test_those_of_one_time_stay_in_order() -> None:
    made = InOrder().feed(observed([(1.0, READ, []), (1.0, WRITE, [4]), (1.0, READ, [4])]))
    assert made is not None
    assert made.found.tolist() == [0, 1, 2]
    assert made.counts.tolist() == [0, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, LATE_S - 0.01), min_size=1, max_size=30), st.integers(1, 9))
def test_whatever_the_delays_the_order_is_as_it_was(delays: list[float], size: int) -> None:
    """A new prompt every 0.1 s: looked up, written 0.01 s later; the report of the look-up is late."""
    heard: list[tuple[float, Step]] = []
    for i, delay_s in enumerate(delays):
        made_s = 100 + 0.1 * i
        heard += [(made_s + delay_s, (made_s, READ, [i])), (made_s + 0.01, (made_s + 0.01, WRITE, [i]))]
    heard.sort(key=lambda pair: pair[0])
    order, parts = InOrder(), []
    for start in range(0, len(heard), size):
        some = heard[start : start + size]
        parts.append(order.feed(observed([step for _, step in some]), now_s=some[-1][0]))
    parts.append(order.feed(None))
    out = [step for part in parts if part is not None for step in zip(part.keys, part.writes, strict=True)]
    assert out == [(i, write) for i in range(len(delays)) for write in (READ, WRITE)]


def test_what_engines_held_comes_along() -> None:
    first = observed([(0, WRITE, [1]), (0.1, READ, [1])])
    second = replace(observed([(5, READ, [2])]), held=np.array([1]))
    both = joined(first, second)
    assert both.held.tolist() == [0, 0, 1]
    assert selected(both, np.array([2, 0])).held.tolist() == [1, 0]
    assert InOrder().feed(selected(first, np.zeros(0, np.int64))) is None
