"""What every client does, by URL and by actor handles, blocking and async, on real managers."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
from typing import Any

import numpy as np
import pytest

from kvcm_ray import client as client_package
from kvcm_ray.client import Client, Instance, connect_async
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.core.hashing import block_keys_from_tokens
from kvcm_ray.errors import InstanceMismatch, InstanceNotFound, InvalidArgument, KvcmError
from kvcm_ray.traces import block_pattern

SIZE = 512
_names = (f"c{os.getpid()}-{n}" for n in itertools.count())


@pytest.fixture
def cache(client: Client) -> Instance:
    return client.register(next(_names), block_size=4, specs={"tp0": SIZE})


@pytest.fixture
def ranks(client: Client) -> Instance:
    """Two specs of different sizes, and a spec group of the first one."""
    return client.register(
        next(_names),
        block_size=4,
        specs={"tp0": SIZE, "tp1": 2 * SIZE},
        spec_groups={"first": ["tp0"]},
    )


def some_keys(count: int, start: int = 1) -> Any:
    return np.arange(start, start + count, dtype=np.int64) * 0x9E3779B97F4A7C1


def test_exported_names() -> None:
    assert sorted(client_package.__all__) == [
        "AsyncClient", "AsyncInstance", "AsyncWriteSession", "Client", "GetResult", "Instance",
        "Lookup", "Match", "PutResult", "WritePlan", "WriteSession", "connect", "connect_async",
    ]  # fmt: skip
    for name in client_package.__all__:
        assert getattr(client_package, name).__doc__, name
    for method in ("match", "put", "get", "start_write", "read"):
        assert getattr(Instance, method).__doc__, method


def test_put_match_get(cache: Instance) -> None:
    keys = some_keys(50)
    data = block_pattern(keys, SIZE)
    stored = cache.put(keys, data)
    assert (stored, stored.existed, stored.error) == (50, 0, None)
    again = cache.put(keys, data)
    assert (again, again.existed, again.flags.all()) == (0, 50, True)
    found = cache.match([*keys.tolist(), 1, 2])
    assert (found.length, len(found.locations), found.error) == (50, 50, None)
    assert cache.match(keys, limit=7).length == 7
    assert cache.match_length([1, *keys.tolist()]) == 0
    out = np.zeros_like(data)
    got = cache.get([*keys.tolist(), 1], np.zeros((51, SIZE), np.uint8))
    assert (got, got.flags.tolist()) == (50, [True] * 50 + [False])
    assert cache.get(keys, out) == 50
    assert (out == data).all()


def test_lists_of_buffers_and_partial_hits(cache: Instance) -> None:
    keys = some_keys(6)
    data = block_pattern(keys, SIZE)
    assert cache.put(keys[:4], [bytes(row) for row in data[:4]]) == 4
    whole = cache.put(keys, data)
    assert (whole, whole.existed) == (2, 4)
    buffers = [bytearray(SIZE) for _ in keys]
    assert cache.get(keys, buffers) == 6
    assert [bytes(b) for b in buffers] == [row.tobytes() for row in data]


def test_lookup_remove_and_gaps(cache: Instance) -> None:
    keys = some_keys(5)
    cache.put(keys, block_pattern(keys, SIZE))
    cache.remove(keys[2:3])
    assert cache.lookup(keys).flags.tolist() == [True, True, False, True, True]
    assert cache.match_length(keys) == 2
    assert cache.get(keys, np.zeros((5, SIZE), np.uint8)) == 2
    found = cache.lookup(keys)
    out = np.zeros((4, SIZE), np.uint8)
    assert cache.read(found.blocks, out) == 4
    assert (out == block_pattern(found.blocks.keys, SIZE)).all()
    cache.trim()
    assert not cache.lookup(keys).flags.any()


def test_session_by_hand(cache: Instance) -> None:
    keys = some_keys(4)
    with cache.start_write(keys) as session:
        assert session.mask.tolist() == [False] * 4
        assert session.todo.tolist() == [0, 1, 2, 3]
        assert len(session.uris("tp0")) == 4
        moved = session.write(block_pattern(keys, SIZE))
        assert moved.flags.all()
        assert cache.match_length(keys) == 0, "nothing is readable before the finish"
    assert cache.match_length(keys) == 4
    assert session.finish().committed == 4, "finishing again gives the first answer"


def test_only_what_was_written_becomes_readable(cache: Instance) -> None:
    keys = some_keys(4)
    with cache.start_write(keys):
        pass
    assert cache.match_length(keys) == 0
    session = cache.start_write(keys)
    session.write(block_pattern(keys, SIZE))
    session.finish([True, True, False, True])
    assert cache.lookup(keys).flags.tolist() == [True, True, False, True]


def test_an_exception_fails_the_session(cache: Instance) -> None:
    keys = some_keys(3)

    def scene() -> None:
        with cache.start_write(keys) as session:
            session.write(block_pattern(keys, SIZE))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scene()
    assert cache.match_length(keys) == 0
    assert cache.put(keys, block_pattern(keys, SIZE)) == 3, "the keys are free again"


def test_ranks_share_a_session(ranks: Instance) -> None:
    keys = some_keys(5)
    session = ranks.start_write(keys)
    plan = pickle.loads(pickle.dumps(session.plan))
    flags = [
        ranks.write(plan, block_pattern(keys + rank, size), spec=name).flags
        for rank, (name, size) in enumerate(ranks.specs.items())
    ]
    assert session.finish(np.logical_and(*flags)).committed == 5
    for rank, (name, size) in enumerate(ranks.specs.items()):
        out = np.zeros((5, size), np.uint8)
        assert ranks.get(keys, out, spec=name) == 5
        assert (out == block_pattern(keys + rank, size)).all()


def test_all_specs_at_once_and_spec_groups(ranks: Instance) -> None:
    keys = some_keys(3)
    data = {"tp0": block_pattern(keys, SIZE), "tp1": block_pattern(keys + 1, 2 * SIZE)}
    assert ranks.put(keys, data) == 3
    out = {name: np.zeros_like(rows) for name, rows in data.items()}
    assert ranks.get(keys, out) == 3
    assert all((out[name] == data[name]).all() for name in data)
    partial = some_keys(2, start=100)
    assert ranks.put(partial, block_pattern(partial, SIZE), spec="tp0") == 2, "by its spec group"
    assert ranks.get(partial, np.zeros((2, SIZE), np.uint8), spec="tp0") == 2
    assert ranks.get(partial, np.zeros((2, 2 * SIZE), np.uint8), spec="tp1") == 0
    with pytest.raises(InvalidArgument, match="all written in one session"):
        ranks.put(keys, data["tp1"], spec="tp1")


def test_a_session_with_one_spec_missing_commits_nothing(ranks: Instance) -> None:
    keys = some_keys(2)
    session = ranks.start_write(keys)
    session.write(block_pattern(keys, SIZE), spec="tp0")
    assert not session.written.any()
    session.finish()
    assert ranks.match_length(keys) == 0


def test_duplicate_keys(cache: Instance) -> None:
    keys = np.array([5, 6, 5], np.int64)
    stored = cache.put(keys, block_pattern(keys, SIZE))
    assert stored.error is None
    out = np.zeros((3, SIZE), np.uint8)
    assert cache.get(keys, out) == 3
    assert (out == block_pattern(keys, SIZE)).all()


def test_nothing_is_a_valid_amount(cache: Instance) -> None:
    empty = np.zeros((0, SIZE), np.uint8)
    assert cache.put([], empty) == 0
    assert cache.get([], empty) == 0
    assert cache.match([]).length == 0
    assert len(cache.lookup([]).flags) == 0
    cache.remove([])


def test_block_keys_are_the_managers(cache: Instance) -> None:
    tokens = list(range(11))
    assert cache.block_keys(tokens).tolist() == block_keys_from_tokens(tokens, 4).tolist()


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ([1.5], "float64"),
        (["a"], "signed 64-bit"),
        ([[1, 2]], "2 dimensions"),
        ([2**63], "2\\*\\*63"),
        ([2**70], "signed 64-bit"),
        ([None], "signed 64-bit"),
        (range(70_000), "more than 65536"),
    ],
)
def test_bad_keys(cache: Instance, keys: Any, cause: str) -> None:
    with pytest.raises(InvalidArgument, match=cause):
        cache.match(keys)


def test_bad_arguments_raise_also_from_calls_that_never_raise(cache: Instance) -> None:
    keys = some_keys(2)
    for call in (cache.put, cache.get):
        with pytest.raises(InvalidArgument, match="bytes where"):
            call(keys, bytearray(SIZE))
        with pytest.raises(InvalidArgument, match="tp0"):
            call(keys, bytearray(2 * SIZE), spec="tp9")
    with pytest.raises(InvalidArgument, match="limit"):
        cache.match(keys, limit=-1)
    for timeout_s in (0, -1, 1e9, float("nan")):
        with pytest.raises(InvalidArgument, match="timeout_s"):
            cache.start_write(keys, timeout_s)
    with pytest.raises(InvalidArgument, match="spec_groups"):
        cache.start_write(keys, spec_groups=["first"])
    with pytest.raises(InvalidArgument, match="success flags"):
        cache.start_write(keys).finish([True])


def test_bad_registrations(client: Client, cache: Instance) -> None:
    with pytest.raises(InstanceMismatch):
        client.register(cache.instance_id, block_size=4, specs={"tp0": SIZE + 1})
    assert client.register(cache.instance_id, block_size=4, specs={"tp0": SIZE}).specs == {"tp0": SIZE}
    with pytest.raises(InvalidArgument, match="above 0"):
        client.register("x", block_size=4, specs={"tp0": 0})
    with pytest.raises(InvalidArgument, match="specs"):
        client.register("x", block_size=4, specs={})
    with pytest.raises(InvalidArgument, match="block_size"):
        client.register("x", block_size=0, specs={"tp0": 1})
    with pytest.raises(KvcmError, match="nowhere"):
        client.register("x", "nowhere", block_size=4, specs={"tp0": 1})


def test_a_registered_instance_is_found(client: Client, cache: Instance) -> None:
    keys = some_keys(2)
    cache.put(keys, block_pattern(keys, SIZE))
    other = client.instance(cache.instance_id)
    assert other.specs == cache.specs
    assert other.get(keys, np.zeros((2, SIZE), np.uint8)) == 2
    with pytest.raises(InstanceNotFound):
        client.instance("nobody")


def test_async_tasks_share_a_client(address: str) -> None:
    async def scene() -> None:
        async with await connect_async(address) as client:
            cache = await client.register(next(_names), block_size=4, specs={"tp0": SIZE})

            async def one(start: int) -> None:
                keys = some_keys(10, start)
                data = block_pattern(keys, SIZE)
                assert await cache.put(keys, data) == 10
                out = np.zeros_like(data)
                assert await cache.get(keys, out) == 10
                assert (out == data).all()

            await asyncio.gather(*(one(1000 * n) for n in range(1, 9)))
            async with await cache.start_write(some_keys(1, 5)) as session:
                await session.write(bytes(SIZE))
            assert await cache.match_length(some_keys(1, 5)) == 1

    asyncio.run(scene())


def test_removing_says_how_many(cache: Instance, by_actors: bool) -> None:
    keys = some_keys(3)
    cache.put(keys, block_pattern(keys, SIZE))
    assert cache.remove(keys[:2]) == (2 if by_actors else -1)


def test_a_full_group_is_not_an_error_to_the_engine(client: Client) -> None:
    cache = client.register(next(_names), block_size=4, specs={"tp0": 1 << 40})
    with pytest.raises(KvcmError, match="quota"):
        cache.start_write([1, 2])


def test_a_removed_instance_is_a_miss_then_comes_back(
    client: Client, cache: Instance, api: HttpBackend
) -> None:
    keys = some_keys(2)
    data = block_pattern(keys, SIZE)
    cache.put(keys, data)
    drive(api.post("removeInstance", {"instance_id": cache.instance_id}, 10))
    found = cache.match(keys)
    assert (found.length, isinstance(found.error, InstanceNotFound)) == (0, True)
    assert cache.get(keys, np.zeros_like(data)) == 0
    assert cache.put(keys, data) == 0
    again = client.register(cache.instance_id, block_size=4, specs={"tp0": SIZE})
    assert again.match_length(keys) == 0, "the new registration has nothing of the old one"
    assert again.put(keys, data) == 2
    out = np.zeros_like(data)
    assert cache.get(keys, out) == 2, "handles follow the registration"
    assert (out == data).all()
