"""The first answers to requests, for when the same event id comes again.

Bounded twice: by number and by the blocks that the answers speak of. The oldest ones go first.
"""

from __future__ import annotations

from typing import TypeVar

from kvcm_ray.core.limits import ANSWERS_REMEMBERED_MAX
from kvcm_ray.core.requests import Removed, WriteFinished, WriteStarted
from kvcm_ray.errors import InvalidArgument

ANSWER_BLOCKS_MAX = 4_194_304  #: about 16 bytes each

Answer = WriteStarted | WriteFinished | Removed
A = TypeVar("A", bound=Answer)


class Answers:
    """Answers of a group by (instance id, event id). The event id "" is never remembered."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], Answer] = {}
        self._blocks = 0

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, instance_id: str, event_id: str, kind: type[A]) -> A | None:
        """The first answer, if it is known.

        Raises:
            InvalidArgument: the event id belongs to another kind of request.
        """
        answer = self._answers.get((instance_id, event_id))
        if answer is None or isinstance(answer, kind):
            return answer
        raise InvalidArgument(
            f"event_id {event_id!r} was used before, for a request that got {type(answer).__name__}"
        )

    def remember(self, instance_id: str, event_id: str, answer: Answer) -> None:
        if not event_id:
            return
        self._forget((instance_id, event_id))
        self._answers[instance_id, event_id] = answer
        self._blocks += _blocks(answer)
        while len(self._answers) > ANSWERS_REMEMBERED_MAX or self._blocks > ANSWER_BLOCKS_MAX:
            self._forget(next(iter(self._answers)))

    def forget_instance(self, instance_id: str) -> None:
        for name in [name for name in self._answers if name[0] == instance_id]:
            self._forget(name)

    def _forget(self, name: tuple[str, str]) -> None:
        answer = self._answers.pop(name, None)
        if answer is not None:
            self._blocks -= _blocks(answer)


def _blocks(answer: Answer) -> int:
    return len(answer.exists) if isinstance(answer, WriteStarted) else 0
