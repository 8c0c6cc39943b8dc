"""What a group counts and remembers: the rings, journals and trees by themselves, on times given to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcm_ray.actors.histogram import DURATIONS_S, Histogram, quantile
from kvcm_ray.actors.history import COUNTED, HELD, History, Sample
from kvcm_ray.actors.journal import FREQUENT_MAX, RARE_MAX, Departed, Journal
from kvcm_ray.actors.prefixes import HotPrefixes, Node, walk
from kvcm_ray.core.effects import Why
from kvcm_ray.core.observed import Observed
from kvcm_ray.errors import InvalidArgument


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# ------------------------------------------------------------------------------------- histograms


@given(st.lists(st.floats(1e-5, 6.5), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_within_a_bucket(durations: list[float], q: float) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    found = quantile(DURATIONS_S, histogram.counts, q)
    exact = sorted(durations)[min(int(np.ceil(q * len(durations))) - 1, len(durations) - 1)]
    assert found is not None
    assert exact / 2 <= found + 1e-12
    assert found <= max(2 * exact, DURATIONS_S[0])


def test_quantiles_of_nothing_and_of_what_is_beyond() -> None:
    assert quantile(DURATIONS_S, [0] * 18, 0.5) is None
    histogram = Histogram()
    histogram.add(1e9)
    assert quantile(DURATIONS_S, histogram.counts, 0.99) == DURATIONS_S[-1]


# ---------------------------------------------------------------------------------------- history


class Group:
    """Numbers that a test changes."""

    def __init__(self) -> None:
        self.counted = dict.fromkeys(COUNTED, 0)
        self.held = dict.fromkeys(HELD, 0)
        self.calls = Histogram()

    def sample(self) -> Sample:
        return Sample([*self.counted.values()], [*self.held.values()], list(self.calls.counts))


def test_history_gives_each_second_what_was_counted_in_it() -> None:
    group = Group()
    history = History(1000.0, group.sample)
    group.counted |= {"lookup_blocks": 10, "hit_blocks": 4, "writes": 2}
    group.held["used_bytes"] = 7
    group.calls.add(0.001)
    history.advance(1001.2)  # the second that ended at 1001
    group.counted["lookup_blocks"] = 11
    history.advance(1004.5)  # asleep since
    rows = history.rows(1000.0, 1004.5)
    assert rows["step_s"] == 1
    columns = rows["rows"]
    assert columns["time_s"] == [1001, 1002, 1003, 1004]
    assert columns["lookup_blocks"] == [10, 1, 0, 0]
    assert columns["hit_ratio_blocks"] == [0.4, 0.0, None, None]
    assert columns["used_bytes"] == [7, 7, 7, 7]
    assert columns["writes_per_s"] == [2, 0, 0, 0]
    assert 0.0004 < columns["latency_p99_s"][0] < 0.0017
    assert columns["latency_p99_s"][1:] == [None] * 3
    assert history.rows(1003.0, 1004.5)["rows"]["time_s"] == [1004]


def test_history_of_an_hour_is_coarse_and_bounded() -> None:
    group = Group()
    history = History(0.0, group.sample)
    for now in range(1, 8000):
        group.counted["writes"] = now
        history.advance(float(now) + 0.5)
    fine = history.rows(8000 - 300.0, 8000.0)
    assert (fine["step_s"], len(fine["rows"]["time_s"])) == (1, 299)
    coarse = history.rows(0.0, 8000.0)
    assert (coarse["step_s"], len(coarse["rows"]["time_s"])) == (10, 360)
    assert set(coarse["rows"]["writes"]) == {10}
    history.advance(1e7)  # a long sleep costs no more than the rings
    assert set(history.rows(0.0, 1e7)["rows"]["writes"]) == {0}


def test_history_goes_on_when_the_clock_is_set_back() -> None:
    group = Group()
    history = History(5000.0, group.sample)
    history.advance(5010.0)
    group.counted["writes"] = 5
    history.advance(4000.0)  # counted somewhere, never twice
    group.counted["writes"] = 6
    history.advance(4001.5)
    assert sum(history.rows(0.0, 4002.0)["rows"]["writes"]) <= 6
    assert 4001 in history.rows(4000.5, 4002.0)["rows"]["time_s"]


# ---------------------------------------------------------------------------------------- journal


def test_events_are_read_on_and_losses_are_told() -> None:
    journal = Journal()
    for i in range(5):
        journal.add(float(i), "evicted", "i", blocks=i)
    first = journal.after(0, 3)
    assert [event["blocks"] for event in first["events"]] == [0, 1, 2]
    second = journal.after(first["next"], 10)
    assert ([event["id"] for event in second["events"]], second["dropped"]) == ([4, 5], 0)
    assert journal.after(second["next"], 10) == {"events": [], "next": 5, "dropped": 0}
    assert journal.after(10**9, 10)["events"][0]["id"] == 1, "a reader of another incarnation begins anew"


def test_traffic_does_not_push_out_what_is_rare() -> None:
    journal = Journal()
    journal.add(0.0, "fault", reason="this one")
    for i in range(2 * FREQUENT_MAX):
        journal.add(float(i), "lookup", "i")
    found = journal.after(0, 1)
    assert found["events"][0]["reason"] == "this one"
    rest = journal.after(1, 1)
    assert rest["dropped"] == FREQUENT_MAX
    assert rest["next"] == rest["events"][0]["id"] == FREQUENT_MAX + 2


@given(
    st.lists(st.sampled_from(["lookup", "evicted"]), max_size=60),
    st.lists(st.integers(0, 7), max_size=80),
)
def test_every_event_is_read_once_or_told_as_dropped(kinds: list[str], limits: list[int]) -> None:
    journal, seen, dropped, after = Journal(), [], 0, 0
    journal._frequent = type(journal._frequent)(maxlen=5)
    journal._rare = type(journal._rare)(maxlen=5)
    for i, kind in enumerate(kinds):
        journal.add(float(i), kind)
        limit = limits[i] if i < len(limits) else 0
        answer = journal.after(after, limit)
        seen += [event["id"] for event in answer["events"]]
        dropped += answer["dropped"]
        after = answer["next"]
    answer = journal.after(after, 100)
    seen += [event["id"] for event in answer["events"]]
    assert seen == sorted(set(seen))
    assert len(seen) + dropped + answer["dropped"] == len(kinds)
    assert RARE_MAX >= 1000


# --------------------------------------------------------------------------------------- departed


def test_the_last_departure_of_a_block_is_known_with_what_went_since() -> None:
    departed = Departed(8)
    departed.add("i", keys(1, 2), 200, Why.QUOTA, 500, 10.0)
    departed.add("j", keys(1), 50, Why.TIER, 60, 11.0)
    departed.add("i", keys(2), 100, Why.EXPIRED, 0, 12.0)
    one, two, three = departed.find("i", keys(1, 2, 3))
    assert one is not None
    assert (one.time_s, one.why, one.needed_bytes, one.since_bytes) == (10.0, Why.QUOTA, 500, 350)
    assert two is not None
    assert (two.time_s, two.why, two.since_bytes) == (12.0, Why.EXPIRED, 100)
    assert three is None
    assert departed.find("nobody", keys(1)) == [None]


def test_departures_are_bounded_and_the_newest_stay() -> None:
    departed = Departed(8)
    for i in range(20):
        departed.add("i", keys(i), 10, Why.QUOTA, 0, float(i))
    found = departed.find("i", np.arange(20))
    assert [one is not None for one in found] == [False] * 12 + [True] * 8
    departed.add("i", np.arange(100, 150), 1, Why.REMOVED, 0, 99.0)
    assert sum(one is not None for one in departed.find("i", np.arange(100, 150))) == 8
    assert departed.find("i", keys(149))[0].since_bytes == 0  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=60))
def test_departures_agree_with_a_dictionary(gone: list[tuple[str, int]]) -> None:
    departed, last = Departed(16), {}
    for i, (name, key) in enumerate(gone):
        departed.add(name, keys(key), 1, Why.QUOTA, 0, float(i))
        last[name, key] = i
    for name in "ab":
        for key, found in enumerate(departed.find(name, np.arange(10))):
            known = last.get((name, key))
            expected = None if known is None or known < len(gone) - 16 else known
            assert (None if found is None else found.time_s) == expected


def test_names_of_instances_that_came_and_went_are_forgotten() -> None:
    departed = Departed(4)
    for i in range(5_000):
        departed.add(f"i{i}", keys(i), 1, Why.QUOTA, 0, 0.0)
    assert len(departed._names) <= 1_100
    assert departed.find("i4999", keys(4999))[0] is not None


# --------------------------------------------------------------------------------------- prefixes


def observed(*prompts: tuple[str, list[int], int]) -> Observed:
    """(instance, keys, found) of look-ups."""
    n = len(prompts)
    return Observed(
        instance_ids=[name for name, _, _ in prompts],
        times_s=np.arange(n) + 100.0,
        writes=np.zeros(n, np.bool_),
        partial=np.zeros(n, np.bool_),
        found=np.array([found for _, _, found in prompts], np.int64),
        counts=np.array([len(k) for _, k, _ in prompts], np.int64),
        keys=np.array([key for _, k, _ in prompts for key in k], np.int64),
    )


def shape(nodes: list[Node]) -> list[tuple]:
    return [(node.keys.tolist(), node.hits, shape(node.children)) for node in nodes]


def test_prefixes_make_a_tree() -> None:
    hot = HotPrefixes()
    hot.feed(observed(
        ("i", [1, 2, 3, 4], 4), ("i", [1, 2, 3, 4, 5], 4), ("i", [1, 2, 9], 3), ("i", [7], 0),
        ("j", [1, 2], 2), ("i", [-5, 6], 2),
    ))  # fmt: skip
    roots, looked, since_s = hot.tree(8, 100)
    assert (looked, since_s) == (5, 100.0)
    assert [(root.instance_id, root.hits) for root in roots] == [("i", 3), ("i", 1), ("j", 1)]
    assert shape(roots[:1]) == [([1, 2], 3, [([3, 4], 2, []), ([9], 1, [])])]
    assert roots[0].last_s == 102.0
    assert [node.depth for node in walk(roots[:1])] == [0, 1, 1]


def test_trees_are_cut_where_it_is_coldest_and_say_so() -> None:
    hot = HotPrefixes()
    hot.feed(observed(*(("i", [1, child, child + 100], 3) for child in range(10, 20))))
    roots, _, _ = hot.tree(8, 4)
    assert (len(roots[0].children), roots[0].left_out) == (3, 7)
    roots, _, _ = hot.tree(1, 100)
    assert (roots[0].children, roots[0].left_out) == ([], 10)
    for wrong in ((0, 10), (8, 0), (1000, 10)):
        with pytest.raises(InvalidArgument, match="depth"):
            hot.tree(*wrong)


def test_what_is_kept_of_look_ups_is_bounded() -> None:
    hot = HotPrefixes()
    prompt = list(range(4096))
    for _ in range(200):
        hot.feed(observed(("i", prompt, 4096)))
    assert hot._keys <= 1 << 19
    roots, looked, _ = hot.tree(8, 10)
    assert (len(roots), roots[0].hits, len(roots[0].keys)) == (1, looked, 4096)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=30))
def test_hits_of_a_node_are_the_look_ups_that_found_it(prompts: list[list[int]]) -> None:
    hot = HotPrefixes()
    hot.feed(observed(*(("i", prompt, len(prompt)) for prompt in prompts)))

    def check(node: Node, before: list[int]) -> None:
        path = before + node.keys.tolist()
        assert node.hits == sum(prompt[: len(path)] == path for prompt in prompts)
        for child in node.children:
            check(child, path)

    roots, _, _ = hot.tree(64, 1000)
    for root in roots:
        check(root, [])
    assert sum(root.hits for root in roots) == len(prompts)
