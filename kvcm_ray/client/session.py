"""A write session: room reserved for new blocks until they are written, or a time has passed.

    async with await cache.start_write(keys) as session:
        await session.write(buffers)          # one buffer for each block of session.todo
                                              # leaving finishes; an exception fails the session

Only blocks whose every spec was written become readable. Nobody sees any of them before the finish.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvcm_ray.client.backend import CALL_TIMEOUT_S, Backend
from kvcm_ray.client.buffers import SpecBuffers, by_spec, rows_of
from kvcm_ray.client.results import WritePlan
from kvcm_ray.client.transfer import Moved, Transfer
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import BlockLocations, Flags, WriteFinished
from kvcm_ray.errors import InvalidArgument, KvcmError

Success = bool | Sequence[bool] | npt.NDArray[np.bool_]


class AsyncWriteSession:
    """Made by `AsyncInstance.start_write`."""

    def __init__(self, backend: Backend, transfer: Transfer, info: InstanceInfo, plan: WritePlan) -> None:
        self._backend = backend
        self._transfer = transfer
        self._info = info
        self._written: dict[str, Flags] = {}
        self.plan = plan  #: for other processes; see `WritePlan`
        self.finished: WriteFinished | None = None

    @property
    def session_id(self) -> str:
        return self.plan.session_id

    @property
    def mask(self) -> Flags:
        """One flag for each key of the request: True = it exists, there is nothing to write."""
        return self.plan.exists

    @property
    def todo(self) -> npt.NDArray[np.intp]:
        """Positions of the keys to be written, ascending."""
        return self.plan.todo

    @property
    def locations(self) -> BlockLocations:
        """Where to write, one for each of `todo`."""
        return self.plan.blocks.locations

    def uris(self, spec: str) -> list[str]:
        """The same as URIs of one spec, for writers that bring their own data path."""
        return self.plan.uris(spec)

    @property
    def written(self) -> Flags:
        """One flag for each of `todo`: `write` stored every spec of it."""
        blocks = self.plan.blocks
        flags = np.ones(len(blocks), np.bool_)
        for segment_id in np.unique(blocks.locations.segment).tolist():
            here = blocks.locations.segment == segment_id
            for spec in blocks.segments[segment_id].specs:
                stored = self._written.get(spec.name)
                flags[here] &= False if stored is None else stored[here]
        return flags

    async def write(self, buffers: SpecBuffers, spec: str | None = None) -> Moved:
        """Store the new blocks: `buffers` has one row (or buffer) for each of `todo`.

        A rank gives the buffers of its own `spec`; a mapping of spec to buffers writes several.
        Trouble of a storage is not raised: ``flags`` of the result says which blocks are in place
        and ``error`` what happened. Nothing is written once the session's time is over.

        Raises:
            InvalidArgument: buffers of the wrong number, size or kind; an unknown spec.
        """
        sizes = {info.name: info.size for info in self._info.location_spec_infos}
        blocks = self.plan.blocks
        rows = {
            name: rows_of(given, len(blocks), sizes[name], writable=False)
            for name, given in by_spec(buffers, spec, list(sizes)).items()
        }
        result = Moved(np.ones(len(blocks), np.bool_))
        for name, given in rows.items():
            moved = await self._transfer.write(name, blocks, given, self.plan.deadline_s)
            before = self._written.get(name)
            self._written[name] = moved.flags if before is None else before | moved.flags
            result.flags &= moved.flags
            result.error = result.error or moved.error
        return result

    async def finish(self, success: Success | None = None) -> WriteFinished:
        """End the session and make its good blocks readable. Doing it again gives the first answer.

        Args:
            success: which of `todo` were written: one flag each, or one for all. None means those
                that `write` of this object stored.

        Raises:
            SessionNotFound: its time was over; the blocks are gone.
            InvalidArgument: wrong number of flags. Unavailable: unknown whether it took effect.
        """
        if self.finished is not None:
            return self.finished
        flags = self._success(success)
        if not len(flags):
            self.finished = WriteFinished(0, 0)  # an empty session holds nothing
            return self.finished
        left_s = max(1.0, min(CALL_TIMEOUT_S, self.plan.deadline_s - time.monotonic()))
        mask = BlockMask.from_flags(flags)
        self.finished = await self._backend.finish_write(self._info, self.session_id, mask, left_s)
        return self.finished

    def _success(self, success: Success | None) -> Flags:
        count = len(self.plan.blocks)
        if success is None:
            return self.written
        if isinstance(success, bool | np.bool_):
            return np.full(count, success, np.bool_)
        flags = np.asarray(success, np.bool_)
        if flags.shape != (count,):
            raise InvalidArgument(f"{flags.size} success flags given for {count} new blocks")
        return flags

    async def __aenter__(self) -> AsyncWriteSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            await self.finish()
            return
        # The caller's exception is the news, not what becomes of a session that expires anyway.
        with contextlib.suppress(KvcmError):
            await self.finish(False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.session_id} of {self._info.instance_id!r}>"
