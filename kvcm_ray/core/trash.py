"""Blocks whose bytes are still to be erased: what is due, and what is being erased right now.

A record is *queued* until it is due and handed out, then *in flight* until its deletion is
confirmed or has failed (then it is queued again). It stays counted in the quota throughout.
"""

from __future__ import annotations

import heapq

from kvcm_ray.core.records import TrashRecord

_Name = tuple[str, int]  # (instance id, trash id)


class TrashTable:
    """All trash of a group."""

    def __init__(self) -> None:
        self.records: dict[_Name, TrashRecord] = {}
        self._queued: dict[_Name, int] = {}  #: due times of those that are not in flight
        self._heap: list[tuple[int, str, int]] = []  #: holds all of `_queued`, and stale entries

    def __len__(self) -> int:
        return len(self.records)

    def put(self, record: TrashRecord) -> None:
        name = record.instance_id, record.trash_id
        assert name not in self.records, "a trash id is used once"
        self.records[name] = record
        self._queue(name, record.due_ms)

    def hand_out(self, now_ms: int, limit: int) -> list[TrashRecord]:
        """At most `limit` due records, earliest first; they are in flight from now on."""
        out: list[TrashRecord] = []
        while len(out) < limit and (due := self.next_due_ms()) is not None and due <= now_ms:
            _, instance_id, trash_id = heapq.heappop(self._heap)
            del self._queued[instance_id, trash_id]
            out.append(self.records[instance_id, trash_id])
        return out

    def again(self, instance_id: str, trash_ids: tuple[int, ...], due_ms: int) -> None:
        """The deletion of these failed; queue those again that are in flight."""
        for trash_id in trash_ids:
            name = instance_id, trash_id
            if name in self.records and name not in self._queued:
                self._queue(name, due_ms)

    def take(self, instance_id: str, trash_id: int) -> TrashRecord | None:
        """Forget a record, as its bytes are gone; None if it is not known."""
        self._queued.pop((instance_id, trash_id), None)
        return self.records.pop((instance_id, trash_id), None)

    def of_instance(self, instance_id: str) -> list[TrashRecord]:
        return [r for (owner, _), r in self.records.items() if owner == instance_id]

    def next_due_ms(self) -> int | None:
        """Earliest due time of what is queued."""
        while self._heap:
            due, instance_id, trash_id = self._heap[0]
            if self._queued.get((instance_id, trash_id)) == due:
                return due
            heapq.heappop(self._heap)
        return None

    def forget(self, instance_id: str) -> None:
        for record in self.of_instance(instance_id):
            self.take(instance_id, record.trash_id)

    def _queue(self, name: _Name, due_ms: int) -> None:
        self._queued[name] = due_ms
        heapq.heappush(self._heap, (due_ms, *name))
