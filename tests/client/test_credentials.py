"""Tokens, passwords and certificates, shown to real managers that ask for accounts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcm_ray.actors.accounts import new_token
from kvcm_ray.actors.paths import admin_token_file
from kvcm_ray.client import Client, connect, connect_async
from kvcm_ray.client.credentials import Credentials
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.core.model import AccessSettings, AccountRole
from kvcm_ray.errors import Forbidden, InvalidArgument, Unauthenticated, Unavailable
from kvcm_ray.testing.access import PASSWORD, cheap_passwords
from kvcm_ray.testing.certificates import make_certificate
from kvcm_ray.testing.served import Served, served

SIZE = 64


class Locked:
    """A manager that asks for accounts; ``engines`` may use the group ``default``."""

    def __init__(self, manager: Served) -> None:
        self.url, self.data_dir = manager.url, manager.data_dir
        self._backend = manager.backend
        self.registry("add_account", "admin", PASSWORD, AccountRole.ROLE_ADMIN)
        self.registry("add_account", "engines", PASSWORD, AccountRole.ROLE_USER, ("default",))
        self.require(True)

    def registry(self, method: str, *args: Any) -> Any:
        return asyncio.run(self._backend.registry(method, *args))

    def require(self, required: bool) -> None:
        self.registry("set_access", AccessSettings(required))

    def token(self) -> tuple[str, Callable[[], Any]]:
        """A fresh one, and what revokes it."""
        secret, token = new_token("engines")
        self.registry("add_token", token)
        return secret, lambda: self.registry("revoke_token", token.token_id)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVCM_TOKEN", "KVCM_TOKEN_FILE", "KVCM_CA_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Locked]:
    cheap_passwords(monkeypatch)
    with served(tmp_path / "data") as manager:
        yield Locked(manager)


def use(client: Client, name: str = "default/i") -> None:
    """Write, read and report; raises what goes wrong."""
    cache = client.register(name, block_size=4, specs={"tp0": SIZE})
    stored = cache.put([1, 2], bytes(2 * SIZE))
    assert (stored + stored.existed, stored.error) == (2, None)
    found = cache.match([1, 2, 3])
    assert (found.length, found.error) == (2, None)
    client.flush_touches()


def test_a_token_by_argument_by_environment_and_from_a_file(
    locked: Locked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, _ = locked.token()
    file = tmp_path / "token"
    file.write_text(f"{secret}\n")
    for address in (locked.url, locked.data_dir):
        for token in (secret, file):
            with connect(address, token=token) as client:
                use(client)
        with connect(address, token="wrong") as client, pytest.raises(Unauthenticated):
            client.register("default/new", block_size=4, specs={"tp0": SIZE})
    with connect(locked.url) as client, pytest.raises(Unauthenticated):
        client.instance("default/i")
    monkeypatch.setenv("KVCM_TOKEN_FILE", str(file))
    with connect(locked.url) as client:
        use(client)
    monkeypatch.setenv("KVCM_TOKEN", "wrong")  # goes before the file
    with connect(locked.url) as client, pytest.raises(Unauthenticated):
        client.instance("default/i")


def test_an_event_loop_shows_its_token_too(locked: Locked) -> None:
    secret, _ = locked.token()

    async def scene() -> None:
        for address in (locked.url, locked.data_dir):
            async with await connect_async(address, token=secret) as client:
                cache = await client.register("default/a", block_size=4, specs={"tp0": SIZE})
                assert (await cache.put([1], bytes(SIZE))).error is None
                assert (await cache.match([1])).length == 1
                await client.flush_touches()

    asyncio.run(scene())


def test_a_user_and_password_in_the_url_are_sent_and_not_shown(locked: Locked) -> None:
    with connect(locked.url.replace("//", f"//engines:{PASSWORD.replace(' ', '%20')}@")) as client:
        use(client)
        assert client.address == locked.url
    with connect(locked.url.replace("//", "//engines:wrong@")) as client:
        with pytest.raises(Unauthenticated) as refused:
            client.instance("default/i")
        assert "wrong@" not in str(refused.value)


def test_what_an_account_may_not_do(locked: Locked) -> None:
    secret, _ = locked.token()
    from kvcm_ray.client.runtime import drive

    api = HttpBackend(locked.url, blocking=True, credentials=Credentials(secret))
    with pytest.raises(Forbidden):
        drive(api.post("addAccount", {"user_name": "x", "password": "y", "role": "ROLE_USER"}, 5))
    drive(api.close())


def test_a_renewed_token_is_read_from_its_file(locked: Locked, tmp_path: Path) -> None:
    file = tmp_path / "token"
    secret, revoke = locked.token()
    file.write_text(secret)
    with connect(locked.url, token=file) as client:
        use(client)
        revoke()
        file.unlink()  # in between; the old one is refused
        with pytest.raises(Unauthenticated):
            client.instance("default/i")
        file.write_text(locked.token()[0])
        use(client)


def test_who_may_read_the_data_directory_needs_no_other_token(locked: Locked) -> None:
    locked.require(False)
    with connect(locked.data_dir, ray=False) as client:
        use(client)
        locked.require(True)  # nobody can use it yet
        assert isinstance(client.instance("default/i").put([9], bytes(SIZE)).error, Unauthenticated)
        admin_token_file(locked.data_dir).write_text(locked.token()[0])
        use(client)


@pytest.mark.parametrize("token", ["", "two words", "ümlaut", "line\nbreak"])
def test_what_is_no_token_is_told_at_once(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    with pytest.raises(InvalidArgument, match="no token"):
        connect("http://127.0.0.1:9", token=file)
    if token:
        with pytest.raises(InvalidArgument, match="no token"):
            connect("http://127.0.0.1:9", token=token)


def test_a_token_is_not_in_what_is_printed() -> None:
    assert "secret" not in repr(Credentials("secret"))
    with pytest.raises(InvalidArgument, match="cannot read a token"):
        connect("http://127.0.0.1:9", token=Path("/no/such/file"))


def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_certificate(tmp_path)
    with served(tmp_path / "data", tls=made) as manager:
        assert manager.url.startswith("https://")
        for address in (manager.url, manager.data_dir):
            with connect(address, ca_file=made.cert) as client:
                use(client)
        with connect(manager.url) as client, pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            client.instance("default/i")
        monkeypatch.setenv("KVCM_CA_FILE", str(made.cert))
        with connect(manager.url) as client:
            use(client)
    (tmp_path / "empty").touch()
    for wrong in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(InvalidArgument, match="no certificates"):
            connect("https://127.0.0.1:9", ca_file=wrong)
