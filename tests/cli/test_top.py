"""``kvcm top``: rates, what it prints without a terminal, and the screen on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import selectors
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.cli.lasting import lasting
from kvcm_ray.cli.target import Target
from kvcm_ray.cli.top import BAR, _bar, _page, _refreshed, _spark, _View
from kvcm_ray.client import connect
from kvcm_ray.errors import GroupNotFound, Unavailable
from kvcm_ray.testing.commands import Ran
from kvcm_ray.testing.served import Served, served

Kvcm = Callable[..., Ran]
BLOCK = 4096


def talk(url: str, instance_id: str, keys: list[int], group: str = "default") -> None:
    """Write blocks and find them."""
    with closing(connect(url)) as client:
        cache = client.register(instance_id, group, block_size=16, specs={"tp0": BLOCK})
        cache.put(keys, np.ones((len(keys), BLOCK), np.uint8))
        assert cache.match(keys).length == len(keys)
        client.flush_touches()


def row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(each for each in rows if each["name"] == name)


def test_rates(manager: Served) -> None:
    view = _View(None)
    with lasting(Target(manager.url, None)) as api:
        first = row(view.refresh(api), "default")
        assert (first["writes_per_s"], first["lookups_per_s"]) == (0, 0), "nothing to compare with"
        before_s = time.time()
        for n in range(5):
            talk(manager.url, "rates", [10 * n, 10 * n + 1])
        deadline = time.monotonic() + 10
        found, writes = first, 0.0
        while found["recent_hit_ratios"][-1] is None or found["hit_ratio_tokens"] is None:
            assert time.monotonic() < deadline
            found = row(view.refresh(api), "default")
            writes = max(writes, found["writes_per_s"])
    passed_s = time.time() - before_s
    assert writes * passed_s >= 5 * 0.9
    assert found["blocks"] >= 10
    assert found["used_bytes"] >= 10 * BLOCK
    assert 0 < found["hit_ratio_tokens"] <= 1
    assert found["quota_bytes"] == 1 << 30


def test_one_object(kvcm: Kvcm, manager: Served) -> None:
    talk(manager.url, "one", [1, 2])
    found = kvcm("top", "--count", "1", "--json").json
    assert row(found["rows"], "default")["blocks"] >= 2
    (instance,) = (each for each in kvcm("top", "default", "--count", "1", "--json").json["rows"]
                   if each["name"] == "one")  # fmt: skip
    assert (instance["blocks"], instance["used_bytes"]) == (2, 2 * BLOCK)
    assert instance["quota_bytes"] == 1 << 30, "that of its group"


def test_lines_without_a_terminal(kvcm: Kvcm, manager: Served) -> None:
    talk(manager.url, "lines", [1, 2])
    ran = kvcm("top", "--count", "2", "--every", "0.2")
    lines = [line for line in ran.out.splitlines() if " default " in line]
    assert len(lines) == 2
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d default used [\d.]+ [KM]?i?B of 1\.0 GiB, hits [\d.]+% of tokens, "
        r"[\d.]+ look-ups/s, [\d.]+ writes/s, [\d.]+ evicted/s", lines[1],
    ), lines[1]  # fmt: skip
    assert len(kvcm("top", "--count", "2", "--every", "0.2", "--json").out.splitlines()) == 2


def test_refusals(kvcm: Kvcm, tmp_path: Path) -> None:
    unknown = kvcm("top", "nope", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (1, "KVCM-N002")
    assert kvcm("top", "--every", "0").code == 2
    for away in (("--url", "http://127.0.0.1:9"), ("--data-dir", str(tmp_path))):
        assert kvcm("top", *away).code == 3


def test_a_group_that_does_not_answer(kvcm: Kvcm, manager: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvcm("group", "create", "dead", "--quota", "1MiB", "--storage", "files").code == 0
    ask = manager.backend.ask

    async def without_dead(group: str, method: str, *args: Any) -> dict[str, Any]:
        if group == "dead":
            raise Unavailable("the actor of group 'dead' does not answer")
        return await ask(group, method, *args)

    monkeypatch.setattr(manager.backend, "ask", without_dead)
    ran = kvcm("top", "--count", "1")
    assert ran.code == 0
    assert "dead the actor of group 'dead' does not answer" in ran.out
    assert " default used " in ran.out
    assert kvcm("top", "dead", "--count", "1").code == 3


def test_a_manager_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    view = _View("default")
    with lasting(Target(None, tmp_path), said.append) as api:
        with served(tmp_path, keep=True) as first:
            talk(first.url, "kept", [1, 2, 3])
            assert _refreshed(view, api) is not None
        assert [_refreshed(view, api) for _ in range(3)] == [None] * 3
        assert row(view.rows or [], "kept")["blocks"] == 3, "the screen keeps the last numbers"
        assert "is away: no " in view.heading(api.away)
        with served(tmp_path):
            rows = _refreshed(view, api)
    assert [each["blocks"] for each in rows or []] == [3]
    assert len(said) == 2, said
    assert "away" not in view.heading(api.away)


def test_a_group_that_is_removed_ends_it(manager: Served, kvcm: Kvcm) -> None:
    assert kvcm("group", "create", "brief", "--quota", "1MiB", "--storage", "files").code == 0
    view = _View("brief")
    with lasting(Target(manager.url, None)) as api:
        assert _refreshed(view, api) == []
        assert kvcm("group", "remove", "brief", "--yes").code == 0
        with pytest.raises(GroupNotFound):
            _refreshed(view, api)


def test_bars_and_sparks() -> None:
    assert _bar({"used_bytes": 0, "quota_bytes": 0}) == "░" * BAR
    assert _bar({"used_bytes": 5, "quota_bytes": 0}) == "░" * BAR
    assert _bar({"used_bytes": 30, "quota_bytes": 10}) == "█" * BAR
    assert _bar({"used_bytes": 5, "quota_bytes": 10}) == "█" * (BAR // 2) + "░" * (BAR // 2)
    assert _spark([None, 0.0, 0.5, 1.0]) == " ▁▅█"


def page(rows: list[dict[str, Any]], columns: int, lines: int) -> list[str]:
    shown = _page("heading", rows, os.terminal_size((columns, lines)))
    return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown).splitlines()


def test_a_page_fits_its_window() -> None:
    one = {
        "used_bytes": 1, "quota_bytes": 2, "blocks": 1, "hit_ratio_tokens": None, "recent_hit_ratios": [],
        "lookups_per_s": 1234.5, "writes_per_s": 0.0, "evicted_blocks_per_s": 0.0, "writing_blocks": 0,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [{"name": "a-very-long-name-of-a-group", **one}]
    rows += [{"name": f"g{n}", **one} for n in range(50)]
    rows.append({"name": "dead", "unavailable": "it does not answer"})
    lines = page(rows, 80, 12)
    assert len(lines) == 11
    assert max(map(len, lines)) == 79
    assert lines[3].split() == ["a-very-long…", "1", "B", "2", "B", "-", "1,234.5", "0.0", "0.0", "0"]
    assert lines[-1].startswith("... and 45 more; make the window taller")
    assert max(map(len, page(rows, 60, 12))) == 59
    whole = page(rows, 150, 90)
    assert len(whole) == 55
    assert whole[3].startswith("a-very-long-name-of…        1 B ██████████░░░░░░░░░░        2 B")
    assert whole[2].endswith("writing")
    assert whole[-1].startswith("dead                 it does not answer")


# ------------------------------------------------------------------------------ a real terminal


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 150, 0, 0))
        self._readable = selectors.DefaultSelector()
        self._readable.register(self.master, selectors.EVENT_READ)
        self.slave = slave
        self.mode = termios.tcgetattr(slave)
        self.child = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, start_new_session=True, text=True
        )
        self.shown = ""

    def read(self, seconds: float) -> None:
        if self._readable.select(seconds):
            self.shown += os.read(self.master, 65536).decode(errors="replace")

    def until(self, text: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self.child.poll() is None, self.shown
            self.read(0.2)

    def end(self, timeout_s: float = 20) -> tuple[int, str]:
        """(exit code, standard error)."""
        deadline = time.monotonic() + timeout_s
        while self.child.poll() is None and time.monotonic() < deadline:
            self.read(0.1)
        self.read(0.1)
        assert self.child.stderr is not None
        return self.child.wait(1), self.child.stderr.read()


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(sys.executable, "-m", "kvcm_ray.cli", *arguments)
    try:
        yield opened
    finally:
        if opened.child.poll() is None:
            opened.child.kill()
            opened.child.wait()
        os.close(opened.master)
        os.close(opened.slave)


@pytest.mark.parametrize("how", ["q", "Q behind another key", "Ctrl-C"])
def test_the_screen(manager: Served, how: str) -> None:
    talk(manager.url, "screen", [1, 2])
    with terminal("top", "--url", manager.url, "--every", "30") as screen:
        screen.until("look-ups/s")
        screen.until("░" * BAR)
        assert "\x1b[?1049h" in screen.shown
        assert not termios.tcgetattr(screen.slave)[3] & termios.ECHO
        if how == "Ctrl-C":
            os.killpg(screen.child.pid, signal.SIGINT)
        else:
            os.write(screen.master, b"q" if how == "q" else b"xQ")
        code, err = screen.end()
        assert screen.shown.endswith("\x1b[?25h\x1b[?1049l"), "the cursor and the old screen are back"
        assert termios.tcgetattr(screen.slave) == screen.mode
    assert (code, err.strip()) == ((130, "interrupted") if how == "Ctrl-C" else (0, ""))


def test_the_screen_goes_when_the_manager_refuses(manager: Served) -> None:
    with terminal("top", "nope", "--url", manager.url) as screen:
        code, err = screen.end(30)
        assert termios.tcgetattr(screen.slave) == screen.mode
    assert code == 1
    assert "error[KVCM-N002]" in err


def test_instances_on_a_screen(manager: Served) -> None:
    talk(manager.url, "screen-instance", [1, 2])
    with terminal("top", "default", "--url", manager.url, "--count", "2", "--every", "0.3") as screen:
        screen.until("screen-instance")
        assert "instances of default" in screen.shown
        assert screen.end()[0] == 0
