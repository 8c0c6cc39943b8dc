"""Limits, slow senders, whose address counts, and the audit log."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.serve_app import app as app_module
from kvcm_ray.serve_app.access import audit, gate
from kvcm_ray.serve_app.access.audit import AuditLog
from kvcm_ray.serve_app.access.http import sender_of
from kvcm_ray.serve_app.access.limits import BUCKETS_MAX, Buckets
from kvcm_ray.testing.access import Guarded, basic

# ----------------------------------------------------------------------------------------- limits


def test_a_bucket_fills_at_its_rate() -> None:
    now = [100.0]
    buckets = Buckets(2.0, 3, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b") == 0
    now[0] += 0.5
    assert buckets.take("a") == 0
    assert buckets.take("a") > 0
    now[0] += 1000
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]


def test_buckets_are_bounded() -> None:
    buckets = Buckets(1.0, 1)
    for i in range(BUCKETS_MAX + 10):
        buckets.take(str(i))
    assert len(buckets._held) == BUCKETS_MAX


def test_no_rate_is_no_limit() -> None:
    buckets = Buckets(0.0, 0)
    assert not any(buckets.take("a") for _ in range(1000))


def test_an_account_that_asks_too_often_waits_and_others_do_not(guarded: Guarded) -> None:
    guarded.app.gate._pace = Buckets(0.5, 2)
    answers = [guarded.as_("user", "checkHealth") for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"] == "2"
    assert "limit" in answers[2].json()["header"]["status"]["message"]
    assert guarded.as_("stranger", "checkHealth").status_code == 200
    assert guarded.call("getCacheLocation", f"Bearer {guarded.tokens['user']}").status_code == 429
    assert guarded.page("/healthz", f"Bearer {guarded.tokens['user']}").status_code == 429


def test_an_open_manager_counts_addresses(guarded: Guarded) -> None:
    guarded.set_required(False)
    guarded.app.gate._pace = Buckets(0.5, 1)
    statuses = [
        guarded.run(
            guarded.client.post("/api/checkHealth", json={}, headers={"x-forwarded-for": ip})
        ).status_code
        for ip in ("10.0.0.1", "10.0.0.1", "10.0.0.2")
    ]
    assert statuses == [200, 429, 200]


@pytest.mark.parametrize(
    ("client", "forwarded", "peer"),
    [
        ("127.0.0.1", [b"10.0.0.9"], "10.0.0.9"),
        ("127.0.0.1", [b"6.6.6.6, 10.0.0.9"], "10.0.0.9"),
        ("10.0.0.3", [b"6.6.6.6"], "10.0.0.3"),
        ("::1", [b"10.0.0.9"], "10.0.0.9"),
        ("127.0.0.1", [b""], "127.0.0.1"),
        ("127.0.0.1", [], "127.0.0.1"),
    ],
)
def test_only_our_own_proxy_says_whose_request_it_is(client: str, forwarded: list[bytes], peer: str) -> None:
    headers = [(b"x-forwarded-for", value) for value in forwarded]
    assert sender_of({"client": (client, 1), "headers": headers})[1] == peer


# ----------------------------------------------------------------------------------- slow senders


async def _ask(
    guarded: Guarded, path: str, messages: list[dict[str, Any]], headers: Any
) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("10.0.0.1", 1)}
    scope |= {"query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"}
    await guarded.app(scope, receive, send)
    return sent


def test_a_body_that_does_not_come_is_given_up(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_TIMEOUT_S", 0.05)
    token = [(b"authorization", f"Bearer {guarded.tokens['user']}".encode())]
    begun = {"type": "http.request", "body": b"{", "more_body": True}
    for path in ("/api/getCacheLocation", "/api/getInstanceInfo"):
        sent = guarded.run(_ask(guarded, path, [dict(begun)], token))
        assert sent[0]["status"] == 408
        assert (b"connection", b"close") in sent[0]["headers"]


def test_nothing_is_read_of_a_stranger(guarded: Guarded) -> None:
    """Not even a byte of 64 MiB: the refusal comes before the body."""
    for path in ("/api/getCacheLocation", "/api/addStorage"):
        sent = guarded.run(_ask(guarded, path, [], [(b"content-length", b"67108864")]))
        assert sent[0]["status"] == 401


# -------------------------------------------------------------------------------------- audit log


def entries(guarded: Guarded) -> list[dict[str, Any]]:
    return [json.loads(line) for line in audit.audit_file(guarded.data_dir).read_text().splitlines()]


def test_changes_are_noted_with_who_whence_and_how_they_ended(guarded: Guarded) -> None:
    guarded.as_("admin", "disableStorage", storage_unique_name="nfs_01", trace_id="trace-7")
    guarded.as_("admin", "disableStorage", storage_unique_name="nothing")
    guarded.as_("user", "addAccount", user_name="eve", password="hush-hush", role="ROLE_ADMIN")
    guarded.as_("user", "getInstanceInfo", instance_id="mine/i1")
    done, failed, refused = entries(guarded)[-3:]
    assert done | {"time": ""} == {
        "time": "", "account": "admin", "role": "admin", "from": "127.0.0.1", "call": "DisableStorage",
        "what": {"storage_unique_name": "nfs_01"}, "result": "OK", "trace_id": "trace-7",
    }  # fmt: skip
    assert done["time"].endswith("Z")
    assert failed["result"] == "KVCM-N001"
    assert (refused["account"], refused["result"]) == ("user", "KVCM-P002")
    assert refused["what"] == {"user_name": "eve", "role": "ROLE_ADMIN", "instance_groups": []}
    assert "hush" not in audit.audit_file(guarded.data_dir).read_text()
    assert stat.S_IMODE(audit.audit_file(guarded.data_dir).stat().st_mode) == 0o600
    listed = guarded.as_("admin", "listAudit", limit=3).json()["entries"]
    assert listed == [done, failed, refused]


def test_wrong_credentials_are_noted_and_floods_of_them_are_not(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        guarded.call("checkHealth", None)
    assert not audit.audit_file(guarded.data_dir).exists() or all(e["call"] for e in entries(guarded))
    for _ in range(gate.REFUSALS_NOTED_BURST + 30):
        guarded.call("checkHealth", basic("admin", "wrong"))
    noted = [entry for entry in entries(guarded) if not entry["call"]]
    assert gate.REFUSALS_NOTED_BURST <= len(noted) <= gate.REFUSALS_NOTED_BURST + 10
    assert noted[0]["result"] == "KVCM-P001"
    assert "wrong" not in json.dumps(noted)


def test_long_values_are_cut(guarded: Guarded) -> None:
    guarded.as_("admin", "removeInstance", instance_id="x" * 100_000, trace_id="t" * 100_000)
    assert len(audit.audit_file(guarded.data_dir).read_bytes().splitlines()[-1]) < 1000


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FILE_BYTES_MAX", 2_000)


def _write_many(folder: str, writer: int, count: int) -> None:
    audit.FILE_BYTES_MAX = 200_000
    log = AuditLog(Path(folder))
    for i in range(count):
        log.write({"writer": writer, "i": i, "padding": "x" * 100})


def test_several_processes_write_whole_lines_and_lose_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), n, 500)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = AuditLog(tmp_path).tail(10_000)
    assert {(entry["writer"], entry["i"]) for entry in found} == {
        (n, i) for n in range(3) for i in range(500)
    }
    assert len(list(tmp_path.glob("audit.log.[0-9]"))) >= 1  # it was renamed meanwhile


def test_the_log_is_bounded_and_its_tail_in_order(tmp_path: Path, small_files: None) -> None:
    log = AuditLog(tmp_path)
    for i in range(500):
        log.write({"i": i})
    files = sorted(tmp_path.glob("audit.log*"))
    assert sum(file.stat().st_size for file in files) <= 2_000 * (audit.FILES_KEPT + 1)
    assert [entry["i"] for entry in log.tail(60)] == list(range(440, 500))
    assert log.tail(10_000)[-1]["i"] == 499


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.write({"i": 1})
    with log.path.open("ab") as file:
        file.write(b'{"time":"2026-')
    assert [entry["i"] for entry in log.tail(10)] == [1]


def test_a_full_disk_does_not_fail_the_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AuditLog(tmp_path / "missing").write({"call": "AddStorage"})
    assert "an entry of the audit log is lost" in caplog.text
