"""Every command: its JSON keys, its exit codes, what it says when refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.client import connect
from kvcm_ray.testing.served import Served
from kvcm_ray.traces import block_pattern

Kvcm = Callable[..., Any]
REPLAY_KEYS = {
    "requests", "accessed_blocks", "hit_blocks", "wrong_bytes", "seconds", "lookup_p50_us",
    "lookup_p99_us", "bytes_written", "bytes_read",
}  # fmt: skip
FSCK_KEYS = {"orphan_bytes", "dangling_locations", "corrupt_records", "counters_ok"}


# ------------------------------------------------------------------------------ groups and storages


def test_groups_from_birth_to_death(kvcm: Kvcm) -> None:
    assert kvcm("group", "create", "chat", "--quota", "1MiB", "--storage", "files").code == 0
    shown = kvcm("group", "show", "chat", "--json").json
    assert (shown["quota"]["capacity"], shown["version"]) == (str(1 << 20), "1")
    done = kvcm("group", "update", "chat", "--quota", "2MiB", "--file-quota", "1MiB", "--json")
    assert done.json["version"] == 2
    shown = kvcm("group", "show", "chat", "--json").json
    assert shown["quota"] == {
        "capacity": str(2 << 20),
        "quota_config": [{"storage_type": "ST_NFS", "capacity": str(1 << 20)}],
    }
    names = [g["name"] for g in kvcm("group", "list", "--json").json["groups"]]
    assert names == ["chat", "default"]
    assert "2.0 MiB" in kvcm("group", "list").out
    assert kvcm("group", "remove", "chat", "--yes").code == 0
    gone = kvcm("group", "show", "chat")
    assert (gone.code, gone.out) == (1, "")
    assert "error[KVCM-N002]" in gone.err
    assert "try: `kvcm group list`" in gone.err


def test_groups_that_are_refused(kvcm: Kvcm) -> None:
    assert kvcm("group", "create", "x").code == 2
    assert kvcm("group", "create", "x", "--quota", "1MiB", "--storage", "nope").code == 1
    assert kvcm("group", "create", "x", "--quota", "lots", "--storage", "files").code == 2
    assert kvcm("group", "create", "default", "--quota", "1", "--storage", "files").code == 1
    assert kvcm("group", "update", "default").code == 2
    assert kvcm("group", "update", "nope", "--quota", "1").code == 1
    assert kvcm("group", "remove", "nope", "--yes").code == 1


def test_storages_from_birth_to_death(kvcm: Kvcm, tmp_path: Path) -> None:
    assert kvcm("storage", "create", "disk1", "--path", str(tmp_path / "one")).code == 0
    assert kvcm("storage", "create", "disk1", "--path", str(tmp_path / "one")).code == 1
    listed = kvcm("storage", "list", "--json").json["storages"]
    assert [s["global_unique_name"] for s in listed] == ["disk1", "files", "memory"]
    assert kvcm("storage", "update", "disk1", "--path", str(tmp_path / "two")).code == 0
    assert kvcm("storage", "show", "disk1", "--json").json["nfs"]["root_path"].endswith("/two")
    assert kvcm("storage", "disable", "disk1").code == 0
    assert kvcm("storage", "enable", "disk1").code == 0
    assert kvcm("storage", "remove", "disk1", "--yes").code == 0
    assert kvcm("storage", "remove", "disk1", "--yes").code == 1
    assert kvcm("storage", "create", "bad", "--path", "relative/path").code == 1
    assert kvcm("storage", "create", "bad").code == 2


def test_instances_from_birth_to_death(kvcm: Kvcm) -> None:
    create = ("instance", "create", "m1", "--block-size", "16", "--spec", "tp0=4KiB")
    assert kvcm(*create, "--spec", "tp1=4KiB").code == 0
    assert kvcm(*create).code == 1, "another shape"
    shown = kvcm("instance", "show", "m1", "--json").json
    assert [s["size"] for s in shown["location_spec_infos"]] == ["4096", "4096"]
    rows = kvcm("instance", "list", "--json").json["instances"]
    assert "m1" in [i["instance_id"] for i in rows]
    assert "8.0 KiB" in kvcm("instance", "list").out
    assert kvcm("instance", "update", "m1", "--user-data", "team a").code == 0
    assert kvcm("instance", "show", "m1", "--json").json["model_deployment"]["user_data"] == "team a"
    assert kvcm("instance", "update", "nobody", "--user-data", "x").code == 1
    assert kvcm("instance", "remove", "m1", "--yes").code == 0
    assert kvcm("instance", "show", "m1").code == 1
    assert kvcm("instance", "create", "m2", "--block-size", "16", "--spec", "4KiB").code == 2
    assert kvcm("instance", "create", "m2", "--block-size", "0", "--spec", "a=1").code == 2


def test_removing_asks_first(kvcm: Kvcm) -> None:
    refused = kvcm("storage", "remove", "files")
    assert (refused.code, "--yes" in refused.err) == (1, True), "no answer is no"
    assert "files" in kvcm("storage", "list").out


# ----------------------------------------------------------------------------------------- status


def test_status(kvcm: Kvcm, manager: Served) -> None:
    found = kvcm("status", "--json").json
    assert found["url"] == manager.url
    (group,) = (g for g in found["groups"] if g["name"] == "default")
    assert {
        "used_bytes", "reserved_bytes", "quota_bytes", "blocks", "hit_blocks", "lookup_blocks",
    } <= group.keys()  # fmt: skip
    assert group["quota_bytes"] == 1 << 30
    assert [s["name"] for s in found["storages"]] == ["files", "memory"]
    assert len(found["nodes"]) == 1
    text = kvcm("status").out
    assert "default" in text
    assert "healthy" in text


def test_a_manager_that_is_away(kvcm: Kvcm, tmp_path: Path) -> None:
    for arguments in (("--url", "http://127.0.0.1:9"), ("--data-dir", str(tmp_path))):
        away = kvcm("status", *arguments, "--json")
        assert away.code == 3
        assert away.json["error"]["code"] == "KVCM-U001"
        assert "error[KVCM-U001]" in away.err
        assert "Traceback" not in away.err


# ----------------------------------------------------------------------------------------- replay


def trace(tmp_path: Path, *prompts: list[int]) -> str:
    lines = [
        json.dumps({"timestamp": 10 * n, "input_length": 9, "output_length": 1, "hash_ids": ids})
        for n, ids in enumerate(prompts)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("window", [1, 8])
def test_replay_counts_exactly(kvcm: Kvcm, tmp_path: Path, window: int) -> None:
    path = trace(tmp_path, [1, 2, 3], [1, 2, 4], [1, 2, 4], [9], [], [2, 1], [9, 1])
    replay = ("replay", path, "--via", "http", "--block-bytes", "100", "--window", str(window))
    first = kvcm(*replay, "--instance", f"w{window}", "--json")
    assert first.code == 0, first.err
    found = first.json
    assert found.keys() >= REPLAY_KEYS
    assert (found["requests"], found["accessed_blocks"], found["hit_blocks"]) == (7, 14, 9)
    assert (found["wrong_bytes"], found["unreadable_blocks"], found["refused_blocks"]) == (0, 0, 0)
    assert (found["bytes_written"], found["bytes_read"]) == (500, 900)
    second = kvcm(*replay, "--instance", f"w{window}", "--json").json
    assert (second["hit_blocks"], second["bytes_written"]) == (14, 0)


def test_replay_of_the_conversation_trace_finds_the_oracles_hits(kvcm: Kvcm) -> None:
    seen: set[int] = set()
    expected = 0
    from kvcm_ray.traces import open_trace

    for request in open_trace("conversation", 300):
        keys = request.keys.tolist()
        expected += next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(keys)
    ran = kvcm("replay", "conversation", "--via", "http", "--limit", "300",
               "--instance", "oracle", "--block-bytes", "64", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["hit_blocks"] == expected > 0
    assert ran.json["bytes_written"] == 64 * len(seen)


def test_replay_keeps_the_traces_pace(kvcm: Kvcm, tmp_path: Path) -> None:
    path = trace(tmp_path, *([n] for n in range(6)))  # 50 ms long
    ran = kvcm("replay", path, "--via", "http", "--instance", "pace", "--speed", "0.1", "--json")
    assert 0.5 <= ran.json["seconds"] < 5


def test_replay_wraps_until_the_time_is_over(kvcm: Kvcm, tmp_path: Path) -> None:
    path = trace(tmp_path, [1], [2])
    ran = kvcm("replay", path, "--via", "http", "--instance", "wrap", "--wrap",
               "--seconds", "0.5", "--json").json  # fmt: skip
    assert ran["requests"] > 4
    assert ran["hit_blocks"] == ran["requests"] - 2
    assert 0.4 <= ran["seconds"] < 5


def test_replay_text_and_refusals(kvcm: Kvcm, tmp_path: Path) -> None:
    path = trace(tmp_path, [1, 2])
    assert "wrong bytes      0" in kvcm("replay", path, "--via", "http", "--instance", "t").out
    other = kvcm("replay", path, "--via", "http", "--instance", "t", "--block-bytes", "8")
    assert (other.code, "KVCM-C002" in other.err) == (1, True)
    assert kvcm("replay", str(tmp_path / "none")).code == 2
    assert kvcm("replay", path, "--speed", "0").code == 2
    assert kvcm("replay", path, "--wrap").code == 2
    assert kvcm("replay", path, "--block-bytes", "0").code == 2
    assert kvcm("replay", path, "--window", "0").code == 2
    assert kvcm("replay", path, "--limit", "-1").code == 2
    (tmp_path / "bad.jsonl").write_text('{"hash_ids": 3}\n')
    bad = kvcm("replay", str(tmp_path / "bad.jsonl"), "--via", "http", "--json")
    assert (bad.code, "line 1" in bad.json["error"]["message"]) == (1, True)


def test_replay_does_not_fill_another_group(kvcm: Kvcm, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n')
    replay = ("replay", str(path), "--via", "http", "--instance", "mine")
    assert kvcm(*replay).code == 0
    assert kvcm("group", "create", "other", "--quota", "1MiB", "--storage", "memory").code == 0
    refused = kvcm(*replay, "--group", "other")
    assert refused.code == 1
    assert "instance 'mine' is in group 'default', not 'other'" in refused.err
    assert kvcm(*replay[:-1], "theirs", "--group", "other").code == 0
    assert kvcm("group", "remove", "other", "--force", "--yes").code == 0


def test_replay_that_does_not_fit_says_so(kvcm: Kvcm, tmp_path: Path) -> None:
    kvcm("group", "create", "tiny", "--quota", "150", "--storage", "files")
    path = trace(tmp_path, [1], [3, 4], [1])
    ran = kvcm("replay", path, "--via", "http", "--group", "tiny", "--instance", "tiny",
               "--block-bytes", "100", "--window", "1", "--json")  # fmt: skip
    assert ran.code == 1
    assert (ran.json["hit_blocks"], ran.json["refused_blocks"]) == (1, 2), "two never fit"
    assert "quota" in ran.json["first_error"]["message"]


def test_replay_counts_what_was_acknowledged_and_is_gone(kvcm: Kvcm, tmp_path: Path) -> None:
    assert kvcm("group", "create", "narrow", "--quota", "1000", "--storage", "files").code == 0
    path = trace(tmp_path, *([n, n + 1] for n in range(0, 40, 2)))
    replay = ("replay", path, "--via", "http", "--block-bytes", "100", "--recheck", "--json")
    kept = kvcm(*replay, "--instance", "kept")
    assert (kept.code, kept.json["lost_blocks"]) == (0, 0)
    gone = kvcm(*replay, "--instance", "gone", "--group", "narrow")
    (group,) = (g for g in kvcm("status", "--json").json["groups"] if g["name"] == "narrow")
    assert gone.code == 4
    assert gone.json["written_blocks"] - gone.json["lost_blocks"] == group["blocks"] <= 10


# ------------------------------------------------------------------------------------------- fsck


def test_fsck_of_a_healthy_manager(kvcm: Kvcm, manager: Served) -> None:
    with connect(manager.url) as client:
        cache = client.register("healthy", block_size=4, specs={"tp0": 100, "tp1": 5000})
        keys = [1, 2, 3]
        both = {"tp0": bytes(300), "tp1": b"x" * 15000}
        assert cache.put(keys, both) == 3
        cache.remove([2])
    ran = kvcm("fsck", "--deep", "--json")
    assert ran.code == 0, ran.out
    assert ran.json.keys() >= FSCK_KEYS
    assert ran.json["blocks"] >= 2
    assert ran.json["running"] is True


@pytest.fixture
def written(manager: Served) -> Any:
    """Ten blocks of an instance of their own, by two specs; where their files are."""
    import numpy as np

    with connect(manager.url) as client:
        cache = client.register("broken", block_size=4, specs={"tp0": 4096, "tp1": 512})
        keys = np.arange(1, 11, dtype=np.int64)
        data = {"tp0": block_pattern(keys, 4096), "tp1": block_pattern(keys, 512)}
        assert cache.put(keys, data) == 10
        blocks = cache.match(keys).blocks
        (segment,) = blocks.segments.values()
        root = blocks.storages[segment.storage].root_path
        yield Path(root) / segment.path, blocks.locations.slot.tolist()
        cache.remove(keys)


Written = tuple[Path, list[int]]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_fsck_finds_damaged_headers(kvcm: Kvcm, written: Written) -> None:
    directory, slots = written
    for slot in slots[:2]:
        overwrite(directory / "tp1.hdr", 64 * slot, b"junk" * 16)
    ran = kvcm("fsck", "--json")
    assert ran.code == 4
    assert ran.json["dangling_locations"] == 2
    assert ran.json["orphan_bytes"] == 0


def test_fsck_deep_finds_rotten_bytes(kvcm: Kvcm, written: Written) -> None:
    directory, slots = written
    overwrite(directory / "tp0.dat", 4096 * slots[3] + 17, b"?")
    assert kvcm("fsck", "--json").code == 0, "headers alone cannot tell"
    ran = kvcm("fsck", "--deep", "--json")
    assert (ran.code, ran.json["dangling_locations"]) == (4, 1)


def test_fsck_finds_bytes_that_nobody_owns(kvcm: Kvcm, written: Written) -> None:
    directory, _ = written
    size = (directory / "tp0.dat").stat().st_size
    overwrite(directory / "tp0.dat", 4096 * 1000, b"left behind")
    stray = directory.parent / "99999999-000001"
    stray.mkdir()
    (stray / "tp0.dat").write_bytes(b"x" * 8192)
    (stray / "tp0.hdr").write_bytes(b"")
    try:
        ran = kvcm("fsck", "--json")
        assert (ran.code, ran.json["orphan_bytes"]) == (4, 4096 + 8192)
        assert any("99999999-000001" in p for p in ran.json["notes"])
    finally:
        for file in stray.iterdir():
            file.unlink()
        stray.rmdir()
        os.truncate(directory / "tp0.dat", 4096 * 1000)
        os.truncate(directory / "tp0.dat", size)
    assert kvcm("fsck", "--json").code == 0


def test_fsck_needs_a_directory(kvcm: Kvcm, tmp_path: Path) -> None:
    assert kvcm("fsck", "--url", "http://127.0.0.1:9").code == 2
    assert kvcm("fsck", "--data-dir", str(tmp_path / "none")).code == 3


# -------------------------------------------------------------------------------------- the program


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvcm_ray.cli", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_program_itself(manager: Served) -> None:
    ran = program("status", "--json", KVCM_URL=manager.url)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["url"] == manager.url
    away = program("status", KVCM_URL="http://127.0.0.1:9")
    assert (away.returncode, away.stdout) == (3, "")
    assert away.stderr.startswith("error[KVCM-U001]: "), "no colour off a terminal"
    assert program("status", "--nonsense").returncode == 2
    assert program("nonsense").returncode == 2


def test_help_of_every_command(kvcm: Kvcm) -> None:
    top = kvcm("--help").out
    for name in ("up", "down", "status", "capacity", "group", "storage", "instance", "pin",
                 "reclaimer", "replay", "fsck", "bench", "demo", "version"):  # fmt: skip
        assert f"\n  {name} " in top, name
        shown = kvcm(name, "--help")
        assert (shown.code, "Usage: kvcm" in shown.out) == (0, True)
    assert json.loads(kvcm("version", "--json").out)["version"]


def test_benchmarks_are_listed(kvcm: Kvcm) -> None:
    shown = kvcm("bench", "--help").out
    assert all(name in shown for name in ("lookup", "write", "http", "data"))
    assert kvcm("bench", "nothing").code == 2


# ------------------------------------------------------------------- what is said when it goes wrong


def test_a_refusal_over_http_keeps_its_code(kvcm: Kvcm) -> None:
    """The stable code and its remedy reach a user, though the protocol knows INTERNAL_ERROR only."""
    refused = kvcm("storage", "remove", "files", "--yes", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "KVCM-C004")
    assert "KVCM" not in refused.json["error"]["message"], "told once is enough"
    assert "error[KVCM-C004]: Failed to remove storage : storage 'files' is a candidate" in refused.err
    assert "try: Empty it (`kvcm storage drain files --wait`)" in refused.err
    unknown = kvcm("group", "create", "x", "--quota", "1MiB", "--storage", "nope", "--json")
    assert unknown.json["error"]["code"] == "KVCM-N001"
    nowhere = kvcm("instance", "create", "n", "--group", "KVCM-Q001", "--block-size", "1", "--spec", "a=1")
    assert "error[KVCM-N002]" in nowhere.err


def test_wrong_usage_is_json_too(kvcm: Kvcm) -> None:
    wrong = kvcm("group", "create", "x", "--json")
    assert (wrong.code, wrong.json["error"]["code"]) == (2, "KVCM-A001")
    assert "Usage:" in wrong.err


@pytest.mark.parametrize("tier", ["foo:1", "shm:0", "shm:-5", "file", "file:1GiB:not/absolute"])
def test_a_tier_that_is_no_tier_is_wrong_usage(kvcm: Kvcm, tmp_path: Path, tier: str) -> None:
    wrong = kvcm("up", "--detach", "--data-dir", str(tmp_path / "d"), "--port", "0", "--tier", tier)
    assert (wrong.code, f"tier '{tier}'" in wrong.err) == (2, True)
    assert not (tmp_path / "d").exists()


def test_a_data_directory_that_cannot_be(kvcm: Kvcm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = kvcm("up", "--detach", "--port", "0", "--data-dir", str(tmp_path / "file" / "d"), "--json")
    assert (wrong.code, wrong.json["error"]["code"]) == (1, "KVCM-A001")
    assert "cannot be a data directory" in wrong.err


def test_a_port_that_is_taken(kvcm: Kvcm, manager: Served, tmp_path: Path) -> None:
    port = manager.url.rpartition(":")[2]
    for detach in ("--detach", "--json"):  # this process has no Ray, so it could be the manager itself
        if detach == "--json" and "ray" in sys.modules:
            continue
        taken = kvcm("up", detach, "--data-dir", str(tmp_path / "d"), "--port", port)
        assert (taken.code, "0 picks a free one" in taken.err) == (1, True)


def test_the_version_option(kvcm: Kvcm) -> None:
    assert kvcm("--version").out.startswith("kvcm-ray, version ")
