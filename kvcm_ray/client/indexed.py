"""The client's metadata on a manager's node: the index is read in this process, changes go elsewhere.

Needs the manager's data directory on this node. A look-up costs no call, and goes on while the manager
is down. Who was found what is reported in the background.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np

from kvcm_ray.actors.registry_store import Contents
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.client.backend import NO_SEGMENT, Channel, NewBlocks
from kvcm_ray.client.places import differ, fill
from kvcm_ray.client.results import Lookup, WritePlan
from kvcm_ray.client.touches import TouchCollector
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo, Segment
from kvcm_ray.core.requests import (
    BlockLocations,
    Flags,
    Keys,
    Leased,
    PinBlocks,
    Pinned,
    Removed,
    Touch,
    TrimInstance,
    UnpinBlocks,
    WriteFinished,
)
from kvcm_ray.errors import InstanceNotFound, NotFound
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


def _is_registered(known: InstanceInfo, info: InstanceInfo) -> bool:
    """Whether registering `info` would change nothing."""
    return (
        known.same_shape(info)
        and known.model_deployment == info.model_deployment
        and info.model_version in ("", known.model_version)
        and info.supersedes in ("", known.supersedes)
    )


class IndexBackend:
    """`Backend` on index readers and a channel; see `kvcm_ray.client.backend`.

    Args:
        view: of the manager's data directory; closed with this.
        changes: how the manager is told; closed with this.
        blocking: as that of `changes`.
    """

    def __init__(self, view: RegistryView, changes: Channel, *, blocking: bool) -> None:
        self.blocking = blocking
        self.view = view
        self._changes = changes
        self._indexes: dict[str, _Index] = {}  #: by registration uid
        self._lock = threading.Lock()
        self._touches = TouchCollector(self._send_touches)
        self._judged: Contents | None = None
        self._disabled = False

    @property
    def address(self) -> str:
        return str(self.view.data_dir)

    async def close(self) -> None:
        self._touches.close()
        await self._changes.close()
        with self._lock:
            indexes, self._indexes = list(self._indexes.values()), {}
        for index in indexes:
            index.reader.close()
        self.view.close()

    # ------------------------------------------------------------------------------- instances

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        """As registered; costs no call if it is so already."""
        known = self.view.instances().get(info.instance_id)
        if known is not None and _is_registered(known, info):
            return known
        stored = await self._changes.register(info, timeout_s)
        return self.view.instances().get(info.instance_id, stored)

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

    # --------------------------------------------------------------------------------- changes

    async def lease(self, info: InstanceInfo, keys: Keys, lease_s: float, timeout_s: float) -> Leased:
        return await self._changes.lease(info, keys, lease_s, timeout_s)

    async def start_write(self, info: InstanceInfo, new: NewBlocks, timeout_s: float) -> WritePlan:
        return await self._changes.start_write(info, new, timeout_s)

    async def finish_write(
        self, info: InstanceInfo, session_id: str, success: BlockMask, timeout_s: float
    ) -> WriteFinished:
        return await self._changes.finish_write(info, session_id, success, timeout_s)

    async def remove(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Removed:
        return await self._changes.remove(info, keys, timeout_s)

    async def trim(self, info: InstanceInfo, what: TrimInstance, timeout_s: float) -> Removed:
        return await self._changes.trim(info, what, timeout_s)

    async def pin(self, info: InstanceInfo, what: PinBlocks | UnpinBlocks, timeout_s: float) -> Pinned:
        return await self._changes.pin(info, what, timeout_s)

    async def flush_touches(self) -> None:
        if self.blocking:
            self._touches.flush()
        else:
            await asyncio.to_thread(self._touches.flush)

    # ------------------------------------------------------------------------------- internals

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
        if touch.lookups:
            self._touches.add(info.instance_group_name, touch)

    def _send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        self._changes.tell(group, touches, TOUCH_TIMEOUT_S)
