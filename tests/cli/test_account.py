"""``kvcm account`` and how commands find their credentials."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcm_ray.cluster import door
from kvcm_ray.testing.commands import Ran
from kvcm_ray.testing.served import Served, served


class _Registry:
    """The registry as its handle is called."""

    def __init__(self, found: Served) -> None:
        self._backend = found.backend

    def call_sync(self, method: str, *args: object) -> object:
        backend = self._backend
        return backend._thread.submit(backend._registry.call, "", method, *args).result()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One that requires accounts."""
    with served(Path(tmp_path_factory.mktemp("guarded")) / "data") as found:
        door.apply(_Registry(found), found.data_dir, True, lambda _: None)
        yield found


def test_accounts_and_tokens(
    kvcm: Callable[..., Ran], manager: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kvcm("account", "add", "eng", "--group", "default", "--json").json["instance_groups"] == [
        "default"
    ]
    kvcm("account", "add", "all", "--all-groups")
    file = tmp_path / "token"
    kvcm("account", "token", "create", "eng", "--save", str(file), "--lifetime", "1h")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    by_url = ("--url", manager.url)
    assert kvcm("status", *by_url).code == 1
    assert kvcm("status", *by_url, "--token-file", str(file)).code == 0
    assert kvcm("status", *by_url, "--token", file.read_text().strip()).code == 0
    assert "KVCM-P002" in kvcm("account", "list", *by_url, "--token-file", str(file)).err
    monkeypatch.setenv("KVCM_TOKEN_FILE", str(file))
    assert kvcm("status", *by_url).code == 0
    assert kvcm("account", "list").code == 1  # the environment beats the token of the data directory
    monkeypatch.delenv("KVCM_TOKEN_FILE")
    listed = kvcm("account", "token", "list", "--json").json["tokens"]
    (token_id,) = [t["token_id"] for t in listed if t["user_name"] == "eng"]
    kvcm("account", "token", "revoke", token_id)
    assert kvcm("status", *by_url, "--token-file", str(file)).code == 1


def test_passwords(kvcm: Callable[..., Ran], manager: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))
    assert kvcm("account", "add", "ada", "--role", "admin", "--password-stdin").code == 0
    url = manager.url.replace("http://", "http://ada:{}@")
    assert kvcm("account", "list", "--url", url.format("first")).code == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("second\n"))
    assert kvcm("account", "password", "ada", "--password-stdin").code == 0
    assert kvcm("account", "list", "--url", url.format("first")).code == 1
    assert kvcm("account", "list", "--url", url.format("second")).code == 0
    assert kvcm("account", "remove", "ada", "--yes").code == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no password on standard input" in kvcm("account", "password", "eng", "--password-stdin").err


def test_the_log_of_it(kvcm: Callable[..., Ran]) -> None:
    kvcm("account", "add", "eve", "--all-groups")
    kvcm("account", "update", "eve", "--group", "default")
    kvcm("account", "remove", "eve", "--yes")
    entries = kvcm("account", "audit", "--limit", "3", "--json").json["entries"]
    assert [entry["call"] for entry in entries] == ["AddAccount", "UpdateAccount", "DeleteAccount"]
    assert "UpdateAccount" in kvcm("account", "audit").out


@pytest.mark.parametrize(
    "words",
    [
        ("add", "x"),
        ("add", "x", "--role", "admin", "--group", "g"),
        ("add", "x", "--group", "g", "--all-groups"),
        ("update", "x"),
        ("token", "create", "x", "--lifetime", "1h", "--no-expiry"),
    ],
)
def test_wrong_usage(kvcm: Callable[..., Ran], words: tuple[str, ...]) -> None:
    assert kvcm("account", *words).code == 2


def test_a_password_is_not_shown(kvcm: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hush-hush\n"))
    ran = kvcm("account", "add", "quiet", "--all-groups", "--password-stdin", "--curl")
    assert "/api/addAccount" in ran.err
    assert "hush" not in ran.err + ran.out
    assert "$KVCM_TOKEN" in ran.err
