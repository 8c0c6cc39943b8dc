"""``kvcm tail``: the order of events, filters, who goes away and comes back, and whose events one sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.cli import tail as module
from kvcm_ray.cli.lasting import lasting
from kvcm_ray.cli.tail import _Follower
from kvcm_ray.cli.target import Target
from kvcm_ray.client import connect
from kvcm_ray.core.model import AccessSettings
from kvcm_ray.errors import Unavailable
from kvcm_ray.testing.commands import Ran
from kvcm_ray.testing.served import Served, served

Kvcm = Callable[..., Ran]
BLOCK = 4096


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.05)


def write(url: str, instance_id: str, keys: list[int], group: str = "default") -> int:
    with closing(connect(url)) as client:
        cache = client.register(instance_id, group, block_size=16, specs={"tp0": BLOCK})
        return cache.put(keys, np.ones((len(keys), BLOCK), np.uint8))


@contextmanager
def followed(target: Target, *groups: str) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Events and sentences of a `kvcm tail` that goes on in a thread."""
    events: list[dict[str, Any]] = []
    said: list[str] = []
    stop = threading.Event()

    def run() -> None:
        with lasting(target, said.append) as api:
            for event in _Follower(api, groups).events(follow=True):
                events.append(event)
                if stop.is_set():
                    return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield events, said
    finally:
        stop.set()


def until(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kinds(events: list[dict[str, Any]], instance_id: str) -> list[str]:
    return [event["kind"] for event in events if event["instance_id"] == instance_id]


def test_what_happened_in_order(kvcm: Kvcm, manager: Served) -> None:
    assert kvcm("group", "create", "small", "--quota", str(8 * BLOCK), "--storage", "files").code == 0
    for first in (0, 4, 8, 12):
        write(manager.url, "s", list(range(first, first + 4)), "small")
    write(manager.url, "s", list(range(100, 120)), "small")  # never fits
    found = kvcm("tail", "--group", "small", "--no-follow", "--json").json["events"]
    assert [event["id"] for event in found] == sorted(event["id"] for event in found)
    assert {event["group"] for event in found} == {"small"}
    seen = [event["kind"] for event in found]
    assert seen[0] == "incarnation"
    assert seen.index("write_started") < seen.index("write_finished") < seen.index("evicted")
    assert seen.index("evicted") < seen.index("refused")
    (refused,) = [event for event in found if event["kind"] == "refused"]
    assert "KVCM-Q001" in refused["reason"]
    only = kvcm("tail", "--no-follow", "--kind", "evicted", "--kind", "refused").out.splitlines()
    assert only
    assert all("  evicted  " in line or "  refused  " in line for line in only)
    assert any("small" in line and "blocks, " in line and "quota" in line for line in only)
    two = kvcm("tail", "--no-follow", "--group", "small", "--count", "2", "--json").json["events"]
    assert two == found[:2]


def test_following(manager: Served) -> None:
    with followed(Target(manager.url, None)) as (events, said):
        until(lambda: bool(events))
        write(manager.url, "live", [1, 2])
        until(lambda: "write_finished" in kinds(events, "live"))
    assert kinds(events, "live") == ["write_started", "write_finished"]
    assert said == []


def test_a_group_that_comes_later(kvcm: Kvcm, manager: Served) -> None:
    with followed(Target(manager.url, None)) as (events, _):
        until(lambda: bool(events))
        assert kvcm("group", "create", "later", "--quota", "1MiB", "--storage", "files").code == 0
        until(lambda: any(event["group"] == "later" for event in events))
    assert kvcm("group", "remove", "later", "--yes").code == 0


def test_events_that_came_too_fast_are_counted(
    manager: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = manager.backend.groups_control.services["default"]
    with lasting(Target(manager.url, None)) as api:
        follower = _Follower(api, ["default"])
        list(follower.events(follow=False))
        for number in range(5_000):  # 4096 are remembered
            service.figures.journal.add(time.time(), "lookup", reason=str(number))
        told = list(follower.events(follow=False))
    assert len(told) == 4_096
    assert "events of group 'default' came too fast to be told" in capsys.readouterr().err


def test_a_manager_that_goes_away_and_comes_back_elsewhere(tmp_path: Path) -> None:
    """At another port, with groups of another incarnation: nothing of theirs is missed or told twice."""
    with ExitStack() as stack:
        with served(tmp_path, keep=True) as first:
            events, said = stack.enter_context(followed(Target(None, tmp_path)))
            until(lambda: bool(events))
            write(first.url, "before", [1])
            until(lambda: "write_finished" in kinds(events, "before"))
        until(lambda: bool(said))
        time.sleep(0.3)
        assert len(said) == 1, "it is told once"
        with served(tmp_path) as second:
            until(lambda: [event["kind"] for event in events].count("incarnation") == 2)
            write(second.url, "after", [1])
            until(lambda: "write_finished" in kinds(events, "after"))
            assert said[0].startswith("the manager is away: no ")
            assert said[1:] == ["the manager is back"]
    assert second.url != first.url
    assert kinds(events, "before") == ["write_started", "write_finished"]


def test_a_group_that_does_not_answer(kvcm: Kvcm, manager: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are told; a command that ends says by its code that something is missing."""
    assert kvcm("group", "create", "dead", "--quota", "1MiB", "--storage", "files").code == 0
    ask = manager.backend.ask

    async def without_dead(group: str, method: str, *args: Any) -> dict[str, Any]:
        if group == "dead":
            raise Unavailable("the actor of group 'dead' does not answer")
        return await ask(group, method, *args)

    monkeypatch.setattr(manager.backend, "ask", without_dead)
    ran = kvcm("tail", "--no-follow", "--json")
    assert ran.code == 1
    assert {event["group"] for event in ran.json["events"]} >= {"default"}
    assert ran.err.count("group 'dead' is away: ") == 1
    assert kvcm("tail", "--no-follow", "--group", "dead").code == 3


def test_refusals(kvcm: Kvcm, tmp_path: Path) -> None:
    unknown = kvcm("tail", "--group", "nope", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (1, "KVCM-N002")
    assert kvcm("tail", "--kind", "nonsense").code == 2
    for away in (("--url", "http://127.0.0.1:9"), ("--data-dir", str(tmp_path))):
        assert kvcm("tail", *away).code == 3


def test_ctrl_c_and_lines_of_json(manager: Served) -> None:
    command = [sys.executable, "-m", "kvcm_ray.cli", "tail", "--json", "--url", manager.url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "KVCM_URL": ""}
    ) as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["kind"] == "incarnation"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "\ninterrupted\n")


def test_colours_only_on_a_terminal(kvcm: Kvcm, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("tail", "--no-follow", "--kind", "incarnation")
    assert "\x1b[" not in kvcm(*arguments).out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # type: ignore[attr-defined]
    assert "\x1b[36m" in kvcm(*arguments).out
    assert "\x1b[" not in kvcm(*arguments, "--no-color").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in kvcm(*arguments).out


def test_a_token_sees_the_events_of_its_groups(kvcm: Kvcm, manager: Served, tmp_path: Path) -> None:
    def registry(method: str, *args: object) -> object:
        backend = manager.backend
        return backend._thread.submit(backend._registry.call, "", method, *args).result()

    for name in ("ours", "theirs"):
        assert kvcm("group", "create", name, "--quota", "1MiB", "--storage", "files").code == 0
    assert kvcm("account", "add", "root", "--role", "admin").code == 0
    assert kvcm("account", "add", "eng", "--group", "ours").code == 0
    file = tmp_path / "token"
    assert kvcm("account", "token", "create", "eng", "--save", str(file)).code == 0
    registry("set_access", AccessSettings(True))
    try:
        mine = ("--url", manager.url, "--token-file", str(file))
        events = kvcm("tail", "--no-follow", "--json", *mine).json["events"]
        assert {event["group"] for event in events} == {"ours"}
        assert [row["name"] for row in kvcm("top", "--count", "1", "--json", *mine).json["rows"]] == ["ours"]
        foreign = kvcm("tail", "--no-follow", "--group", "theirs", *mine)
        unknown = kvcm("tail", "--no-follow", "--group", "nobody", *mine)
        assert (foreign.code, foreign.err) == (1, unknown.err.replace("nobody", "theirs"))
        assert kvcm("top", "theirs", "--count", "1", *mine).code == 1
    finally:
        registry("set_access", AccessSettings(False))
