"""What the gate needs of an HTTP request, and what a refusal adds to the answer."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

from kvcm_ray.errors import KvcmError, TooManyRequests, Unauthenticated

Scope = MutableMapping[str, Any]
Headers = list[tuple[bytes, bytes]]

_LOOPBACK = ("127.", "::1", "::ffff:127.")
_CHALLENGES: Headers = [
    (b"www-authenticate", b'Bearer realm="kvcm"'),
    (b"www-authenticate", b'Basic realm="kvcm", charset="UTF-8"'),
]


def sender_of(scope: Scope) -> tuple[dict[str, str], str]:
    """The headers that the gate reads, and the sender's address.

    The address is the connection's, or what our own proxy on this machine says of it. Two
    ``Authorization`` headers count as none: it must not matter who reads which.
    """
    client = scope.get("client")
    peer = str(client[0]) if client else ""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name == b"authorization":
            headers["authorization"] = "" if "authorization" in headers else value.decode("latin-1")
        elif name == b"x-forwarded-for" and peer.startswith(_LOOPBACK):
            peer = value.decode("latin-1").rpartition(",")[2].strip()[:64] or peer
    return headers, peer


def refusal_headers(error: KvcmError | None) -> Headers:
    """What tells a client how to go on."""
    if isinstance(error, Unauthenticated):
        return _CHALLENGES
    if isinstance(error, TooManyRequests):
        wait_s = max(1, math.ceil(float(error.details.get("retry_after_s", 1.0))))
        return [(b"retry-after", b"%d" % wait_s)]
    return []
