"""The life of a block, as one table.

    ABSENT --start--> WRITING --finish ok--> SERVING --remove--> DELETING --confirmed--> ABSENT
                         \\--failed, expired, removed----------------^

A block's state is never stored as a number: it *is* the table of the index that holds the block
(session record, run, trash record, none), so the states cannot disagree.
"""

from __future__ import annotations

import enum


class BlockState(enum.IntEnum):
    """Numbers are the wire's CLS_* numbers."""

    ABSENT = 0
    WRITING = 2
    SERVING = 3
    DELETING = 4


class BlockEvent(enum.StrEnum):
    START = "start"
    FINISHED = "finished"
    FAILED = "failed"  #: the writer said so
    EXPIRED = "expired"
    REMOVED = "removed"
    DELETED = "deleted"  #: the reclaimer confirmed that the bytes are gone


TRANSITIONS: dict[tuple[BlockState, BlockEvent], BlockState] = {
    (BlockState.ABSENT, BlockEvent.START): BlockState.WRITING,
    (BlockState.WRITING, BlockEvent.FINISHED): BlockState.SERVING,
    (BlockState.WRITING, BlockEvent.FAILED): BlockState.DELETING,
    (BlockState.WRITING, BlockEvent.EXPIRED): BlockState.DELETING,
    (BlockState.WRITING, BlockEvent.REMOVED): BlockState.DELETING,
    (BlockState.SERVING, BlockEvent.REMOVED): BlockState.DELETING,
    (BlockState.DELETING, BlockEvent.DELETED): BlockState.ABSENT,
}

WIRE_NAMES = {
    BlockState.ABSENT: "CLS_NOT_FOUND",
    BlockState.WRITING: "CLS_WRITING",
    BlockState.SERVING: "CLS_SERVING",
    BlockState.DELETING: "CLS_DELETING",
}
