"""The client's metadata without HTTP: the index is read in this process, writes are actor calls.

Needs the manager's data directory on this node, and Ray for anything but reads: a look-up costs no
RPC and goes on while the manager is down. A process stays in the Ray it has joined; if a manager is
started again on the data directory, changes go to the new one by HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.actors.join import joined_manager, manager_facts
from kvcm_ray.actors.registry_store import Contents
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.client.backend import NO_SEGMENT, NewBlocks, new_id
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.places import differ, fill
from kvcm_ray.client.results import Lookup, WritePlan
from kvcm_ray.client.touches import TouchCollector
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo, Segment
from kvcm_ray.core.requests import (
    BlockLocations,
    FinishWrite,
    Flags,
    Keys,
    LeaseBlocks,
    Leased,
    PinBlocks,
    Pinned,
    RemoveBlocks,
    Removed,
    Request,
    StartWrite,
    Touch,
    TrimInstance,
    UnpinBlocks,
    WriteFinished,
    WriteStarted,
)
from kvcm_ray.errors import InstanceNotFound, NotFound, Unavailable
from kvcm_ray.index import IndexReader

TOUCH_TIMEOUT_S = 2.0
REFRESH_S = 0.25  #: how often a reader looks whether its index was replaced by a rebuilt one


class _Index:
    """The reader of one registration of an instance, and its segments."""

    def __init__(self, path: str) -> None:
        self.reader = IndexReader(path)
        self._segments: dict[int, Segment] = {}
        self._refresh_at = time.monotonic() + REFRESH_S

    def refreshed(self) -> IndexReader:
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_S
            self.reader.refresh()
        return self.reader

    def segments_of(self, locations: BlockLocations) -> dict[int, Segment]:
        """The segments that `locations` names, as far as they exist.

        Ids are never used twice, so what was read once stays true.
        """
        found = {}
        for segment_id in _distinct(locations):
            segment = self._segments.get(segment_id) or self.reader.segment(segment_id)
            if segment is not None:
                found[segment_id] = self._segments[segment_id] = segment
        return found


def _distinct(locations: BlockLocations) -> Iterable[int]:
    ids = locations.segment
    if len(ids) == 0:
        return ()
    first = ids[0]
    return (int(first),) if (ids == first).all() else np.unique(ids).tolist()


def _on_enabled(blocks: Blocks) -> Flags:
    """Which blocks are on a storage that the operator has not disabled."""
    disabled = [
        number
        for number, segment in blocks.segments.items()
        if segment.storage in blocks.storages and not blocks.storages[segment.storage].is_available
    ]
    return ~np.isin(blocks.locations.segment, disabled)


def _running_manager(data_dir: Path) -> tuple[str, str]:
    """Id and URL of the manager of a data directory; "" if none is ready there."""
    try:
        facts = manager_facts(data_dir)
    except Unavailable:
        return "", ""
    return facts.get("manager_id", ""), facts.get("url", "")


class DirectBackend:
    """`Backend` on actor handles and index readers; see `kvcm_ray.client.backend`."""

    def __init__(self, view: RegistryView, *, blocking: bool) -> None:
        self.blocking = blocking
        self.view = view
        self._registry = RegistryHandle()
        self._groups: dict[str, GroupHandle] = {}
        self._indexes: dict[str, _Index] = {}  #: by registration uid
        self._lock = threading.Lock()
        self._touches = TouchCollector(self._send_touches)
        self._manager = joined_manager(view.data_dir) or _running_manager(view.data_dir)[0]
        self._successor: HttpBackend | None = None
        self._look_at = 0.0
        self._judged: Contents | None = None
        self._disabled = False

    @property
    def address(self) -> str:
        return str(self.view.data_dir)

    async def close(self) -> None:
        self._touches.close()
        if self._successor is not None:
            await self._successor.close()
        with self._lock:
            indexes, self._indexes = list(self._indexes.values()), {}
        for index in indexes:
            index.reader.close()
        self.view.close()

    # ------------------------------------------------------------------------------- instances

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        stored: InstanceInfo
        if (http := self._by_http()) is not None:
            stored = await http.register(info, timeout_s)
        elif self.blocking:
            stored = self._registry.call_sync("register_instance", info, timeout_s=timeout_s)
        else:
            stored = await self._registry.call("register_instance", info, timeout_s=timeout_s)
        return stored

    async def instance(self, instance_id: str, timeout_s: float) -> InstanceInfo:
        return self.view.instance(instance_id)

    # ----------------------------------------------------------------------------------- reads

    async def match_length(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> int:
        contents = self.view.contents()
        if self._some_disabled(contents):  # then the locations matter
            return len(await self.match(info, keys, timeout_s))
        index = self._index(info, contents)
        length = index.refreshed().match_length(keys) if index and len(keys) else 0
        self._touch_prefix(info, keys, length)
        return length

    async def match(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Blocks:
        contents = self.view.contents()
        index = self._index(info, contents)
        if index is None or not len(keys):
            self._touch_prefix(info, keys, 0)
            return Blocks(keys[:0], BlockLocations.empty(), {}, contents.storages)
        found = index.refreshed().match(keys)
        segments = index.segments_of(found.locations)
        blocks = Blocks(keys[: found.length], found.locations, segments, contents.storages)
        if self._some_disabled(contents):
            blocks, flags = self._enabled(index, blocks)
            blocks = blocks.take(slice(0, len(flags) if flags.all() else int(np.argmin(flags))))
        self._touch_prefix(info, keys, len(blocks.keys))
        return blocks

    async def lookup(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Lookup:
        contents = self.view.contents()
        index = self._index(info, contents)
        if index is None or not len(keys):
            none = Blocks(keys[:0], BlockLocations.empty(), {}, contents.storages)
            return Lookup(np.zeros(len(keys), np.bool_), none)
        flags, locations = index.refreshed().lookup(keys)
        found = locations.take(flags)
        blocks = Blocks(keys[flags], found, index.segments_of(found), contents.storages)
        if self._some_disabled(contents):
            blocks, enabled = self._enabled(index, blocks)
            blocks = blocks.take(enabled)
            flags[flags] = enabled
        self._touch(info, Touch(info.instance_id, blocks.keys, len(keys), chained=False))
        return Lookup(flags, blocks)

    async def elsewhere(self, info: InstanceInfo, tried: Blocks, timeout_s: float) -> Blocks:
        contents = self.view.contents()
        index = self._index(info, contents)
        places = BlockLocations.empty(len(tried))
        places.segment[:] = NO_SEGMENT
        if index is None:
            return Blocks(tried.keys, places, {}, contents.storages)
        reader = index.refreshed()
        fill(places, *reader.copies(tried.keys))
        serving, now = reader.lookup(tried.keys)
        fill(places, serving & differ(now, tried.locations), now)
        return Blocks(tried.keys, places, index.segments_of(places), contents.storages)

    def _some_disabled(self, contents: Contents) -> bool:
        if contents is not self._judged:
            self._judged = contents
            self._disabled = any(not storage.is_available for storage in contents.storages.values())
        return self._disabled

    def _enabled(self, index: _Index, blocks: Blocks) -> tuple[Blocks, Flags]:
        """Which blocks are on a storage that is not disabled; those that have a copy on one, there."""
        enabled = _on_enabled(blocks)
        places = BlockLocations.joined([blocks.locations])  # a copy
        has_copy, copies = index.reader.copies(blocks.keys)
        fill(places, has_copy & ~enabled, copies)
        moved = Blocks(blocks.keys, places, index.segments_of(places), blocks.storages)
        return moved, _on_enabled(moved)

    async def lease(self, info: InstanceInfo, keys: Keys, lease_s: float, timeout_s: float) -> Leased:
        if (http := self._by_http()) is not None:
            return await http.lease(info, keys, lease_s, timeout_s)
        request = LeaseBlocks(info.instance_id, keys, max(1, int(lease_s * 1000)))
        leased: Leased = await self._call(info, request, timeout_s)
        return leased

    # ---------------------------------------------------------------------------------- writes

    async def start_write(self, info: InstanceInfo, new: NewBlocks, timeout_s: float) -> WritePlan:
        if (http := self._by_http()) is not None:
            return await http.start_write(info, new, timeout_s)
        begin_s = time.monotonic()
        lease_ms = max(1, int(new.lease_s * 1000))
        request = StartWrite(
            new_id(), info.instance_id, new.keys, new_id(), lease_ms, new.spec_groups, new.partial_tail
        )
        reply: WriteStarted = await self._call(info, request, timeout_s)
        blocks = Blocks(new.keys[~reply.exists], reply.locations, reply.segments, self.view.storages())
        deadline_s = begin_s + reply.lease_ms / 1000  # before the manager's own, by the call's time
        return WritePlan(reply.session_id, reply.exists, blocks, deadline_s)

    async def finish_write(
        self, info: InstanceInfo, session_id: str, success: BlockMask, timeout_s: float
    ) -> WriteFinished:
        if (http := self._by_http()) is not None:
            return await http.finish_write(info, session_id, success, timeout_s)
        event_id = f"finish-{session_id}"  # calling again must not be another event
        request = FinishWrite(event_id, info.instance_id, session_id, success)
        finished: WriteFinished = await self._call(info, request, timeout_s)
        return finished

    async def remove(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Removed:
        if (http := self._by_http()) is not None:
            return await http.remove(info, keys, timeout_s)
        request = RemoveBlocks(new_id(), info.instance_id, keys)
        removed: Removed = await self._call(info, request, timeout_s)
        return removed

    async def trim(self, info: InstanceInfo, what: TrimInstance, timeout_s: float) -> Removed:
        if (http := self._by_http()) is not None:
            return await http.trim(info, what, timeout_s)
        removed: Removed = await self._call(info, what, timeout_s)
        return removed

    async def pin(self, info: InstanceInfo, what: PinBlocks | UnpinBlocks, timeout_s: float) -> Pinned:
        if (http := self._by_http()) is not None:
            return await http.pin(info, what, timeout_s)
        pinned: Pinned = await self._call(info, what, timeout_s)
        return pinned

    async def flush_touches(self) -> None:
        if self.blocking:
            self._touches.flush()
        else:
            await asyncio.to_thread(self._touches.flush)

    # ------------------------------------------------------------------------------- internals

    def _by_http(self) -> HttpBackend | None:
        """The manager that runs there now, if it is another than the one whose Ray we are in."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + REFRESH_S
            manager, url = _running_manager(self.view.data_dir)
            if manager and url and manager != self._manager:
                self._manager = manager
                self._successor = HttpBackend(url, blocking=self.blocking)
        return self._successor

    async def _call(self, info: InstanceInfo, request: Request, timeout_s: float) -> Any:
        handle = self._group(info.instance_group_name)
        if self.blocking:
            return handle.call_sync(request, timeout_s)
        return await handle.call(request, timeout_s)

    def _group(self, name: str) -> GroupHandle:
        handle = self._groups.get(name)
        if handle is None:
            with self._lock:
                handle = self._groups.setdefault(name, GroupHandle(name))
        return handle

    def _index(self, info: InstanceInfo, contents: Contents) -> _Index | None:
        """The index of the instance as it is registered now; None while it has none yet.

        Raises:
            InstanceNotFound: it was removed.
        """
        current = contents.instances.get(info.instance_id)
        if current is None:
            raise InstanceNotFound(f"instance {info.instance_id!r} is not registered (any more)")
        index = self._indexes.get(current.uid)
        if index is None:
            with self._lock:
                index = self._indexes.get(current.uid)
                if index is None:
                    try:
                        index = _Index(str(self.view.index_path(current)))
                    except NotFound:
                        return None
                    self._forget_gone()
                    self._indexes[current.uid] = index
        return index

    def _forget_gone(self) -> None:
        """An open index keeps its disk space, also when its instance was removed."""
        uids = {info.uid for info in self.view.instances().values()}
        for uid in self._indexes.keys() - uids:
            self._indexes.pop(uid).reader.close()

    def _touch_prefix(self, info: InstanceInfo, keys: Keys, length: int) -> None:
        """Of the whole prompt that was asked for, so many blocks were found."""
        self._touch(info, Touch(
            info.instance_id, keys[:length], len(keys), missed=keys[length:], time_s=time.time()
        ))

    def _touch(self, info: InstanceInfo, touch: Touch) -> None:
        if touch.lookups and self._successor is None:
            self._touches.add(info.instance_group_name, touch)

    def _send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        handle = self._group(group)
        for future in [handle.start(touch, TOUCH_TIMEOUT_S) for touch in touches]:
            handle.wait(future, TOUCH_TIMEOUT_S)
