"""Storages and groups that a file declares: made once, compared later, applied when asked."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.config.declared import apply_at_start, compare, desired
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.testing.commands import Ran, run_command
from kvcm_ray.testing.served import Served, served


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("declared")) / "data") as found:
        yield found


class Registry:
    """The registry's calls as `RegistryHandle` has them, on the manager of this process."""

    def __init__(self, manager: Served) -> None:
        self._backend = manager.backend
        self.loaded = 0

    def call_sync(self, method: str, *args: Any, timeout_s: float = 1.0) -> Any:
        self.loaded += method == "load_snapshot"
        return asyncio.run(self._backend.registry(method, *args))


@pytest.fixture
def kvcm(
    manager: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    monkeypatch.setenv("KVCM_DATA_DIR", str(manager.data_dir))
    monkeypatch.delenv("KVCM_URL", raising=False)
    monkeypatch.chdir(manager.data_dir.parent)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return lambda *arguments: run_command(capsys, arguments)


def now(registry: Registry) -> Any:
    return json.loads(registry.call_sync("save_snapshot"))


def test_first_start_and_later_ones(manager: Served, tmp_path: Path) -> None:
    registry, notes = Registry(manager), []
    declared = {
        "storages": {"disk1": {"kind": "file", "path": str(tmp_path / "disk1")}},
        "groups": {"first": {"quota": 1 << 20, "storages": ["files", "disk1"], "policy": "lfu", "ttl": 60}},
    }
    apply_at_start(registry, declared, fresh=False, note=notes.append)
    groups = {group["name"]: group for group in now(registry)["groups"]}
    assert groups["first"]["quota"]["capacity"] == 1 << 20
    assert groups["first"]["storage_candidates"] == ["files", "disk1"]
    assert notes == []
    loads = registry.loaded
    apply_at_start(registry, declared, fresh=False, note=notes.append)
    assert (registry.loaded, notes) == (loads, []), "the same again is nothing"
    declared["groups"]["first"]["quota"] = 2 << 20
    apply_at_start(registry, declared, fresh=False, note=notes.append)
    assert registry.loaded == loads, "somebody may have wanted it so"
    (told,) = notes
    assert "quota.capacity 1048576 -> 2097152" in told
    assert "kvcm config apply" in told
    apply_at_start(registry, declared, fresh=True, note=notes.append)
    assert now(registry)["groups"][-1]["quota"]["capacity"] == 2 << 20


def test_what_is_refused(manager: Served) -> None:
    document = now(Registry(manager))
    with pytest.raises(InvalidArgument, match="needs a quota"):
        desired(document, {"groups": {"x": {}}})
    with pytest.raises(InvalidArgument, match="no storage is named 'tape'"):
        desired(document, {"groups": {"x": {"quota": 1, "storages": ["tape"]}}})


def test_nothing_declared_is_nothing_changed(manager: Served) -> None:
    document = now(Registry(manager))
    assert compare(document, desired(document, {})) == []
    assert compare(document, document) == []
    for group in document["groups"]:
        assert compare(document, desired(document, {"groups": {group["name"]: {}}})) == []


def test_config_apply(kvcm: Callable[..., Ran], manager: Served, tmp_path: Path) -> None:
    file = tmp_path / "kvcm.yaml"
    file.write_text("groups:\n  chat: {quota: 1MiB, storages: [files]}\n")
    apply = ("config", "apply", "--config", str(file), "--data-dir", str(manager.data_dir))
    planned = kvcm(*apply, "--dry-run", "--json").json
    assert planned["applied"] is False
    assert [(c["kind"], c["name"], c["new"]) for c in planned["changes"]] == [("group", "chat", True)]
    refused = kvcm(*apply)
    assert (refused.code, "--yes" in refused.err) == (1, True)
    assert kvcm(*apply, "--yes", "--json").json["applied"] is True
    again = kvcm(*apply, "--json").json
    assert again == {"applied": False, "changes": []}
    file.write_text("groups:\n  chat: {quota: 2MiB, high_water: 80%}\n")
    assert "quota.capacity 1048576 -> 2097152" in kvcm(*apply, "--dry-run").out
    assert kvcm(*apply, "--yes").code == 0
    assert kvcm("group", "show", "chat", "--json").json["quota"]["capacity"] == str(2 << 20)


def test_config_commands(kvcm: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 7001\n")
    shown = kvcm("config", "show", "--origin", "--config", str(file), "--replicas", "5", "--json").json
    assert shown["settings"]["port"] == 7001
    assert shown["origins"]["port"] == f"file {file}:1"
    assert shown["origins"]["replicas"] == "flag --replicas"
    assert "default" in kvcm("config", "show", "--origin").out
    good = kvcm("config", "check", str(file))
    assert (good.code, "is good" in good.out) == (0, True)
    file.write_text("prot: 7001\n")
    bad = kvcm("config", "check", str(file), "--json")
    assert bad.code == 4
    assert bad.json["problems"] == [
        {"where": f"{file}:1", "key": "prot", "message": "unknown key; did you mean 'port'?"}
    ]
    assert kvcm("config", "show", "--config", str(file)).code == 1
    about = kvcm("config", "explain", "groups.chat.high_water", "--json").json
    assert (about["key"], about["variable"]) == (
        "groups.NAME.high_water", "KVCM_GROUPS__NAME__HIGH_WATER",
    )  # fmt: skip
    assert "when raised" in kvcm("config", "explain", "replicas").out
    wrong = kvcm("config", "explain", "replcas")
    assert (wrong.code, "did you mean 'replicas'?" in wrong.err) == (1, True)
    assert len(kvcm("config", "explain", "--json").json["keys"]) > 20
    assert kvcm("config", "example").out.startswith("# Configuration")


# ------------------------------------------------------------------------------------- snapshots


def test_snapshot_there_and_back(kvcm: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "snapshot.json"
    assert kvcm("group", "create", "kept", "--quota", "1MiB", "--storage", "files").code == 0
    saved = kvcm("snapshot", "save", str(file), "--json").json
    assert saved["groups"] >= 2
    assert file.stat().st_mode & 0o777 == 0o600
    assert kvcm("snapshot", "load", str(file), "--yes", "--json").json == {"loaded": False, "changes": []}
    assert kvcm("group", "update", "kept", "--quota", "3MiB").code == 0
    shown = kvcm("snapshot", "load", str(file), "--dry-run")
    assert "group kept: quota.capacity 3145728 -> 1048576" in shown.out
    assert kvcm("snapshot", "load", str(file)).code == 1, "nobody said yes"
    assert kvcm("snapshot", "load", str(file), "--yes", "--json").json["loaded"] is True
    assert kvcm("group", "show", "kept", "--json").json["quota"]["capacity"] == str(1 << 20)
    assert json.loads(kvcm("snapshot", "save", "-").out)["kvcm_snapshot"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kvcm_snapshot": 1, "groups": [{}]}'])
def test_what_is_no_snapshot(kvcm: Callable[..., Ran], tmp_path: Path, text: str) -> None:
    file = tmp_path / "no.json"
    file.write_text(text)
    ran = kvcm("snapshot", "load", str(file), "--yes")
    assert (ran.code, "is no snapshot" in ran.err) == (1, True)


def test_a_snapshot_that_cannot_be_written(kvcm: Callable[..., Ran], tmp_path: Path) -> None:
    ran = kvcm("snapshot", "save", str(tmp_path / "no" / "where.json"))
    assert (ran.code, "cannot write" in ran.err) == (1, True)
