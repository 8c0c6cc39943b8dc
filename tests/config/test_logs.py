"""Log lines: their formats, their level, and the request behind them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray import logs
from kvcm_ray.testing.http import Http


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """The logger as it was before."""
    logger = logging.getLogger(logs.ROOT)
    before = (logger.level, list(logger.handlers), logger.propagate)
    yield
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]
    logger.propagate = before[2]


def configure(log_format: str, level: str = "info") -> logging.Logger:
    logs.configure(logs.environment(log_format, level))
    return logging.getLogger(f"{logs.ROOT}.test")


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text").warning("slow %s", "commit")
    line = capsys.readouterr().err
    assert line.endswith(" WARNING kvcm_ray.test: slow commit\n")
    assert line[10] == "T"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    log = configure("json")
    try:
        raise ValueError("of no use")
    except ValueError:
        log.exception('it "broke"\n')
    found = json.loads(capsys.readouterr().err)
    assert found["message"] == 'it "broke"\n'
    assert "ValueError: of no use" in found["exception"]
    assert "trace_id" not in found


def test_level_and_doing_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text", "error").warning("not this")
    log = configure("json", "warning")
    log.warning("this")
    log.info("nor this")
    assert json.loads(capsys.readouterr().err)["message"] == "this", "one line, of one handler"
    configure("nonsense", "nonsense").info("text again")
    assert capsys.readouterr().err.endswith("text again\n")


def test_a_line_names_the_request_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = configure("json")

    async def inner() -> None:
        await asyncio.sleep(0)
        log.warning("inside")

    async def request(name: str) -> None:
        logs.set_trace_id(name)
        await asyncio.gather(inner(), inner())

    async def both() -> None:
        await asyncio.gather(request("one"), request("two"))
        log.warning("outside")

    asyncio.run(both())
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert sorted(line.get("trace_id", "") for line in found) == ["", "one", "one", "two", "two"]


def test_a_failing_call_is_logged_with_its_trace_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    http = Http(tmp_path / "data")
    try:
        configure("json")

        async def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(http.backend, "registry", broken)
        answer = http.post("genConfigSnapshot", trace_id="my-request")
        assert answer["header"]["status"]["code"] == "INTERNAL_ERROR"
    finally:
        monkeypatch.undo()
        http.close()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["trace_id"] for line in lines if "failed" in line["message"]] == ["my-request"]
