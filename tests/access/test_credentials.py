"""Who gets in: passwords, tokens, their ends, and what they cost."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvcm_ray.actors import passwords
from kvcm_ray.actors.accounts import new_token
from kvcm_ray.actors.registry_store import Contents
from kvcm_ray.core.model import Account, AccountRole, Token
from kvcm_ray.errors import TooManyRequests, Unauthenticated
from kvcm_ray.serve_app.access import credentials as module
from kvcm_ray.serve_app.access.credentials import Credentials
from kvcm_ray.serve_app.access.limits import Buckets
from kvcm_ray.testing.access import Guarded, basic, cheap_passwords


def contents(*accounts: Account, tokens: tuple[Token, ...] = ()) -> Contents:
    return Contents(1, {}, {}, {}, {a.user_name: a for a in accounts}, None, {t.digest: t for t in tokens})


def test_hashes_are_salted_and_say_how_they_were_made() -> None:
    one, two = passwords.hash_password("x"), passwords.hash_password("x")
    assert one != two
    assert one.startswith("scrypt$16384$8$5$")
    assert passwords.check_password(one, "x")
    assert not passwords.check_password(one, "y")
    assert not passwords.check_password(passwords.NOBODYS_HASH, "x")
    assert not passwords.check_password("", "")


def test_a_hash_of_an_earlier_version_still_counts() -> None:
    digest = passwords._scrypt("x", b"s" * 16, 2**14, 8, 1).hex()
    assert passwords.check_password(f"scrypt$16384$8$1${(b's' * 16).hex()}${digest}", "x")


def test_a_password_is_hashed_once_and_then_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)
    checks: list[str] = []

    def counted(known: str, password: str) -> bool:
        checks.append(password)
        return passwords.check_password(known, password)

    monkeypatch.setattr(module, "check_password", counted)
    account = Account("ada", AccountRole.ROLE_ADMIN, passwords.hash_password("one"))
    gate = Credentials()

    async def ask(now: Contents, password: str) -> str:
        return (await gate.caller(now, basic("ada", password), "peer")).name

    async def scenario() -> None:
        now = contents(account)
        for _ in range(3):
            assert await ask(now, "one") == "ada"
        assert checks == ["one"]
        changed = contents(replace(account, password_hash=passwords.hash_password("two")))
        with pytest.raises(Unauthenticated):
            await ask(changed, "one")  # what was remembered counts for the old hash only
        assert await ask(changed, "two") == "ada"
        with pytest.raises(Unauthenticated):
            await ask(contents(), "two")

    asyncio.run(scenario())
    gate.close()


def test_what_is_remembered_is_bounded_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)
    monkeypatch.setattr(module, "REMEMBERED_MAX", 2)
    gate = Credentials()
    for name in "abc":
        gate._remember(name, "p", "hash")
    assert [gate._recently(name, "p", "hash") for name in "abc"] == [False, True, True]
    monkeypatch.setattr(module, "REMEMBERED_S", -1.0)
    gate._remember("d", "p", "hash")
    assert not gate._recently("d", "p", "hash")


def test_guessing_is_slow_and_does_not_lock_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)
    gate = Credentials()
    gate._guesses = Buckets(0.001, 3)
    now = contents(Account("ada", AccountRole.ROLE_ADMIN, passwords.hash_password("right")))

    async def scenario() -> None:
        for _ in range(3):
            with pytest.raises(Unauthenticated):
                await gate.caller(now, basic("ada", "wrong"), "attacker")
        with pytest.raises(TooManyRequests) as refused:
            await gate.caller(now, basic("ada", "right"), "attacker")
        assert refused.value.details["retry_after_s"] > 1
        assert (await gate.caller(now, basic("ada", "right"), "office")).name == "ada"

    asyncio.run(scenario())
    gate.close()


def test_few_passwords_are_checked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of logins is refused, not queued."""
    monkeypatch.setattr(module, "check_password", lambda known, password: time.sleep(0.05) or False)
    gate = Credentials()
    now = contents()

    async def scenario() -> list[str]:
        tries = [gate.caller(now, basic(f"user{i}"), "peer") for i in range(40)]
        return [type(e).__name__ for e in await asyncio.gather(*tries, return_exceptions=True)]

    outcomes = asyncio.run(scenario())
    assert outcomes.count("Unauthenticated") == module.CHECKING_MAX
    assert outcomes.count("TooManyRequests") == 40 - module.CHECKING_MAX
    gate.close()


def test_a_bearer_token_costs_no_hash_of_passwords_and_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bool:
        raise AssertionError("a password was checked")

    monkeypatch.setattr(module, "check_password", never)
    secret, token = new_token("ada")
    now = contents(Account("ada", AccountRole.ROLE_USER, "", ("chat",)), tokens=(token,))
    gate = Credentials()
    caller = asyncio.run(gate.caller(now, f"Bearer {secret}", "peer"))
    assert (caller.name, caller.role, caller.groups) == ("ada", "user", frozenset({"chat"}))
    assert secret not in str(token)


def test_random_tokens_never_get_in() -> None:
    secret, token = new_token("ada")
    now = contents(Account("ada", AccountRole.ROLE_ADMIN), tokens=(token,))
    gate = Credentials()

    async def scenario() -> int:
        accepted = 0
        for i in range(20_000):
            try:
                await gate.caller(now, f"Bearer kvcm_{i:043d}", "peer")
                accepted += 1
            except Unauthenticated:
                pass
        return accepted

    assert asyncio.run(scenario()) == 0
    assert asyncio.run(gate.caller(now, f"Bearer {secret}", "peer")).name == "ada"


@pytest.mark.parametrize(
    "header",
    [
        "Basic",
        "Basic !!!",
        "Basic YQ==",
        "Basic " + "A" * 5000,
        "Basic //8=",
        "Bearer",
        "Bearer \udcff",
        "x y z",
        "",
    ],
)
def test_odd_headers_are_refused(header: str) -> None:
    gate = Credentials()
    with pytest.raises(Unauthenticated):
        asyncio.run(gate.caller(contents(), header, "peer"))
    gate.close()


# ------------------------------------------------------------------------------- through the app


def test_a_token_ends(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    made = guarded.as_("admin", "createToken", user_name="user", lifetime_s=3600).json()
    header = f"Bearer {made['secret']}"
    assert guarded.call("checkHealth", header).status_code == 200
    assert int(made["token"]["expires_s"]) - int(made["token"]["created_s"]) == 3600
    later = int(made["token"]["expires_s"])
    monkeypatch.setattr(module.time, "time", lambda: later)
    refused = guarded.call("checkHealth", header)
    assert refused.status_code == 401
    assert "has expired" in refused.text
    monkeypatch.undo()
    assert made["token"] in guarded.as_("admin", "listToken").json()["tokens"]


def test_revoking_and_removing_act_at_once(guarded: Guarded) -> None:
    made = guarded.as_("admin", "createToken", user_name="user", label="x").json()
    header = f"Bearer {made['secret']}"
    assert guarded.call("checkHealth", header).status_code == 200
    guarded.as_("admin", "revokeToken", token_id=made["token"]["token_id"])
    assert guarded.call("checkHealth", header).status_code == 401
    assert guarded.as_("user", "checkHealth").status_code == 200
    guarded.as_("admin", "deleteAccount", user_name="user")
    assert guarded.as_("user", "checkHealth").status_code == 401
    guarded.as_("admin", "addAccount", user_name="user", password="new", instance_groups=["mine"])
    assert guarded.as_("user", "checkHealth").status_code == 401  # its tokens do not come back


def test_secrets_are_nowhere_on_the_disk(guarded: Guarded) -> None:
    made = guarded.as_("admin", "createToken", user_name="user").json()
    guarded.as_("admin", "addAccount", user_name="eve", password="a-secret-password")
    guarded.as_("admin", "updateAccount", user_name="eve", password="another-secret-password")
    guarded.call("checkHealth", basic("eve", "a-mistyped-password"))
    snapshot = guarded.as_("admin", "genConfigSnapshot").json()["config_snapshot"]
    secrets = [made["secret"], *guarded.tokens.values(), "a-secret-password", "another-secret-password",
               "a-mistyped-password"]  # fmt: skip
    stored = [file.read_bytes() for file in guarded.data_dir.rglob("*") if file.is_file()]
    for secret in secrets:
        assert secret not in snapshot
        assert not any(secret.encode() in content for content in stored)
    assert "scrypt" not in snapshot
    answer = guarded.as_("admin", "listAccount").text + guarded.as_("admin", "listToken").text
    assert "scrypt" not in answer
    assert "digest" not in answer


def test_the_last_admin_stays(guarded: Guarded) -> None:
    removed = guarded.as_("admin", "deleteAccount", user_name="admin")
    assert "KVCM-C004" in removed.text
    demoted = guarded.as_("admin", "updateAccount", user_name="admin", role="ROLE_USER")
    assert "KVCM-C004" in demoted.text
    guarded.as_("admin", "addAccount", user_name="second", password="x", role="ROLE_ADMIN")
    assert '"OK"' in guarded.as_("admin", "deleteAccount", user_name="admin").text
    assert guarded.call("listAccount", basic("second", "x")).status_code == 200


def test_loading_a_snapshot_lets_nobody_in_and_locks_nobody_out(guarded: Guarded) -> None:
    text = guarded.as_("admin", "genConfigSnapshot").json()["config_snapshot"]
    evil = text.replace('"user_name": "admin",\n   "role": 1', '"user_name": "admin",\n   "role": 0')
    assert evil != text
    evil = evil.replace('"user_name": "scopeless"', '"user_name": "intruder"')
    loaded = guarded.as_("admin", "loadConfigSnapshot", config_snapshot=evil)
    assert loaded.json()["header"]["status"]["code"] == "OK", loaded.text
    accounts = {a["user_name"]: a["role"] for a in guarded.as_("admin", "listAccount").json()["accounts"]}
    assert accounts["admin"] == "ROLE_ADMIN"
    assert accounts["intruder"] == "ROLE_USER"
    assert guarded.call("checkHealth", basic("intruder", "")).status_code == 401
    assert guarded.page("/metrics").status_code == 401  # accounts are still required


def test_passwords_in_uris_are_masked_in_snapshots(tmp_path: Path) -> None:
    from kvcm_ray.core.model import MetaIndexerConfig, MetaStorageBackendConfig
    from kvcm_ray.testing.http import Http, default_group

    http = Http(tmp_path)
    http.start_default(tmp_path / "files")
    group = default_group()
    assert group.cache_config is not None
    backend = MetaStorageBackendConfig("redis", "redis://:hidden@host:6379?cluster_name=x")
    indexer = MetaIndexerConfig(max_key_count=9, meta_storage_backend_config=backend)
    group = replace(group, name="g", cache_config=replace(group.cache_config, meta_indexer_config=indexer))
    http.run(http.backend.registry("create_group", group))
    text = http.ok("genConfigSnapshot")["config_snapshot"]
    assert "hidden" not in text
    assert "redis://***@host" in text
    http.ok("loadConfigSnapshot", config_snapshot=text)
    assert http.backend.groups()["g"] == group  # what is masked is what was there
    http.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"user_name": "a:b"},
        {"user_name": ""},
        {"user_name": "x", "role": "ROLE_ADMIN", "instance_groups": ["mine"]},
        {"user_name": "x", "password": "p" * 1025},
        {"user_name": "x", "instance_groups": ["g" * 300]},
        {"user_name": "x", "instance_groups": [f"g{i}" for i in range(1001)]},
    ],
)
def test_accounts_that_cannot_be(crowd: Guarded, fields: dict[str, object]) -> None:
    answer = crowd.as_("admin", "addAccount", **fields)
    assert answer.json()["header"]["status"]["code"] == "INVALID_ARGUMENT", answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"user_name": "nobody"},
        {"user_name": "user", "lifetime_s": -1},
        {"user_name": "user", "lifetime_s": 10**12},
        {"user_name": "user", "lifetime_s": 5, "no_expiry": True},
    ],
)
def test_tokens_that_cannot_be(crowd: Guarded, fields: dict[str, object]) -> None:
    answer = crowd.as_("admin", "createToken", **fields)
    assert answer.json()["header"]["status"]["code"] != "OK"
    assert answer.json()["secret"] == ""
