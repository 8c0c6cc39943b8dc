"""The scheduler's connection to the manager: made in the background, and made again.

Nothing here raises for trouble of the cache, and nothing blocks but what says so: until the instance is
registered every look-up finds nothing. After a failure that looks like an absent manager, saving pauses for a
moment, so that engines do not copy blocks for nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from kvcm_ray.client.aio import AsyncClient
from kvcm_ray.client.backend import no_blocks
from kvcm_ray.client.runtime import Pool, SyncRuntime
from kvcm_ray.client.sync import Client, Instance, WriteSession
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.connectors.vllm.node import backend_of
from kvcm_ray.connectors.vllm.settings import Settings
from kvcm_ray.connectors.vllm.windows import Found, Part, last_end, nothing, window_keys
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Flags, Keys
from kvcm_ray.errors import InstanceMismatch, InstanceNotFound, InvalidArgument, KvcmError

log = logging.getLogger("vllm.kvcm")  # vLLM shows those below "vllm"

RETRY_S = 2.0  #: between attempts to connect
PAUSE_S = 2.0  #: of saving, after the manager did not answer
REMOVE_KEYS_MAX = 4096


class Link:
    """Made with the instance that is to be registered; `connect` begins."""

    def __init__(
        self, settings: Settings, info: InstanceInfo, parts: tuple[Part, ...] = (Part((0,)),)
    ) -> None:
        self.settings = settings
        self.info = info
        self.parts = parts
        self._client: Client | None = None
        self._instance: Instance | None = None
        self._connected = threading.Event()
        self._closed = threading.Event()
        self._again = threading.Event()
        self._paused_until = 0.0
        self._wrote = False  #: a session was finished
        self._starts, self._ends = Pool("starts"), Pool("ends")
        self._lookups = Pool("lookups")

    # ------------------------------------------------------------------------------ connecting

    def connect(self) -> bool:
        """Begin connecting; True if it was done within ``connect_timeout_s``."""
        threading.Thread(target=self._keep_connected, name="kvcm-link", daemon=True).start()
        return self._connected.wait(self.settings.connect_timeout_s)

    @property
    def is_connected(self) -> bool:
        return self._instance is not None

    @property
    def can_save(self) -> bool:
        return self._instance is not None and time.monotonic() >= self._paused_until

    def close(self) -> None:
        self._closed.set()
        self._again.set()
        for pool in (self._starts, self._ends, self._lookups):
            pool.close()
        client, self._client, self._instance = self._client, None, None
        if client is not None:
            client.close()

    def _keep_connected(self) -> None:
        told = ""
        while not self._closed.is_set():
            self._again.clear()
            if self._instance is None:
                try:
                    self._instance = self._register()
                    self._connected.set()
                    log.info("kvcm: connected to %s as %s", self.settings.address, self.info.instance_id)
                except (KvcmError, OSError) as error:
                    if str(error) != told:
                        log.warning(
                            "kvcm: nothing is cached until %s is there: %s", self.settings.address, error
                        )
                        told = str(error)
                    if isinstance(error, InstanceMismatch | InvalidArgument):
                        return  # trying again would not help
            self._again.wait(RETRY_S if self._instance is None else None)

    def _register(self) -> Instance:
        if self._client is None:
            self._client = Client(AsyncClient(backend_of(self.settings), SyncRuntime(), raise_errors=True))
        info = self.info
        instance = self._client.register(
            info.instance_id, info.instance_group_name, block_size=info.block_size,
            specs={spec.name: spec.size for spec in info.location_spec_infos},
            deployment=info.model_deployment, model_version=info.model_version,
            spec_groups={group.name: group.spec_names for group in info.location_spec_groups},
        )  # fmt: skip
        self._open_index(instance)
        return instance

    def _open_index(self, instance: Instance) -> None:
        """Look something up, so that the scheduler's first look-up finds the index open.

        An instance has one from its first write on.
        """
        if not self.settings.kvcm_url:
            instance.match(np.zeros(1, np.int64), timeout_s=self.settings.lookup_timeout_s)

    def _trouble(self, error: Exception) -> None:
        if isinstance(error, InstanceNotFound):  # the operator removed it, or began with an empty disk
            self._instance = None
            self._again.set()
        elif getattr(error, "retryable", False) or isinstance(error, OSError):
            self._paused_until = time.monotonic() + PAUSE_S
        log.debug("kvcm: %s", error)

    # -------------------------------------------------------------------------------- look-ups

    def match(self, keys: Keys, most: int) -> Found:
        """What the cache holds of `keys`, for a request that goes on behind `most` blocks at most.

        Nothing if it cannot be asked.
        """
        instance = self._instance
        if instance is None or not len(keys):
            return nothing()
        try:
            blocks = instance.match(keys, timeout_s=self.settings.lookup_timeout_s).blocks
            if len(self.parts) == 1:
                return Found(blocks, len(blocks))
            return self._with_window(instance, blocks, min(len(blocks), most))
        except Exception as error:  # it is called by the engine's scheduler, which must not end
            self._trouble(error)
            return nothing()

    def _with_window(self, instance: Instance, blocks: Blocks, end: int) -> Found:
        keys, window = window_keys(blocks.keys), self.parts[1].window
        timeout_s = self.settings.lookup_timeout_s
        end = last_end(lambda index: instance.lookup(keys[index], timeout_s=timeout_s).flags, end, window)
        last = keys[max(0, end - window) : end]
        found = instance.lookup(last, timeout_s=timeout_s).blocks if end else no_blocks()
        usable = end if len(found) == len(last) else 0  # they may have gone since
        return Found(blocks, usable, found)

    def match_soon(self, keys: Keys, most: int, then: Callable[[Found], None]) -> None:
        """`match` by a thread of ours, for managers that are asked by HTTP."""
        try:
            self._lookups.submit(lambda: then(self.match(keys, most)))
        except KvcmError:
            then(nothing())

    # ---------------------------------------------------------------------------------- writes

    def start_write(self, keys: Keys, part: str, then: Callable[[WriteSession | None], None]) -> None:
        """Open a session for `keys` of a part, in the background; `then` gets it, or None."""

        def work() -> None:
            instance, session = self._instance, None
            try:
                if instance is not None:
                    session = instance.start_write(
                        keys, self.settings.save_timeout_s, [part] * len(keys) if part else None
                    )
            except (KvcmError, OSError) as error:
                self._trouble(error)
            then(session)

        self._submit(self._starts, work)

    def finish_write(self, session: WriteSession, good: Flags, then: Callable[[int], None]) -> None:
        """End a session in the background; `then` gets the number of blocks that are readable now."""

        def work() -> None:
            committed = 0
            try:
                committed = session.finish(good).committed
                if not self._wrote and self._instance is not None:
                    self._open_index(self._instance)
                    self._wrote = True
            except (KvcmError, OSError) as error:
                self._trouble(error)
            then(committed)

        self._submit(self._ends, work)

    def forget(self, keys: Keys) -> None:
        """Remove blocks whose bytes are lost, so that they can be written again."""

        def work() -> None:
            instance = self._instance
            try:
                if instance is not None:
                    instance.remove(keys[:REMOVE_KEYS_MAX])
            except (KvcmError, OSError) as error:
                self._trouble(error)

        self._submit(self._ends, work)

    def _submit(self, pool: Pool, work: Callable[[], None]) -> None:
        try:
            pool.submit(work)
        except KvcmError as error:  # the link is closed
            log.debug("kvcm: %s", error)
