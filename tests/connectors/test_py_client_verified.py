"""kvcm_py_client on the locations of a real manager: proved bytes, late writers refused, both tiers.

`Engine` does what the bundled connectors do: HTTP for metadata, the transfer client for bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from kvcm_ray.client import Client, connect
from kvcm_ray.connectors.py_client import install
from kvcm_ray.storage_adapters import header
from kvcm_ray.testing.served import Served, served
from kvcm_ray.traces import block_pattern

kvcm = install()
Code = kvcm.ClientErrorCode

SPECS = {"tp_0": 8192, "tp_1": 8192, "odd": 1000}  # of whole pages, and not
KEYS = np.arange(1, 13, dtype=np.int64) * -0x1234567890ABCD
TIERS = ("memory", "files")


class Engine:
    """One instance of an engine with a transfer client for each spec (rank)."""

    def __init__(self, url: str, instance: str, specs: dict[str, int] | None = None) -> None:
        self.url, self.instance, self.specs = url, instance, specs or SPECS
        answer = self.call(
            "registerInstance", instance_group="default", block_size=4,
            model_deployment={"model_name": "unnamed", "dtype": "bytes", "tp_size": 2},
            location_spec_infos=[{"name": n, "size": s} for n, s in self.specs.items()],
        )  # fmt: skip
        self.ranks = {name: self._client(name, answer["storage_configs"]) for name in self.specs}

    def _client(self, spec: str, storage_configs: str) -> Any:
        params = kvcm.InitParams()
        params.role_type, params.self_location_spec_name = kvcm.RoleType.WORKER, spec
        params.storage_configs = storage_configs
        config = {
            "instance_group": "default", "instance_id": self.instance, "block_size": 4,
            "location_spec_infos": self.specs,
            "sdk_config": {
                "thread_num": 4, "timeout_config": {"get_timeout_ms": 5000, "put_timeout_ms": 5000},
            },
        }  # fmt: skip
        client = kvcm.TransferClient.Create(json.dumps(config), params)
        assert client is not None
        return client

    def call(self, name: str, /, **fields: Any) -> dict[str, Any]:
        body = {"trace_id": "t", "instance_id": self.instance, **fields}
        answer = httpx.post(f"{self.url}/api/{name}", json=body, timeout=30).json()
        assert answer["header"]["status"]["code"] == "OK", answer["header"]
        return dict(answer)

    def start(self, keys: Any, timeout_s: int = 30) -> dict[str, Any]:
        keys = [int(key) for key in keys]
        return self.call("startWriteCache", block_keys=keys, write_timeout_seconds=timeout_s)

    def save(self, spec: str, locations: Any, blocks: Sequence[np.ndarray]) -> Any:
        uris = uris_of(locations, spec)
        code, actual = self.ranks[spec].SaveKvCaches(uris, buffers(blocks))
        assert actual == (uris if code == Code.ER_OK else [])
        return code

    def finish(self, started: dict[str, Any], flags: Sequence[bool]) -> None:
        mask = {"bool_masks": {"values": list(flags)}}
        self.call("finishWriteCache", write_session_id=started["write_session_id"], success_blocks=mask)

    def put(self, keys: Any) -> list[Any]:
        started = self.start(keys)
        for spec, size in self.specs.items():
            assert self.save(spec, started["locations"], block_pattern(keys, size)) == Code.ER_OK
        self.finish(started, [True] * len(keys))
        return list(started["locations"])

    def locations(self, keys: Any) -> list[Any]:
        keys = [int(key) for key in keys]
        query = {"query_type": "QT_PREFIX_MATCH", "block_keys": keys, "block_mask": {"offset": 0}}
        return list(self.call("getCacheLocation", **query)["locations"])

    def load(self, spec: str, locations: Any) -> tuple[Any, np.ndarray]:
        out = np.full((len(locations), self.specs[spec]), 0xAA, np.uint8)
        return self.ranks[spec].LoadKvCaches(uris_of(locations, spec), buffers(out)), out

    def only(self, tier: str) -> None:
        """New blocks go to this storage from now on."""
        for name in TIERS:
            call = "enableStorage" if name == tier else "disableStorage"
            self.call(call, storage_unique_name=name)

    def enable_all(self) -> None:
        for name in TIERS:
            self.call("enableStorage", storage_unique_name=name)


def uris_of(locations: Any, spec: str) -> list[str]:
    return [s["uri"] for location in locations for s in location["location_specs"] if s["name"] == spec]


def buffers(blocks: Sequence[np.ndarray]) -> list[Any]:
    """Each block in two pieces, K and V; the first is one piece of memory all the same."""
    found = []
    for row in blocks:
        buffer = kvcm.BlockBuffer()
        half = len(row) // 2
        buffer.iovs = [piece(row[:half]), piece(row[half:])]
        found.append(buffer)
    return found


def piece(memory: np.ndarray) -> Any:
    iov = kvcm.Iov()
    iov.type, iov.base, iov.size = kvcm.MemoryType.CPU, memory.ctypes.data, memory.nbytes
    return iov


def place(uri: str) -> tuple[Path, int, int]:
    """Data file, slot and slot size."""
    location, _, query = uri.partition("://")[2].partition("?")
    fields = dict(pair.split("=") for pair in query.split("&"))
    return Path("/" + location.partition("/")[2]), int(fields["blkid"]), int(fields["size"])


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(Path(tmp_path_factory.mktemp("verified")) / "data") as found:
        yield found


@pytest.fixture
def ours(manager: Served) -> Iterator[Client]:
    with connect(manager.url) as client:
        yield client


@pytest.fixture(params=TIERS)
def engine(manager: Served, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine whose blocks go to one of the tiers."""
    name = f"{request.node.originalname}-{request.param}"
    found = Engine(manager.url, name)
    found.only(request.param)
    yield found
    found.enable_all()


def test_round_trip(engine: Engine) -> None:
    engine.put(KEYS)
    locations = engine.locations(KEYS)
    assert len(locations) == len(KEYS)
    for spec, size in engine.specs.items():
        code, out = engine.load(spec, locations)
        assert code == Code.ER_OK
        assert (out == block_pattern(KEYS, size)).all()
        backwards = locations[::-2]
        code, out = engine.load(spec, backwards)
        assert code == Code.ER_OK
        assert (out == block_pattern(KEYS[::-2], size)).all()


def test_our_client_reads_it_and_it_reads_ours(engine: Engine, ours: Client) -> None:
    cache = ours.instance(engine.instance)
    theirs, own = KEYS[:6], KEYS[6:]
    engine.put(theirs)
    blocks = {name: block_pattern(KEYS, size) for name, size in engine.specs.items()}
    assert cache.put(KEYS, blocks) == len(own)
    for spec, size in engine.specs.items():
        out = np.zeros((len(KEYS), size), np.uint8)
        assert cache.get(KEYS, out, spec=spec) == len(KEYS)
        assert (out == block_pattern(KEYS, size)).all()
        code, out = engine.load(spec, engine.locations(KEYS))
        assert code == Code.ER_OK
        assert (out == block_pattern(KEYS, size)).all()


def test_large_calls_are_cut_into_pieces(engine: Engine) -> None:
    large = Engine(engine.url, engine.instance + "-large", {"tp_0": 1 << 20})
    keys = KEYS[:11]
    large.put(keys)
    code, out = large.load("tp_0", large.locations(keys))
    assert code == Code.ER_OK
    assert (out == block_pattern(keys, 1 << 20)).all()


def test_blocks_of_two_storages_in_one_call(manager: Served) -> None:
    engine = Engine(manager.url, "both")
    engine.only("files")
    engine.put(KEYS[:5])
    engine.only("memory")
    engine.put(KEYS[5:])
    engine.enable_all()
    locations = engine.locations(KEYS)
    hosts = {uri.split("/")[2] for uri in uris_of(locations, "tp_0")}
    assert hosts == set(TIERS)
    code, out = engine.load("tp_0", locations)
    assert code == Code.ER_OK
    assert (out == block_pattern(KEYS, SPECS["tp_0"])).all()


def test_a_block_that_was_removed_is_an_error(engine: Engine) -> None:
    engine.put(KEYS)
    locations = engine.locations(KEYS)
    engine.call("removeCache", block_keys=[int(KEYS[3])])
    wait_until(lambda: engine.load("odd", locations[3:4])[0] == Code.ER_SDKREAD_ERROR)
    for spec in engine.specs:
        code, out = engine.load(spec, locations)
        assert code == Code.ER_SDKREAD_ERROR, "all or nothing"
        code, out = engine.load(spec, locations[:3])
        assert code == Code.ER_OK
        assert (out == block_pattern(KEYS[:3], engine.specs[spec])).all()


def test_a_slot_that_holds_another_block_by_now_is_an_error(engine: Engine) -> None:
    engine.put(KEYS)
    old = engine.locations(KEYS)
    engine.call("removeCache", block_keys=[int(key) for key in KEYS])
    wait_until(lambda: engine.load("odd", old[:1])[0] == Code.ER_SDKREAD_ERROR)
    others = KEYS * 7 + 1
    engine.finish(start_on(engine, others, slots(old)), [False] * len(others))
    for spec in engine.specs:
        assert engine.load(spec, old)[0] == Code.ER_SDKREAD_ERROR


def test_damaged_bytes_are_an_error(engine: Engine) -> None:
    engine.put(KEYS)
    locations = engine.locations(KEYS)
    for spec in engine.specs:
        path, slot, size = place(uris_of(locations, spec)[2])
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, slot * size + 700)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), slot * size + 700)
        code, _ = engine.load(spec, locations)
        assert code == Code.ER_SDKREAD_ERROR
        assert engine.load(spec, locations[3:])[0] == Code.ER_OK


def test_what_was_not_reported_as_written_cannot_be_read(engine: Engine, ours: Client) -> None:
    started = engine.start(KEYS)
    for spec, size in engine.specs.items():
        for _ in "ab":  # again is fine
            assert engine.save(spec, started["locations"], block_pattern(KEYS, size)) == Code.ER_OK
        assert engine.load(spec, started["locations"])[0] == Code.ER_SDKREAD_ERROR
    engine.finish(started, [True] * 5 + [False] * (len(KEYS) - 5))
    for spec, size in engine.specs.items():
        assert engine.load(spec, started["locations"][5:])[0] == Code.ER_SDKREAD_ERROR
        code, out = engine.load(spec, started["locations"][:5])
        assert code == Code.ER_OK
        assert (out == block_pattern(KEYS[:5], size)).all()
    assert ours.instance(engine.instance).match_length(KEYS) == 5


def test_a_writer_whose_session_is_over_harms_nobody(engine: Engine) -> None:
    """Its slots belong to a later session, which has written them but not yet said so."""
    late = engine.start(KEYS, timeout_s=1)
    for spec, size in engine.specs.items():
        assert engine.save(spec, late["locations"][:4], block_pattern(KEYS[:4], size)) == Code.ER_OK
    others = KEYS * 7 + 1
    later = start_on(engine, others, slots(late["locations"]))
    for spec, size in engine.specs.items():
        assert engine.save(spec, later["locations"], block_pattern(others, size)) == Code.ER_OK
        junk = np.full((len(KEYS), size), 0xEE, np.uint8)
        assert engine.save(spec, late["locations"], junk) == Code.ER_SDKWRITE_ERROR
    engine.finish(later, [True] * len(others))
    for spec, size in engine.specs.items():
        junk = np.full((len(KEYS), size), 0xEE, np.uint8)
        assert engine.save(spec, late["locations"], junk) == Code.ER_SDKWRITE_ERROR
    for spec, size in engine.specs.items():
        code, out = engine.load(spec, engine.locations(others))
        assert code == Code.ER_OK
        assert (out == block_pattern(others, size)).all()


def test_slots_of_removed_blocks_refuse_their_writer(engine: Engine) -> None:
    locations = engine.put(KEYS)
    blocks = {spec: block_pattern(KEYS, size) for spec, size in engine.specs.items()}
    for spec in engine.specs:
        assert engine.save(spec, locations, blocks[spec]) == Code.ER_SDKWRITE_ERROR, "sealed by now"
        assert engine.load(spec, locations)[0] == Code.ER_OK
    engine.call("removeCache", block_keys=[int(key) for key in KEYS])
    wait_until(lambda: erased(uris_of(locations, "odd")))
    for spec in engine.specs:
        assert engine.save(spec, locations, blocks[spec]) == Code.ER_SDKWRITE_ERROR


def test_a_segment_that_is_gone_is_not_made_again(engine: Engine) -> None:
    locations = engine.put(KEYS)
    path, _, _ = place(uris_of(locations, "tp_0")[0])
    engine.call("removeInstance", instance_group="default")
    wait_until(lambda: not path.exists())
    for spec, size in engine.specs.items():
        assert engine.load(spec, locations)[0] == Code.ER_SDKREAD_ERROR
        assert engine.save(spec, locations, block_pattern(KEYS, size)) == Code.ER_SDKWRITE_ERROR
    assert not path.parent.exists()


def test_a_location_outside_its_storage_is_refused(engine: Engine, tmp_path: Path) -> None:
    locations = engine.put(KEYS)
    (uri,) = uris_of(locations[:1], "tp_0")
    path, _, _ = place(uri)
    block = block_pattern(KEYS[:1], SPECS["tp_0"])
    for wrong in (
        uri.replace(str(path), f"{tmp_path}/tp_0.dat"),
        uri.replace("/tp_0.dat", "/tp_9.dat"),
        uri.replace(str(path.parent.parent), f"{path.parent.parent}/../{path.parent.parent.name}"),
        uri.replace("size=8192", "size=4096"),
    ):
        assert wrong != uri
        assert engine.ranks["tp_0"].LoadKvCaches([wrong], buffers(block)) == Code.ER_SDKREAD_ERROR
        assert engine.ranks["tp_0"].SaveKvCaches([wrong], buffers(block))[0] == Code.ER_SDKWRITE_ERROR
    beyond = uri.replace("blkid=", "blkid=9999999")
    assert engine.ranks["tp_0"].LoadKvCaches([beyond], buffers(block)) == Code.ER_SDKREAD_ERROR
    assert engine.ranks["tp_0"].SaveKvCaches([beyond], buffers(block))[0] == Code.ER_SDKWRITE_ERROR


def slots(locations: Any) -> set[tuple[str, int]]:
    return {(str(path), slot) for path, slot, _ in map(place, uris_of(locations, "odd"))}


def start_on(engine: Engine, keys: Any, taken: set[tuple[str, int]]) -> dict[str, Any]:
    """Start a write that is given all of these slots, as soon as they are free."""
    found: dict[str, Any] = {}

    def started() -> bool:
        found.update(engine.start(keys))
        if slots(found["locations"]) >= taken:
            return True
        engine.finish(found, [False] * len(keys))
        return False

    wait_until(started)
    return found


def erased(uris: list[str]) -> bool:
    """The slots carry the mark of an erased block."""
    for path, slot, _ in map(place, uris):
        with path.with_suffix(".hdr").open("rb") as file:
            row = np.frombuffer(os.pread(file.fileno(), 64, slot * 64), header.HEADER)
        if not header.is_erased(row)[0] or row["length"][0]:
            return False
    return True


def wait_until(condition: Any, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.ray
def test_with_a_running_manager() -> None:
    from kvcm_ray.testing.cluster import shared_manager

    url = shared_manager().url
    engine = Engine(url, "py-client-ray")
    engine.put(KEYS)
    with connect(url) as client:
        for spec, size in engine.specs.items():
            code, out = engine.load(spec, engine.locations(KEYS))
            assert code == Code.ER_OK
            assert (out == block_pattern(KEYS, size)).all()
            assert client.instance(engine.instance).get(KEYS, out, spec=spec) == len(KEYS)


def test_bytes_that_changed_before_they_were_sealed_are_not_served(engine: Engine) -> None:
    """A stopped writer of an older session wrote into slots of this one, after the check."""
    started = engine.start(KEYS)
    for spec, size in engine.specs.items():
        assert engine.save(spec, started["locations"], block_pattern(KEYS, size)) == Code.ER_OK
        path, slot, _ = place(uris_of(started["locations"], spec)[4])
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"late", slot * size + 9)
    engine.finish(started, [True] * len(KEYS))
    for spec in engine.specs:
        assert engine.load(spec, started["locations"][4:5])[0] == Code.ER_SDKREAD_ERROR
        assert engine.load(spec, started["locations"][5:])[0] == Code.ER_OK


def test_an_expired_writer_is_refused_before_its_slots_are_used_again(engine: Engine) -> None:
    started = engine.start(KEYS, timeout_s=1)
    blocks = {spec: block_pattern(KEYS, size) for spec, size in engine.specs.items()}
    for spec in engine.specs:
        assert engine.save(spec, started["locations"], blocks[spec]) == Code.ER_OK
    wait_until(lambda: erased(uris_of(started["locations"], "odd")))
    for spec in engine.specs:
        assert engine.save(spec, started["locations"], blocks[spec]) == Code.ER_SDKWRITE_ERROR
