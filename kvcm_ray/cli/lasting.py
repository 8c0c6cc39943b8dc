"""Calls of a manager for commands that go on for long: it may go away and come back, at another URL too.

The first call fails as that of any command does. Later ones that may be tried again are the caller's to
`miss`: standard error is told once that somebody is away, and once that they are back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvcm_ray.cli.output import note
from kvcm_ray.cli.target import Api, Target, open_api
from kvcm_ray.client.http import NotReached
from kvcm_ray.errors import KvcmError, Unavailable

MANAGER = "the manager"


class Lasting:
    """
    Args:
        say: takes each sentence about who went and came back.
    """

    def __init__(self, target: Target, say: Callable[[str], None]) -> None:
        self._target = target
        self._say = say
        self._stack = ExitStack()
        self._api: Api | None = None
        self.away: dict[str, str] = {}  #: why, by who

    def call(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """Raises as `Api.call`; NotReached also if no manager runs on the data directory."""
        try:
            if self._api is None:
                self._api = self._open()
            answer = self._api.call(name, **fields)
        except NotReached:
            self.close()  # it may come back elsewhere
            raise
        self.seen(MANAGER)
        return answer

    def miss(self, who: str, error: KvcmError) -> None:
        """Go on without `who` for now. Raises the error if trying again does not help."""
        if not error.retryable:
            raise error
        who = MANAGER if isinstance(error, NotReached) else who
        if who not in self.away:
            self._say(f"{who} is away: {error.message}")
        self.away[who] = error.message

    def seen(self, who: str) -> None:
        if self.away.pop(who, None) is not None:
            self._say(f"{who} is back")

    def close(self) -> None:
        self._api = None
        self._stack.close()

    def _open(self) -> Api:
        try:
            return self._stack.enter_context(open_api(self._target))
        except Unavailable as error:
            raise NotReached(error.message) from error


@contextmanager
def lasting(target: Target, say: Callable[[str], None] = note) -> Iterator[Lasting]:
    api = Lasting(target, say)
    try:
        yield api
    finally:
        api.close()
