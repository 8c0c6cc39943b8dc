"""Password hashes of accounts: scrypt with a random salt, compared in constant time.

One hash takes 16 MiB and about a quarter of a second on purpose, so callers do it off the event loop. The
parameters stand in the hash, so that raising them later leaves old passwords valid.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

_N, _R, _P = 2**14, 8, 5
#: A hash that no password has, for accounts that do not exist: refusing those takes as long.
NOBODYS_HASH = f"scrypt${_N}${_R}${_P}${'0' * 32}${'0' * 64}"


def hash_password(password: str) -> str:
    """``scrypt$n$r$p$salt$hash``, the last two in hexadecimal."""
    salt = secrets.token_bytes(16)
    return f"scrypt${_N}${_R}${_P}${salt.hex()}${_scrypt(password, salt, _N, _R, _P).hex()}"


def check_password(password_hash: str, password: str) -> bool:
    """False also for an account that has no password."""
    try:
        kind, n, r, p, salt, digest = password_hash.split("$")
        made = _scrypt(password, bytes.fromhex(salt), int(n), int(r), int(p))
    except ValueError:
        return False
    return kind == "scrypt" and hmac.compare_digest(made.hex(), digest)


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, dklen=32)
