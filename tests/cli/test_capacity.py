"""``kvcm capacity | pin | reclaimer``, drains, water marks and model upgrades on the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from kvcm_ray.cli.values import FRACTION, RATE, SECONDS, human_seconds
from kvcm_ray.client import connect
from kvcm_ray.optimizer.economics import command_line, group_update
from kvcm_ray.testing.served import Served

Kvcm = Callable[..., Any]

BLOCK = 4096
REPORT_KEYS = {
    "group", "policy", "quota_bytes", "used_bytes", "reserved_bytes", "pending_delete_bytes",
    "reclaimable_bytes", "pinned_bytes", "leased_bytes", "high_bytes", "low_bytes", "blocks",
    "fill_bytes_per_s", "seconds_to_full", "tiers", "instances", "draining", "pins", "reclaim",
}  # fmt: skip


@pytest.fixture
def chat(kvcm: Kvcm) -> Iterator[str]:
    """A group "chat" for 16 blocks, 8 of them in memory, with an instance "m"."""
    create = ("group", "create", "chat", "--quota", "64KiB", "--memory-quota", "32KiB")
    assert kvcm(*create, "--storage", "memory", "--storage", "files").code == 0
    register(kvcm, "m")
    yield "chat"
    assert kvcm("group", "remove", "chat", "--force", "--yes").code == 0


def register(kvcm: Kvcm, name: str, *more: str) -> Any:
    shape = ("--group", "chat", "--block-size", "4", "--spec", f"tp0={BLOCK}")
    return kvcm("instance", "register", name, *shape, *more, "--json")


def put(manager: Served, instance: str, *keys: int) -> int:
    with connect(manager.url) as client:
        return int(client.instance(instance).put(np.array(keys), {"tp0": bytes(len(keys) * BLOCK)}))


# --------------------------------------------------------------------------------------- capacity


def test_the_report_as_json_and_for_people(kvcm: Kvcm, manager: Served, chat: str) -> None:
    put(manager, "m", 1, 2, 3)
    report = kvcm("capacity", chat, "--json").json
    assert report.keys() >= REPORT_KEYS
    assert (report["quota_bytes"], report["used_bytes"], report["blocks"]) == (65536, 3 * BLOCK, 3)
    assert [tier["storages"] for tier in report["tiers"]] == [["memory"], ["files"]]
    every = kvcm("capacity", "--json").json["groups"]
    assert [r["group"] for r in every] == ["chat", "default"]
    text = kvcm("capacity", chat).out
    for word in (
        "reclaims when it is full",
        "memory (memory)",
        "12.0 KiB of",
        "total",
        "copies",
        "full in",
        "3",
    ):
        assert word.removesuffix(" of") in text
    assert "0 evicted" in text
    unknown = kvcm("capacity", "ghost")
    assert (unknown.code, "KVCM-N002" in unknown.err) == (1, True)


def test_status_has_a_short_form(kvcm: Kvcm, manager: Served, chat: str) -> None:
    put(manager, "m", 1, 2)
    (group,) = (g for g in kvcm("status", "--json").json["groups"] if g["name"] == chat)
    assert (group["used_bytes"], group["reclaimable_bytes"], group["pinned_bytes"]) == (8192, 8192, 0)
    assert "seconds_to_full" in group
    shown = kvcm("status").out
    assert "reclaimable" in shown
    assert "full in" in shown


def test_water_marks_and_policies_change_at_run_time(kvcm: Kvcm, chat: str) -> None:
    update = ("group", "update", chat, "--policy", "adaptive", "--high-water", "75%", "--low-water", "0.5")
    assert kvcm(*update, "--ttl", "2h", "--period", "1s", "--step", "8", "--step-percent", "10").code == 0
    strategy = kvcm("group", "show", chat, "--json").json["cache_config"]["reclaim_strategy"]
    assert strategy | {"storage_unique_name": ""} == {
        "storage_unique_name": "", "reclaim_policy": "POLICY_ADAPTIVE",
        "trigger_strategy": {"used_size": "0", "used_percentage": 0.75}, "low_water_percentage": 0.5,
        "ttl_seconds": 7200, "trigger_period_seconds": 1, "reclaim_step_size": 8,
        "reclaim_step_percentage": 10, "delay_before_delete_ms": 0,
    }  # fmt: skip
    report = kvcm("capacity", chat, "--json").json
    assert (report["policy"], report["high_bytes"], report["low_bytes"]) == ("adaptive", 49152, 32768)
    assert "75% to 50%" in kvcm("group", "list").out
    assert "from 48.0 KiB down to 32.0 KiB" in kvcm("capacity", chat).out
    refused = kvcm("group", "update", chat, "--low-water", "0.8")
    assert (refused.code, "above the mark" in refused.err, "set it to 0" in refused.err) == (1, True, True)
    assert kvcm("group", "update", chat, "--high-water-bytes", "40KiB").code == 0
    assert kvcm("capacity", chat, "--json").json["high_bytes"] == 40 << 10
    assert "75% to 50%, or 40.0 KiB" in kvcm("group", "list").out
    assert kvcm("group", "update", chat, "--high-water", "95").code == 2
    assert kvcm("group", "update", chat, "--policy", "mru").code == 2
    assert kvcm("group", "update", chat, "--quota", "128KiB").code == 0
    assert kvcm("capacity", chat, "--json").json["policy"] == "adaptive", "the rest stays"


# ------------------------------------------------------------------------------------------ pins


def test_pins_from_birth_to_death(kvcm: Kvcm, manager: Served, chat: str, tmp_path: Path) -> None:
    put(manager, "m", 1, 2)
    added = kvcm("pin", "add", "m", "two", "--key", "1", "--key", "2", "--key", "3", "--json").json
    assert (added["keys"], added["blocks"], added["until_s"]) == (3, 2, 0)
    tokens = tmp_path / "tokens"
    tokens.write_text(json.dumps(list(range(9))))
    assert kvcm("pin", "add", "m", "list", "--tokens", str(tokens), "--for", "1h", "--json").json["keys"] == 2
    tokens.write_text("0 1 2 3 4 5 6 7\n8")
    assert kvcm("pin", "add", "m", "words", "--tokens", str(tokens)).code == 0
    pins = kvcm("pin", "list", "--instance", "m", "--json").json["pins"]
    assert [(p["name"], p["keys"]) for p in pins] == [("list", 2), ("two", 3), ("words", 2)]
    assert kvcm("pin", "list", "--instance", "other", "--json").json["pins"] == []
    shown = kvcm("pin", "list").out
    assert ("8.0 KiB" in shown, "no end" in shown) == (True, True)
    assert kvcm("pin", "remove", "m", "two").code == 0
    assert "two" not in kvcm("pin", "list").out


def test_pins_that_are_refused(kvcm: Kvcm, chat: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("[1, {}]")
    assert kvcm("pin", "add", "m", "p").code == 2
    assert kvcm("pin", "add", "m", "p", "--key", "1", "--tokens", str(bad)).code == 2
    assert kvcm("pin", "add", "m", "p", "--tokens", str(bad)).code == 2
    assert kvcm("pin", "add", "m", "p", "--key", "1", "--for", "soon").code == 2
    assert kvcm("pin", "add", "m", "p", "--key", "1", "--for", "0s").code == 2, "0 is not: for ever"
    assert kvcm("pin", "add", "nobody", "p", "--key", "1").code == 1
    bad.write_text("1 2")
    short = kvcm("pin", "add", "m", "p", "--tokens", str(bad))
    assert (short.code, "no whole block of 4" in short.err) == (1, True)


# --------------------------------------------------------------------------------------- drains


def test_a_drain_waits_until_the_storage_is_empty(kvcm: Kvcm, manager: Served, chat: str) -> None:
    put(manager, "m", 1, 2, 3)
    assert kvcm("capacity", chat, "--json").json["tiers"][0]["blocks"] == 3
    drained = kvcm("storage", "drain", "memory", "--wait", "--timeout", "20", "--json")
    assert (drained.code, drained.json["empty"], drained.json["blocks"]) == (0, True, 0)
    assert "is empty" in kvcm("storage", "drain", "memory").out, "say it again to see how far it is"
    tiers = kvcm("capacity", chat, "--json").json["tiers"]
    assert {t["storage_type"]: t["blocks"] for t in tiers} == {"ST_NFS": 3, "ST_TAIRMEMPOOL": 0}
    storages = kvcm("storage", "list", "--json").json["storages"]
    states = {s["global_unique_name"]: s["state"] for s in storages}
    assert states == {"files": "ok", "memory": "draining"}
    assert "draining" in kvcm("status").out
    assert kvcm("storage", "undrain", "memory").code == 0
    assert kvcm("storage", "show", "memory", "--json").json["state"] == "ok"
    assert kvcm("storage", "drain", "ghost").code == 1


def test_a_drain_that_cannot_end_says_what_is_left(kvcm: Kvcm, manager: Served, chat: str) -> None:
    put(manager, "m", 1, 2, 3)
    assert kvcm("reclaimer", "--pause").code == 0
    try:
        late = kvcm("storage", "drain", "memory", "--wait", "--timeout", "1s", "--json")
        assert (late.code, late.json["error"]["code"]) == (1, "KVCM-C004")
        assert "3 blocks, 12.0 KiB left" in late.json["error"]["message"]
        assert "storage memory: 3 blocks" in late.err, "progress goes to standard error"
        assert kvcm("storage", "undrain", "memory").code == 0
        put(manager, "m", *range(1, 9))  # all that fits
        memory = kvcm("capacity", chat).out.splitlines()[3]
        assert memory.endswith("  full"), "there is no time left, whatever the rate"
    finally:
        assert kvcm("storage", "undrain", "memory").code == 0
        assert kvcm("reclaimer", "--resume").code == 0


def test_commands_about_storages_say_what_comes_next(kvcm: Kvcm, chat: str, tmp_path: Path) -> None:
    added = kvcm("storage", "create", "spare", "--path", str(tmp_path / "spare"), "--json")
    assert (added.json["ok"], "kvcm group update" in added.err) == (True, True)
    assert kvcm("storage", "remove", "spare", "--yes").code == 0
    used = kvcm("storage", "remove", "memory", "--yes")
    assert (used.code, "candidate of group chat" in used.err) == (1, True)
    assert "kvcm storage drain memory --wait" in used.err


# ------------------------------------------------------------------------------------ reclaimers


def test_reclaimers_are_shown_and_changed(kvcm: Kvcm, chat: str) -> None:
    changed = kvcm("reclaimer", "--size", "3", "--rate", "100MiB/s", "--json").json
    shown = kvcm("reclaimer", "--json").json
    assert shown == changed
    assert (shown["reclaimers"], shown["max_bytes_per_second"], shown["paused"]) == (3, 100 << 20, False)
    assert shown["groups"][chat]["evicted_blocks"] == 0
    paused = kvcm("reclaimer", "--pause")
    assert ("paused" in paused.out, "--resume" in paused.err) == (True, True)
    assert kvcm("capacity", chat, "--json").json["reclaim"]["paused"] is True
    assert kvcm("status", "--json").json["reclaiming_paused"] is True
    assert "PAUSED" in kvcm("status").out
    assert "3 reclaimers, at most 100.0 MiB/s, at work" in kvcm("reclaimer", "--resume").out
    assert "no limit" in kvcm("reclaimer", "--rate", "0", "--size", "2").out
    assert kvcm("reclaimer", "--size", "0").code == 2
    assert kvcm("reclaimer", "--rate", "fast").code == 2


# --------------------------------------------------------------------------------- model upgrades


def test_an_upgrade_and_its_roll_back(kvcm: Kvcm, manager: Served, chat: str) -> None:
    put(manager, "m", 1, 2)
    upgrade = ("--model-version", "v2", "--supersedes", "m", "--handover", "30m")
    assert register(kvcm, "m2", *upgrade).code == 0
    listed = {
        i["instance_id"]: i for i in kvcm("instance", "list", "--group", chat, "--json").json["instances"]
    }
    assert (listed["m2"]["supersedes"], listed["m2"]["model_version"]) == ("m", "v2")
    assert listed["m2"]["retiring"] is None
    assert 0.9 < listed["m"]["retiring"]["share"] <= 1
    assert "30 min left" in kvcm("instance", "list").out
    assert kvcm("instance", "get", "m2", "--json").json["handover_seconds"] == 1800
    back = kvcm("instance", "rollback", "m2", "--json")
    assert (back.code, back.json["serves"]) == (0, "m")
    listed = {i["instance_id"]: i for i in kvcm("instance", "list", "--json").json["instances"]}
    assert listed["m"]["retiring"] is None
    assert listed["m2"]["retiring"]["empty"] is True
    assert "it is empty" in kvcm("instance", "list").out
    again = register(kvcm, "m2", *upgrade)
    assert (again.code, "does not undo a roll back" in again.json["error"]["message"]) == (1, True)
    refused = kvcm("instance", "rollback", "m2")
    assert (refused.code, "error[KVCM-C005]" in refused.err) == (1, True)
    assert register(kvcm, "m3", "--supersedes", "ghost").code == 1
    assert kvcm("instance", "show", "m3").code == 1, "nothing is kept of what was refused"


def test_what_keeps_a_retired_instance_from_being_empty(kvcm: Kvcm, manager: Served, chat: str) -> None:
    put(manager, "m", 1, 2)
    kvcm("pin", "add", "m", "p", "--key", "1")
    assert register(kvcm, "m2", "--supersedes", "m", "--handover", "1s").code == 0
    deadline = time.monotonic() + 10
    while "pinned" not in kvcm("instance", "list").out:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kvcm("pin", "remove", "m", "p")
    while "it is empty" not in kvcm("instance", "list").out:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ------------------------------------------------------------------------------------ the values


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (FRACTION, "95%", 0.95), (FRACTION, ".5", 0.5), (FRACTION, "1", 1.0), (FRACTION, "0", 0.0),
        (SECONDS, "90", 90), (SECONDS, "1.5h", 5400), (SECONDS, "2d", 172_800),
        (RATE, "1MiB/s", 1 << 20), (RATE, "0", 0), (RATE, "100", 100),
    ],
)  # fmt: skip
def test_values(kind: click.ParamType, text: str, value: float) -> None:
    assert kind.convert(text, None, None) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (FRACTION, "101%"),
        (FRACTION, "-1"),
        (FRACTION, ""),
        (SECONDS, "1w"),
        (SECONDS, "-5"),
        (SECONDS, "0.5s"),
        (SECONDS, "1.5"),
        (RATE, "/s"),
    ],
)
def test_values_that_are_none(kind: click.ParamType, text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


def test_times_for_people() -> None:
    texts = [human_seconds(s) for s in (None, 0, 41.2, 119, 150, 7199, 7200, 86_400 * 3)]
    assert texts == ["-", "0 s", "41 s", "119 s", "2 min", "120 min", "2.0 h", "3 d"]


# ------------------------------------------------------------------------- groups from a file


def test_a_group_takes_what_the_optimizer_recommends(kvcm: Kvcm, chat: str, tmp_path: Path) -> None:
    """The file and the command line of a recommendation do the same, and an option counts more."""
    update = group_update("adaptive", 32, BLOCK, ttl_s=7200, high_water=0.8, low_water=0.5)
    file = tmp_path / "group-chat.json"
    file.write_text(json.dumps(update))
    assert kvcm("group", "update", chat, "--from", str(file), "--json").json["version"] == 2
    by_file = kvcm("group", "show", chat, "--json").json
    report = kvcm("capacity", chat, "--json").json
    assert (report["policy"], report["low_bytes"]) == ("adaptive", 32 * BLOCK), "what was simulated stays"
    assert by_file["quota"]["capacity"] == str(64 * BLOCK)
    assert by_file["quota"]["quota_config"], "the rest stays"
    reset = ("--quota", "64KiB", "--policy", "lru", "--high-water", "0", "--low-water", "0", "--ttl", "0")
    assert kvcm("group", "update", chat, *reset).code == 0
    assert kvcm(*command_line(chat, update).split()[1:]).code == 0
    by_command = kvcm("group", "show", chat, "--json").json
    assert by_command | {"version": 0} == by_file | {"version": 0}
    assert kvcm("group", "update", chat, "--from", str(file), "--quota", "1MiB", "--ttl", "0").code == 0
    found = kvcm("group", "show", chat, "--json").json
    assert found["quota"]["capacity"] == str(1 << 20)
    strategy = found["cache_config"]["reclaim_strategy"]
    assert (strategy.get("ttl_seconds", 0), strategy["reclaim_policy"]) == (0, "POLICY_ADAPTIVE")


def test_a_file_may_hold_any_option_as_it_is_typed(kvcm: Kvcm, chat: str, tmp_path: Path) -> None:
    file = tmp_path / "group.json"
    file.write_text(
        '{"quota": "128KiB", "storage": ["files"], "high-water": "75%", "max_keys": 5, "ttl": "2h"}'
    )
    assert kvcm("group", "update", chat, "--from", str(file)).code == 0
    found = kvcm("group", "show", chat, "--json").json
    assert (found["quota"]["capacity"], found["storage_candidates"]) == (str(128 << 10), ["files"])
    strategy = found["cache_config"]["reclaim_strategy"]
    assert (strategy["ttl_seconds"], strategy["trigger_strategy"]["used_percentage"]) == (7200, 0.75)
    assert found["cache_config"]["meta_indexer_config"]["max_key_count"] in (5, "5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "a JSON object with names of options"),
        ('{"quotta": 1}', "'quotta' is no option of a group; did you mean 'quota'?"),
        ('{"name": "other"}', "'name' is no option of a group; "),
        ('{"quota": -5}', "quota: '-5' is not a size"),
        ('{"quota": true}', "quota: True is not a value"),
        ('{"ttl": null}', "ttl: None is not a value"),
        ('{"high_water": 1.5}', "high_water: '1.5' is not a fraction"),
        ('{"policy": "mru"}', "policy: 'mru' is not one of"),
        ('{"storage": "files"}', "storage: 'files' is not a list of names"),
        ('{"step_percent": 101}', "step_percent: 101 is not in the range"),
    ],
)
def test_files_that_are_refused(kvcm: Kvcm, chat: str, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "group.json"
    file.write_text(text)
    before = kvcm("group", "show", chat, "--json").json
    refused = kvcm("group", "update", chat, "--from", str(file), "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "KVCM-A001")
    assert message in refused.json["error"]["message"]
    assert "group.json" in refused.json["error"]["message"]
    assert kvcm("group", "show", chat, "--json").json == before


def test_a_file_that_says_nothing(kvcm: Kvcm, chat: str, tmp_path: Path) -> None:
    file = tmp_path / "group.json"
    file.write_text("{}")
    refused = kvcm("group", "update", chat, "--from", str(file))
    assert (refused.code, "nothing to change" in refused.err) == (2, True)
    assert kvcm("group", "update", chat, "--from", str(tmp_path / "nowhere.json")).code == 2
