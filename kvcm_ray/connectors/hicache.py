"""What the SGLang backend is made of, without SGLang: settings, page keys, and the pages of one host pool.

A host pool is anything with ``page_size`` and ``get_page_buffer_meta(indices)`` (addresses and sizes of the
pieces of pages), or ``get_data_page`` and the like. Tests of SGLang's own run in an environment of theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcm_ray.client import Client, Instance
from kvcm_ray.connectors.given import with_address
from kvcm_ray.connectors.hicache_memory import PAGE, Bools, Layout, Memory, flat_memory, memory_of
from kvcm_ray.connectors.keys import Keys, keys_of_hashes, salt_of
from kvcm_ray.core.model import ModelDeployment
from kvcm_ray.errors import InstanceNotFound, InvalidArgument, KvcmError, Unavailable

log = logging.getLogger(__name__)

RETRY_S = 5.0  #: between attempts to register with a manager that is away
HASH_DIGITS = 64
HASH_BYTES = HASH_DIGITS // 2


@dataclass(frozen=True, slots=True)
class Settings:
    """What the backend's extra config may say; one of `kvcm_data_dir` and `kvcm_url` is set."""

    kvcm_data_dir: str = ""  #: the manager's, on this node: look-ups cost no call
    kvcm_url: str = ""  #: a manager elsewhere: look-ups are HTTP calls
    instance_group: str = "default"
    model_version: str = ""  #: part of the instances' ids; change it with the weights
    load_timeout_s: float = 5.0  #: for a batch; what is not loaded by then is a miss
    save_timeout_s: float = 15.0  #: for a batch

    @property
    def address(self) -> str:
        return self.kvcm_data_dir or self.kvcm_url


def settings_of(extra: Mapping[str, Any]) -> Settings:
    """Settings from the extra config; words of SGLang's own are left aside, others are refused.

    Without an address there, KVCM_ADDRESS or KVCM_URL is taken.

    Raises:
        InvalidArgument: an unknown word, a value of the wrong type, no address or two.
    """
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in extra.items() if name.startswith("kvcm_") or name in fields}
    unknown = sorted(name for name in given if name not in fields)
    if unknown:
        raise InvalidArgument(f"the extra config has no {', '.join(unknown)}; it knows {', '.join(fields)}")
    for name, value in given.items():
        good = isinstance(value, int | float) and value > 0 if name.endswith("_s") else isinstance(value, str)
        if not good or isinstance(value, bool):
            raise InvalidArgument(f"{name} in the extra config cannot be {value!r}")
    settings = Settings(**with_address(given))
    if bool(settings.kvcm_data_dir) == bool(settings.kvcm_url):
        raise InvalidArgument("the extra config needs either kvcm_data_dir or kvcm_url")
    return settings


def page_keys(names: Sequence[str]) -> Keys:
    """Block keys of SGLang's page names: SHA-256 as hex digits, with more behind it or not.

    What stands behind the hash is a salt. A name without a hash is hashed.
    """
    if all(len(name) == HASH_DIGITS for name in names):
        try:
            digests = bytes.fromhex("".join(names))
        except ValueError:
            digests = b""
        if len(digests) == HASH_BYTES * len(names):
            starts = range(0, len(digests), HASH_BYTES)
            return keys_of_hashes([digests[at : at + HASH_BYTES] for at in starts])
    return np.array([_page_key(name) for name in names], np.int64)


def _page_key(name: str) -> int:
    head, tail = name[:HASH_DIGITS], name[HASH_DIGITS:]
    try:
        digest = bytes.fromhex(head)
    except ValueError:
        digest = b""
    if len(digest) != HASH_BYTES:
        digest, tail = hashlib.sha256(name.encode()).digest(), ""
    return int(keys_of_hashes([digest], salt_of(tail=tail))[0])


def restorable(found: Bools, trailing: int) -> npt.NDArray[np.intp]:
    """The prefix lengths, ascending, of which the last `trailing` pages (or all of fewer) are found."""
    missing = np.concatenate(([0], np.cumsum(~found)))
    lengths = np.arange(1, len(found) + 1)
    good: npt.NDArray[np.intp] = lengths[missing[lengths] == missing[np.maximum(lengths - trailing, 0)]]
    return good


class Pages:
    """The pages of one host pool as blocks of one instance. May be used by several threads."""

    def __init__(
        self, client: Client, settings: Settings, pool: Any, identity: Mapping[str, Any], page_indices: Any
    ) -> None:
        """Registers the instance; a manager that is away is asked again later.

        Args:
            identity: all that a page's bytes depend on, as plain values.
            page_indices: the indices of the pool's first page.

        Raises:
            InvalidArgument, GroupNotFound, InstanceMismatch.
        """
        self._client, self._settings, self._pool = client, settings, pool
        self._identity = {**identity, "version": settings.model_version}
        self._step = len(page_indices)  #: indices a page
        self._layout = Layout.of(pool, page_indices)
        self._specs = self._layout.specs if self._layout else {PAGE: pool.get_dummy_flat_data_page().nbytes}
        self._known: Instance | None = None
        self._retry_at_s = 0.0
        try:
            self._known = self._register()
        except Unavailable as error:
            self._trouble("no manager", error)

    @property
    def instance_id(self) -> str:
        text = json.dumps(self._identity, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        model = re.sub(r"[^A-Za-z0-9.]+", "-", str(self._identity["model"]).rpartition("/")[2])
        return f"sglang-{model or 'model'}-{self._identity['pool']}-{digest}"

    # ------------------------------------------------------------------------------------- look-up

    def match_length(self, keys: Keys) -> int:
        instance = self._instance()
        return instance.match_length(keys) if instance is not None and len(keys) else 0

    def lookup(self, keys: Keys) -> Bools:
        """Which pages are there, each for itself."""
        instance = self._instance()
        if instance is None or not len(keys):
            return np.zeros(len(keys), np.bool_)
        try:
            return instance.lookup(keys).flags
        except KvcmError as error:
            self._trouble("look-up", error)
            return np.zeros(len(keys), np.bool_)

    # ---------------------------------------------------------------------------------------- load

    def load(self, keys: Keys, indices: Any) -> list[bool]:
        """Read the leading pages that are there into the pool."""
        return self._load(keys, self._pool_memory(indices), each=False)

    def load_each(self, keys: Keys, indices: Any) -> list[bool]:
        """Read the pages that are there into the pool, wherever they stand."""
        return self._load(keys, self._pool_memory(indices), each=True)

    def load_flat(self, keys: Keys, pages: Sequence[Any]) -> list[bool]:
        """Read the leading pages that are there into flat pages."""
        return self._load(keys, flat_memory(self._specs, pages), each=False)

    def _load(self, keys: Keys, memory: Memory, *, each: bool) -> list[bool]:
        flags = np.zeros(len(keys), np.bool_)
        instance = self._instance()
        if instance is None or not len(keys):
            return list(flags.tolist())
        try:
            if each:
                found = instance.lookup(keys)
                wanted, blocks = np.flatnonzero(found.flags), found.blocks
            else:
                match = instance.match(keys)
                wanted, blocks = np.arange(match.length), match.blocks
            if len(wanted):
                rows = memory.rows(wanted)
                got = instance.read(blocks, rows, deadline_s=self._settings.load_timeout_s)
                memory.loaded(wanted[got.flags], rows, np.flatnonzero(got.flags))
                flags[wanted] = got.flags
                if got.error is not None:
                    self._trouble("load", got.error)
        except KvcmError as error:
            self._trouble("load", error)
        return list(flags.tolist())

    # ---------------------------------------------------------------------------------------- save

    def save(self, keys: Keys, indices: Any, parent: str | None = None) -> list[bool]:
        """Store pages of the pool; True for each that is in the cache afterwards."""
        return self._save(keys, self._pool_memory(indices), parent)

    def save_flat(self, keys: Keys, pages: Sequence[Any]) -> list[bool]:
        """Store flat pages."""
        return self._save(keys, flat_memory(self._specs, pages), None)

    def _save(self, keys: Keys, memory: Memory, parent: str | None) -> list[bool]:
        flags = np.zeros(len(keys), np.bool_)
        instance = self._instance()
        if instance is not None and len(keys):
            try:
                first = self._parent(instance, parent)
                flags |= self._write(instance, first, keys, memory)
            except KvcmError as error:
                self._trouble("save", error)
        return list(flags.tolist())

    def _parent(self, instance: Instance, name: str | None) -> Keys:
        """The key before a batch's first, if it is there: by it the cache knows what hangs on what."""
        key = page_keys([name] if name else [])
        return key[: instance.match_length(key)] if name else key

    def _write(self, instance: Instance, first: Keys, keys: Keys, memory: Memory) -> Bools:
        session = instance.start_write(np.concatenate([first, keys]), self._settings.save_timeout_s)
        todo = session.todo - len(first)
        if len(todo) and todo[0] < 0:  # the parent went just now; nothing is written for it
            session.finish(False)
            return self._write(instance, first[:0], keys, memory)
        flags = session.mask[len(first) :].copy()
        if len(todo):
            moved = session.write(memory.rows(todo, filled=True))
            session.finish()
            flags[todo] = session.written
            if moved.error is not None:
                self._trouble("save", moved.error)
        return flags

    def clear(self) -> None:
        instance = self._instance()
        if instance is not None:
            instance.trim()

    # ----------------------------------------------------------------------------------- internals

    def _pool_memory(self, indices: Any) -> Memory:
        return memory_of(self._layout, self._pool, indices, self._step)

    def _instance(self) -> Instance | None:
        if self._known is None and time.monotonic() >= self._retry_at_s:
            try:
                self._known = self._register()
            except KvcmError as error:
                self._trouble("no manager", error)
        return self._known

    def _register(self) -> Instance:
        identity = self._identity
        deployment = ModelDeployment(
            model_name=str(identity["model"]), dtype=str(identity.get("dtype", "")), tp_size=1, pp_size=1,
            dp_size=1, extra=json.dumps(identity, sort_keys=True, default=str),
        )  # fmt: skip
        return self._client.register(
            self.instance_id, self._settings.instance_group, block_size=self._step, specs=self._specs,
            deployment=deployment,
        )  # fmt: skip

    def _trouble(self, what: str, error: KvcmError) -> None:
        """Never raised at SGLang, whose threads would end; a line every few seconds is enough."""
        now = time.monotonic()
        if now >= self._retry_at_s:
            self._retry_at_s = now + RETRY_S
            log.warning("%s: %s: %s", self.instance_id, what, error)
        if isinstance(error, InstanceNotFound):
            self._known, self._retry_at_s = None, 0.0  # registered again with the next call
