"""Who sends a request, as far as the rest of the gateway has to know."""

from __future__ import annotations

from dataclasses import dataclass

ADMIN, USER, METRICS, NOBODY = "admin", "user", "metrics", "nobody"


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller, known by its credentials or by having none.

    Args:
        name: of the account; "" for nobody in particular (an open manager).
        role: "admin", "user", "metrics" (reads the metrics and nothing else) or "nobody".
        groups: instance groups that exist for this caller; None for all of them.
        peer: address that the request came from.
    """

    name: str = ""
    role: str = ADMIN
    groups: frozenset[str] | None = None
    peer: str = ""

    def sees(self, group: str) -> bool:
        """Whether an instance group exists for this caller."""
        return self.groups is None or group in self.groups


ANYONE = Caller()
#: Somebody without credentials, where accounts are required but this page is open.
STRANGER = Caller("", NOBODY, frozenset())
