"""Blocks with bytes that can be told from their keys, written and read as an engine would."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvcm_ray.actors.handles import GroupHandle
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo, LocationSpecInfo, Segment
from kvcm_ray.core.requests import (
    BlockLocations,
    FinishWrite,
    Flags,
    Keys,
    Reply,
    Request,
    StartWrite,
    WriteFinished,
    WriteStarted,
)
from kvcm_ray.core.segments import by_segment
from kvcm_ray.index import IndexReader
from kvcm_ray.storage_adapters import StorageAdapter, open_storage

BLOCK_BYTES = 4096
SPEC = "tp0"


def instance(instance_id: str, group: str = "default", size: int = BLOCK_BYTES) -> InstanceInfo:
    """One spec of `size` bytes."""
    return InstanceInfo(
        instance_group_name=group,
        instance_id=instance_id,
        block_size=16,
        location_spec_infos=(LocationSpecInfo(SPEC, size),),
    )


def some_keys(count: int) -> Keys:
    """Random distinct keys."""
    raw = np.frombuffer(secrets.token_bytes(8 * count), np.int64)
    return np.unique(raw) if len(np.unique(raw)) == count else some_keys(count)


def payloads(keys: Keys, size: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    """(blocks, size) bytes; each block is made from its key."""
    words = keys.view(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    return (words + np.arange(size // 8, dtype=np.uint64)).view(np.uint8).reshape(len(keys), size)


def start_request(instance_id: str, keys: Keys, timeout_ms: int = 0) -> StartWrite:
    return StartWrite(secrets.token_hex(8), instance_id, keys, secrets.token_hex(16), timeout_ms)


def finish_request(instance_id: str, started: WriteStarted) -> FinishWrite:
    """All blocks were written."""
    mask = BlockMask(offset=len(started.locations))
    return FinishWrite(secrets.token_hex(8), instance_id, started.session_id, mask)


class Group(Protocol):
    """What an `Engine` asks of a group's handle."""

    def call_sync(self, request: Request, timeout_s: float = ...) -> Reply: ...


class Engine:
    """A client of one instance, by group handle, index and storages; no RPC to read."""

    def __init__(self, view: RegistryView, instance_id: str, handle: Group | None = None) -> None:
        self.view = view
        self.info = view.instance(instance_id)
        self.handle = handle or GroupHandle(self.info.instance_group_name)
        self._adapters: dict[str, StorageAdapter] = {}

    def adapter(self, storage: str) -> StorageAdapter:
        if storage not in self._adapters:
            self._adapters[storage] = open_storage(self.view.storages()[storage])
        return self._adapters[storage]

    def put(self, keys: Keys, timeout_s: float = 20.0, *, partial_tail: bool = False) -> WriteFinished:
        """Write blocks with real bytes; returns when they are acknowledged."""
        instance_id = self.info.instance_id
        request = replace(start_request(instance_id, keys), partial_tail=partial_tail)
        started = self.handle.call_sync(request, timeout_s)
        assert isinstance(started, WriteStarted)
        self.write(keys[~started.exists], started.locations, started.segments)
        finished = self.handle.call_sync(finish_request(instance_id, started), timeout_s)
        assert isinstance(finished, WriteFinished)
        return finished

    def write(self, keys: Keys, at: BlockLocations, segments: Mapping[int, Segment]) -> None:
        for segment_id, _ in by_segment(at):
            part = at.segment == segment_id
            segment = segments[segment_id]
            for spec in segment.specs:
                data = payloads(keys[part], spec.size)
                where = at.take(part)
                self.adapter(segment.storage).write(
                    segment, spec.name, where.slot, keys[part], where.generation, data
                )

    def found(self, keys: Keys) -> Flags:
        """True for each block that the index knows and whose bytes are right."""
        hits, right, _ = self.looked_at(keys)
        return hits & right

    def looked_at(self, keys: Keys, *, copies: bool = False) -> tuple[Flags, Flags, BlockLocations]:
        """Of each block, or of its copy: whether the index knows it, whether its bytes are right, and
        where they are.

        Raises:
            AssertionError: a read that succeeded gave other bytes than those that were written.
        """
        reader = IndexReader(self.view.index_path(self.info))
        try:
            hits, at = reader.copies(keys) if copies else reader.lookup(keys)
            segments = reader.segments()
        finally:
            reader.close()
        right = np.zeros(len(keys), np.bool_)
        for segment_id in np.unique(at.segment[hits]).tolist():
            part = hits & (at.segment == segment_id)
            if segment_id in segments:  # else it was dropped since, and its blocks before it
                right[part] = self._right(keys[part], at.take(part), segments[segment_id])
        return hits, right, at

    def _right(self, keys: Keys, at: BlockLocations, segment: Segment) -> Flags:
        good = np.ones(len(keys), np.bool_)
        for spec in segment.specs:
            out = np.zeros((len(keys), spec.size), np.uint8)
            read = self.adapter(segment.storage).read(segment, spec.name, at.slot, keys, at.generation, out)
            same = (out == payloads(keys, spec.size)).all(axis=1)
            assert same[read].all(), f"wrong bytes of blocks {keys[read & ~same].tolist()}"
            good &= read
        return good
