"""Blocks that a plain protocol client wrote: sealed when it says that they are written.

The plain client here is made from the protocol alone: it opens the path of each URI and writes at
``blkid * size``. Ours then reads those blocks, every byte verified.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from kvcm_ray.client import Client, connect
from kvcm_ray.storage_adapters.path_storage import PathStorage
from kvcm_ray.testing.served import Served, served
from kvcm_ray.traces import block_pattern

SPECS = {"tp_0": 4096, "tp_1": 1000}  # of whole pages, and not
KEYS = np.arange(1, 9, dtype=np.int64) * -0x1234567890ABCD


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("sealing")) / "data") as found:
        yield found


@pytest.fixture
def ours(manager: Served) -> Iterator[Client]:
    with connect(manager.url) as client:
        yield client


class Plain:
    """What an engine's connector does, with nothing but HTTP and files."""

    def __init__(self, manager: Served, instance: str) -> None:
        self.url, self.instance = manager.url, instance
        self.call(
            "registerInstance", instance_group="default", block_size=4,
            model_deployment={"model_name": "unnamed", "dtype": "bytes", "tp_size": 2},
            location_spec_infos=[{"name": n, "size": s} for n, s in SPECS.items()],
        )  # fmt: skip

    def call(self, name: str, /, **fields: Any) -> dict[str, Any]:
        body = {"trace_id": "t", "instance_id": self.instance, **fields}
        answer = httpx.post(f"{self.url}/api/{name}", json=body, timeout=30).json()
        assert answer["header"]["status"]["code"] == "OK", answer["header"]
        return dict(answer)

    def start(self, keys: Any) -> dict[str, Any]:
        return self.call("startWriteCache", block_keys=[int(k) for k in keys], write_timeout_seconds=30)

    def store(self, location: dict[str, Any], key: int, specs: tuple[str, ...] = tuple(SPECS)) -> None:
        for spec in location["location_specs"]:
            if spec["name"] in specs:
                path, at, size = place(spec["uri"])
                with path.open("r+b") as file:
                    os.pwrite(file.fileno(), payload(key, size), at)

    def finish(self, started: dict[str, Any], *flags: bool) -> None:
        mask = {"bool_masks": {"values": flags}}
        self.call("finishWriteCache", write_session_id=started["write_session_id"], success_blocks=mask)

    def put(self, keys: Any) -> None:
        started = self.start(keys)
        for key, location in zip(keys, started["locations"], strict=True):
            self.store(location, key)
        self.finish(started, *[True] * len(keys))


def payload(key: int, size: int) -> bytes:
    return block_pattern(np.array([key], np.int64), size).tobytes()


def place(uri: str) -> tuple[Path, int, int]:
    location, _, query = uri.partition("://")[2].partition("?")
    fields = dict(pair.split("=") for pair in query.split("&"))
    size = int(fields["size"])
    return Path("/" + location.partition("/")[2]), int(fields["blkid"]) * size, size


def read(client: Client, instance: str, spec: str, keys: Any = KEYS) -> tuple[int, bool]:
    """How many blocks our client reads, and whether their bytes are right."""
    out = np.zeros((len(keys), SPECS[spec]), np.uint8)
    got = client.instance(instance).get(keys, out, spec=spec)
    return int(got), bool((out[: int(got)] == block_pattern(keys[: int(got)], SPECS[spec])).all())


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_our_client_reads_what_a_plain_client_wrote(manager: Served, ours: Client, kind: str) -> None:
    plain = Plain(manager, f"plain-{kind}")
    other = "files" if kind == "memory" else "memory"
    plain.call("disableStorage", storage_unique_name=other)
    try:
        plain.put(KEYS)
    finally:
        plain.call("enableStorage", storage_unique_name=other)
    for spec in SPECS:
        assert read(ours, plain.instance, spec) == (len(KEYS), True)


def test_a_plain_client_reads_what_ours_wrote(manager: Served, ours: Client) -> None:
    plain = Plain(manager, "mixed")
    cache = ours.instance("mixed")
    cache.put(KEYS, {name: block_pattern(KEYS, size) for name, size in SPECS.items()})
    query = {"query_type": "QT_PREFIX_MATCH", "block_keys": KEYS.tolist(), "block_mask": {"offset": 2}}
    locations = plain.call("getCacheLocation", **query)["locations"]
    assert len(locations) == len(KEYS) - 2
    for key, location in zip(KEYS[2:], locations, strict=True):
        for spec in location["location_specs"]:
            path, at, size = place(spec["uri"])
            with path.open("rb") as file:
                assert os.pread(file.fileno(), size, at) == payload(key, size)


def test_failed_and_unwritten_blocks_are_not_sealed(manager: Served, ours: Client) -> None:
    plain = Plain(manager, "holes")
    keys = KEYS[:4]
    started = plain.start(keys)
    for key, location in list(zip(keys, started["locations"], strict=True))[:3]:
        plain.store(location, int(key), specs=("tp_0",))  # tp_1 never; the last block not at all
    plain.finish(started, True, True, False, True)
    assert read(ours, "holes", "tp_0", keys) == (2, True)
    assert ours.instance("holes").match_length(keys) == 2


def test_a_wrong_mask_seals_nothing_and_the_right_one_does(manager: Served, ours: Client) -> None:
    plain = Plain(manager, "twice")
    started = plain.start(KEYS)
    for key, location in zip(KEYS, started["locations"], strict=True):
        plain.store(location, key)
    with pytest.raises(AssertionError, match="success_blocks has 1 values"):
        plain.finish(started, True)
    plain.finish(started, *[True] * len(KEYS))
    assert read(ours, "twice", "tp_0") == (len(KEYS), True)


@pytest.mark.parametrize("failure", [OSError(5, "broken disk"), ValueError("a defect")])
def test_a_finish_goes_on_when_sealing_fails(
    manager: Served, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise failure

    plain = Plain(manager, f"broken-{type(failure).__name__}")
    monkeypatch.setattr(PathStorage, "seal", broken)
    plain.put(KEYS)
    query = {"query_type": "QT_PREFIX_MATCH", "block_keys": KEYS.tolist()}
    assert len(plain.call("getCacheLocation", **query)["locations"]) == len(KEYS)


def test_a_finish_does_not_wait_for_a_storage_that_hangs(
    manager: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Plain(manager, "hangs")
    started = plain.start(KEYS)
    monkeypatch.setattr("kvcm_ray.serve_app.sealing.SEAL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(PathStorage, "seal", lambda *_: time.sleep(2))
    began_s = time.monotonic()
    plain.finish(started, *[True] * len(KEYS))
    assert time.monotonic() - began_s < 1.5


def test_files_are_not_held_open_for_long(manager: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcm_ray.serve_app.sealing.FILES_KEPT_S", 0.1)
    sealer = manager.backend.sealer
    for storage in sealer._storages.values():  # timers of other tests run for longer
        storage.config = None  # type: ignore[assignment]
    plain = Plain(manager, "held")
    plain.put(KEYS)
    adapters = [s.adapter for s in sealer._storages.values() if s.config is not None]
    assert adapters
    deadline_s = time.monotonic() + 5
    while any(len(a._handles) for a in adapters):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_our_own_blocks_are_left_alone(
    manager: Served, ours: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> None:
        pytest.fail("sealed a block that has a header")

    monkeypatch.setattr(PathStorage, "seal", unwanted)
    cache = ours.register("own", block_size=4, specs={"tp_0": 4096})
    assert cache.put(KEYS, block_pattern(KEYS, 4096)) == len(KEYS)
    assert read(ours, "own", "tp_0") == (len(KEYS), True)
