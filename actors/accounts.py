"""Accounts and tokens: what the registry accepts. Pure functions on its records.

A user's `instance_groups` say which groups exist for it; nothing is implied, so an account without any
sees none. A token stands for its account and is known by a digest only: the secret is made by whoever
hands it out. While accounts are required, one with the role admin always stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Sequence

from kvcm_ray.actors.passwords import hash_password
from kvcm_ray.actors.registry_store import Contents
from kvcm_ray.actors.validate import check_name
from kvcm_ray.core.model import AccessSettings, Account, AccountRole, Token
from kvcm_ray.errors import (
    AccountNotFound,
    AlreadyExists,
    InUse,
    InvalidArgument,
    LimitReached,
    NotFound,
)

PASSWORD_BYTES_MAX = 1_024
SCOPE_GROUPS_MAX = 1_000
TOKENS_MAX = 10_000
TOKEN_PREFIX = "kvcm_"  #: lets scanners of source code find tokens that were committed
TOKEN_ID_LENGTH = 12
EXPIRED_KEPT_S = 30 * 86_400  #: expired tokens are listed so long


# --------------------------------------------------------------------------------------- accounts


def check_account(account: Account) -> None:
    """Raises `InvalidArgument`."""
    check_name("user_name", account.user_name)
    if ":" in account.user_name:
        raise InvalidArgument(
            f"user_name {account.user_name!r} has a colon, which HTTP basic authentication cannot carry"
        )
    groups = account.instance_groups
    if groups and account.role == AccountRole.ROLE_ADMIN:
        raise InvalidArgument("an account with the role admin has no instance_groups: it knows all of them")
    if len(groups) > SCOPE_GROUPS_MAX:
        raise InvalidArgument(f"{len(groups)} instance_groups, at most {SCOPE_GROUPS_MAX} are allowed")
    for name in groups:
        check_name("instance_groups", name)


def added(now: Contents, name: str, password: str, role: AccountRole, groups: Sequence[str]) -> Account:
    """Raises `AlreadyExists`, `InvalidArgument`."""
    if name in now.accounts:
        raise AlreadyExists(f"account {name!r} exists")
    account = Account(name, AccountRole(role), "", tuple(sorted(set(groups))))
    check_account(account)
    return dataclasses.replace(account, password_hash=_hashed(password))


def changed(
    now: Contents, name: str, password: str, role: AccountRole | None, groups: Sequence[str]
) -> Account:
    """Raises `AccountNotFound`, `InvalidArgument`, `InUse`."""
    account = _account(now, name)
    new_role = account.role if role is None else AccountRole(role)
    if new_role != AccountRole.ROLE_ADMIN:
        _check_not_last_admin(now, name)
    kept = () if new_role == AccountRole.ROLE_ADMIN else account.instance_groups
    scope = tuple(sorted(set(groups))) or kept
    hashed = _hashed(password) if password else account.password_hash
    account = Account(name, new_role, hashed, scope)
    check_account(account)
    return account


def removed(now: Contents, name: str) -> list[tuple[type, str]]:
    """The records to drop: the account and its tokens. Raises `AccountNotFound`, `InUse`."""
    _account(now, name)
    _check_not_last_admin(now, name)
    tokens = [digest for digest, token in now.tokens.items() if token.user_name == name]
    return [(Account, name), *((Token, digest) for digest in tokens)]


def check_access(now: Contents, settings: AccessSettings) -> None:
    if settings.required and not _admins(now):
        raise InvalidArgument("accounts cannot be required while no account has the role admin")


def _hashed(password: str) -> str:
    if len(password.encode(errors="surrogatepass")) > PASSWORD_BYTES_MAX:
        raise InvalidArgument(f"a password has at most {PASSWORD_BYTES_MAX} bytes")
    return hash_password(password) if password else ""


def _account(now: Contents, name: str) -> Account:
    found = now.accounts.get(name)
    if found is None:
        raise AccountNotFound(f"no account {name!r}")
    return found


def _admins(now: Contents) -> list[str]:
    return [a.user_name for a in now.accounts.values() if a.role == AccountRole.ROLE_ADMIN]


def _check_not_last_admin(now: Contents, name: str) -> None:
    if now.access.required and _admins(now) == [name]:
        raise InUse(
            f"{name!r} is the last account with the role admin, and this manager requires accounts",
            hint="Add another one with the role admin first.",
        )


# ----------------------------------------------------------------------------------------- tokens


def new_token(
    user_name: str, *, label: str = "", lifetime_s: int = 0, metrics_only: bool = False
) -> tuple[str, Token]:
    """A fresh secret of 256 bits and what is kept of it.

    Args:
        lifetime_s: seconds until it expires; 0 for never.
    """
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    digest, now_s = digest_of_secret(secret), int(time.time())
    expires_s = now_s + lifetime_s if lifetime_s else 0
    return secret, Token(digest, digest[:TOKEN_ID_LENGTH], user_name, label, metrics_only, now_s, expires_s)


def digest_of_secret(secret: str) -> str:
    """A fast hash will do: nobody can guess 256 random bits."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def checked_token(now: Contents, token: Token, now_s: int) -> list[tuple[type, str]]:
    """The stale tokens to drop. Raises `AccountNotFound`, `InvalidArgument`, `LimitReached`."""
    _account(now, token.user_name)
    if token.label:
        check_name("label", token.label)
    stale = [d for d, t in now.tokens.items() if 0 < t.expires_s < now_s - EXPIRED_KEPT_S]
    if len(now.tokens) - len(stale) >= TOKENS_MAX:
        raise LimitReached(f"there are {TOKENS_MAX} tokens; revoke some first")
    return [(Token, digest) for digest in stale]


def digest_of(now: Contents, token_id: str) -> str:
    """Raises `NotFound`."""
    for digest, token in now.tokens.items():
        if token.token_id == token_id:
            return digest
    raise NotFound(f"no token {token_id!r}; `kvcm account token list` shows the ids")
