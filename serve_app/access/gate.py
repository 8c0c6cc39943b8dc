"""The gate in front of every call: who is it, how fast, may they, and a note of what they did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcm_ray.actors.view import RegistryView
from kvcm_ray.errors import Forbidden, KvcmError, Refused, TooManyRequests, Unauthenticated
from kvcm_ray.serve_app.access.audit import AuditLog, shown
from kvcm_ray.serve_app.access.caller import STRANGER, Caller
from kvcm_ray.serve_app.access.credentials import Credentials
from kvcm_ray.serve_app.access.limits import Buckets
from kvcm_ray.serve_app.access.rules import page_role, rule_of, satisfies

if TYPE_CHECKING:
    from kvcm_ray.serve_app.endpoint import Endpoint

REFUSALS_NOTED_PER_S, REFUSALS_NOTED_BURST = 1.0, 20  #: in the audit log, of one address


class Gate:
    """Of one replica. Whether accounts are required is read from the registry's view on each call.

    Args:
        view: of the manager.
        requests_per_second: that one account may send, or one address while the manager is open; 0 for
            no limit. Each replica counts for itself.
        burst: requests that may come at once.
    """

    def __init__(self, view: RegistryView, requests_per_second: float = 0.0, burst: float = 0.0) -> None:
        self._view = view
        self._credentials = Credentials()
        self._pace = Buckets(requests_per_second, burst or 2 * requests_per_second)
        self._refusals = Buckets(REFUSALS_NOTED_PER_S, REFUSALS_NOTED_BURST)
        self.audit = AuditLog(Path(view.data_dir))

    async def identify(self, headers: Mapping[str, str], peer: str) -> Caller:
        """The caller behind a request's headers (names in lower case) or gRPC metadata.

        Raises:
            Unauthenticated: no credentials where they are required, or wrong ones.
            TooManyRequests: with the seconds to wait as ``details["retry_after_s"]``.
        """
        contents = self._view.contents()
        if not contents.access.required:
            self._slow_down(f"@{peer}")
            return Caller(peer=peer)
        try:
            caller = await self._credentials.caller(contents, headers.get("authorization", ""), peer)
        except Refused as error:
            self._note_refusal(peer, error)
            raise
        self._slow_down(caller.name)
        return caller

    async def visitor(self, path: str, headers: Mapping[str, str], peer: str) -> Caller:
        """The caller that reads a page. Raises as `identify`, and `Forbidden`."""
        least = page_role(path)
        if "authorization" not in headers and satisfies(STRANGER.role, least) and self.required:
            self._slow_down(f"@{peer}")
            return STRANGER
        caller = await self.identify(headers, peer)
        if not satisfies(caller.role, least):
            raise Forbidden(f"{path} is for the role {least}; account {caller.name!r} has another")
        return caller

    @property
    def required(self) -> bool:
        """Whether calls need an account."""
        return self._view.accounts_required()

    def check(self, caller: Caller, endpoint: Endpoint) -> None:
        """Raises `Forbidden`. What is outside of the caller's scope is refused by `scope`."""
        least = rule_of(endpoint.rpc).least
        if not satisfies(caller.role, least):
            raise Forbidden(f"{endpoint.rpc} needs the role {least}; account {caller.name!r} has another")

    def note(self, caller: Caller, endpoint: Endpoint, request: Any, error: KvcmError | None) -> None:
        """Called once after a call; writes those that change the manager to the audit log."""
        fields = rule_of(endpoint.rpc).audited
        if fields is None:
            return
        self.audit.write(
            {
                "account": caller.name,
                "role": caller.role,
                "from": caller.peer,
                "call": endpoint.rpc,
                "what": {name: shown(_value(request, name)) for name in fields},
                "result": "OK" if error is None else error.code,
                "trace_id": shown(request.trace_id),
            }
        )

    def _slow_down(self, who: str) -> None:
        wait_s = self._pace.take(who)
        if wait_s:
            raise TooManyRequests(
                "more requests than this manager's limit for one account or address", retry_after_s=wait_s
            )

    def _note_refusal(self, peer: str, error: KvcmError) -> None:
        """Wrong credentials are noted; missing ones, and floods of either, are not."""
        wrong = isinstance(error, Unauthenticated | TooManyRequests) and not error.details.get("missing")
        if wrong and not self._refusals.take(peer):
            entry = {"account": "", "from": peer, "call": "", "result": error.code, "why": error.message}
            self.audit.write(entry)

    def close(self) -> None:
        self._credentials.close()


def _value(request: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        request = getattr(request, name, None)
    return request
