"""A manager with accounts in this process: two tenants, an admin, and every kind of credentials.

Groups ``mine`` and ``theirs`` with an instance each, ``mine/i1`` and ``theirs/i1``.
"""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvcm_ray.actors import passwords
from kvcm_ray.actors.accounts import new_token
from kvcm_ray.core.model import AccessSettings, AccountRole
from kvcm_ray.serve_app.access import credentials
from kvcm_ray.serve_app.access.limits import Buckets
from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.testing.http import Http, default_group, registration

USERS = {"user": ("mine",), "stranger": ("theirs",), "scopeless": (), "all_groups": ("*",)}
PASSWORD = "correct horse"


def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that take microseconds: what is tested is who gets in."""
    monkeypatch.setattr(passwords, "_N", 2)
    monkeypatch.setattr(passwords, "_P", 1)
    monkeypatch.setattr(credentials, "NOBODYS_HASH", f"scrypt$2$8$1${'0' * 32}${'0' * 64}")


class Guarded(Http):
    """The application of a manager that requires accounts."""

    def __init__(self, data_dir: Path, options: GatewayOptions | None = None) -> None:
        super().__init__(data_dir, options)
        self.start_default(data_dir / "files")
        self.tokens: dict[str, str] = {}
        for name in ("mine", "theirs"):
            self.registry("create_group", replace(default_group(), name=name))
        for name, groups in USERS.items():
            self.registry("add_account", name, PASSWORD, AccountRole.ROLE_USER, groups)
        self.registry("add_account", "admin", PASSWORD, AccountRole.ROLE_ADMIN)
        for name in (*USERS, "admin"):
            self.tokens[name] = self.token(name)
        for group in ("mine", "theirs"):
            request = registration(f"{group}/i1") | {"instance_group": group}
            self.ok("registerInstance", **request)
            self.write(f"{group}/i1", [1, 2, 3])
        self.set_required(True)

    def registry(self, method: str, *args: Any) -> Any:
        return self.run(self.backend.registry(method, *args))

    def set_required(self, required: bool) -> None:
        self.registry("set_access", AccessSettings(required))

    def token(self, name: str, **options: Any) -> str:
        """The secret of a fresh token."""
        secret, token = new_token(name, **options)
        self.registry("add_token", token)
        return secret

    def expired_token(self, name: str) -> str:
        secret, token = new_token(name)
        self.registry("add_token", replace(token, expires_s=int(time.time()) - 1))
        return secret

    def revoked_token(self, name: str) -> str:
        secret, token = new_token(name)
        self.registry("add_token", token)
        self.registry("revoke_token", token.token_id)
        return secret

    def allow_any_number_of_guesses(self) -> None:
        self.app.gate._credentials._guesses = Buckets(0, 0)

    def call(self, name: str, authorization: str | None, /, **request: Any) -> httpx.Response:
        headers = {} if authorization is None else {"authorization": authorization}
        response: httpx.Response = self.run(self.client.post(f"/api/{name}", json=request, headers=headers))
        return response

    def as_(self, who: str, name: str, /, **request: Any) -> httpx.Response:
        """A call with the token of an account."""
        return self.call(name, f"Bearer {self.tokens[who]}", **request)

    def page(self, path: str, authorization: str | None = None) -> httpx.Response:
        headers = {} if authorization is None else {"authorization": authorization}
        response: httpx.Response = self.run(self.client.get(path, headers=headers))
        return response

    def close(self) -> None:
        self.app.gate.close()
        super().close()


def basic(name: str, password: str = PASSWORD) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()
