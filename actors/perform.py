"""Makes effects true: one write transaction for each touched instance, in the one right order.

    files of new segments  →  records  →  commit of all transactions  →  files of dropped segments

A transaction is opened when its instance is first asked for, and nothing in it waits for anything but
the creation of an empty segment (some system calls every 64 MiB). If anything raises before the
commits, no transaction commits; if a commit raises, the later ones do not commit either and the caller
rebuilds its state from what the indexes say.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from kvcm_ray.core.effects import (
    AddBlocks,
    CreateSegment,
    DropBlocks,
    DropCopies,
    DropPin,
    DropSegment,
    DropSession,
    DropTrash,
    Effect,
    MoveBlocks,
    PutCopies,
    PutPin,
    PutSession,
    PutTrash,
    RememberAnswer,
)
from kvcm_ray.core.model import Segment
from kvcm_ray.index import IndexBatch, IndexWriter

#: Effects that are told after the commit, beside what was answered.
Noted = DropBlocks | MoveBlocks | DropSession


class Transaction:
    """All effects of one micro-batch of one group.

    Args:
        writers: index of each open instance.
        create: makes the files of a new segment of an instance; raises `StorageError`.
    """

    def __init__(
        self, writers: Mapping[str, IndexWriter], create: Callable[[str, Segment], None]
    ) -> None:
        self._writers = writers
        self._create = create
        self._stack = contextlib.ExitStack()
        self._open: dict[str, IndexBatch] = {}
        self.created: list[tuple[str, Segment]] = []
        self.dropped: list[tuple[str, int]] = []  #: their files may go once this is committed
        self.noted: list[Noted] = []  #: blocks that go or move, sessions that expire
        self.commit_s = 0.0  #: how long committing took

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        began = time.perf_counter()
        self._stack.__exit__(kind, error, trace)
        self.commit_s = time.perf_counter() - began

    def index(self, instance_id: str) -> IndexBatch:
        """The instance's transaction. Raises `Fenced` if a newer incarnation owns the index."""
        batch = self._open.get(instance_id)
        if batch is None:
            batch = self._stack.enter_context(self._writers[instance_id].begin())
            self._open[instance_id] = batch
        return batch

    def perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            _PERFORM[type(effect)](self, effect)

    def _create_segment(self, effect: CreateSegment) -> None:
        self._create(effect.instance_id, effect.segment)
        self.created.append((effect.instance_id, effect.segment))
        self.index(effect.instance_id).put_segment(effect.segment)

    def _drop_segment(self, effect: DropSegment) -> None:
        self.index(effect.instance_id).drop_segment(effect.segment_id)
        self.dropped.append((effect.instance_id, effect.segment_id))

    def _put_session(self, effect: PutSession) -> None:
        self.index(effect.instance_id).put_session(effect.record)

    def _drop_session(self, effect: DropSession) -> None:
        self.index(effect.instance_id).drop_session(effect.session_id)
        if effect.expired:
            self.noted.append(effect)

    def _add_blocks(self, effect: AddBlocks) -> None:
        self.index(effect.instance_id).add_blocks(
            effect.keys, effect.locations, effect.parent_key, effect.written_s
        )

    def _drop_blocks(self, effect: DropBlocks) -> None:
        self.index(effect.instance_id).remove_blocks(effect.keys)
        self.noted.append(effect)

    def _move_blocks(self, effect: MoveBlocks) -> None:
        self.index(effect.instance_id).move_blocks(effect.keys, effect.locations)
        self.noted.append(effect)

    def _put_copies(self, effect: PutCopies) -> None:
        self.index(effect.instance_id).put_copies(effect.keys, effect.locations)

    def _drop_copies(self, effect: DropCopies) -> None:
        self.index(effect.instance_id).drop_copies(effect.keys)

    def _put_pin(self, effect: PutPin) -> None:
        self.index(effect.instance_id).put_pin(effect.record)

    def _drop_pin(self, effect: DropPin) -> None:
        self.index(effect.instance_id).drop_pin(effect.name)

    def _put_trash(self, effect: PutTrash) -> None:
        self.index(effect.instance_id).put_trash(effect.record)

    def _drop_trash(self, effect: DropTrash) -> None:
        batch = self.index(effect.instance_id)
        for trash_id in effect.trash_ids:
            batch.drop_trash(trash_id)

    def _remember(self, effect: RememberAnswer) -> None:
        self.index(effect.instance_id).remember(effect.event_id, effect.reply_bytes)


_PERFORM: dict[type, Callable[..., None]] = {
    CreateSegment: Transaction._create_segment,
    DropSegment: Transaction._drop_segment,
    PutSession: Transaction._put_session,
    DropSession: Transaction._drop_session,
    AddBlocks: Transaction._add_blocks,
    DropBlocks: Transaction._drop_blocks,
    MoveBlocks: Transaction._move_blocks,
    PutCopies: Transaction._put_copies,
    DropCopies: Transaction._drop_copies,
    PutPin: Transaction._put_pin,
    DropPin: Transaction._drop_pin,
    PutTrash: Transaction._put_trash,
    DropTrash: Transaction._drop_trash,
    RememberAnswer: Transaction._remember,
}
