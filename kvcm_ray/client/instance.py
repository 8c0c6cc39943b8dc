"""One registered instance: find, write and read its blocks.

`AsyncInstance` is the implementation; `kvcm_ray.client.sync.Instance` drives the same coroutines.

What an engine may rely on: `match`, `put` and `get` never raise for trouble of the cache. A manager
that is away, a storage that is full, slow or broken, a block that vanished while being read: all of
it is a miss (or a block not stored), with the reason in the result's ``error``. Wrong arguments
raise `InvalidArgument`, always. With ``raise_errors`` everything raises.

A write that meets a full cache waits while the manager makes room, for half of its time at most. A
block that cannot be read where the index says is looked for again: it may have been moved since, or
have a copy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcm_ray import tracing
from kvcm_ray.client.backend import CALL_TIMEOUT_S, Backend, NewBlocks, new_id, no_blocks
from kvcm_ray.client.buffers import Rows, SpecBuffers, by_spec, rows_of, select
from kvcm_ray.client.results import GetResult, Lookup, Match, PutResult, WritePlan
from kvcm_ray.client.session import AsyncWriteSession
from kvcm_ray.client.transfer import Blocks, Moved, Transfer
from kvcm_ray.core.hashing import block_keys_from_tokens
from kvcm_ray.core.limits import KEYS_PER_CALL_MAX, LEASE_MAX_MS, SESSION_TIMEOUT_MAX_MS
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Flags, Keys, PinBlocks, Pinned, TrimInstance, UnpinBlocks
from kvcm_ray.errors import InvalidArgument, KvcmError

KeyList = Sequence[int] | npt.NDArray[np.int64]

START_SHARE = 0.5  #: of a write's time, for finding room; the rest is for writing
START_LEAST_S = 2.0  #: a start may take so long also in writes with less time


def as_keys(keys: KeyList) -> Keys:
    """`keys` as an int64 array.

    Raises:
        InvalidArgument: not a flat list of signed 64-bit integers, or more than KEYS_PER_CALL_MAX.
    """
    try:
        array = np.asarray(keys)
        if array.size == 0:
            array = np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(f"got {array.dtype} of {array.ndim} dimensions")
        if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
            raise OverflowError("a key is 2**63 or more")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"keys must be signed 64-bit integers: {error}") from error
    if len(array) > KEYS_PER_CALL_MAX:
        raise InvalidArgument(f"{len(array)} keys in one call, more than {KEYS_PER_CALL_MAX}")
    return np.ascontiguousarray(array, np.int64)


class AsyncInstance:
    """Handle of one instance. Cheap; safe for use by several tasks."""

    def __init__(self, backend: Backend, transfer: Transfer, info: InstanceInfo, raise_errors: bool) -> None:
        self._backend = backend
        self._transfer = transfer
        self._raise_errors = raise_errors
        self.info = info  #: as registered

    @property
    def instance_id(self) -> str:
        return self.info.instance_id

    @property
    def specs(self) -> dict[str, int]:
        """Bytes of each part of a block, by spec name, in order."""
        return {spec.name: spec.size for spec in self.info.location_spec_infos}

    def block_keys(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> Keys:
        """Prefix keys of a prompt's whole blocks, as the HTTP API derives them from token_ids."""
        return block_keys_from_tokens(tokens, self.info.block_size)

    async def match(
        self, keys: KeyList, *, limit: int | None = None, lease_s: float = 0, timeout_s: float = 2.0
    ) -> Match:
        """Find the leading run of `keys` that the cache holds, looking at `limit` keys at most.

        With `lease_s` what is found is kept from being reclaimed for so many seconds, which takes a
        call to the manager; ``leased_s`` of the result says whether it is. (See `lease`.)
        """
        asked = _limited(as_keys(keys), limit)
        if lease_s:
            _check_lease(lease_s)
        try:
            blocks = await self._backend.match(self.info, asked, timeout_s)
        except KvcmError as error:
            self._maybe_raise(error)
            return Match(0, no_blocks(), error)
        if not lease_s or not len(blocks):
            return Match(len(blocks), blocks)
        return await self._leased(blocks, lease_s, timeout_s)

    async def _leased(self, blocks: Blocks, lease_s: float, timeout_s: float) -> Match:
        try:
            leased = await self._backend.lease(self.info, blocks.keys, lease_s, timeout_s)
            if leased.blocks < len(np.unique(blocks.keys)):  # some went meanwhile; the others stay now
                blocks = await self._backend.match(self.info, blocks.keys, timeout_s)
        except KvcmError as error:
            self._maybe_raise(error)
            return Match(len(blocks), blocks, error)
        return Match(len(blocks), blocks, leased_s=leased.lease_ms / 1000)

    async def lease(self, keys: KeyList, seconds: float, *, timeout_s: float = 2.0) -> int:
        """Keep those of `keys` that the cache holds from being reclaimed for so many seconds.

        For long transfers of blocks that were found before. A lease that ends later stays; leases end
        with the group's process too, and a reader then meets a miss, as without one.

        Returns:
            How many blocks are held now; 0 if the manager cannot be asked.

        Raises:
            InvalidArgument: `seconds` not above 0, or more than LEASE_MAX_MS.
        """
        asked = as_keys(keys)
        _check_lease(seconds)
        if not len(asked):
            return 0
        try:
            return (await self._backend.lease(self.info, asked, seconds, timeout_s)).blocks
        except InvalidArgument:
            raise
        except KvcmError as error:
            self._maybe_raise(error)
            return 0

    async def match_length(self, keys: KeyList, *, limit: int | None = None, timeout_s: float = 2.0) -> int:
        """Length of the leading run of `keys` that the cache holds; 0 if it cannot be asked."""
        asked = _limited(as_keys(keys), limit)
        try:
            return await self._backend.match_length(self.info, asked, timeout_s)
        except KvcmError as error:
            self._maybe_raise(error)
            return 0

    async def lookup(self, keys: KeyList, *, timeout_s: float = 2.0) -> Lookup:
        """Look every key up for itself. Raises KvcmError."""
        return await self._backend.lookup(self.info, as_keys(keys), timeout_s)

    async def start_write(
        self,
        keys: KeyList,
        timeout_s: float = 30,
        spec_groups: Sequence[str] | None = None,
        *,
        partial_tail: bool = False,
    ) -> AsyncWriteSession:
        """Reserve room for those of `keys` that are not there yet, for `timeout_s` seconds.

        If the cache is full this waits until room was made, for half of `timeout_s` at most (or 15 s,
        the smaller); it does not wait if nothing there can be reclaimed.

        Args:
            keys: the prompt's from its first block on, so that the index can chain them.
            timeout_s: from this call until the session is finished.
            spec_groups: names a spec group for each key (none: all specs).
            partial_tail: the last key is of a block that the prompt fills only partly. Nothing can
                follow it, so it is the first that may go.

        Raises:
            QuotaExceeded, KeyLimitReached, NoStorageAvailable, StorageFull: no room; nothing
            changed. InvalidArgument, InstanceNotFound, Unavailable.
        """
        asked = as_keys(keys)
        groups = tuple(spec_groups or ())
        if not 0 < timeout_s <= SESSION_TIMEOUT_MAX_MS / 1000:
            most = SESSION_TIMEOUT_MAX_MS // 1000
            raise InvalidArgument(f"timeout_s must be above 0 and at most {most}, got {timeout_s}")
        if groups and len(groups) != len(asked):
            raise InvalidArgument(f"{len(groups)} spec_groups given for {len(asked)} keys")
        start_s = min(timeout_s, CALL_TIMEOUT_S, max(START_LEAST_S, timeout_s * START_SHARE))
        new = NewBlocks(asked, timeout_s, groups, partial_tail)
        plan = await self._backend.start_write(self.info, new, start_s)
        return AsyncWriteSession(self._backend, self._transfer, self.info, plan)

    async def write(self, plan: WritePlan, buffers: SpecBuffers, spec: str | None = None) -> Moved:
        """Write one spec of a plan's blocks: for the ranks of an engine, see `WritePlan`."""
        session = AsyncWriteSession(self._backend, self._transfer, self.info, plan)
        return await session.write(buffers, spec)

    async def put(
        self,
        keys: KeyList,
        buffers: SpecBuffers,
        *,
        spec: str | None = None,
        partial_tail: bool = False,
        timeout_s: float = 30,
    ) -> PutResult:
        """Store whole blocks; those that the cache has already are skipped.

        Args:
            keys: the prompt's block keys, from its first block on.
            buffers: one buffer over all blocks or a list of one a block; or a mapping of these by
                spec. All specs of the instance must be given, or exactly those of a spec group.
            partial_tail: the prompt fills its last block only partly; see `start_write`.
            timeout_s: everything has to be done within this time, waiting for room included.

        Returns:
            How many blocks were stored now; see `PutResult`.
        """
        with tracing.span("kvcm put", {"kvcm.instance_id": self.instance_id} if tracing.on else None):
            return await self._put(keys, buffers, spec, partial_tail, timeout_s)

    async def _put(
        self, keys: KeyList, buffers: SpecBuffers, spec: str | None, partial_tail: bool, timeout_s: float
    ) -> PutResult:
        asked = as_keys(keys)
        rows = self._rows(buffers, spec, len(asked), writable=False)
        group = self._spec_group(set(rows))
        groups = [group] * len(asked) if group else None
        try:
            session = await self.start_write(asked, timeout_s, groups, partial_tail=partial_tail)
        except KvcmError as failure:
            if isinstance(failure, InvalidArgument):
                raise
            self._maybe_raise(failure)
            return PutResult.nothing(len(asked), failure)
        plan, flags = session.plan, session.plan.exists.copy()
        error: KvcmError | None = None
        committed = 0
        if len(plan.todo):
            new = {name: select(given, plan.todo) for name, given in rows.items()}
            error = (await session.write(new)).error
            try:
                committed = (await session.finish()).committed
                flags[plan.todo] = session.written
            except KvcmError as failure:
                error = error or failure
        if error is not None:
            self._maybe_raise(error)
        return PutResult(committed, int(plan.exists.sum()), flags, error)

    async def get(
        self,
        keys: KeyList,
        buffers: SpecBuffers,
        *,
        spec: str | None = None,
        deadline_s: float | None = 2.0,
    ) -> GetResult:
        """Read the leading run of `keys` into `buffers`, every byte verified.

        Args:
            keys: block keys. buffers: as for `put`, writable; a rank gives its own `spec` only.
            Buffers of blocks that
                were not read have undefined content.
            deadline_s: what is not read after so many seconds is a miss; None waits without limit.

        Returns:
            How many leading blocks were read; see `GetResult`.
        """
        with tracing.span("kvcm get", {"kvcm.instance_id": self.instance_id} if tracing.on else None):
            return await self._get(keys, buffers, spec, deadline_s)

    async def _get(
        self, keys: KeyList, buffers: SpecBuffers, spec: str | None, deadline_s: float | None
    ) -> GetResult:
        asked = as_keys(keys)
        rows = self._rows(buffers, spec, len(asked), writable=True)
        end_s = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            left_s = CALL_TIMEOUT_S if deadline_s is None else deadline_s
            blocks = await self._backend.match(self.info, asked, left_s)
        except KvcmError as failure:
            self._maybe_raise(failure)
            return GetResult.nothing(len(asked), failure)
        return await self._read(blocks, rows, len(asked), end_s)

    async def read(
        self,
        blocks: Blocks,
        buffers: SpecBuffers,
        *,
        spec: str | None = None,
        deadline_s: float | None = 2.0,
    ) -> GetResult:
        """Read blocks that `match` or `lookup` found (``.blocks``), as `get` does, without asking
        again.

        `blocks` can be pickled: a scheduler finds, its workers read. A block that was removed in
        between is a miss.
        """
        rows = self._rows(buffers, spec, len(blocks), writable=True)
        end_s = None if deadline_s is None else time.monotonic() + deadline_s
        return await self._read(blocks, rows, len(blocks), end_s)

    async def _read(
        self, blocks: Blocks, rows: dict[str, Rows], asked: int, end_s: float | None
    ) -> GetResult:
        """Read the leading `blocks` of so many asked ones."""
        flags = np.zeros(asked, np.bool_)
        read, error = await self._read_specs(blocks, rows, np.arange(len(blocks)), end_s)
        if not read.all():
            await self._read_elsewhere(blocks, rows, read, end_s)
            error = None if read.all() else error
        flags[: len(blocks)] = read
        if error is not None:
            self._maybe_raise(error)
        return GetResult(flags, error)

    async def _read_specs(
        self, blocks: Blocks, rows: dict[str, Rows], index: npt.NDArray[np.intp], end_s: float | None
    ) -> tuple[Flags, KvcmError | None]:
        """Which of the blocks have all specs of `rows` (at `index`, one for each block) read now."""
        flags = np.ones(len(blocks), np.bool_)
        error: KvcmError | None = None
        for name, given in rows.items():
            moved = await self._transfer.read(name, blocks, select(given, index), end_s)
            flags &= moved.flags
            error = error or moved.error
        return flags, error

    async def _read_elsewhere(
        self, blocks: Blocks, rows: dict[str, Rows], read: Flags, end_s: float | None
    ) -> None:
        """Try the blocks that are not `read` at another place, in the time that is left."""
        left_s = CALL_TIMEOUT_S if end_s is None else end_s - time.monotonic()
        index = np.flatnonzero(~read)
        if left_s <= 0:
            return
        try:
            again = await self._backend.elsewhere(self.info, blocks.take(index), left_s)
        except KvcmError:
            return  # these stay what they are: not read
        known = np.isin(again.locations.segment, list(again.segments))
        if known.any():
            index = index[known]
            read[index], _ = await self._read_specs(again.take(known), rows, index, end_s)

    def _rows(self, buffers: SpecBuffers, spec: str | None, count: int, *, writable: bool) -> dict[str, Rows]:
        return {
            name: rows_of(given, count, self.specs[name], writable=writable)
            for name, given in by_spec(buffers, spec, list(self.specs)).items()
        }

    async def remove(self, keys: KeyList) -> int:
        """Remove blocks; returns how many were there, -1 by URL (HTTP does not say)."""
        done = await self._backend.remove(self.info, as_keys(keys), CALL_TIMEOUT_S)
        return done.blocks

    async def trim(self, begin_s: int = 0, end_s: int = 2**32 - 1, *, drop_sessions: bool = False) -> int:
        """Remove the blocks written within these unix seconds; all by default. Raises KvcmError."""
        what = TrimInstance(new_id(), self.instance_id, begin_s, end_s, drop_sessions)
        return (await self._backend.trim(self.info, what, CALL_TIMEOUT_S)).blocks

    async def pin(self, name: str, keys: KeyList, until_s: int = 0) -> Pinned:
        """Never reclaim `keys`, for example of a shared system prompt; those that come later included.

        Pinning under a name that exists replaces what it pinned. Pinned blocks count in the quota.

        Args:
            until_s: unix time at which the pin ends; 0 = with `unpin`.

        Raises:
            InvalidArgument: too many keys or pins. InstanceNotFound, Unavailable.
        """
        what = PinBlocks(new_id(), self.instance_id, name, as_keys(keys), until_s)
        return await self._backend.pin(self.info, what, CALL_TIMEOUT_S)

    async def unpin(self, name: str) -> Pinned:
        """End a pin. Raises NotFound if there is none of that name, else as `pin`."""
        what = UnpinBlocks(new_id(), self.instance_id, name)
        return await self._backend.pin(self.info, what, CALL_TIMEOUT_S)

    def _spec_group(self, names: set[str]) -> str:
        """The spec group of exactly these specs; "" for all specs of the instance."""
        if names == set(self.specs):
            return ""
        for group in self.info.location_spec_groups:
            if set(group.spec_names) == names:
                return group.name
        raise InvalidArgument(
            f"a block of {self.instance_id!r} has the specs {', '.join(self.specs)}, all written "
            f"in one session; got {', '.join(sorted(names))} only. Ranks share a session by "
            "start_write and WritePlan"
        )

    def _maybe_raise(self, error: KvcmError) -> None:
        if self._raise_errors:
            raise error

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.instance_id!r} at {self._backend.address}>"


def _check_lease(seconds: float) -> None:
    if not 0 < seconds <= LEASE_MAX_MS / 1000:
        raise InvalidArgument(
            f"a lease must be above 0 and at most {LEASE_MAX_MS // 1000} seconds, got {seconds}"
        )


def _limited(keys: Keys, limit: int | None) -> Keys:
    if limit is not None and limit < 0:
        raise InvalidArgument(f"limit must not be negative, got {limit}")
    return keys[:limit]
