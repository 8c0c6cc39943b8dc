"""20 000 requests that nobody means: no answer of 5xx, and nothing grows.

By schemathesis from the manager's own OpenAPI page: each as made, about an instance that exists, and with
values and bytes changed; between them the page's own examples, changed. And on raw sockets, what is no HTTP.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings

from kvcm_ray import fsck
from kvcm_ray.testing import wire_fuzz
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.http import registration

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

SEED = 6
GENERATED = 15_000
VARIANTS = 9  #: of a request
ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    2**64,
    1.5,
    "",
    "i1",
    "default",
    "files",
    "\x00",
    "é" * 300,
    [],
    {},
]
RAW = 5_000
RAW_BEHIND_HAPROXY = 1_000
GROWTH_BYTES = 30 << 20
FILES = {"addStorage", "updateStorage", "loadConfigSnapshot"}  #: calls that may name folders


class Client:
    """Sends JSON and keeps count."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)
        self.statuses: Counter[int] = Counter()
        self.codes: Counter[str] = Counter()

    def send(self, path: str, body: bytes, method: str = "POST") -> None:
        response = self._http.request(method, path, content=body)
        self.statuses[response.status_code] += 1
        assert response.status_code < 500, (path, body, response.text)
        if response.status_code == 200 and path.startswith("/api/"):
            status = response.json()["header"]["status"]
            self.codes[status["code"]] += 1
            assert "internal error" not in status["message"], (path, body, status)

    def ask(self, name: str, **request: Any) -> dict[str, Any]:
        response = self._http.post(f"/api/{name}", json={"trace_id": "t", **request})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def ok(self, name: str, **request: Any) -> dict[str, Any]:
        answer = self.ask(name, **request)
        assert answer["header"]["status"]["code"] == "OK", answer
        return answer

    def works(self) -> None:
        """A good request still gets its answer."""
        self.ask("registerInstance", **registration("i1"))
        started = self.ok("startWriteCache", instance_id="i1", block_keys=[1, 2], write_timeout_seconds=30)
        if blocks := len(started["locations"]):
            done = {"offset": blocks}
            session_id = started["write_session_id"]
            self.ok("finishWriteCache", instance_id="i1", write_session_id=session_id, success_blocks=done)
        about = {"instance_id": "i1", "block_keys": [1, 2], "query_type": "QT_PREFIX_MATCH"}
        assert len(self.ok("getCacheLocation", **about)["locations"]) == 2

    def tidy(self) -> None:
        """Remove what random requests made, or it would be that which grows."""
        for instance in self.ok("listInstanceInfo")["instance_info"]:
            if instance["instance_id"] != "i1":
                names = {key: instance[key] for key in ("instance_id", "instance_group_name")}
                self.ask("removeInstance", instance_group=names["instance_group_name"], **names)
        for group in self.ok("listInstanceGroup")["instance_group"]:
            if group["name"] != "default":
                self.ask("removeInstanceGroup", name=group["name"])
        for storage in self.ok("listStorage")["storage"]:
            if (name := storage["global_unique_name"]) not in ("files", "memory"):
                self.ask("removeStorage", storage_unique_name=name)


def variants(call: Call, body: Any, chance: random.Random) -> Iterator[bytes]:
    """`VARIANTS` requests: as made, about ``i1``, changed, and the page's own example changed."""
    about = {"instance_id": "i1", "instance_group": "default"}
    made = body if isinstance(body, bytes) else call.encode(body)
    yield made
    yield call.encode({**body, **about} if isinstance(body, dict) else about)
    for _ in range(2):
        yield call.encode(changed({**body, **about} if isinstance(body, dict) else body, chance))
    for _ in range(VARIANTS - 5):
        yield call.encode(changed({"trace_id": "t", **call.example, **about}, chance))
    flipped = bytearray(made)
    if call.name not in FILES and flipped:
        flipped[chance.randrange(len(flipped))] = chance.randrange(256)
    yield bytes(flipped)


def changed(value: Any, chance: random.Random) -> Any:
    """The same with one value in it another one, or gone."""
    if isinstance(value, bytes):
        return None
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    at = chance.choice(keys)
    copy: Any = value.copy()
    if chance.random() < 0.15:
        del copy[at]
    else:
        copy[at] = changed(copy[at], chance)
    return copy


@dataclass(frozen=True, slots=True)
class Call:
    """An operation of the OpenAPI page."""

    operation: Any
    mode: Any
    example: dict[str, Any]
    folder: Path  #: for what is stored

    @property
    def path(self) -> str:
        return str(self.operation.path)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def encode(self, body: Any) -> bytes:
        return json.dumps(within(body, self.folder)).encode()


def calls_of(page: dict[str, Any], folder: Path) -> list[Call]:
    """Every operation twice: requests that follow the page, and such that do not."""
    found = []
    for each in schemathesis.openapi.from_dict(page).get_all_operations():
        operation = each.ok()
        if operation.method == "post":
            content = page["paths"][operation.path]["post"]["requestBody"]["content"]["application/json"]
            example = content.get("example", {})
            found += [Call(operation, mode, example, folder) for mode in schemathesis.GenerationMode]
    random.Random(SEED).shuffle(found)  # so that what grows does so all the time
    return found


def within(body: Any, folder: Path) -> Any:
    """The same with every folder that it names in `folder`: the manager makes those."""
    if isinstance(body, list):
        return [within(each, folder) for each in body]
    if not isinstance(body, dict):
        return body
    places = ("root_path", "mountpoint", "root_dir")
    return {
        key: f"{folder}/{len(str(value)) % 4}" if key in places else within(value, folder)
        for key, value in body.items()
    }


def rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Client, str, int, Path]]:
    data_dir = tmp_path / "data"
    with wire_fuzz.serving(data_dir) as (url, pid):
        client = Client(url)
        client.works()
        yield client, url, pid, data_dir


def test_requests_made_from_the_openapi_page(served: tuple[Client, str, int, Path], tmp_path: Path) -> None:
    client, url, pid, data_dir = served
    calls = calls_of(httpx.get(f"{url}/openapi.json").json(), tmp_path / "made")
    examples = GENERATED // (VARIANTS * len(calls)) + 1
    chance = random.Random(SEED)
    sizes = []
    for call in calls:
        run(call, examples, client, chance)
        client.tidy()
        sizes.append(rss(pid))
    client.works()
    count, warm = client.statuses.total(), sizes[len(sizes) // 3]
    print(f"\n{count} requests, statuses {dict(client.statuses)}, codes {dict(client.codes)}")
    print(f"memory {sizes[0] >> 20} MiB, warm {warm >> 20} MiB, at the end {sizes[-1] >> 20} MiB")
    assert count >= GENERATED
    assert client.codes["OK"] > 100, "random requests must get somewhere"
    assert sizes[-1] - warm < GROWTH_BYTES
    assert fsck.check(data_dir).ok


def run(call: Call, examples: int, client: Client, chance: random.Random) -> None:
    """Make `examples` requests of one kind, and send the variants of each."""
    made: list[Any] = []

    @seed(SEED)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=call.operation.as_strategy(generation_mode=call.mode))
    def make(case: Any) -> None:
        made.append(case.body)

    make()
    made = made[:examples]
    made += [{"trace_id": str(n)} for n in range(examples - len(made))]  # of what has few examples
    for body in made:
        for variant in variants(call, body, chance):
            client.send(call.path, variant)


def test_bytes_that_are_no_requests(served: tuple[Client, str, int, Path]) -> None:
    client, url, pid, data_dir = served
    found = wire_fuzz.send_all(url, wire_fuzz.attempts(SEED, RAW // 3))
    warm = rss(pid)
    found += wire_fuzz.send_all(url, wire_fuzz.attempts(SEED + 1, RAW - RAW // 3))
    client.works()
    print(f"\n{RAW} attempts, {summed(found)}; memory {warm >> 20} MiB, at the end {rss(pid) >> 20} MiB")
    assert not wire_fuzz.failures(found)
    assert rss(pid) - warm < GROWTH_BYTES
    assert fsck.check(data_dir).ok


@pytest.mark.ray
def test_bytes_that_are_no_requests_at_a_whole_manager(tmp_path: Path) -> None:
    with manager(tmp_path / "data", replicas=2) as running:
        client = Client(running.url)
        client.works()
        found = wire_fuzz.send_all(running.url, wire_fuzz.attempts(SEED, RAW_BEHIND_HAPROXY // 3))
        warm = replicas(running)
        rest = RAW_BEHIND_HAPROXY - RAW_BEHIND_HAPROXY // 3
        found += wire_fuzz.send_all(running.url, wire_fuzz.attempts(SEED + 1, rest))
        client.works()
        print(f"\n{RAW_BEHIND_HAPROXY} attempts, {summed(found)}; memory by pid {warm}, {replicas(running)}")
        assert not wire_fuzz.failures(found)
        assert replicas(running).keys() == warm.keys(), "a replica died"
        assert all(size - warm[pid] < GROWTH_BYTES for pid, size in replicas(running).items())
        assert fsck.check(tmp_path / "data").ok


def replicas(running: Any) -> dict[int, int]:
    """Memory in bytes of every HTTP replica, by pid."""
    from kvcm_ray import cluster

    found = [psutil.Process(pid) for pid in cluster.leftovers(running)]
    return {each.pid: rss(each.pid) for each in found if "gateway" in " ".join(each.cmdline())}


def summed(found: Counter[str]) -> dict[str, int]:
    """Attempts by status."""
    total: Counter[str] = Counter()
    for what, count in found.items():
        total[what.split()[-1]] += count
    return dict(sorted(total.items()))
