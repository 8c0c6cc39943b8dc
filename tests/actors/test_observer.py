"""What listeners hear of a group's traffic: whole prompts, in order, off the loop's thread."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvcm_ray.actors import observer as module
from kvcm_ray.actors.observer import Observer
from kvcm_ray.core.observed import Observed
from kvcm_ray.core.requests import Touch, Touched
from kvcm_ray.errors import InstanceNotFound
from kvcm_ray.testing.blocks import instance, some_keys, start_request
from kvcm_ray.testing.reclaim_lab import ReclaimLab


class Ear:
    def __init__(self) -> None:
        self.heard: list[Observed] = []
        self.threads: set[str] = set()

    def feed(self, observed: Observed) -> None:
        self.heard.append(observed)
        self.threads.add(threading.current_thread().name)

    def requests(self) -> list[tuple[str, bool, list[int], int]]:
        """(instance, write, keys, found) of each request."""
        found = []
        for batch in self.heard:
            keys = np.split(batch.keys, np.cumsum(batch.counts)[:-1])
            rows = zip(batch.instance_ids, batch.writes.tolist(), keys, batch.found.tolist(), strict=True)
            found += [(name, write, part.tolist(), n) for name, write, part, n in rows]
        return found


def look_up(keys: list[int], found: int, held: int = 0) -> Touch:
    array = np.array(keys, np.int64)
    first = held + found
    return Touch("i", array[held:first], len(keys) - held, missed=array[first:], held=array[:held])


def test_look_ups_are_of_whole_prompts_in_order() -> None:
    ear = Ear()
    observer = Observer([ear])
    touches = [look_up([1, 2, 3], 2), look_up([1, 9], 0), look_up([1, 2, 3, 4], 1, held=2)]
    observer.note(touches, [Touched()] * 3)
    observer.flush(all_of_it=True)
    assert ear.requests() == [
        ("i", False, [1, 2, 3], 2),
        ("i", False, [1, 9], 0),
        ("i", False, [1, 2, 3, 4], 3),
    ]
    assert np.concatenate([batch.held for batch in ear.heard]).tolist() == [0, 0, 2]
    observer.stop()


def test_what_is_no_prompt_or_was_refused_is_left_out() -> None:
    ear = Ear()
    observer = Observer([ear])
    window = Touch("i", np.array([5, 6], np.int64), 9)
    observer.note([window, look_up([1], 1)], [Touched(), InstanceNotFound("gone")])
    observer.stop()
    assert ear.requests() == []


def test_a_listener_that_fails_keeps_nothing_from_the_next() -> None:
    class Deaf:
        def feed(self, observed: Observed) -> None:
            raise RuntimeError("cannot hear")

    ear = Ear()
    observer = Observer([Deaf(), ear])
    observer.note([look_up([1, 2], 1)], [Touched()])
    observer.stop()
    assert len(ear.requests()) == 1


def test_too_much_is_left_out_and_counted(monkeypatch) -> None:
    monkeypatch.setattr(module, "PENDING_KEYS_MAX", 10 + 2 * module.NOTE_KEYS)
    ear = Ear()
    observer = Observer([ear])
    with observer._feeding:  # listeners that take their time
        observer.note([look_up([1, 2, 3, 4], 1)] * 3, [Touched()] * 3)
    observer.stop()
    assert len(ear.requests()) == 2
    assert observer.dropped == 1


def test_requests_without_keys_are_bounded_too(monkeypatch) -> None:
    monkeypatch.setattr(module, "PENDING_KEYS_MAX", 100)
    observer = Observer([])
    with observer._feeding:
        observer.note([look_up([], 0)] * 1000, [Touched()] * 1000)
    observer.stop()
    assert observer.dropped > 900


def test_nothing_that_fails_reaches_the_loop(monkeypatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ear = Ear()
    observer = Observer([ear])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        observer.note([look_up([1], 1)], [Touched()])
    assert observer.dropped == 1
    observer.note([look_up([2], 1)], [Touched()])
    odd = Touch("i", np.zeros((1, 1), np.int64), 1, missed=np.zeros(0, np.int64))
    observer.note([odd], [Touched()])  # cannot be joined with the others
    observer.stop()
    observer = Observer([ear])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        observer.note([look_up([1], 1)], [Touched()])
    observer.stop()


def test_a_batch_that_cannot_be_made_does_not_end_the_thread() -> None:
    ear = Ear()
    observer = Observer([ear])
    observer.note([Touch("i", np.zeros((1, 1), np.int64), 1, missed=np.zeros(0, np.int64))], [Touched()])
    observer._much.set()
    deadline = time.monotonic() + 10
    while observer._notes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    observer.note([look_up([1, 2], 1)], [Touched()])
    while not ear.heard:
        observer._much.set()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    observer.stop()
    assert ear.threads == {"observer"}


def test_a_flush_ends_while_more_comes_than_listeners_can_take() -> None:
    class Busy:
        fed = 0

        def feed(self, observed: Observed) -> None:
            self.fed += 1
            if self.fed < 50:
                observer._add(module._look_up(look_up([1], 1), 1.0))  # as the loop does meanwhile

    busy = Busy()
    observer = Observer([busy])
    observer._thread = threading.current_thread()  # only what is flushed here
    observer.note([look_up([1], 1)], [Touched()])
    observer.flush(all_of_it=True)
    assert busy.fed == 1


def test_times_of_readers_are_near_ours() -> None:
    now_s = 1000.0
    told = [990.5, 999.0, 1.0, 1e300, float("inf"), float("nan"), -1.0, 0.0]
    notes = [module._look_up(replace(look_up([1], 1), time_s=time_s), now_s) for time_s in told]
    assert [note.time_s for note in notes if note] == [990.5, 999.0, 990.0, *[now_s] * 5]


def test_a_group_tells_its_reads_and_writes(tmp_path: Path) -> None:
    lab = ReclaimLab(tmp_path, ("shm:2MiB",))
    ear = Ear()
    try:
        lab.registry.register_instance(instance("one", size=16 * 1024))
        lab.service.observer = Observer([ear])
        keys = some_keys(4)
        start = start_request("one", keys)
        lab.service.submit([start]).result(10)
        lab.service.submit([Touch("one", keys[:0], 4, missed=keys)]).result(10)
        lab.service.submit([Touch("one", keys[:2], 2, chained=False)]).result(10)
    finally:
        lab.close()
    assert [(write, part) for _, write, part, _ in ear.requests()] == [
        (True, keys.tolist()),
        (False, keys.tolist()),
    ]
