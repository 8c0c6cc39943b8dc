"""From an ``Authorization`` header to an account, without a call to any other process.

A bearer token costs one hash and one look-up in what the replica has read of the registry. A password
costs scrypt, in a thread; a success is remembered for a while, so a client pays once. Both follow the
registry at once: a revoked token is gone from it, and a remembered success counts only while the account
has the password hash that it was checked against. Whatever is wrong, the answer is the same, except that
the owner of an expired token is told so.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import secrets
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from kvcm_ray.actors.accounts import PASSWORD_BYTES_MAX, digest_of_secret
from kvcm_ray.actors.passwords import NOBODYS_HASH, check_password
from kvcm_ray.actors.registry_store import Contents
from kvcm_ray.core.model import ALL_GROUPS, Account, AccountRole
from kvcm_ray.errors import TooManyRequests, Unauthenticated
from kvcm_ray.serve_app.access.caller import ADMIN, METRICS, USER, Caller
from kvcm_ray.serve_app.access.limits import Buckets

REMEMBERED_MAX = 1_024  #: successes
REMEMBERED_S = 300.0
CHECKING_THREADS = 2
CHECKING_MAX = 16  #: passwords that wait for a thread; more are refused at once
GUESSES_PER_S, GUESSES_BURST = 0.2, 10  #: for one account from one address

MISSING = "this manager requires an account: send `Authorization: Bearer <token>`, or user and password"
WRONG = "the credentials are not those of an account of this manager"


class Credentials:
    """Checks credentials; one for a replica, used on its event loop."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)
        self._remembered: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._guesses = Buckets(GUESSES_PER_S, GUESSES_BURST)
        self._threads: ThreadPoolExecutor | None = None
        self._checking = 0

    async def caller(self, contents: Contents, authorization: str, peer: str) -> Caller:
        """Raises `Unauthenticated`, `TooManyRequests`."""
        scheme, _, value = authorization.strip().partition(" ")
        if scheme.lower() == "bearer":
            return self._bearer(contents, value.strip(), peer)
        if scheme.lower() == "basic":
            return await self._basic(contents, value.strip(), peer)
        raise Unauthenticated(MISSING, missing=True)

    def _bearer(self, contents: Contents, secret: str, peer: str) -> Caller:
        token = contents.tokens.get(digest_of_secret(secret))
        account = contents.accounts.get(token.user_name) if token else None
        if token is None or account is None:
            raise Unauthenticated(WRONG)
        if 0 < token.expires_s <= time.time():
            raise Unauthenticated(f"token {token.token_id} of account {account.user_name!r} has expired")
        if token.metrics_only:
            return Caller(account.user_name, METRICS, frozenset(), peer)
        return _caller(account, peer)

    async def _basic(self, contents: Contents, value: str, peer: str) -> Caller:
        name, password = _name_and_password(value)
        account = contents.accounts.get(name)
        known = account.password_hash if account else ""
        if not self._recently(name, password, known):
            await self._check(name, password, known or NOBODYS_HASH, peer)
        assert account is not None, "nobody's hash has no password"
        return _caller(account, peer)

    async def _check(self, name: str, password: str, known: str, peer: str) -> None:
        wait_s = self._guesses.take(f"{peer} {name}")
        if wait_s or self._checking >= CHECKING_MAX:
            raise TooManyRequests("too many passwords are tried at a time", retry_after_s=wait_s or 1.0)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(CHECKING_THREADS, thread_name_prefix="passwords")
        self._checking += 1
        try:
            loop = asyncio.get_running_loop()
            right = await loop.run_in_executor(self._threads, check_password, known, password)
        finally:
            self._checking -= 1
        if not right:
            raise Unauthenticated(WRONG)
        self._remember(name, password, known)

    def _recently(self, name: str, password: str, known: str) -> bool:
        if not known:
            return False
        checked, until = self._remembered.get(self._key(name, password), ("", 0.0))
        return checked == known and time.monotonic() < until

    def _remember(self, name: str, password: str, known: str) -> None:
        self._remembered[self._key(name, password)] = (known, time.monotonic() + REMEMBERED_S)
        if len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)

    def _key(self, name: str, password: str) -> bytes:
        """Of a remembered success; tells nothing outside this process."""
        return hashlib.blake2b(f"{name}:{password}".encode(), key=self._salt).digest()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)


def _caller(account: Account, peer: str) -> Caller:
    if account.role == AccountRole.ROLE_ADMIN:
        return Caller(account.user_name, ADMIN, None, peer)
    groups = None if ALL_GROUPS in account.instance_groups else frozenset(account.instance_groups)
    return Caller(account.user_name, USER, groups, peer)


def _name_and_password(value: str) -> tuple[str, str]:
    if len(value) > 2 * PASSWORD_BYTES_MAX:
        raise Unauthenticated(WRONG)
    try:
        text = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise Unauthenticated("the basic credentials are not base64 of `user:password`") from None
    name, _, password = text.partition(":")
    return name, password
