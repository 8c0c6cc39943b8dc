"""`TransferClient`: moves blocks between the caller's memory and the storages that URIs name.

A call is cut into jobs, at most one a thread, each of some data files; the pool does them, the caller waits.
The first failure or the end of the time makes the call fail as a whole, and what is still under way then
touches the caller's memory no more: what may hang is read into memory of ours and copied under a lock that
giving up takes too. Results are codes; the reason of a failure is logged, at most once a second each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import numpy as np

from kvcm_ray.client.buffers import PIECE_BYTES, staging
from kvcm_ray.connectors.py_client import config, memory, plain, segments, uris
from kvcm_ray.connectors.py_client.config import Backend, Settings
from kvcm_ray.connectors.py_client.memory import BlockMemory, Bytes, Rows
from kvcm_ray.connectors.py_client.pool import Pool
from kvcm_ray.connectors.py_client.types import BlockBuffer, ClientError, ClientErrorCode, InitParams
from kvcm_ray.connectors.py_client.uris import Location
from kvcm_ray.errors import KvcmError

log = logging.getLogger(__name__)

LOG_EVERY_S = 1.0


@dataclass(slots=True)
class _File:
    """What a call wants of one data file."""

    path: str
    backend: Backend
    places: list[Location] = field(default_factory=list)
    blocks: list[BlockMemory] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        return self.places[0].generation is not None

    def pieces(self, block_bytes: int) -> Iterator[slice]:
        step = max(1, PIECE_BYTES // block_bytes)
        for first in range(0, len(self.places), step):
            yield slice(first, first + step)


class _GivenUp(Exception):
    """The call has ended already."""


@dataclass(slots=True)
class _Job:
    """The files of one thread."""

    settings: Settings
    segments: segments.Segments
    files: list[_File]
    abandoned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def abandon(self) -> None:
        with self.lock:
            self.abandoned = True

    def read(self) -> None:
        for file in self.files:
            for piece in file.pieces(self.settings.spec_size):
                self._check()
                if file.verified:
                    self._read_verified(file, piece)
                else:
                    self._read_plain(file, piece)

    def write(self) -> None:
        size = self.settings.spec_size
        for file in self.files:
            for piece in file.pieces(size):
                self._check()
                places, blocks = file.places[piece], file.blocks[piece]
                if file.verified:
                    segment, spec = self.segments.find(file.backend, file.path)
                    rows = [_row(block, size) for block in blocks]
                    segments.write(file.backend, segment, spec, places, rows)
                else:
                    plain.write(file.path, [place.slot for place in places], places[0].size, blocks)

    def _read_verified(self, file: _File, piece: slice) -> None:
        size = self.settings.spec_size
        segment, spec = self.segments.find(file.backend, file.path)
        places, blocks = file.places[piece], file.blocks[piece]
        direct = [None if file.backend.may_hang else block.whole(size) for block in blocks]
        if all(row is not None for row in direct):
            with self.lock:
                self._check()
                rows = [row for row in direct if row is not None]
                good = segments.read(file.backend, segment, spec, places, rows)
        else:
            staged = staging(len(blocks), size)
            good = segments.read(file.backend, segment, spec, places, staged)
            self._deliver(blocks, staged, good)
        if not good:
            text = f"{file.path}: a block is not there any more, or damaged"
            raise ClientError(ClientErrorCode.ER_SDKREAD_ERROR, text)

    def _read_plain(self, file: _File, piece: slice) -> None:
        places, blocks = file.places[piece], file.blocks[piece]
        staged = staging(len(blocks), self.settings.spec_size)
        plain.read(file.path, [place.slot for place in places], places[0].size, blocks, staged)
        self._deliver(blocks, staged, True)

    def _deliver(self, blocks: Sequence[BlockMemory], staged: Rows, good: bool) -> None:
        with self.lock:
            self._check()
            if good:
                for block, row in zip(blocks, staged, strict=True):
                    block.fill(row)

    def _check(self) -> None:
        if self.abandoned:
            raise _GivenUp


class TransferClient:
    """Made by `Create`. May be used by several threads at once; needs no closing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._segments = segments.Segments()
        self._pool = Pool(settings.threads, settings.queue_size)
        self._logged: dict[ClientErrorCode, float] = {}

    @staticmethod
    def Create(config_json: str, init_params: InitParams) -> TransferClient | None:
        """A client, or None if it cannot work; the reason is logged."""
        try:
            return TransferClient(config.parse(config_json, init_params))
        except ClientError as error:
            log.error("no transfer client: %s: %s", error.code.name, error)
            return None

    def LoadKvCaches(self, uris: list[str], buffers: list[BlockBuffer]) -> ClientErrorCode:
        """Fill each buffer with the block that its URI names: all of them, or the call has failed."""
        try:
            self._move(uris, buffers, reading=True)
        except ClientError as error:
            return self._failed("load", error)
        return ClientErrorCode.ER_OK

    def SaveKvCaches(self, uris: list[str], buffers: list[BlockBuffer]) -> tuple[ClientErrorCode, list[str]]:
        """Store each buffer where its URI says: all of them, or the call has failed."""
        try:
            self._move(uris, buffers, reading=False)
        except ClientError as error:
            return self._failed("save", error), []
        return ClientErrorCode.ER_OK, list(uris)

    def __del__(self) -> None:
        self._pool.close()
        for backend in self._settings.backends.values():
            backend.adapter.close()

    # ------------------------------------------------------------------------------- internals

    def _move(self, names: list[str], buffers: list[BlockBuffer], *, reading: bool) -> None:
        settings = self._settings
        deadline_s = time.monotonic() + (settings.get_timeout_s if reading else settings.put_timeout_s)
        if not names or len(names) != len(buffers):
            text = f"{len(names)} URIs and {len(buffers)} buffers"
            raise ClientError(ClientErrorCode.ER_INVALID_PARAMS, text)
        places = [uris.parse(name) for name in names]
        backends = [self._backend(place) for place in places]
        blocks = memory.memories(buffers, settings.spec_size)
        files = self._files(places, backends, blocks, reading)
        shares = [files[n :: settings.threads] for n in range(min(settings.threads, len(files)))]
        jobs = [_Job(settings, self._segments, share) for share in shares]
        futures = self._pool.submit([job.read if reading else job.write for job in jobs])
        try:
            self._wait(futures, deadline_s, reading)
        except BaseException:
            for job, future in zip(jobs, futures, strict=True):
                future.cancel()
                job.abandon()
            raise

    def _wait(self, futures: list[Future[None]], deadline_s: float, reading: bool) -> None:
        done, _ = wait(futures, max(0.0, deadline_s - time.monotonic()), "FIRST_EXCEPTION")
        for future in done:
            error = future.exception()
            if error is not None:
                raise _as_client_error(error, reading) from error
        if len(done) < len(futures):
            raise ClientError(ClientErrorCode.ER_SDK_TIMEOUT, "the time for the transfer is over")

    def _backend(self, place: Location) -> Backend:
        backend = self._settings.backends.get(place.host)
        if backend is None:
            known = ", ".join(self._settings.backends)
            text = f"storage {place.host!r} is not one of storage_configs ({known})"
            raise ClientError(ClientErrorCode.ER_GETSDK_ERROR, text)
        return backend

    def _files(
        self, places: list[Location], backends: list[Backend], blocks: list[BlockMemory], reading: bool
    ) -> list[_File]:
        """The call's blocks by data file."""
        code = ClientErrorCode.ER_SDKREAD_ERROR if reading else ClientErrorCode.ER_SDKWRITE_ERROR
        files: dict[tuple[str, int, bool], _File] = {}
        for place, backend, block in zip(places, backends, blocks, strict=True):
            slot_sized = place.scheme == "hf3fs" and place.generation is None
            if place.size != self._settings.spec_size and not (slot_sized and place.size > 0):
                text = f"{place.path}: slots of {place.size} bytes, the spec has {self._settings.spec_size}"
                raise ClientError(code, text)
            key = (place.path, place.size, place.generation is None)
            file = files.setdefault(key, _File(place.path, backend))
            file.places.append(place)
            file.blocks.append(block)
        return list(files.values())

    def _failed(self, what: str, error: ClientError) -> ClientErrorCode:
        now = time.monotonic()
        if now - self._logged.get(error.code, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged[error.code] = now
            log.warning("%s failed: %s: %s", what, error.code.name, error)
        return error.code


def _as_client_error(error: BaseException, reading: bool) -> ClientError:
    if isinstance(error, ClientError):
        return error
    if not isinstance(error, KvcmError | OSError | EOFError | MemoryError):
        log.error("a transfer failed unexpectedly", exc_info=error)
    code = ClientErrorCode.ER_SDKREAD_ERROR if reading else ClientErrorCode.ER_SDKWRITE_ERROR
    return ClientError(code, str(error) or type(error).__name__)


def _row(block: BlockMemory, size: int) -> Bytes:
    """A whole slot: the caller's memory if it is one, else a copy with zeros where it has nothing."""
    whole = block.whole(size)
    if whole is None:
        whole = np.zeros(size, np.uint8)
        block.store(whole)
    return whole
